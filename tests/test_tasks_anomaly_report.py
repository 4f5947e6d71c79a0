"""What the galleries of an anomaly detector show."""

from __future__ import annotations

import numpy as np

from lit_defect.data.samples import Sample
from lit_defect.tasks.anomaly_report import AnomalyEvaluation, _one_of_each_part


def test_a_part_that_was_photographed_often_is_shown_once():
    groups = ["a", "a", "b", "", "", "b", *"cdefghij"]
    samples = [Sample(path=f"{i}.png", name=f"{i}.png", label=1, group=group) for i, group in enumerate(groups)]
    count = len(samples)
    evaluation = AnomalyEvaluation(
        samples=samples,
        positions=list(range(count)),
        is_defect=np.ones(count, bool),
        known=True,
        scores={"gaussian": np.arange(count, dtype=float)},
        thresholds={"gaussian": 0.0},
        score="gaussian",
        pixel={},
    )
    rows = np.array([5, 2, 1, 0, 3, 4, *range(6, count)])
    assert _one_of_each_part(evaluation, rows) == [5, 1, 3, 4, 6, 7, 8, 9]  # b, a, two without a group, c to f
