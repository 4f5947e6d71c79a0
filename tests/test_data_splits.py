"""The splits keep parts together, keep the proportions, repeat, and say what cannot be done."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_defect.data.samples import Sample
from lit_defect.data.splits import assign_splits, read_groups, read_split, write_groups, write_split
from lit_defect.errors import DataError, UserError

TILES = Path(__file__).parents[2] / "shared" / "data" / "magnetic_tile"


def make(counts: dict[str, int], *, per_group: int = 0, split: str = "", category: str = "") -> list[Sample]:
    """Samples of the given kinds; good is label 0, every other kind label 1."""
    return [
        Sample(
            path=f"/data/{kind}/{i:04d}.png",
            name=f"{kind}/{i:04d}.png",
            label=int(kind != "good"),
            defect_type=kind,
            category=category,
            group=f"{kind}-{i // per_group}" if per_group else "",
            split=split,
        )
        for kind, number in counts.items()
        for i in range(number)
    ]


def split_of(samples: list[Sample]) -> dict[str, str]:
    return {s.name: s.split for s in samples}


def table(samples: list[Sample]) -> Counter[tuple[str, str]]:
    return Counter((s.split, s.defect_type) for s in samples)


def torn_groups(samples: list[Sample]) -> list[str]:
    places = defaultdict(set)
    for s in samples:
        if s.group and s.split:
            places[s.group].add(s.split)
    return [group for group, where in places.items() if len(where) > 1]


@pytest.mark.parametrize("seed", range(5))
def test_single_samples_are_split_exactly(seed: int) -> None:
    kinds = {"good": 1508, "a": 295, "b": 106, "c": 715}  # the four grades of ELPV
    samples = assign_splits(make(kinds), seed=seed, test_fraction=0.25, val_fraction=0.2)
    sizes = Counter(s.split for s in samples)
    assert sizes == {"test": 656, "val": 394, "train": 1574}  # 2624 / 4; 1968 / 5 = 393.6
    for kind, number in kinds.items():
        found = table(samples)
        assert abs(found["test", kind] - number / 4) < 1
        assert abs(found["val", kind] - (number - found["test", kind]) / 5) < 1


def test_order_of_the_samples_does_not_matter_and_the_seed_does() -> None:
    samples = make({"good": 40, "hole": 20}, per_group=3)
    first = assign_splits(samples, seed=7)
    shuffled = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]
    assert split_of(assign_splits(shuffled, seed=7)) == split_of(first)
    assert [s.name for s in first] == [s.name for s in samples]
    assert split_of(assign_splits(samples, seed=8)) != split_of(first)


def test_a_validation_seed_leaves_the_test_alone() -> None:
    samples = make({"good": 40, "hole": 20}, per_group=3)
    plain, same, other = (assign_splits(samples, seed=7, val_seed=seed) for seed in (None, 7, 8))
    assert same == plain
    val, test = ({s.name for s in plain if s.split == split} for split in ("val", "test"))
    assert {s.name for s in other if s.split == "test"} == test
    assert {s.name for s in other if s.split == "val"} != val
    with pytest.raises(UserError, match=r"data\.val_seed is -1"):
        assign_splits(samples, seed=7, val_seed=-1)


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_the_shares_are_near(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = []
    for kind, number in (("good", 90), ("crack", 20), ("hole", 15)):
        for g in range(number):  # parts were photographed one to nine times
            part = make({kind: int(rng.integers(1, 10))})
            samples += [replace(s, name=f"{kind}/{g}-{i}", group=f"{kind}{g}") for i, s in enumerate(part)]
    kinds = Counter(s.defect_type for s in samples)
    done = assign_splits(samples, seed=seed)
    assert not torn_groups(done)
    for kind, number in kinds.items():
        assert abs(table(done)["test", kind] - number / 4) <= 3
    assert abs(Counter(s.split for s in done)["test"] - len(samples) / 4) <= 3


def test_a_group_with_several_kinds_moves_as_one() -> None:
    samples = [replace(s, group=str(i % 20)) for i, s in enumerate(make({"good": 80, "crack": 40}))]
    done = assign_splits(samples, seed=0)
    assert not torn_groups(done)
    assert Counter(s.split for s in done) == {"train": 72, "test": 30, "val": 18}


@pytest.mark.parametrize("per_group", [0, 4])
def test_folds_are_disjoint_cover_everything_and_are_balanced(per_group: int) -> None:
    samples = make({"good": 63, "crack": 25}, per_group=per_group)
    tested: Counter[str] = Counter()
    for fold in range(5):
        done = assign_splits(samples, seed=3, folds=5, fold=fold)
        assert not torn_groups(done)
        test = [s for s in done if s.split == "test"]
        tested.update(s.name for s in test)
        for kind, number in (("good", 63), ("crack", 25)):
            bound = max(1, per_group)
            assert abs(sum(s.defect_type == kind for s in test) - number / 5) <= bound
    assert tested == Counter(s.name for s in samples)


def test_what_the_layout_prescribes_is_kept() -> None:
    samples = make({"good": 30}, split="train") + make({"crack": 10, "hole": 5}, split="test")
    done = assign_splits(samples, seed=0, val_fraction=0.2, test_fraction=0.9)
    assert table(done) == {
        ("train", "good"): 24,
        ("val", "good"): 6,
        ("test", "crack"): 10,
        ("test", "hole"): 5,
    }
    # A prescribed validation split is enough of it.
    samples = make({"good": 30}, split="train") + make({"crack": 4}, split="val")
    assert split_of(assign_splits(samples, seed=0)) == split_of(samples)


def test_only_free_samples_are_tested() -> None:
    samples = make({"good": 20}, split="train") + make({"crack": 20})
    done = assign_splits(samples, seed=0, test_fraction=0.5, val_fraction=0)
    assert table(done) == {("train", "good"): 20, ("train", "crack"): 10, ("test", "crack"): 10}


def test_a_group_spread_by_the_layout_leaves_the_training() -> None:
    train = [replace(s, group="one") for s in make({"good": 3}, split="train")]
    free = [replace(s, group="one") for s in make({"scratch": 1})]
    test = [replace(s, group="one") for s in make({"crack": 2}, split="test")]
    rest = make({"fine": 10, "good-too": 10}, split="train")
    rest = [replace(s, label=int(s.defect_type == "fine")) for s in rest]
    with pytest.warns(UserWarning, match=r"1 groups stand in several .*\(one\)"):
        done = assign_splits([*train, *free, *test, *rest], seed=0, val_fraction=0)
    assert [s.split for s in done] == [""] * 3 + ["test"] * 3 + ["train"] * 20


def test_shots_limit_training_and_nothing_else() -> None:
    samples = make({"good": 60, "crack": 30, "hole": 12}, per_group=3)
    full, five, one = (assign_splits(samples, seed=1, shots=shots) for shots in (None, 5, 1))
    for few in (five, one):
        assert all(a.split == b.split for a, b in zip(full, few, strict=True) if a.split != "train")
    train = {name for name, split in split_of(five).items() if split == "train"}
    assert Counter(name.split("/")[0] for name in train) == {"good": 5, "crack": 5, "hole": 5}
    assert {name for name, split in split_of(one).items() if split == "train"} < train
    cracks = [s.group for s in five if s.split == "train" and s.defect_type == "crack"]
    assert len(set(cracks)) == 5  # five different parts, not one part five times


def test_the_last_group_of_a_kind_is_never_taken_from_training() -> None:
    samples = make({"good": 40}, per_group=4) + make({"rare": 6}, per_group=6) + make({"single": 1})
    for seed in range(10):
        assert {("train", "rare"), ("train", "single")} <= table(assign_splits(samples, seed=seed)).keys()


def test_a_large_share_leaves_one_of_every_kind() -> None:
    done = assign_splits(make({"good": 30, "rare": 2, "single": 1}), seed=0, test_fraction=0.95, val_fraction=0)
    assert table(done) == {
        ("test", "good"): 29,
        ("train", "good"): 1,
        ("test", "rare"): 1,
        ("train", "rare"): 1,
        ("train", "single"): 1,
    }


def test_groups_larger_than_the_share() -> None:
    done = assign_splits(make({"good": 24}, per_group=8), seed=0, test_fraction=0.1, val_fraction=0.1)
    assert Counter(s.split for s in done) == {"train": 8, "val": 8, "test": 8}


def test_a_class_of_many_rare_kinds_is_drawn_too() -> None:
    # A fifth of a kind, 2.4 samples, is less than half a group of 6; of all kinds together it is 3.6 groups.
    kinds = {"good": 72} | {f"kind {i}": 12 for i in range(9)}
    for seed in range(5):
        done = assign_splits(make(kinds, per_group=6), seed=seed, test_fraction=0, val_fraction=0.2)
        found = Counter(s.label for s in done if s.split == "val")
        assert abs(found[0] - 14.4) <= 6
        assert abs(found[1] - 21.6) <= 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "data.seed is -1"),
        ({"val_fraction": 1.0}, "data.val_fraction is 1"),
        ({"test_fraction": -0.1}, r"data.test_fraction is -0.1"),
        ({"folds": 1}, "data.folds is 1"),
        ({"folds": 3, "fold": 3}, "data.fold is 3"),
        ({"fold": 1}, "data.fold is 1"),
        ({"shots": 0}, "data.shots is 0"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        assign_splits(make({"good": 9}), **{"seed": 0, **settings})


def test_what_cannot_be_done() -> None:
    with pytest.raises(UserError, match="prescribes its test split"):
        assign_splits(make({"good": 9}, split="train") + make({"hole": 9}, split="test"), seed=0, folds=3)
    with pytest.raises(DataError, match=r"listed more than once \(good/0000.png\)"):
        assign_splits(make({"good": 1}) * 2, seed=0)
    with pytest.raises(DataError, match=r"test_fraction: 0.25 of 5 samples in 1 groups cannot be drawn"):
        assign_splits(make({"good": 5}, per_group=5), seed=0)
    with pytest.raises(DataError, match="2 folds of 1 groups leave fold"):
        assign_splits(make({"good": 5}, per_group=5), seed=0, folds=2)
    torn = [replace(s, group="x") for s in make({"good": 2}, split="test") + make({"hole": 2}, split="train")]
    with (
        pytest.warns(UserWarning, match="1 groups"),
        pytest.raises(DataError, match=r"classes with the labels \[1\]"),
    ):
        assign_splits(torn, seed=0)


def test_a_written_split_is_read_back(tmp_path: Path) -> None:
    samples = make({"good": 12, "hole, 'ö' \"q\"": 12}, per_group=2)
    done = assign_splits(samples, seed=5, shots=2)
    assert "" in split_of(done).values()  # unused ones are written, too
    write_split(tmp_path / "deep" / "splits.csv", done)
    assert read_split(tmp_path / "deep" / "splits.csv", samples) == done
    with (tmp_path / "deep" / "splits.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["name", "split", "label", "group", "source"]


@pytest.mark.parametrize("split", ["", "train"])
def test_generated_samples_only_train(split: str) -> None:
    samples = make({"good": 40, "a": 20}, split=split) + [
        replace(s, name=f"made/{s.name}", source="sd", split=split) for s in make({"a": 40})
    ]
    done = assign_splits(samples, seed=0, test_fraction=0.25, val_fraction=0.25)
    assert {s.split for s in done if s.source == "sd"} == {"train"}
    real = Counter(s.split for s in done if s.source == "real")
    assert real == ({"train": 45, "val": 15} if split else {"test": 15, "val": 11, "train": 34})


def test_what_was_generated_of_an_evaluated_part_is_not_used() -> None:
    originals = make({"good": 20, "a": 20}, per_group=1)
    made = [replace(s, name=f"made/{s.name}", source="sd", split="train") for s in originals if s.label]
    done = assign_splits(originals + made, seed=0)
    assert torn_groups(done) == []
    split = split_of(done)
    for s in done[len(originals) :]:
        assert s.split == ("train" if split[s.name.removeprefix("made/")] == "train" else "")
    assert Counter(s.split for s in done)[""] > 0


def test_a_split_of_other_data_is_refused(tmp_path: Path) -> None:
    path, samples = tmp_path / "splits.csv", make({"good": 8})
    write_split(path, assign_splits(samples, seed=0))
    with pytest.raises(DataError, match=r"1 samples of the file are not in the data set \(good/0007.png\)"):
        read_split(path, samples[:-1])
    with pytest.raises(DataError, match=r"2 samples of the data set are not in the file \(a/0000.png"):
        read_split(path, samples + make({"a": 2}))
    torn = [replace(s, group="g") for s in samples]
    with pytest.raises(DataError, match=r"1 groups into several splits \(g\)"):
        read_split(path, torn)
    for text, message in (
        ("a,b\n", "expected name,split"),
        ("name,split\nx,training\n", ":2: split 'training'"),
        ("name,split\nx,val\nx,val\n", ":3: 'x' stands in the file twice"),
        ("name,split\nx\n", ":2: the row has not as many cells"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_split(path, samples)
    with pytest.raises(DataError, match="is not there"):
        read_split(tmp_path / "no.csv", samples)


def test_groups_are_written_and_read(tmp_path: Path) -> None:
    path, samples = tmp_path / "groups.csv", make({"good": 3})
    write_groups(path, [s.name for s in samples], ["p", "p", ""])
    assert [s.group for s in read_groups(path, samples)] == ["p", "p", ""]
    # Crops of a photograph take the photograph's group.
    crops = [replace(s, name=f"{s.name}#0,0,8,8") for s in samples]
    assert [s.group for s in read_groups(path, crops)] == ["p", "p", ""]
    # A category's own file: the same group name elsewhere is another part.
    tiles = [replace(s, name=f"{c}/{s.name}") for c in ("tile", "wood") for s in samples]
    both = read_groups(path, read_groups(path, tiles, prefix="tile/"), prefix="wood/")
    assert [s.group for s in both] == ["tile/p", "tile/p", "", "wood/p", "wood/p", ""]


def test_groups_of_other_data_are_refused(tmp_path: Path) -> None:
    path, samples = tmp_path / "groups.csv", make({"good": 3})
    write_groups(path, ["good/0000.png", "elsewhere.png"], ["p", "q"])
    with pytest.raises(DataError, match=r"no row for 2 samples \(good/0001.png, good/0002.png\)"):
        read_groups(path, samples)
    path.write_text("path,group\na,1\na,2\n")
    with pytest.raises(DataError, match=":3: 'a' stands in the file twice"):
        read_groups(path, samples)


@pytest.mark.skipif(not TILES.is_dir(), reason="the magnetic tiles are not beside the project")
def test_real_tiles_split_by_part() -> None:
    with (TILES / "groups.csv").open() as file:
        rows = list(csv.DictReader(file))
    samples = [
        Sample(path=str(TILES / row["path"]), name=row["path"], label=int(kind != "good"), defect_type=kind)
        for row in rows
        for kind in [row["path"].split("/")[1]]
    ]
    samples = read_groups(TILES / "groups.csv", samples)
    assert len({s.group for s in samples}) == 216
    for seed in range(3):
        done = assign_splits(samples, seed=seed)
        assert not torn_groups(done)
        assert {s.name for s in done if not s.split} == set()
        found = table(done)
        for kind, number in Counter(s.defect_type for s in samples).items():
            assert abs(found["test", kind] - number / 4) <= 6  # one part is six photographs
        assert abs(Counter(s.split for s in done)["test"] - 336) <= 6
