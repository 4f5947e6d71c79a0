"""The verbs of `python -m lit_defect`, in words. No torch here, so that `--help` is there at once."""

from __future__ import annotations

VERBS = {
    "fit": "Train a model; --resume goes on with a run that was stopped.",
    "check": "Say whether fit would work, and at what cost: data, weights, a step, memory, disk. Takes fit's options.",
    "validate": "Evaluate a checkpoint on the validation split.",
    "test": "Evaluate a checkpoint on the test split.",
    "predict": "Write the predictions of a checkpoint for new pictures (--data.predict_root) or a split "
    "(--data.predict_split; the test split if neither is given).",
}
"""Those of LightningCLI (`lit_defect.cli`)."""

OWN_VERBS = {
    "study": ("lit_defect.study", "Arms that differ in one thing, a run of each for several seeds, and a report."),
    "sweep": (
        "lit_defect.sweep",
        "Search hyper-parameters with any number of workers: W&B on line, Optuna off line.",
    ),
    "report": ("lit_defect.report", "Runs as one HTML file, tables (CSV, LaTeX) and a W&B report."),
    "export": ("lit_defect.export", "A trained model with its preprocessing as ONNX or torch.export, for the factory."),
}
"""Module (with `main(arguments) -> exit status`) and description of the others, which start without PyTorch."""
