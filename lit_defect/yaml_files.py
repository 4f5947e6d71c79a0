"""Files of YAML that users write beside their configs, read with an error that names the file and the key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lit_defect.errors import UserError


def read_yaml(file: Path, what: str) -> Any:
    """The content of a file; names that stand twice are refused.

    Args:
        file: in UTF-8.
        what: the file is, such as `a study's file`.

    Raises:
        UserError: no such file, or none of YAML.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text in UTF-8; {what} is needed") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; {what} is needed") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no YAML: {error}") from None


class YamlReader:
    """Takes the content of a file apart, and says where in it something is wrong.

    Args:
        file: that the errors name.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def known(self, said: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
        """A mapping of known keys.

        Raises:
            UserError: it is none, or has other keys.
        """
        entries = self.mapping(said, where)
        for key in entries:
            if key not in keys:
                raise self.wrong(f"{where}.{key}", f"is unknown{near_word(str(key), keys)}")
        return entries

    def mapping(self, said: Any, where: str) -> dict[str, Any]:
        """What has to be a mapping.

        Raises:
            UserError: it is none.
        """
        if not isinstance(said, dict):
            raise self.wrong(where or "the file", "is no mapping of keys to values")
        return said

    def wrong(self, key: str, what: str) -> UserError:
        """An error to be raised, which names the file and the key; of a key at the top, `.key` will do."""
        return UserError(f"{self.file}: {key.removeprefix('.')} {what}")


def near_word(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or what there is."""
    known = list(known)
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known) or 'none'}"


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a name that stands twice, of which YAML would drop the first silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node
