"""Where the options of a run come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

OF_THE_CHECK = ("--json", "--strict")


def sources(words: Sequence[str], environ: Mapping[str, str], prefix: str) -> str:
    """Files, options of the command line and variables of the environment; the later ones win.

    Args:
        words: of the command line, the verb among them.
        environ: the environment.
        prefix: what variables of options begin with.
    """
    files, named = [], []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option in ("--config", "-c"):
            files.append(value or following)
        elif option.startswith("--") and option not in OF_THE_CHECK:
            named.append(option.removeprefix("--"))
    variables = sorted(name for name in environ if name.startswith(prefix))
    listed = {"": files, "environment: ": variables, "command line: ": named}
    return "; ".join(kind + ", ".join(found) for kind, found in listed.items() if found) or "defaults alone"
