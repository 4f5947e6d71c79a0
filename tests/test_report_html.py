"""The HTML report: what a browser gets, checked without one."""

import base64
import hashlib
import io
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_defect.report.axes import Scale
from lit_defect.report.blocks import (
    Bars,
    Block,
    Code,
    Column,
    Curve,
    Details,
    Interval,
    Intervals,
    Lines,
    Parallel,
    Picture,
    Pictures,
    Report,
    Section,
    Table,
    Text,
)
from lit_defect.report.charts import Point, segments, spread, thin
from lit_defect.report.embedding import LARGEST
from lit_defect.report.html import write_html
from lit_defect.report.html_tables import write
from lit_defect.reporting.palette import PALETTE

NAN = math.nan
HOSTILE = "</script><script>alert('1')</script>\"><img src=x onerror=alert(1)> & `code` \u202eRTL \u05e9\u05dc\u05d5\u05dd \x00\x07 \udcff"
VOID = {"meta", "img", "input", "br", "wbr", "link"}


class Page(HTMLParser):
    """A page as a browser takes it apart: elements with attributes and the text straight inside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], "elements that are never closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag, **attributes):
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    def inside(self, tag):
        return [text for name, text in self.texts if name == tag]


def page_of(tmp_path: Path, *blocks: Block, **options) -> str:
    report = Report("A title", "A summary.", [Section("A section", blocks)], ["made by a test"])
    return write_html(report, tmp_path / "folder" / "report.html", **options).read_text("utf-8")


def body_of(text: str) -> ET.Element:
    """The page's body as XML, without its script: it must be well-formed, drawings and all."""
    body = re.sub(r"<script>.*?</script>", "", text[text.index("<body>") : text.index("</body>") + 7], flags=re.DOTALL)
    return ET.fromstring(re.sub(r' xmlns="[^"]+"', "", body))


def with_class(root: ET.Element, tag: str, class_: str) -> list[ET.Element]:
    return [found for found in root.iter(tag) if class_ in found.get("class", "").split()]


def dots(root: ET.Element) -> list[tuple[str, str]]:
    return [(dot.get("cx", ""), dot.get("cy", "")) for dot in with_class(root, "circle", "dot")]


def save(path: Path, size=(40, 30), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).convert("RGB").save(path, **options)
    return path


LINES = Lines("Curves", "step", "AP", [Curve("a", [0, 1, 2], [0.0, 0.5, 1.0], [0, 0.4, 0.9], [0.1, 0.6, 1.1])])
EVERY_BLOCK = [
    Text("plain `code`"),
    Text("a note", "note"),
    Text("a warning", "warning"),
    Code("python -m lit_defect fit", "a command"),
    Table("t", [Column("arm"), Column("AP", 2, "help", "larger")], [["a", 0.5], ["b", None]], "a table", [(0, 1)]),
    LINES,
    Intervals(
        "i", "AP", [Interval("a", 0.5, 0.4, 0.6, [0.45, 0.55])], reference=0.0, published=[("a", 0.7), ("p", 0.8)]
    ),
    Bars("b", "share", [("lr", 0.75), ("wd", 0.25)]),
    Parallel("p", ["lr", "net", "AP"], [[1e-3, "x", 0.5], [1e-2, "y", None], [None, "x", 0.9]], log=["lr"]),
    Pictures([Picture(Path("nowhere.png"), "missing")], "pictures"),
    Details("more", [Text("inside")]),
]


