"""Sentences about pictures: one, several that are drawn from, or either for each type.

    prompts = Prompts({"crack": ["a {category} with a {type}", "a broken {category}"], "good": "a {category}"}, KEY)
    prompts.of("metal_nut", "crack", rng)        # "a metal nut with a crack", or "a broken metal nut"

`{category}` and `{type}` are put in as words, with spaces for underscores, and `{caption}` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter

import numpy as np

from lit_defect.editing.options import KEY
from lit_defect.errors import UserError

Spelling = str | Sequence[str] | Mapping[str, str | Sequence[str]]
CATEGORY, TYPE, CAPTION = "category", "type", "caption"


class Prompts:
    """What is said of a picture.

    Args:
        spelling: a sentence, several, or either by type.
        key: the option that it stands in, for messages.
        known: what may stand in braces.

    Attributes:
        needs_caption: whether any sentence asks for `{caption}`.

    Raises:
        UserError: no sentence, or something else in braces.
    """

    def __init__(
        self, spelling: Spelling, key: str = f"{KEY}.prompt", known: Sequence[str] = (CATEGORY, TYPE, CAPTION)
    ) -> None:
        self.key = key
        by_type = spelling if isinstance(spelling, Mapping) else {None: spelling}
        self._sentences = {kind: [s] if isinstance(s, str) else list(s) for kind, s in by_type.items()}
        asked: set[str] = set()
        for sentences in self._sentences.values() or [[]]:
            if not sentences:
                raise UserError(f"{key} = {spelling!r}: expected a sentence, several, or either by type")
            for sentence in sentences:
                asked |= self._fields(sentence, known)
        self.needs_caption = CAPTION in asked

    def _fields(self, sentence: str, known: Sequence[str]) -> set[str]:
        may = ", ".join(f"{{{name}}}" for name in known)
        try:
            parts = [part[1:] for part in Formatter().parse(sentence) if part[1] is not None]
        except ValueError as error:
            raise UserError(f"{self.key} = {sentence!r}: {error}; there are {may}, and {{{{ for a brace") from None
        for name, spec, conversion in parts:
            if name not in known or spec or conversion:
                raise UserError(f"{self.key} = {sentence!r}: there is no {{{name}}}, only {may}")
        return {str(name) for name, _, _ in parts}

    def of(self, category: str, kind: str, rng: np.random.Generator | None = None, caption: str = "") -> str:
        """The sentence for a picture.

        Args:
            category: as the data set spells it.
            kind: type of what the picture shows, or shall show.
            rng: draws one of several; None takes the first.
            caption: what stands for `{caption}`.

        Raises:
            UserError: none for this type, or `{category}` of a data set that has no categories.
        """
        sentences = self._sentences.get(kind, self._sentences.get(None))
        if sentences is None:
            raise UserError(f"{self.key} has none for {kind}; it has {', '.join(map(str, self._sentences))}")
        sentence = sentences[0 if rng is None or len(sentences) == 1 else int(rng.integers(len(sentences)))]
        asks = {name for _, name, _, _ in Formatter().parse(sentence)}
        for name, word in ((CATEGORY, category), (TYPE, kind)):
            if name in asks and not word.strip():
                raise UserError(f"{self.key} = {sentence!r}: there is no {name} to put for {{{name}}}; leave it out")
        return sentence.format(category=_spoken(category), type=_spoken(kind), caption=caption)


def _spoken(name: str) -> str:
    return name.replace("_", " ")
