"""Options of a generation, its samplers, and the plan of its pictures."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from lit_defect.errors import UserError
from lit_defect.generation.options import Generation
from lit_defect.tasks.defect_generation import make_sampler
from lit_defect.tasks.generation_plan import choose_pairs, plan
from tests.latent import sd_process

PAIRS = [("nut", "bent"), ("nut", "scratch"), ("tile", "crack")]
CATEGORIES = ["nut", "tile", "nut", "tile", "nut"]  # of five normal pictures


def sampler(**options):
    return make_sampler(SimpleNamespace(process=sd_process()), Generation(**options).resolved())


# ---- options ---------------------------------------------------------------------------------------------------


def test_presets():
    paper, fast = Generation(preset="paper").resolved(), Generation().resolved()
    wanted = {"sampler": "ddim", "steps": 200, "eta": 1.0, "strength": 1.0, "guidance": 1.0, "reweight": "paper",
              "grow": 0.0,
              "candidates": 1}  # fmt: skip
    assert {key: paper[key] for key in wanted} == wanted, "Hu et al., section 4"
    assert fast["sampler"] == "dpmsolver"
    assert (fast["reweight"], fast["grow"]) == ("official", 0.25), "which the authors' code joins"
    evaluations = fast["steps"] * fast["candidates"] * (1 if fast["guidance"] == 1 else 2)
    assert evaluations <= 200 / 5
    for options in (paper, fast):
        assert None not in {key: value for key, value in options.items() if key != "eta"}.values()


def test_what_is_given_takes_the_place_of_the_presets_own():
    given = Generation(preset="paper", steps=50, reweight="off", strength=0.5, candidates=3).resolved()
    assert (given["steps"], given["reweight"], given["strength"], given["candidates"]) == (50, "off", 0.5, 3)
    assert (given["sampler"], given["eta"]) == ("ddim", 1.0)


def test_the_presets_eta_belongs_to_its_sampler():
    assert Generation(preset="paper", sampler="dpmsolver").resolved()["eta"] is None
    assert Generation(preset="paper", sampler="ddim").resolved()["eta"] == 1.0
    assert sampler(preset="paper", sampler="dpmsolver").eta == 0
    assert sampler(preset="paper", sampler="ddpm").eta == 1, "its own"


def test_what_decides_no_pixel_is_left_out():
    plain = Generation().resolved()
    incidental = Generation(count=7, types=["crack"], output="somewhere", keep_rejected=True, batch=3).resolved()
    assert plain == incidental
    spelt = {
        key: plain[key] for key in ("sampler", "steps", "eta", "strength", "guidance", "reweight", "grow", "candidates")
    }
    assert Generation(preset="paper", **spelt).resolved() | {"eta": None} == plain | {"eta": None}
    for other in ({"feather": 3.0}, {"guidance": 1.5}, {"masks": "folder"}, {"repair": False}, {"paste": "picture"}):
        assert Generation(**other).resolved() != plain, other


@pytest.mark.parametrize("key", ["count", "batch", "candidates"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_below_one(key, number):
    with pytest.raises(UserError, match=rf"model\.init_args\.generation\.{key} = {number}: expected at least 1"):
        Generation(**{key: number})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance": 0.5}, r"generation\.guidance = 0\.5"),
        ({"guidance": float("nan")}, r"generation\.guidance = nan"),
        ({"least_contrast": 1.5}, r"generation\.least_contrast = 1\.5"),
        ({"most_contrast": -0.1}, r"generation\.most_contrast = -0\.1"),
        ({"least_contrast": 0.6, "most_contrast": 0.6}, "leave no defect: expected no more than 1 in sum"),
        ({"grow": 1.5}, r"generation\.grow = 1\.5: expected a share of the shorter side"),
        ({"feather": -1.0}, r"generation\.feather = -1"),
        ({"feather": float("nan")}, r"generation\.feather = nan"),
    ],
)
def test_numbers_out_of_range(options, expected):
    with pytest.raises(UserError, match=expected):
        Generation(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 7}, r"generation\.steps = 7: must divide"),
        ({"steps": 0}, r"generation\.steps = 0"),
        ({"strength": 1.5}, r"generation\.strength = 1\.5"),
        ({"strength": 0.0}, r"generation\.strength = 0 changes nothing"),
        ({"strength": 0.01}, r"generation\.steps = 10 and strength = 0\.01"),
        ({"eta": 0.5}, r"generation\.eta = 0\.5: only ddim"),
        ({"sampler": "ddim", "eta": 2.0}, r"generation\.eta = 2"),
    ],
)
def test_samplers_out_of_range(options, expected):
    with pytest.raises(UserError, match=expected) as told:
        sampler(**options)
    assert "model.init_args.train_steps" not in str(told.value), "the base decides that"
    assert "first stage" not in str(told.value), "that is a refiner's word"


def test_a_samplers_steps():
    found = sampler(sampler="ddim", steps=10, strength=0.5)
    assert found.timesteps == [499, 399, 299, 199, 99]
    assert sampler().calls == 9
    assert sampler(preset="paper").calls == 200


# ---- the plan --------------------------------------------------------------------------------------------------


def test_every_picture_is_planned_once_from_its_own_category():
    jobs = plan(PAIRS, PAIRS, CATEGORIES, 7, 0)
    assert [job.number for job in jobs] == list(range(21))
    assert Counter(job.pair for job in jobs) == dict.fromkeys(PAIRS, 7)
    assert all(CATEGORIES[job.source] == job.pair[0] for job in jobs)
    assert len({job.seed for job in jobs}) == 21


def test_sources_are_taken_equally_often():
    for count in (3, 4, 7):
        jobs = plan(PAIRS, PAIRS[:1], CATEGORIES, count, 5)
        times = Counter(job.source for job in jobs)
        assert set(times) == {0, 2, 4}
        assert max(times.values()) - min(times.values()) <= 1


def test_more_pictures_leave_the_others_as_they_are():
    few = {job.number: job for job in plan(PAIRS, PAIRS, CATEGORIES, 2, 0)}
    many = {job.number: job for job in plan(PAIRS, PAIRS, CATEGORIES, 9, 0)}
    alone = {job.number: job for job in plan(PAIRS, PAIRS[2:], CATEGORIES, 9, 0)}
    assert few.items() <= many.items()
    assert alone.items() <= many.items()
    assert {job.pair for job in alone.values()} == {PAIRS[2]}


def test_another_seed_is_another_plan():
    first, second = (plan(PAIRS, PAIRS, CATEGORIES, 30, seed) for seed in (0, 1))
    assert [job.source for job in first] != [job.source for job in second]
    assert not {job.seed for job in first} & {job.seed for job in second}
    assert first == plan(PAIRS, PAIRS, CATEGORIES, 30, 0)


def test_pictures_without_a_category_serve_all():
    jobs = plan(PAIRS, PAIRS, ["", ""], 2, 0)
    assert Counter(job.pair for job in jobs) == dict.fromkeys(PAIRS, 2)
    assert choose_pairs(PAIRS, None, ["", ""]) == PAIRS


def test_a_category_without_normal_pictures():
    with pytest.raises(UserError, match="no normal picture of 'tile'"):
        plan(PAIRS, PAIRS, ["nut"], 1, 0)
    assert choose_pairs(PAIRS, None, ["nut"]) == PAIRS[:2]


def test_types():
    assert choose_pairs(PAIRS, ["crack", "bent"], CATEGORIES) == [PAIRS[0], PAIRS[2]]
    with pytest.raises(UserError, match=r"generation\.types: 'dent' was not learnt; there are bent, crack, scratch"):
        choose_pairs(PAIRS, ["crack", "dent"], CATEGORIES)


def test_types_of_a_category_that_has_no_pictures():
    with pytest.raises(UserError, match=r"no normal picture of 'tile'"):
        choose_pairs(PAIRS, ["crack"], ["nut"])