def test_page_is_whole_and_loads_nothing(tmp_path):
    text = page_of(tmp_path, *EVERY_BLOCK)
    page = Page(text)
    body_of(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "form")
        for name in ("src", "href", "action", "srcset", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
        assert "style" not in attributes, "the policy forbids it"
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert [name for name, _ in page.elements if name in ("h1", "h2", "h3")] == ["h1", "h2", "h2"]
    assert [*page.inside("title")[:1], *page.inside("h1")] == ["A title", "A title"]


def test_policy_names_the_style_and_the_script_that_are_there(tmp_path):
    text = page_of(tmp_path)
    policy = next(meta["content"] for meta in Page(text).all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_nothing_is_hidden_without_the_script(tmp_path):
    root = body_of(page_of(tmp_path, *EVERY_BLOCK, Table("long", [Column("n", 0)], [[i] for i in range(80)], folded=5)))
    assert len(root.findall(".//table[@class='data'][@data-folds='80']/tbody/tr")) == 80
    assert not list(root.iter("button")) or all(button.get("data-arm") for button in root.iter("button"))
    assert not any(element.get("hidden") is not None for element in root.iter())


@pytest.mark.parametrize(
    "block",
    [
        Text(HOSTILE),
        Code(HOSTILE, HOSTILE),
        Table("t", [Column(HOSTILE, help=HOSTILE)], [[HOSTILE]], HOSTILE),
        Lines(HOSTILE, HOSTILE, HOSTILE, [Curve(HOSTILE, [1], [1.0]), Curve(HOSTILE + "2", [1], [1.0])]),
        Intervals(
            HOSTILE, HOSTILE, [Interval(HOSTILE, 1, 0, 2, [1])], published=[(HOSTILE, 1.0), ("other" + HOSTILE, 1.0)]
        ),
        Bars(HOSTILE, HOSTILE, [(HOSTILE, 1.0)]),
        Parallel(HOSTILE, [HOSTILE, "v"], [[HOSTILE, 1.0]]),
        Pictures([Picture(Path("x" + HOSTILE.replace("\x00", "")), HOSTILE)], HOSTILE),
        Details(HOSTILE, [Text(HOSTILE)]),
    ],
    ids=lambda block: type(block).__name__,
)
def test_hostile_text_stays_text(tmp_path, block):
    report = Report(HOSTILE, HOSTILE, [Section(HOSTILE, [block])], [HOSTILE])
    text = write_html(report, tmp_path / "r.html").read_text("utf-8")
    page = Page(text)
    body_of(text)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not re.search("[\x00\x07]", text)
    assert "שלום" in "".join(part for _, part in page.texts)


def test_same_report_same_bytes(tmp_path):
    picture = save(tmp_path / "a.png")
    texts = [page_of(tmp_path / str(i), *EVERY_BLOCK, Pictures([Picture(picture)])) for i in range(2)]
    assert texts[0] == texts[1]


def test_starts_without_torch_matplotlib_or_pillow():
    code = "import sys, lit_defect.report.html; print([m for m in ('torch', 'matplotlib', 'PIL', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Axes


def test_scale_puts_the_middle_in_the_middle():
    assert Scale(2, 4).share(3) == 0.5
    assert Scale(1e-4, 1e-2, log=True).share(1e-3) == pytest.approx(0.5)
    assert Scale.around([7.0]).share(7.0) == pytest.approx(0.5)
    assert Scale.around([0.0, 0.0]).share(0.0) == 0.5
    assert Scale.around([1e-3], log=True).share(1e-3) == pytest.approx(0.5)


def test_scale_passes_over_what_it_cannot_show():
    assert Scale.around([NAN, math.inf]) is None
    assert Scale.around([0.0, -1.0], log=True) is None
    scale = Scale.around([NAN, 0.0, 10.0, -math.inf], margin=0.0)
    assert (scale.low, scale.high) == (0.0, 10.0)


@pytest.mark.parametrize(
    ("scale", "labels"),
    [
        (Scale(0, 1), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (Scale(-1, 1), ["\u22121.0", "\u22120.5", "0.0", "0.5", "1.0"]),
        (Scale(0, 40_000), ["0", "10k", "20k", "30k", "40k"]),
        (Scale(0, 2.5e-4), ["0", "5e-5", "1e-4", "1.5e-4", "2e-4", "2.5e-4"]),
        (Scale(1e-5, 1e-1, log=True), ["1e-5", "1e-4", "0.001", "0.01", "0.1"]),
        (Scale(8, 64, log=True), ["10", "20", "50"]),
        (Scale(0.31, 0.34, log=True), ["0.310", "0.315", "0.320", "0.325", "0.330", "0.335", "0.340"]),
        (Scale(0.92, 0.94), ["0.920", "0.925", "0.930", "0.935", "0.940"]),
    ],
)
def test_ticks_are_round(scale, labels):
    assert [tick.label for tick in scale.ticks()] == labels


@pytest.mark.parametrize("span", [(1e16, 1e16 + 4), (-1e300, 1e300), (1e-320, 1e-300), (0.1, 0.1 + 1e-16)])
def test_ticks_of_odd_axes_end(span):
    assert len(Scale.around(span).ticks()) < 20


def test_labels_of_curves_move_apart_and_stay_inside():
    assert spread([10, 100, 200], 18, 300) == [10, 100, 200]
    assert spread([100, 100], 18, 300) == [91, 109]
    assert spread([299, 300], 18, 300) == [282, 300]
    moved = spread([0, 0, 1, 2, 50], 18, 300)
    assert moved[0] == 0
    assert all(b - a >= 18 for a, b in pairwise(moved))


# Charts


def test_points_stand_where_they_belong(tmp_path):
    """x from 0 to 2 with 2 % free at each end, y from 0 to 1 with 4 %: worked by hand."""
    curve = Curve("a", [0, 1, 2], [0.0, 0.5, 1.0])
    root = body_of(page_of(tmp_path, Lines("c", "step", "AP", [curve])))
    assert dots(root) == [("1.92%", "288.89"), ("50%", "150"), ("98.08%", "11.11")]
    (line,) = with_class(root, "path", "line")
    assert line.get("d") == "M19.23 288.89L500 150L980.77 11.11"
    assert [title.text for title in root.iter("title")] == [
        "a\nstep 0: 0",
        "a\nstep 1: 0.5",
        "a\nstep 2: 1",
    ]


def test_tooltips_hold_full_values_and_bands(tmp_path):
    curve = Curve("a", [10, 20], [0.123456789, 0.9], [0.1, NAN], [0.2, NAN])
    titles = [t.text for t in body_of(page_of(tmp_path, Lines("c", "step", "AP", [curve]))).iter("title")]
    assert titles == ["a\nstep 10: 0.123456789 (0.1 to 0.2)", "a\nstep 20: 0.9"]


def test_values_of_curves_stand_in_a_table(tmp_path):
    curves = [Curve("a", [0, 10, 20], [0.25, -1.0, NAN]), Curve("lost", [0], [NAN])]
    root = body_of(page_of(tmp_path, Lines("c", "step", "AP", curves)))
    rows = [["".join(cell.itertext()) for cell in row] for row in root.findall(".//table[@class='data']/tbody/tr")]
    assert rows == [
        ["a", "2", "\u22121.000", "\u22121.000", "10", "0.250", "0"],
        ["lost", "0", *["\u2013"] * 5],
    ]


def test_log_axis_of_x(tmp_path):
    curve = Curve("a", [0, 1, 10, 100], [9.0, 1.0, 2.0, 3.0])
    root = body_of(page_of(tmp_path, Lines("c", "step", "AP", [curve], log_x=True)))
    assert dots(root)[1] == ("50%", "150")
    assert len(dots(root)) == 3, "0 has no place on the axis"


def test_gaps_break_a_curve_and_lone_points_are_seen(tmp_path):
    curve = Curve("a", range(7), [1, 2, NAN, 3, math.inf, 4, 5])
    assert [len(piece) for piece in segments(curve)] == [2, 1, 2]
    root = body_of(page_of(tmp_path, Lines("c", "step", "AP", [curve])))
    assert len(with_class(root, "path", "line")) == 2
    assert len(with_class(root, "circle", "lone")) == 1


@pytest.mark.parametrize(
    "curves",
    [[], [Curve("a", [], [])], [Curve("a", [1, 2], [NAN, NAN])], [Curve("a", [NAN], [1.0])]],
    ids=["none", "empty", "all nan", "no place"],
)
def test_chart_of_nothing_says_so(tmp_path, curves):
    root = body_of(page_of(tmp_path, Lines("c", "step", "AP", curves)))
    assert len(with_class(root, "figure", "nothing")) == 1
    assert not with_class(root, "svg", "plot")


def test_all_nan_curve_among_others_keeps_its_place_in_the_legend(tmp_path):
    curves = [Curve("good", [1, 2], [1.0, 2.0]), Curve("lost", [1, 2], [NAN, NAN])]
    root = body_of(page_of(tmp_path, Lines("c", "step", "AP", curves)))
    assert ["".join(entry.itertext()) for entry in root.find(".//ul[@class='legend']")] == ["good", "lost"]


def test_constant_and_single_values_stand_in_the_middle(tmp_path):
    assert dots(body_of(page_of(tmp_path, Lines("c", "s", "y", [Curve("a", [5], [3.0])])))) == [("50%", "150")]
    constant = dots(body_of(page_of(tmp_path, Lines("c", "s", "y", [Curve("a", [0, 1, 2], [3.0] * 3)]))))
    assert [y for _, y in constant] == ["150"] * 3


def test_thinning_keeps_ends_and_peaks():
    points = [Point(i, math.sin(i)) for i in range(10_000)]
    points[5000], points[7001] = Point(5000, 99.0), Point(7001, -99.0)
    kept = thin(points)
    assert len(kept) <= 400
    assert {points[0], points[-1], points[5000], points[7001]} <= set(kept)
    assert [point.x for point in kept] == sorted(point.x for point in kept)


def test_long_curves_stay_small(tmp_path):
    curves = [Curve(f"a{i}", range(5000), [math.sin(x / 9) + i for x in range(5000)]) for i in range(35)]
    assert len(page_of(tmp_path, Lines("c", "step", "y", curves))) < 1_000_000


def test_an_arm_looks_the_same_in_all_charts(tmp_path):
    first = Lines("1", "s", "y", [Curve(name, [1, 2], [1, 2]) for name in "abc"])
    second = Lines("2", "s", "y", [Curve(name, [1, 2], [1, 2]) for name in "dcb"])
    single = Intervals("3", "y", [Interval("b", 1, 0, 2), Interval("b - a", 1, 0, 2)])
    root = body_of(page_of(tmp_path, first, second, single, Table("t", [Column("arm")], [["c"], ["other"]])))
    looks: dict[str, set[str]] = {}
    for curve in [*with_class(root, "g", "curve")]:
        looks.setdefault(curve.get("data-arm"), set()).add(curve.get("class"))
    assert [looks[f"a{i}"] for i in range(4)] == [{f"curve c{i} d0"} for i in (0, 1, 2)] + [{"curve c0 d0"}]
    assert [g.get("class") for g in with_class(root, "g", "interval")] == ["interval c1 d0", "interval"]
    marked, other = root.findall(".//table[@class='data']/tbody/tr")[-2:]
    assert marked.get("data-arm") == "a2"
    assert with_class(marked, "svg", "c2")
    assert other.get("data-arm") is None


def test_names_twice_in_a_chart_share_a_look(tmp_path):
    root = body_of(page_of(tmp_path, Lines("1", "s", "y", [Curve("a", [1, 2], [1, 2])] * 2)))
    assert {g.get("class") for g in with_class(root, "g", "curve")} == {"curve c0 d0"}


def test_many_arms_differ_by_dash_and_hundreds_are_drawn_alike(tmp_path):
    def looks(count):
        curves = [Curve(f"arm {i}", [1, 2], [i, i]) for i in range(count)]
        return {
            g.get("class") for g in with_class(body_of(page_of(tmp_path, Lines("c", "s", "y", curves))), "g", "curve")
        }

    assert len(looks(4 * len(PALETTE))) == 4 * len(PALETTE)
    assert looks(200) == {"curve"}


def test_intervals_by_hand(tmp_path):
    """From -1 to 1 with 4 % free at each end, so that -1 stands at 3.7 % and 0 in the middle."""
    block = Intervals(
        "i", "AP", [Interval("a", 0.0, -1.0, 1.0, [-1.0, 0.5])], reference=0.0, published=[("a", 1.0), ("p", 0.5)]
    )
    root = body_of(page_of(tmp_path, block))
    (mean,) = with_class(root, "circle", "mean")
    assert mean.get("cx") == "50%"
    assert [seed.get("cx") for seed in with_class(root, "circle", "seed")] == ["3.7%", "73.15%"]
    whole = with_class(root, "line", "range")[0]
    assert (whole.get("x1"), whole.get("x2")) == ("3.7%", "96.3%")
    assert with_class(root, "line", "reference")[0].get("x1") == "50%"
    assert with_class(root, "line", "guide")[0].get("x1") == "73.15%"
    assert with_class(root, "svg", "open")[0].get("x") == "96.3%"
    assert "0.00 [\u22121.00, 1.00]" in "".join(root.itertext())


def test_interval_without_limits_or_value(tmp_path):
    block = Intervals("i", "AP", [Interval("one", 0.5, NAN, NAN, [0.5]), Interval("none", NAN, NAN, NAN)])
    root = body_of(page_of(tmp_path, block))
    assert not with_class(root, "line", "range")
    assert [cell.text for cell in with_class(root, "td", "number")] == ["0.500", "\u2013"]


def test_single_values_outside_of_the_interval_stay_on_the_axis(tmp_path):
    root = body_of(page_of(tmp_path, Intervals("i", "AP", [Interval("a", 0.5, 0.4, 0.6, [0.0, 1.0])])))
    assert [seed.get("cx") for seed in with_class(root, "circle", "seed")] == ["3.7%", "96.3%"]


def test_bars_by_hand(tmp_path):
    root = body_of(page_of(tmp_path, Bars("b", "share", [("a", 0.8), ("b", 0.2), ("c", 0.0), ("d", NAN)])))
    assert [(bar.get("x"), bar.get("width")) for bar in with_class(root, "rect", "bar")] == [
        ("0%", "100%"),
        ("0%", "25%"),
        ("0%", "0%"),
    ]
    negative = body_of(page_of(tmp_path, Bars("b", "weight", [("a", 3.0), ("b", -1.0)])))
    assert [(bar.get("x"), bar.get("width")) for bar in with_class(negative, "rect", "bar")] == [
        ("25%", "75%"),
        ("0%", "25%"),
    ]


@pytest.mark.parametrize(
    "block", [Bars("b", "s", []), Intervals("i", "x", []), Parallel("p", [], []), Parallel("p", ["a"], [])]
)
def test_empty_charts_say_so(tmp_path, block):
    assert with_class(body_of(page_of(tmp_path, block)), "figure", "nothing")


def test_parallel_coordinates_by_hand(tmp_path):
    lines = [[1e-3, "b", 1.0], [1e-1, "a", 3.0], [1e-2, "a", 2.0], [1e-2, None, None]]
    root = body_of(page_of(tmp_path, Parallel("p", ["m.lr", "net", "AP"], lines, log=["m.lr"])))
    trials = with_class(root, "g", "trial")
    # 300 pixels high; "a" at a quarter and "b" at three quarters from the top; the best line is drawn last.
    assert [trial.get("class") for trial in trials] == ["trial failed", "trial q0", "trial q3", "trial q6 best"]
    assert [with_class(trial, "path", "line")[0].get("d") for trial in trials] == [
        "M0 150h0",
        "M0 288.89L500 225L1000 288.89",
        "M0 150L500 75L1000 150",
        "M0 11.11L500 75L1000 11.11",
    ]
    assert trials[1].find("title").text == "m.lr: 0.001\nnet: b\nAP: 1"
    assert "lr" in [text.text or text.find("title").tail for text in with_class(root, "text", "title")]


def test_parallel_where_small_is_good(tmp_path):
    root = body_of(page_of(tmp_path, Parallel("p", ["a", "loss"], [[1, 1.0], [2, 3.0]], better="smaller")))
    best = with_class(root, "g", "best")
    assert [trial.find("title").text for trial in best] == ["a: 1\nloss: 1"]


@pytest.mark.parametrize(
    "lines",
    [
        [[1.0, "x", 0.5]],
        [[1.0, "x", None]] * 3,
        [[1.0, "x", 0.5]] * 3,
        [[None, None, 0.5], [NAN, "x", NAN]],
        [[True, "x", 1]],
    ],
    ids=["one trial", "none finished", "constant", "missing", "bool"],
)
def test_parallel_of_little(tmp_path, lines):
    root = body_of(page_of(tmp_path, Parallel("p", ["a", "b", "v"], lines)))
    assert len(with_class(root, "g", "trial")) == len(lines)


# Tables


@pytest.mark.parametrize(
    ("cell", "digits", "shown", "exact"),
    [
        (0.12345, 3, "0.123", "0.12345"),
        (0.5, 2, "0.50", "0.50"),
        (-0.5, 2, "\u22120.50", "\u22120.50"),
        (3e-7, 3, "3e-7", "3e-07"),
        (-3e-7, 3, "\u22123e-7", "-3e-07"),
        (0.0, 3, "0.000", "0.000"),
        (7, 2, "7.00", "7.00"),
        (None, 3, "\u2013", "\u2013"),
        ("text", 3, "text", "text"),
        (NAN, 3, "nan", "nan"),
        (-math.inf, 3, "\u2212\u221e", "\u2212\u221e"),
        (True, 3, "True", "True"),
    ],
)
def test_cells_have_the_digits_of_their_column(cell, digits, shown, exact):
    assert write(cell, digits) == (shown, exact)


def test_counts_have_no_digits():
    assert write(12, 3, whole=True) == ("12", "12")


def test_table_marks_and_explains(tmp_path):
    columns = [Column("arm"), Column("AP", 2, "area under the curve", "larger"), Column("loss", 2, "", "smaller")]
    rows = [["a", 0.912, 1.0], ["b", None, 0.5]]
    root = body_of(page_of(tmp_path, Table("t", columns, rows, "the caption", strong=[(0, 1), (1, 2)])))
    heads = root.findall(".//table[@class='data']/thead/tr/th")
    assert [head.get("scope") for head in heads] == ["col"] * 3
    assert heads[1].get("title") == "area under the curve. larger is better"
    assert [strong.text for strong in root.iter("strong")] == ["0.91", "0.50"]
    (cell,) = [cell for cell in root.iter("td") if cell.get("title")]
    assert (cell.get("title"), cell.get("data-value")) == ("0.912", "0.912")
    assert [head.get("scope") for head in root.findall(".//tbody/tr/th")] == ["row", "row"]
    assert "".join(root.find(".//caption").itertext()) == "the caption"
    assert [text.text for text in root.findall(".//dd")] == ["area under the curve"]


def test_table_without_rows_and_columns(tmp_path):
    root = body_of(page_of(tmp_path, Table("t", [Column("a")], []), Table("u", [], [])))
    assert [note.text for note in with_class(root, "p", "note")] == ["no rows", "no rows"]


def test_long_names_have_their_full_form_in_a_tooltip(tmp_path):
    long = "name_" * 60
    root = body_of(page_of(tmp_path, Table("t", [Column("a")], [[long]])))
    bdi = root.find(".//tbody/tr/th/bdi")
    assert bdi.get("title") == long
    assert "…" in "".join(bdi.itertext())


def test_long_words_break_and_figures_do_not(tmp_path):
    text = page_of(tmp_path, Text("0.91 of `runs/editing_magnetic_tile/s0`, a.b-c"))
    assert "<p>0.91 of <code>runs/<wbr/>editing_<wbr/>magnetic_<wbr/>tile/<wbr/>s0</code>, a.b-c</p>" in text


def test_two_hundred_runs(tmp_path):
    names = [f"runs/a_rather_long_name_of_a_study/arm_{i}/s{i}" for i in range(200)]
    curves = [Curve(name, range(100), [i + x for x in range(100)]) for i, name in enumerate(names)]
    blocks = [
        Lines("c", "step", "y", curves),
        Intervals("i", "y", [Interval(name, i, i - 1, i + 1, [i]) for i, name in enumerate(names)]),
        Table("runs", [Column("run"), Column("y")], [[name, i] for i, name in enumerate(names)]),
    ]
    text = page_of(tmp_path, *blocks)
    assert len(text) < 2_000_000
    root = body_of(text)
    assert len(root.findall(".//table[@class='strips bare']")) + len(root.findall(".//table[@class='strips']")) == 1
    assert len(root.findall(".//tbody[@class='rest']")) == 3


# Pictures


def embedded(text: str) -> list[Image.Image]:
    urls = [image["src"] for image in Page(text).all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))) for url in urls]


