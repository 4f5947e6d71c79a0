"""Which pictures a generation makes, of which normal picture each, and in which groups they go through the network.

The plan depends on the seed alone, not on how many processes carry it out or what a broken-off run has left: the
pictures of a group go through the network together always, so that they come out the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lit_defect.errors import UserError


class Job(NamedTuple):
    """One picture to be made.

    Attributes:
        number: in the data set.
        pair: category and defect type.
        source: position of the normal picture among the sources.
        seed: (generation's seed, number of the pair, number within the pair): decides all draws. Whether more pictures
            of a type are asked for does not change those that are.
    """

    number: int
    pair: tuple[str, str]
    source: int
    seed: tuple[int, int, int]


def plan(
    pairs: Sequence[tuple[str, str]],
    chosen: Sequence[tuple[str, str]],
    categories: Sequence[str],
    count: int,
    seed: int,
) -> list[Job]:
    """`count` jobs of each chosen pair; sources are taken in a random order, each equally often.

    Args:
        pairs: all that were learnt.
        chosen: those that are asked for.
        categories: of each source.
        count: pictures of each pair.
        seed: decides everything.

    Raises:
        UserError: a category without normal pictures.
    """
    jobs: list[Job] = []
    for pair in chosen:
        number = list(pairs).index(pair)
        sources = np.flatnonzero([category in (pair[0], "") for category in categories])
        if not len(sources):
            raise UserError(f"there is no normal picture of {pair[0]!r} to put a defect on")
        rounds = -(-count // len(sources))
        rng = np.random.default_rng([seed, number])
        order = np.concatenate([rng.permutation(sources) for _ in range(rounds)])[:count]
        jobs += [Job(number + len(pairs) * i, pair, int(source), (seed, number, i)) for i, source in enumerate(order)]
    return sorted(jobs)


def choose_pairs(pairs: Sequence[tuple[str, str]], types: Sequence[str] | None, categories: Any) -> list[Any]:
    """The pairs of these defect types, of categories that there are pictures of.

    Raises:
        UserError: an unknown type, or none of those asked for has a normal picture.
    """
    known = sorted({kind for _, kind in pairs})
    for kind in types or ():
        if kind not in known:
            products = ", ".join(sorted({category for category, _ in pairs} - {""}))
            raise UserError(
                f"model.init_args.generation.types: {kind!r} was not learnt; there are {', '.join(known)}"
                + (f" of {products}" if products else "")
            )
    there = set(categories)
    wanted = [pair for pair in pairs if not types or pair[1] in types]
    chosen = [pair for pair in wanted if pair[0] in there or there == {""}]
    if not chosen:
        raise UserError(f"there is no normal picture of {wanted[0][0]!r} to put a defect on")
    return chosen
