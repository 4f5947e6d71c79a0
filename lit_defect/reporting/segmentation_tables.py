"""The figures of a segmenter or refiner, method by method, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from lit_defect.reporting.segmentation_figures import METHODS
from lit_defect.reporting.tables import markdown_table

Entry = Mapping[str, Any]

_LOWEST = 6  # classes that are listed in the terminal


def mask_table(result: Mapping[str, Any], title: str) -> Table:
    """A rich table of `<stage>_metrics.json`, a line for each method; narrow enough for 80 characters.

    Args:
        result: `methods` {name: what `evaluate_masks` returned}, `gain` {name: what `compare_masks` returned},
            and what else the task wrote.
        title: above the table.
    """
    table = Table(title=title, title_justify="left", caption=_caption(result), caption_justify="left")
    table.add_column("method", no_wrap=True)
    for name in ("IoU, %", "pooled", "boundary", "HD95"):
        table.add_column(name, justify="right", no_wrap=True)
    gains = result.get("gain") or {}
    if gains:
        table.add_column("gain in IoU", justify="right", no_wrap=True)
    last = list(result["methods"])[-1]
    for name, figures in result["methods"].items():
        cells = [
            METHODS.get(name, name),
            _percent(figures["iou"], limits=True),
            _percent(figures["pooled_iou"]),
            _percent(figures["boundary_iou"]),
            _number(figures["hd95"]),
            *([_points(gains[name]["iou"]) if name in gains else ""] if gains else []),
        ]
        table.add_row(*map(escape, cells), style="bold" if name == last and len(result["methods"]) > 1 else None)
    return table


def mask_markdown(result: Mapping[str, Any]) -> str:
    """The same in Markdown, with every interval, the test of the gain, network calls and time."""
    head = ("method", "IoU, %", "95 % interval", "pooled IoU, %", "boundary IoU, %", "HD95, pixels", "gain in IoU",
            "95 % interval", "Wilcoxon p", "better / worse / equal", "network calls", "ms an image")  # fmt: skip
    gains, times = result.get("gain") or {}, result.get("ms_per_image") or {}
    body = []
    for name, figures in result["methods"].items():
        gain = gains.get(name, {})
        iou, gained = figures["iou"], gain.get("iou", {})
        body.append(
            [
                METHODS.get(name, name),
                _percent(iou),
                _limits(iou),
                _percent(figures["pooled_iou"]),
                _percent(figures["boundary_iou"]),
                _number(figures["hd95"]),
                _percent(gained, sign=True) if gain else "",
                _limits(gained, sign=True),
                _p_value(gain) if gain else "",
                " / ".join(str(gain[key]) for key in ("better", "worse", "equal")) if gain else "",
                _calls(result, name),
                _milliseconds(times[name]) if times.get(name) is not None else "",
            ]
        )
    used = [i for i in range(len(head)) if i < 6 or any(line[i] for line in body)]
    return markdown_table([head[i] for i in used], [[line[i] for i in used] for line in body])


def _number(entry: Entry, digits: int = 1) -> str:
    """The value of an interval as it is, or `-`."""
    value = entry.get("value")
    return "-" if value is None else f"{value:.{digits}f}"


def _p_value(gain: Entry) -> str:
    """`0.012`, `<0.001`, or `-` where no image differs."""
    p = gain.get("wilcoxon_p")
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _calls(result: Mapping[str, Any], method: str) -> str:
    """Calls of a network for one picture: of the refiner's in `refined`, of the segmenter's there; else empty."""
    count = result.get("network_calls")
    return str(count) if count is not None and method in ("refined", "segmenter") else ""


def _milliseconds(time: float) -> str:
    """Three digits: `12.3`, `4321`."""
    return f"{time:.0f}" if time >= 100 else f"{time:.3g}"


def _percent(entry: Entry, *, limits: bool = False, sign: bool = False) -> str:
    """`52.1`, or `52.1 (48.2 to 56.0)`."""
    value = entry.get("value")
    if value is None:
        return "-"
    shown = f"{100 * value:{'+' if sign else ''}z.1f}"
    span = _limits(entry, digits=0) if limits else ""
    return f"{shown} ({span})" if span else shown


def _points(entry: Entry) -> str:
    """`+4.7 (+3.1 to +6.2)`, and from ten points on `+15.2 (+12 to +18)`."""
    wide = max(abs(entry.get(end) or 0.0) for end in ("low", "high")) >= 0.0995
    span = _limits(entry, sign=True, digits=0 if wide else 1)
    return _percent(entry, sign=True) + (f" ({span})" if span else "")


def _limits(entry: Entry, *, sign: bool = False, digits: int = 1) -> str:
    low, high = entry.get("low"), entry.get("high")
    if low is None or high is None:
        return ""
    plus = "+" if sign else ""
    return f"{100 * low:{plus}z.{digits}f} to {100 * high:{plus}z.{digits}f}"


def _caption(result: Mapping[str, Any]) -> str:
    """Counts, the tests of the gains, hardest classes, false alarms, uncertainty, cost."""
    last, figures = list(result["methods"].items())[-1]
    lines = [f"{figures['n']} images, IoU defined on {figures['n_defined']}; 95 % intervals in brackets"]
    if figures.get("n_groups"):
        lines[0] += f", counted by {figures['n_groups']} parts"
    for name, gain in (result.get("gain") or {}).items():
        lines.append(
            f"{METHODS.get(name, name)}: {gain['better']} better, {gain['worse']} worse, {gain['equal']} equal, "
            f"Wilcoxon p {_p_value(gain)}"
        )
    lines += _by_name(figures, METHODS.get(last, last))
    if missed := figures["hd95"].get("undefined"):
        lines.append(f"not found at all (no HD95): {missed} of the images' classes, {METHODS.get(last, last)}")
    alarms = {name: f["false_alarms"] for name, f in result["methods"].items() if "false_alarms" in f}
    if alarms:
        shown = ", ".join(f"{METHODS.get(name, name)} {100 * a['value']:.0f} %" for name, a in alarms.items())
        lines.append(f"false alarms on {next(iter(alarms.values()))['n']} images without the class: {shown}")
    if (uncertainty := result.get("uncertainty")) and uncertainty.get("auroc") is not None:
        lines.append(f"uncertainty ({uncertainty['of']}): AUROC {uncertainty['auroc']:.3f} for wrong pixels")
        if uncertainty.get("found") is not None:
            lines[-1] += f", {100 * uncertainty['found']:.0f} % of them among the 10 % least sure"
    if fresh := result.get("without_near_duplicates"):
        values = ", ".join(
            f"{METHODS.get(n, n)} {_percent(f['iou'], limits=True)}" for n, f in fresh["methods"].items()
        )
        lines.append(f"IoU without images that have a near-duplicate elsewhere: {values}; {fresh['n']} images")
    return "\n".join([*lines, *_cost(result)])


def _by_name(figures: Mapping[str, Any], method: str) -> list[str]:
    """The lowest classes or kinds of the deciding method."""
    lines = []
    for label, key in (("class", "iou_by_class"), ("kind", "iou_by_type")):
        known = [(name, e["value"]) for name, e in (figures.get(key) or {}).items() if e["value"] is not None]
        if len(known) > 1:
            lowest = sorted(known, key=lambda item: item[1])[:_LOWEST]
            shown = ", ".join(f"{escape(name)} {100 * value:.1f}" for name, value in lowest)
            more = f" and {len(known) - _LOWEST} more" if len(known) > _LOWEST else ""
            lines.append(f"IoU by {label}, {method}: {shown}{more}")
    return lines


def _cost(result: Mapping[str, Any]) -> list[str]:
    known = ((name, ms) for name, ms in (result.get("ms_per_image") or {}).items() if ms is not None)
    times = [f"{METHODS.get(name, name)} {_milliseconds(ms)}" for name, ms in known]
    sizes = [f"{METHODS.get(n, n)} {count / 1e6:.3g} M" for n, count in (result.get("parameters") or {}).items()]
    parts = [f"ms an image: {', '.join(times)}"] if times else []
    if result.get("network_calls") is not None and "refined" in result["methods"]:
        parts.append(f"calls of the refiner's network: {result['network_calls']}")
    parts += [f"parameters: {', '.join(sizes)}"] if sizes else []
    return ["; ".join(parts)] if parts else []
