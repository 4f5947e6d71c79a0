"""The verb `report`: runs in, one HTML file, CSV and LaTeX tables and a W&B report out. No torch here.

    python -m lit_defect report RUNS... [-o FOLDER] [--compare A B] [--group-by KEY ...] [--filter KEY=VALUE ...]

RUNS may be `wandb:ENTITY/PROJECT[/GROUP]`, too (`wandb_runs`). `matter` gathers runs (`collect`), arms (`arms`),
figures (`figures`) and tests (`comparing`); `contents` puts them into sections (`answer`, `results`, `protocol`,
`published`, `sweeps`, `costs`, `appendix`) made of `blocks`; `html`, `tables` with `latex`, and `wandb_report` write
those down.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lit_defect.errors import UserError

if TYPE_CHECKING:
    from lit_defect.report.blocks import Report
    from lit_defect.report.matter import Matter


class _Parser(argparse.ArgumentParser):
    """Errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m lit_defect report --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a report; returns the exit status, 2 for what the user can mend."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(words)
        for path in _make(options, "python -m lit_defect report " + shlex.join(words)):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _make(options: argparse.Namespace, command: str) -> list[str]:
    """Write all that is asked for; returns where."""
    from lit_defect.report.contents import build
    from lit_defect.report.html import write_html
    from lit_defect.report.matter import Asked, common_folder, gather
    from lit_defect.report.tables import write_tables

    asked = Asked(
        runs=_folders(options.runs, options.output),
        group_by=options.group_by,
        compare=options.compare,
        filters=options.filter,
        metrics=options.metric,
        stage=options.stage,
        title=options.title,
        question=options.question,
        study=options.study,
        runs_dir=options.runs_dir,
        sweep=options.sweep,
        pictures=not options.no_pictures,
        command=command,
    )
    matter = gather(asked)
    report, folder = build(matter), options.output
    try:
        written = [str(write_html(report, folder / "report.html", base=Path(common_folder(matter.runs))))]
        tables = write_tables(report, folder / "tables")
    except OSError as error:
        raise UserError(f"-o {folder}: {error.strerror or error}; choose another folder") from None
    written.append(f"{folder / 'tables'}: {len(tables)} files")
    return [report.summary, *written, *_on_wandb(options, report, matter)]


def _folders(given: Sequence[str], output: Path) -> list[Path]:
    """Folders as they are; runs of W&B are written below the report's own folder first."""
    from lit_defect.report.wandb_runs import SCHEME, fetch

    found: list[Path] = []
    for text in given:
        found += fetch(text, output / "wandb_runs") if text.startswith(SCHEME) else [Path(text)]
    return found


def _on_wandb(options: argparse.Namespace, report: Report, matter: Matter) -> list[str]:
    """The W&B report: published when logged in, its specification as JSON in any case."""
    if options.wandb == "off":
        return []
    from lit_defect.report import wandb_report
    from lit_defect.tracking_login import logged_in

    experiments = list(dict.fromkeys(run.folder.experiment for run in matter.runs))
    file = options.output / "wandb_report.json"
    try:
        built = wandb_report.build(report, experiments)
        said = [f"{wandb_report.write_specification(built, file)}: not published"]
        if options.wandb == "online" or logged_in():
            entity = options.entity or wandb_report.default_entity()
            said = [wandb_report.publish(wandb_report.build(report, experiments, entity, options.project))]
        return said
    except UserError as error:
        if options.wandb == "online":
            raise
        return [f"no W&B report: {error}"]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lit_defect report",
        description="Runs as one HTML file, tables (CSV, LaTeX) and a W&B report.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        metavar="RUNS",
        help="run folders, or folders of runs, up to three levels deep; or, when logged in, runs of W&B: "
        "wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/GROUP, a group being an experiment",
    )
    add("-o", "--output", type=Path, default=Path("report"), metavar="FOLDER", help="where it goes (report)")
    add("--group-by", nargs="+", default=[], metavar="KEY", help="options whose values make the arms, e.g. model.lr")
    add("--compare", nargs=2, metavar=("A", "B"), help="two arms: B is held against A")
    add(
        "--filter",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this value, e.g. state=finished, seed=0,1, experiment='tiles_*', model.lr=0.0003",
    )
    add(
        "--metric",
        nargs="+",
        default=[],
        metavar="NAME",
        help="figures of the report; the first one is judged by, e.g. auroc, image/auroc, refined/iou",
    )
    add("--stage", choices=("test", "val", "mirrored"), help="whose figures are reported (test where there is one)")
    add("--title", default="", help="of the page")
    add("--question", default="", help="that the runs are to answer")
    add("--study", type=Path, metavar="FILE", help="a study's file: its question, arms, titles, baseline and figure")
    add("--runs_dir", type=Path, metavar="FOLDER", help="where the study's runs lie, in place of what its file says")
    add("--sweep", type=Path, metavar="FOLDER", help="a sweep's folder, which holds sweep.json")
    add("--no-pictures", action="store_true", help="leave examples out: a smaller page")
    add(
        "--wandb",
        choices=("auto", "online", "off"),
        default="auto",
        help="auto: publish when logged in, else write the specification; online: publish or fail; off: neither",
    )
    add("--entity", default="", help="W&B user or team (that of the login)")
    add("--project", default=None, help="W&B project (WANDB_PROJECT, or lit_defect)")
    return parser
