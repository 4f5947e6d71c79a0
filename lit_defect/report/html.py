"""A report as one HTML file that opens from disk: no other file, no network, readable without its script and on paper.

Its Content-Security-Policy allows nothing but the style sheet and the script of this package, named by their digests,
and pictures inside of the file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from lit_defect.files import whole_file
from lit_defect.report.blocks import (
    Bars,
    Block,
    Code,
    Details,
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
from lit_defect.report.charts import lines
from lit_defect.report.embedding import BUDGET, Album
from lit_defect.report.html_tables import table, values_of
from lit_defect.report.markup import Markup, element, join, name, prose
from lit_defect.report.parallel import parallel
from lit_defect.report.series import Arms, colour_rules
from lit_defect.report.strips import bars, intervals

_HERE = Path(__file__).parent
_WIDE = 1200  # pixels of a picture from which a column of the gallery is too narrow for it


def write_html(report: Report, path: Path, *, base: Path | None = None, budget: int = BUDGET) -> Path:
    """Write the report as one self-contained page; the same report gives the same bytes.

    Args:
        report: what to write.
        path: of the file; its folder is made.
        base: relative paths of pictures lie below it, and the page names pictures relative to it.
        budget: bytes that all pictures together may take; the page names those that found no room.
    """
    page = _Page(report, Album(base, budget)).write()
    with whole_file(path) as file:
        file.write(page.encode())
    return path


class _Page:
    """A page while it is written: numbers of its pictures, its album and the looks of its arms."""

    def __init__(self, report: Report, album: Album) -> None:
        self.report, self.album, self.arms = report, album, Arms(report)
        self._pictures = 0

    def write(self) -> str:
        style = colour_rules() + (_HERE / "page.css").read_text("utf-8")
        script = (_HERE / "page.js").read_text("utf-8")
        policy = (
            f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'"
        )
        head = join(
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", self.report.title),
            element("style", Markup(style)),
        )
        body = join(self._contents(), element("main", *self._main(), id="top"), element("script", Markup(script)))
        page = element("html", element("head", head), "\n", element("body", body), lang="en")
        return f"<!DOCTYPE html>\n{page}\n"

    def _contents(self) -> Markup:
        links = (
            element("li", element("a", prose(section.title), href=f"#s{i}"))
            for i, section in enumerate(self.report.sections, 1)
        )
        return element("nav", element("a", "Contents", href="#top"), element("ol", *links), aria_label="Contents")

    def _main(self) -> Iterator[Markup]:
        yield element("h1", prose(self.report.title))
        if self.report.summary:
            yield element("p", prose(self.report.summary), class_="summary")
        for i, section in enumerate(self.report.sections, 1):
            yield self._section(section, i)
        if self.album.left_out:
            yield element(
                "section",
                element("h2", "Pictures left out"),
                element("ul", *(element("li", name(line)) for line in self.album.left_out)),
            )
        if self.report.made:
            yield element("footer", element("ul", *(element("li", prose(line)) for line in self.report.made)))

    def _section(self, section: Section, number: int) -> Markup:
        return element(
            "section",
            element("h2", prose(section.title), id=f"s{number}"),
            *self._blocks(section.blocks),
            aria_labelledby=f"s{number}",
        )

    def _blocks(self, blocks: Sequence[Block]) -> Iterator[Markup]:
        """Blocks in their order; charts of curves that follow one another share a row where the page is wide."""
        for is_lines, group in groupby(blocks, lambda block: isinstance(block, Lines)):
            made = [self._block(block) for block in group]
            if is_lines and len(made) > 1:
                yield element("div", *made, class_="beside")
            else:
                yield from made

    def _block(self, block: Block) -> Markup:
        match block:
            case Text():
                role = "note" if block.kind != "plain" else None
                class_ = None if role is None else block.kind
                if not block.items:
                    return element("p", prose(block.text), class_=class_, role=role)
                text = element("p", prose(block.text)) if block.text else None
                items = element("ul", *(element("li", prose(item)) for item in block.items))
                return element("div", text, items, class_=class_, role=role)
            case Code():
                caption = element("figcaption", prose(block.caption)) if block.caption else None
                code = element("pre", element("code", block.text), tabindex=0)
                return element("figure", caption, code, class_="code")
            case Table():
                return table(block, self.arms)
            case Lines():
                values = element("details", element("summary", "Values"), table(values_of(block), self.arms))
                return element("div", lines(block, self.arms), values)
            case Intervals():
                return intervals(block, self.arms)
            case Bars():
                return bars(block)
            case Parallel():
                return parallel(block)
            case Pictures():
                return self._gallery(block)
            case Details():
                return element("details", element("summary", prose(block.summary)), *self._blocks(block.blocks))

    def _gallery(self, block: Pictures) -> Markup:
        caption = element("p", prose(block.caption), class_="caption") if block.caption else None
        pictures = element("div", *(self._picture(picture) for picture in block.pictures), class_="pictures")
        return element("div", caption, pictures, class_="gallery")

    def _picture(self, picture: Picture) -> Markup:
        self._pictures += 1
        anchor = f"p{self._pictures}"
        file = self.album.name(picture.path)
        embedded = self.album.embed(picture.path)
        caption = element("figcaption", prose(picture.caption)) if picture.caption else None
        if isinstance(embedded, str):
            note = element("p", name(file), f": {embedded}", class_="note")
            return element("figure", note, caption, id=anchor)
        shown = element(
            "img",
            src=embedded.url,
            width=embedded.width,
            height=embedded.height,
            alt=picture.caption.replace("`", "") or file,
            title=file,
        )
        link = element("a", shown, href=f"#{anchor}", class_="large")  # without the script, the picture grows in place
        return element("figure", link, caption, id=anchor, class_="wide" if embedded.width >= _WIDE else None)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
