"""Prompts of an editing: what is put in, which is drawn, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lit_defect.editing.options import Edit
from lit_defect.editing.prompts import Prompts
from lit_defect.errors import UserError


def test_a_sentence_with_everything_put_in():
    prompts = Prompts("a {category} with a {type}, {caption}")
    assert prompts.needs_caption
    said = prompts.of("metal_nut", "bent_corner", caption="a {thing} on_black")
    assert said == "a metal nut with a bent corner, a {thing} on_black"


def test_the_default_of_the_options():
    prompts = Prompts(Edit().prompt)
    assert not prompts.needs_caption
    assert prompts.of("tile", "crack") == "a photo of a tile with a crack"


def test_one_of_several_is_drawn_by_the_given_stream():
    prompts = Prompts(["a {type}", "one {type}", "the {type}"])
    rng = np.random.default_rng(0)
    drawn = Counter(prompts.of("tile", "crack", rng) for _ in range(600))
    assert set(drawn) == {"a crack", "one crack", "the crack"}
    assert all(abs(count - 200) < 5 * 12 for count in drawn.values())  # five standard deviations
    again = [prompts.of("tile", "crack", np.random.default_rng(3)) for _ in range(2)]
    assert again[0] == again[1]
    assert prompts.of("tile", "crack") == "a crack", "the first without one"


def test_sentences_by_type():
    prompts = Prompts({"crack": ["a {type}", "a {caption} broken"], "good": "a {category}"})
    assert prompts.needs_caption
    assert prompts.of("metal_nut", "good") == "a metal nut"
    rng = np.random.default_rng(0)
    assert {prompts.of("tile", "crack", rng, "nut") for _ in range(30)} == {"a crack", "a nut broken"}
    with pytest.raises(UserError, match=r"model\.init_args\.edit\.prompt has none for hole; it has crack, good"):
        prompts.of("tile", "hole")


def test_braces_that_are_braces():
    assert Prompts("{{a}} {type}").of("", "crack") == "{a} crack"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a {kind}", r"'a \{kind\}': there is no \{kind\}, only \{category\}, \{type\}, \{caption\}"),
        ("a {}", r"there is no \{\}"),
        ("a {type", r"'\}'.*there are \{category\}"),
        ("a {type!r}", "there is no"),
        ("a {type:5}", "there is no"),
        ("a {type.x}", "there is no"),
        ([], r"= \[\]: expected a sentence"),
        ({}, r"= \{\}: expected a sentence"),
        ({"crack": []}, "expected a sentence"),
        ({"crack": ["a", "a {kind}"]}, r"there is no \{kind\}"),
    ],
    ids=str,
)
def test_prompts_that_do_not_do(prompt, expected):
    with pytest.raises(UserError, match=rf"^model\.init_args\.edit\.prompt.*{expected}"):
        Prompts(prompt)


def test_a_data_set_without_categories_or_types():
    assert Prompts("a {type}").of("", "crack") == "a crack"
    with pytest.raises(UserError, match=r"no category to put for \{category\}; leave it out"):
        Prompts("a {category} with a {type}").of("", "crack")
    with pytest.raises(UserError, match=r"no type to put for \{type\}"):
        Prompts("a {category} with a {type}").of("tile", "")


def test_another_option_that_knows_less():
    with pytest.raises(UserError, match=r"^model\.init_args\.prompt = .*no \{caption\}, only \{type\}"):
        Prompts("a {caption}", "model.init_args.prompt", ["type"])
