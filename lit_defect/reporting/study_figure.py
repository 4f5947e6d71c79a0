"""The arms of a study as one picture: a dot for each seed, the mean and its 95 % interval."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_defect.reporting.seeds import Spread
from lit_defect.reporting.study_runs import FIGURES, HOLD_OUT, Results
from lit_defect.reporting.style import GREY, INK, MUTED, PALETTE, set_title, styled

_IN_PERCENT = {key for key in FIGURES if key != "auroc"}


@styled
def arms_figure(
    results: Results, titles: Mapping[str, str], baseline: str, title: str, stage: str = HOLD_OUT
) -> Figure:
    """A panel for each figure that is defined, a line for each arm, and the baseline's mean as a broken line.

    Args:
        results: the study's runs.
        titles: of the arms.
        baseline: the arm that the others are held against.
        title: of the picture.
        stage: `test` or `mirrored`.
    """
    arms = [arm for arm, runs in results.items() if any(stage in run.tested for run in runs.values())]
    values = {
        key: {
            arm: [run.tested[stage].figures[key] for run in results[arm].values() if stage in run.tested]
            for arm in arms
        }
        for key in FIGURES
    }
    shown = [key for key in FIGURES if any(math.isfinite(x) for by_seed in values[key].values() for x in by_seed)]
    figure = Figure(figsize=(2.3 + 2.15 * len(shown), 1.5 + 0.42 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, shown, strict=True):
        factor = 100.0 if key in _IN_PERCENT else 1.0
        for line, arm in enumerate(arms):
            colour = MUTED if arm == baseline else PALETTE[line % len(PALETTE)]
            seeds = factor * np.array([x for x in values[key][arm] if math.isfinite(x)])
            place = line + 0.16 + 0.22 * np.linspace(0, 1, len(seeds))  # below the interval, the first seed on top
            axes.plot(seeds, place, "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
            found = Spread.of(seeds)
            if not found.seeds:
                continue
            if math.isfinite(found.low):
                ends = np.clip([found.low, found.high], 0, factor)  # t knows nothing of the ends of the scale
                axes.plot(ends, [line, line], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(found.mean, line, "D", color=colour, markersize=6, markeredgecolor="white", zorder=3)
            if arm == baseline:
                axes.axvline(found.mean, color=GREY, linestyle="--", linewidth=1, zorder=0)
        axes.set_title(f"{FIGURES[key]}{', %' if factor > 1 else ''}", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", visible=False)
    names = [textwrap.fill(arm if titles[arm] == arm else f"{arm}: {titles[arm]}", 28) for arm in arms]
    panels[0].set_yticks(range(len(arms)), names)
    panels[0].set_ylim(len(arms) - 0.45, -0.45)
    set_title(figure, f"{title}: a dot for each seed, mean and 95 % interval over seeds")
    return figure
