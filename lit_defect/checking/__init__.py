"""The verb `check`: whether a configuration would train, and at what cost, before it waits in a queue for hours.

    python -m lit_defect check --config X.yaml [any option of fit] [--json FILE] [--strict]

- `findings`: one line for each thing looked at, as a table or JSON;
- `launch`: what the configuration asks of a machine, what this one has, and a trainer of one process;
- `place`: run folder, disk, tracking; `pictures`: samples, splits, cache;
- `steps`: a few real steps of training and validation; `memory` and `cost`: what a run takes.

Nothing is written into a run's folder. Weights of the hub and decoded pictures (`data.cache=disk`) stay in their
caches, where `fit` finds them again; features and latents go into a temporary folder, so that `fit` computes what
it would have computed without a check.
"""

from lit_defect.checking.findings import Findings
from lit_defect.checking.launch import Launch, one_process, strategy_objection
from lit_defect.checking.order import Job, examine
from lit_defect.checking.sources import sources

__all__ = ["Findings", "Job", "Launch", "examine", "one_process", "sources", "strategy_objection"]