def test_fitting_picture_stays_as_it_is(tmp_path):
    file = save(tmp_path / "runs" / "a.png")
    text = page_of(tmp_path, Pictures([Picture(Path("a.png"), "the `caption`")]), base=tmp_path / "runs")
    assert base64.b64encode(file.read_bytes()).decode() in text
    (image,) = Page(text).all("img")
    assert (image["alt"], image["title"], image["width"], image["height"]) == ("the caption", "a.png", "40", "30")


def test_pictures_are_named_relative_to_the_base(tmp_path):
    text = page_of(tmp_path, Pictures([Picture(tmp_path / "runs" / "gone.png")]), base=tmp_path / "runs")
    assert str(tmp_path) not in text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_big_picture_is_scaled(tmp_path, kind):
    file = save(tmp_path / f"big.{kind.lower()}", (3200, 400), format=kind)
    (image,) = embedded(page_of(tmp_path, Pictures([Picture(file)])))
    assert image.size == (LARGEST[0], 200)


def test_a_tall_sheet_keeps_its_width(tmp_path):
    file = save(tmp_path / "edits.png", (1208, 3428))
    (image,) = embedded(page_of(tmp_path, Pictures([Picture(file)])))
    assert image.size == (1208, 3428)


@pytest.mark.parametrize(("drawn", "kind"), [("photograph", "JPEG"), ("plot", "PNG")])
def test_a_heavy_sheet_of_photographs_becomes_a_jpeg_and_a_plot_stays(tmp_path, drawn, kind):
    noise = np.random.default_rng(0)
    pixels = np.full((800, 1200), 255, np.uint8)
    if drawn == "photograph":
        pixels = noise.normal(120, 6, pixels.shape).astype(np.uint8)
    else:
        pixels[noise.random(pixels.shape) < 0.1] = 0  # sharp edges, which a JPEG is bad at
    file = tmp_path / "a.png"
    Image.fromarray(pixels).convert("RGB").save(file)
    assert file.stat().st_size > 64 * 2**10
    (image,) = embedded(page_of(tmp_path, Pictures([Picture(file)])))
    assert (image.format, image.size) == (kind, (1200, 800))
    assert np.abs(np.asarray(image.convert("L"), float) - pixels).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "I", "F", "CMYK"])
