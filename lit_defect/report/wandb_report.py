"""The report on Weights & Biases: our text and tables as Markdown, the runs' own curves as live panels beside them.

Built and validated without a server by wandb-workspaces; `publish` needs a login.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.files import whole_file
from lit_defect.report.blocks import (
    Bars,
    Block,
    Code,
    Column,
    Details,
    Intervals,
    Lines,
    Parallel,
    Pictures,
    Report,
    Table,
    Text,
)
from lit_defect.report.tables import markdown

_STEP = "trainer/global_step"
_TITLE = 128  # letters, of W&B's titles


def project() -> str:
    """The project that runs go to, as the tracking callback has it."""
    return os.environ.get("WANDB_PROJECT", "lit_defect")


def build(report: Report, experiments: Sequence[str], entity: str = "", name: str | None = None) -> Any:
    """The report as wandb-workspaces has it; with an entity, W&B is asked for the project's number.

    Args:
        report: its text, tables and curves.
        experiments: by which the runs are found, as the groups of W&B runs.
        entity: user or team; empty builds the report without asking anybody.
        name: of the W&B project.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    wr = _workspaces()
    runset = wr.Runset(entity=entity, project=name or project(), filters=_filter(experiments)) if entity else None
    runset = runset or wr.Runset(project=name or project(), filters=_filter(experiments))
    blocks = [wr.MarkdownBlock(text=report.summary), wr.TableOfContents()]
    for section in report.sections:
        blocks += [wr.H2(text=section.title), *_blocks(wr, section.blocks, runset)]
    blocks.append(wr.MarkdownBlock(text="\n".join(f"- {line}" for line in report.made)))
    title = report.title if len(report.title) <= _TITLE else f"{report.title[: _TITLE - 3]}..."
    return wr.Report(
        project=name or project(), entity=entity, title=title, description=report.summary, blocks=blocks, width="fluid"
    )


def specification(built: Any) -> dict[str, Any]:
    """What W&B would be sent, as it stands in JSON, read back and validated by wandb-workspaces."""
    said: dict[str, Any] = json.loads(built._to_model().model_dump_json(by_alias=True, exclude_none=True))
    validate(said)
    return said


def validate(said: Mapping[str, Any]) -> None:
    """Read a specification back.

    Raises:
        ValueError: wandb-workspaces does not take a part of it for what it says that it is.
    """
    from wandb_workspaces.reports.v2 import internal

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # blocks that it cannot read become unknown ones
        model = internal.ReportViewspec.model_validate({**said, "spec": json.dumps(said["spec"])})
    for block, given in zip(model.spec.blocks, said["spec"]["blocks"], strict=True):
        if isinstance(block, internal.UnknownBlock):
            raise ValueError(f"a block is no {given.get('type')}: {str(given)[:200]}")


def write_specification(built: Any, path: Path) -> Path:
    """Write the specification as JSON."""
    with whole_file(path) as file:
        file.write(json.dumps(specification(built), indent=1, ensure_ascii=False).encode("utf-8"))
    return path


def publish(built: Any) -> str:
    """Send the report to W&B; returns its address.

    Raises:
        UserError: W&B did not take it.
    """
    try:
        built.save()
        return str(built.url)
    except Exception as error:  # whatever a network and a server can do
        raise UserError(
            f"W&B did not take the report ({type(error).__name__}: {error}); --wandb off leaves it out"
        ) from error


def default_entity() -> str:
    """User or team of the login.

    Raises:
        UserError: W&B cannot be asked.
    """
    if entity := os.environ.get("WANDB_ENTITY"):
        return entity
    import wandb

    try:
        return str(wandb.Api(timeout=20).default_entity)
    except Exception as error:
        raise UserError(
            f"W&B cannot be asked who you are ({type(error).__name__}: {error}); `wandb login` first"
        ) from error


def _blocks(wr: Any, blocks: Iterable[Block], runset: Any) -> Iterator[Any]:
    """W&B's blocks; charts of curves that stand together become one grid of panels over the runs themselves."""
    panels: list[Any] = []
    for block in blocks:
        if isinstance(block, Lines) and block.x_name == "step":
            panels.append(wr.LinePlot(title=block.caption, x=_STEP, y=[block.y_name], groupby="Group"))
            continue
        if isinstance(block, Parallel):
            metrics = [*map(wr.Config, block.options), wr.SummaryMetric(block.axes[-1])]
            columns = [
                wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=axis, log=axis in block.log)
                for metric, axis in zip(metrics, block.axes, strict=True)
            ]
            panels.append(wr.ParallelCoordinatesPlot(columns=columns, title=block.caption))
            continue
        if isinstance(block, Pictures):
            yield wr.MarkdownBlock(
                text=f"*{block.caption}*: {', '.join(p.caption for p in block.pictures)} (in the HTML report)"
            )
        elif isinstance(block, Details):
            yield wr.H3(text=block.summary, collapsed_blocks=list(_blocks(wr, block.blocks, runset)))
        else:
            yield wr.MarkdownBlock(text=_markdown(block))
    if panels:
        yield wr.PanelGrid(runsets=[runset], panels=panels)


def _markdown(block: Block) -> str:
    if isinstance(block, Text):
        text = f"> **{block.text}**" if block.kind == "warning" else block.text
        return "\n".join([text, "", *(f"- {item}" for item in block.items)]).strip()
    if isinstance(block, Code):
        return f"{block.caption}\n\n```\n{block.text}\n```"
    if isinstance(block, Table):
        return markdown(block)
    if isinstance(block, Intervals):
        columns = [Column("", 0), Column(block.x_name, 4), Column("from", 4), Column("to", 4)]
        ends = [(line.name, line.value, line.low, line.high) for line in block.intervals]
        return markdown(Table("intervals", columns, ends, block.caption))
    if isinstance(block, Bars):
        return markdown(Table("bars", [Column(""), Column(block.x_name, 3)], block.bars, block.caption))
    if isinstance(block, Lines):  # not over the runs' steps, so that no panel can draw it
        rows = [(x, *(curve.y[k] for curve in block.curves)) for k, x in enumerate(block.curves[0].x)]
        columns = [Column(block.x_name, 0), *(Column(curve.name, 4) for curve in block.curves)]
        return markdown(Table("lines", columns, rows, block.caption))
    raise TypeError(type(block).__name__)


def _filter(experiments: Sequence[str]) -> str:
    """The runs of these experiments; all runs of the project where a name cannot be written in a filter."""
    if not experiments or any("'" in name or "\\" in name for name in experiments):
        return ""
    return f"Group in [{', '.join(repr(name) for name in experiments)}]"


def _workspaces() -> Any:
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError:
        raise UserError(
            "a W&B report needs wandb-workspaces: pip install 'lit_defect[report]', or --wandb off"
        ) from None
    return wr
