"""`python -m lit_defect VERB`: a verb that needs no PyTorch starts at once; the others are LightningCLI's."""

from __future__ import annotations

import importlib
import sys

OWN_VERBS = {
    "sweep": (
        "lit_defect.sweep",
        "Search hyper-parameters with any number of workers: W&B on line, Optuna off line.",
    ),
    "report": ("lit_defect.report", "Runs as one HTML file, tables (CSV, LaTeX) and a W&B report."),
    "export": ("lit_defect.export", "A trained model with its preprocessing as ONNX or torch.export, for the factory."),
}
"""Module (with `main(arguments) -> exit status`) and description of the verbs beside LightningCLI's."""


def main() -> None:
    """Run the verb of the command line.

    Raises:
        SystemExit: the verb's exit status; 2 for what the user can mend.
    """
    if len(sys.argv) > 1 and sys.argv[1] in OWN_VERBS:
        module, _ = OWN_VERBS[sys.argv[1]]
        raise SystemExit(importlib.import_module(module).main(sys.argv[2:]))
    from lit_defect.cli import main as run

    run()


if __name__ == "__main__":
    main()
