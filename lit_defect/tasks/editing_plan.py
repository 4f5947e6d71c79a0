"""Which pictures are edited, how often, and in which groups they go through the network.

The plan depends on the seed and the pictures alone: as many processes as you like carry it out alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class EditJob(NamedTuple):
    """One edited picture to be made.

    Attributes:
        number: in the data set.
        source: position of the picture that is edited among the sources.
        kind: type of that picture.
        pair: category and type of what comes out.
        seed: (generation's seed, number of category, type and result, number within these): decides all draws. Whether
            more pictures are asked for does not change those that are.
    """

    number: int
    source: int
    kind: str
    pair: tuple[str, str]
    seed: tuple[int, int, int]


def plan_edits(
    sources: Sequence[tuple[str, str]], results: Sequence[str] | None, count_of: Callable[[str], int | None], seed: int
) -> list[EditJob]:
    """So many edits for each category, type of source and of result; sources are taken in a random order, equally
    often.

    Args:
        sources: category and type of each.
        results: types of what comes out; None for the source's own.
        count_of: type of source -> how many; None for one of each source.
        seed: decides everything.
    """
    pairs = sorted(set(sources))
    wishes = [(pair, wish) for pair in pairs for wish in ([pair[1]] if results is None else results)]
    jobs = []
    for number, ((category, kind), wish) in enumerate(wishes):
        members = np.array([i for i, source in enumerate(sources) if source == (category, kind)])
        asked = count_of(kind)
        wanted = len(members) if asked is None else asked
        rng = np.random.default_rng([seed, number])
        order = np.concatenate([rng.permutation(members) for _ in range(-(-wanted // len(members)))])[:wanted]
        jobs += [
            EditJob(number + len(wishes) * i, int(source), kind, (category, wish), (seed, number, i))
            for i, source in enumerate(order)
        ]
    return sorted(jobs)
