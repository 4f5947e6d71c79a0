"""Stratified draws of whole groups: the arithmetic beneath `lit_defect.data.splits`.

A *unit* is a group of samples that must stay together. `counts` (U, S) holds how many samples of each of S
strata each of U units has, `classes` (S,) the class of each stratum. Single samples are drawn exactly (largest
remainder), groups greedily.
"""

from __future__ import annotations

import math

import numpy as np

ORDERS = 64  # random orders tried when groups are drawn


def draw(counts: np.ndarray, classes: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Mask (U,) of units that hold about `fraction` of every stratum, but never all of one.

    At least one unit is drawn. Where the units are single samples, each stratum gives its share rounded up
    or down, and the total is exact. All False if every unit is the last of its stratum.
    """
    totals = counts.sum(axis=0)
    sizes = counts.sum(axis=1)
    chosen = np.zeros(len(counts), bool)
    groups, singles = np.flatnonzero(sizes > 1), np.flatnonzero(sizes == 1)
    if groups.size:
        goal = fraction * counts[groups].sum(axis=0)
        chosen[groups] = _greedy(counts[groups], classes, goal, totals - 1, rng)
    taken = counts[chosen].sum(axis=0)
    stratum = counts[singles].argmax(axis=1)
    room = np.clip(np.minimum(np.bincount(stratum, minlength=len(totals)), totals - taken - 1), 0, None)
    ideal = np.clip(fraction * totals - taken, 0, room)
    quota = np.floor(ideal + 1e-9).astype(int)
    # Largest remainder: the strata that lost most by rounding down get the missing ones, ties by lot.
    lack = max(1, math.floor(fraction * totals.sum() + 0.5)) - int(taken.sum() + quota.sum())
    order = np.lexsort((rng.random(len(totals)), quota - ideal))
    order = order[quota[order] < room[order]]
    quota[order[: max(0, lack)]] += 1
    for s, number in enumerate(quota):
        chosen[rng.permutation(singles[stratum == s])[:number]] = True
    if not chosen.any():  # every group is larger than the share: the smallest
        fits = np.flatnonzero(((counts == 0) | (counts < totals)).all(axis=1))
        chosen[fits[sizes[fits].argsort(kind="stable")[:1]]] = True
    return chosen


def draw_fold(counts: np.ndarray, classes: np.ndarray, folds: int, fold: int, rng: np.random.Generator) -> np.ndarray:
    """Mask (U,) of one of `folds` disjoint folds.

    Fold 0 is 1/folds of all, each later one an equal share of the rest. The same random stream must be given
    for each fold. All False if there are too few units.
    """
    free = np.arange(len(counts))
    drawn = np.zeros(len(counts), bool)
    for part in range(fold + 1):
        last = part == folds - 1
        drawn = np.ones(len(free), bool) if last else draw(counts[free], classes, 1 / (folds - part), rng)
        if part < fold:
            free = free[~drawn]
    mask = np.zeros(len(counts), bool)
    mask[free[drawn]] = True
    return mask


def _greedy(
    counts: np.ndarray, classes: np.ndarray, goal: np.ndarray, most: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Mask (G,) of groups whose sum comes close to `goal` (S,) and nowhere exceeds `most` (S,).

    Each of `ORDERS` random orders is walked once; a group is taken when that brings the sum nearer. Nearness
    is the squared relative error of every stratum and of the total. A class of many rare kinds, each of less than
    a group, would then not be drawn at all; therefore every second walk minds the classes, too, and a result that
    has all classes is preferred.
    """
    strata = np.concatenate([np.eye(len(goal)), np.ones((len(goal), 1))], axis=1)  # (S, S + 1), the last is the total
    member = np.eye(classes.max() + 1)[classes]  # (S, C)
    minds = np.where(np.arange(ORDERS) % 2, len(goal), 0)  # (T,) weight of the classes

    def error(taken: np.ndarray, parts: np.ndarray) -> np.ndarray:
        return (((taken - goal) @ parts / np.maximum(goal @ parts, 1)) ** 2).sum(axis=1)  # (T,)

    orders = rng.permuted(np.tile(np.arange(len(counts)), (ORDERS, 1)), axis=1)  # (T, G)
    chosen = np.zeros(orders.shape, bool)
    taken = np.zeros((ORDERS, len(goal)), np.int64)
    now = error(taken, strata) + minds * error(taken, member)
    for place in orders.T:
        more = taken + counts[place]
        then = error(more, strata) + minds * error(more, member)
        better = (then < now) & ((counts[place] == 0) | (more <= most)).all(axis=1)
        taken[better], now[better] = more[better], then[better]
        chosen[np.arange(ORDERS), place] = better
    missing = ((taken @ member == 0) & (goal @ member > 0)).sum(axis=1)
    return chosen[np.lexsort((error(taken, strata), missing))[0]]