def test_pictures_of_any_mode(tmp_path, mode):
    file = tmp_path / "a.tiff"
    grey = Image.linear_gradient("L")
    image = grey.convert("F").convert("I").convert("I;16") if mode == "I;16" else grey.convert("RGB").convert("L").convert(mode) if mode in ("1", "L", "LA", "I", "F") else grey.convert("RGB").convert(mode)  # fmt: skip
    if mode == "LA":
        file = tmp_path / "a.png"
    image.save(file)
    (shown,) = embedded(page_of(tmp_path, Pictures([Picture(file)])))
    low, high = shown.convert("L").getextrema()
    assert (low, high) == pytest.approx((0, 255), abs=12), "the gradient is still there"


def test_turned_photograph_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save(tmp_path / "a.jpg", (40, 20), exif=exif)
    (image,) = embedded(page_of(tmp_path, Pictures([Picture(file)])))
    assert image.size == (20, 40)
    assert not image.getexif()


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "half", "half a JPEG", "folder"])
def test_picture_that_cannot_be_read_leaves_a_note(tmp_path, damage):
    file = tmp_path / "a.png"
    if damage.startswith("half"):
        data = save(file, (300, 300), format="JPEG" if "JPEG" in damage else "PNG").read_bytes()
        file.write_bytes(data[: len(data) // 2])
    elif damage == "folder":
        file.mkdir()
    elif damage != "missing":
        file.write_text("" if damage == "empty" else "no picture")
    text = page_of(tmp_path, Pictures([Picture(file, "caption")]))
    assert not Page(text).all("img")
    assert "caption" in text
    assert text.count("the file ") >= 2, "where it should be, and in the list of what was left out"


def test_budget_names_what_found_no_room(tmp_path):
    data = save(tmp_path / "0.png", (60, 60)).read_bytes()
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(data)
    gallery = Pictures([Picture(Path(f"{i}.png")) for i in range(3)])
    weight = len(base64.b64encode(data))
    assert len(embedded(page_of(tmp_path, gallery, base=tmp_path, budget=3 * weight))) == 3
    text = page_of(tmp_path, gallery, base=tmp_path, budget=3 * weight - 1)
    assert len(embedded(text)) == 2
    items = ["".join(item.itertext()) for item in body_of(text).iter("li")]
    assert [item.split(":")[0] for item in items if "pictures are full" in item] == ["2.png"]


def test_a_box_holds_its_list(tmp_path):
    root = body_of(page_of(tmp_path, Text("Not compared:", "warning", ["a <b>", "c `d`"])))
    (box,) = with_class(root, "div", "warning")
    assert ["".join(item.itertext()) for item in box.iter("li")] == ["a <b>", "c d"]
    assert box.get("role") == "note"
