"""Generated pictures in the training split: which are taken, which never, and that the real data stay as they were."""

from __future__ import annotations

import csv
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image

from lit_defect.data import ELPV, CustomCrops, DefectDataModule, MVTecAD, PascalVOC
from lit_defect.data.images import read_image
from lit_defect.data.samples import Sample
from lit_defect.data.synthetic import Recipe, choose
from lit_defect.errors import DataError, UserError
from lit_defect.generation.store import About, GeneratedStore, Made
from tests.fakes import damage, make_crops_csv, make_elpv, make_mvtec, make_voc, save

Sources = Iterable[Sample]


@pytest.fixture(autouse=True)
def _few_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have a near-duplicate")
        yield


def generate(
    root: Path,
    sources: Sources,
    *,
    kinds: Iterable[str] = ("crack", "hole"),
    trained_on: Iterable[tuple[str, str]] = (),
    generator: str = "AnomalyDiffusion",
    unmarked: Iterable[str] = (),
) -> Path:
    """A generated data set with an accepted picture of every kind on every source, and a rejected one of each kind.

    The pictures of the `unmarked` kinds have no masks.
    """
    about = About(generator=generator, base={"source": "ours", "fingerprint": "b"}, tokens="t", options={}, seed=0)
    store = GeneratedStore(root, about, trained_on)
    rng = np.random.default_rng(7)
    number = 0
    for i, kind in enumerate(kinds):
        for j, source in enumerate([*sources, None]):
            normal = next(iter(sources)) if source is None else source
            part = read_image(normal.path, box=normal.box)[..., 0]
            picture, mask = damage(rng, part, i)
            made = Made(
                number=number, source=normal.name, source_group=normal.group, category=normal.category,
                defect_type=kind, seed=number, prompt="a *", base="b", tokens="t", sampler="ddim", steps=1,
                strength=0.9, guidance=1.0, reweight="off", mask_source="real", candidates=1, rejected={},
                change_inside=9.0, change_outside=0.0, covered=1.0, contrast=9.0, likeness=float(j), area=0.1,
                accepted=source is not None, reason="" if source is not None else "nothing changed",
                mode="", most_outside=0.0, most_after=0.0, share_changed=0.1, seam=0.0, retried=0,
            )  # fmt: skip
            if source is None:
                store.add(made)
            else:
                store.add(made, np.stack([picture] * 3, -1), None if kind in unmarked else mask > 0)
            number += 1
    store.merge()
    return root


def tiles(tmp_path: Path, **settings: Any) -> Callable[..., MVTecAD]:
    """Makes modules of one few-shot data set: 12 good pictures and 2 of 6 of each kind train, 14 in all."""
    root = tmp_path / "tiles"
    if not root.exists():
        make_mvtec(root)

    def build(synthetic: Any = None, **more: Any) -> MVTecAD:
        options: dict[str, Any] = {
            "setting": "few_shot",
            "val_fraction": 0.0,
            "leakage": "off",
            "with_masks": True,
            "batch_size": 4,
        }
        data = MVTecAD(str(root), synthetic=synthetic, **(options | settings | more))
        data.prepare_data()
        data.setup("fit")
        return data

    return build


def good(data: DefectDataModule, split: str = "train") -> list[Sample]:
    return [s for s in data.samples[split] if s.label == data.normal_class and s.source == "real"]


def made(data: DefectDataModule, split: str = "train") -> list[Sample]:
    return [s for s in data.samples[split] if s.source != "real"]


def names(samples: Iterable[Sample]) -> set[str]:
    return {sample.name for sample in samples}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


# ---- what trains ----------------------------------------------------------------------------------------


def test_accepted_pictures_train_and_the_real_splits_stay(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    plain = build()
    folder = generate(tmp_path / "made", good(plain))
    data = build(str(folder))
    assert [s for s in data.samples["train"] if s.source == "real"] == plain.samples["train"]
    assert all(data.samples[split] == plain.samples[split] for split in ("val", "test", "predict"))
    assert "synthetic_val" not in data.samples
    listed = [row for row in rows(folder / "manifest.csv") if row["accepted"] == "1"]
    assert len(listed) == 24
    assert names(made(data)) == {f"synthetic/{row['image']}" for row in listed}
    first = next(s for s in made(data) if s.defect_type == "hole")
    assert first == Sample(
        path=str(folder / first.name.removeprefix("synthetic/")),
        name=first.name,
        label=1,
        mask=str(folder / "tile" / "ground_truth" / "hole" / f"{Path(first.path).stem}_mask.png"),
        category="tile",
        defect_type="hole",
        source="AnomalyDiffusion",
        split="train",
    )
    assert data.counts() == {
        "train": {"good": 12, "defective": 4 + 24},
        "train (synthetic)": {"good": 0, "defective": 24},
        "test": plain.counts()["test"],
    }


@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
def test_batches_hold_the_pixels_and_masks_of_both(tmp_path: Path, cache: str) -> None:
    build = tiles(tmp_path, cache=cache)
    data = build({"path": generate(tmp_path / "made", good(build())), "holdout": 0.25})
    seen: set[str] = set()
    for split in ("train", "synthetic_val", "test"):
        for batch in data.loader(split, batch_size=5):
            for image, mask, name, path in zip(
                batch["image"], batch["mask"], batch["name"], batch["path"], strict=True
            ):
                sample = next(s for s in data.samples[split] if s.name == name)
                stored = np.asarray(Image.open(path).convert("RGB"))
                np.testing.assert_array_equal(image.numpy(), stored.transpose(2, 0, 1))
                marked = np.asarray(Image.open(sample.mask)) > 0 if sample.mask else np.zeros(stored.shape[:2])
                np.testing.assert_array_equal(mask[0].numpy(), marked)
                seen.add(name)
    assert seen == names(s for split in ("train", "synthetic_val", "test") for s in data.samples[split])
    position = next(i for i, s in enumerate(data.samples["synthetic_val"]) if s.defect_type == "crack")
    picture, mask = data.original("synthetic_val", position)
    held = data.samples["synthetic_val"][position]
    np.testing.assert_array_equal(picture, np.asarray(Image.open(held.path)))
    np.testing.assert_array_equal(mask, np.asarray(Image.open(str(held.mask))) // 255)
    assert len({data.sample_key(s) for split in data.samples for s in data.samples[split]}) == 16 + 24 + 14


def test_a_ratio_multiplies_the_real_defects_and_larger_ones_contain_smaller_ones(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    taken = {ratio: made(build({"path": folder, "ratio": ratio})) for ratio in (0.25, 1, 1.5, 3)}
    assert {ratio: len(samples) for ratio, samples in taken.items()} == {0.25: 1, 1: 4, 1.5: 6, 3: 12}
    assert names(taken[0.25]) < names(taken[1]) < names(taken[1.5]) < names(taken[3])
    assert Counter(s.defect_type for s in taken[3]) == {"crack": 6, "hole": 6}
    again, other = (names(made(build({"path": folder, "ratio": 3}, seed=seed))) for seed in (0, 1))
    assert again == names(taken[3]) != other
    with pytest.warns(
        UserWarning, match=r"ratio 9 asks for 36 defective pictures \(4 real ones train\) and 24 are there"
    ):
        assert len(made(build({"path": folder, "ratio": 9}))) == 24


def test_generated_pictures_of_the_data_set_itself_are_not_multiplied(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    data = build()
    first = next(s for s in data.samples["train"] if s.label)
    listed = [replace(s, source="cutpaste") if s == first else s for s in data._divided]
    recipe = Recipe.of({"path": folder, "ratio": 2})
    assert len(choose(recipe, data._divided, label_of=data.label_of, normal_class=0, seed=0).samples) == 8
    assert len(choose(recipe, listed, label_of=data.label_of, normal_class=0, seed=0).samples) == 6


def test_numbers_of_every_type_and_of_some(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))

    def kinds(**options: Any) -> dict[str, int]:
        return dict(Counter(s.defect_type for s in made(build({"path": folder} | options))))

    assert kinds(per_type=3) == {"crack": 3, "hole": 3}
    assert kinds(types=["hole"]) == {"hole": 12}
    assert kinds(types=["hole"], ratio=1) == {"hole": 4}
    assert kinds(types={"hole": 5, "crack": 2}) == {"hole": 5, "crack": 2}
    three, five = (names(made(build({"path": folder, "per_type": number}))) for number in (3, 5))
    assert three < five
    with pytest.warns(UserWarning, match="fewer pictures than asked for: tile/crack has 12"):
        assert kinds(types={"hole": 5, "crack": 20}) == {"hole": 5, "crack": 12}
    with pytest.raises(DataError, match=r"no accepted picture of crck: crack, hole\. Did you mean crack"):
        kinds(types=["crck"])


def test_a_share_takes_the_turns_of_normal_pictures_and_leaves_the_real_defects_theirs(tmp_path: Path) -> None:
    """With generated pictures counted to the defects, of 28 of which 4 are real, these would be 1 in 14."""
    build = tiles(tmp_path, sampler="balanced", batch_size=8, batches_per_epoch=60)
    data = build({"path": str(generate(tmp_path / "made", good(build()))), "share": 0.25})
    drawn = [data.samples["train"][i] for batch in data.train_dataloader() for i in batch["index"]]
    counts = Counter("made" if s.source != "real" else s.label for s in drawn)
    assert {kind: count / len(drawn) for kind, count in counts.items()} == pytest.approx(
        {"made": 0.25, 0: 0.25, 1: 0.5}, abs=0.02
    )
    assert len({s.name for s in drawn if s.source != "real"}) == 24


@pytest.mark.parametrize("target", ["binary", "defects"])
def test_alone_generated_defects_train_and_the_real_ones_are_written_down_as_unused(
    tmp_path: Path, target: str
) -> None:
    build = tiles(tmp_path, target=target)
    plain = build()
    folder = str(generate(tmp_path / "made", good(tiles(tmp_path)())))
    both, data = build(folder), build({"path": folder, "alone": True})
    real = [s for s in data.samples["train"] if s.source == "real"]
    assert real == good(plain)
    assert made(data) == made(both)
    assert data.samples["test"] == plain.samples["test"]
    data.write_records(tmp_path / "records")
    kept_out = {s.name for s in plain.samples["train"] if s not in real}
    assert len(kept_out) == 4
    assert {row["name"] for row in rows(tmp_path / "records" / "splits.csv") if row["split"] == "unused"} == kept_out


def test_alone_generated_defects_must_stand_for_every_class(tmp_path: Path) -> None:
    build = tiles(tmp_path, target="defects")
    folder = generate(tmp_path / "made", good(tiles(tmp_path)()), kinds=["crack"])
    with pytest.raises(UserError, match=r"alone leaves nothing of hole: generate some"):
        build({"path": str(folder), "alone": True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "shuffle"}, r"a share of balanced batches: set data\.sampler to balanced"),
        ({"target": "defects"}, "the turns of normal ones, and no normal one trains"),
        ({"share": 0.5}, r"share is 0\.5; normal pictures, one of 2 classes, are 1/2 of what is drawn"),
    ],
)
def test_a_share_that_cannot_be_given_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    build = tiles(tmp_path, sampler="balanced")
    folder = generate(tmp_path / "made", good(build()))
    data = build({"path": str(folder), "share": settings.pop("share", 0.25)}, **settings)
    with pytest.raises(UserError, match=message):
        data.train_dataloader()


def test_predictions_on_the_training_pictures_show_generated_ones_too(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    for shown, splits in (("train", ["train"]), ("test", ["test"]), ("all", ["train", "test"])):
        data = build({"path": folder, "holdout": 0.5}, predict_split=shown)
        served = [name for batch in data.predict_dataloader() for name in batch["name"]]
        assert served == [s.name for split in splits for s in data.samples[split]]


# ---- what is held out -----------------------------------------------------------------------------------


def test_held_out_pictures_come_from_parts_of_their_own_whatever_trains(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    part = {f"synthetic/{row['image']}": row["source"] for row in rows(folder / "manifest.csv")}
    data = build({"path": folder, "holdout": 0.25})
    held, trained = made(data, "synthetic_val"), made(data)
    assert data.samples["synthetic_val"] == held
    assert {s.split for s in held} == {"synthetic_val"}
    assert len(held) == 3 * 2
    assert len(trained) == 9 * 2
    assert not {part[s.name] for s in held} & {part[s.name] for s in trained}
    assert [name for batch in data.loader("synthetic_val") for name in batch["name"]] == [s.name for s in held]
    assert data.counts()["synthetic_val"] == {"good": 0, "defective": 6}
    few = build({"path": folder, "holdout": 0.25, "ratio": 1})
    assert few.samples["synthetic_val"] == held
    assert len(made(few)) == 4
    more = build({"path": folder, "holdout": 0.5})
    assert names(held) < names(more.samples["synthetic_val"])
    for split in ("val", "test"):
        assert not made(data, split)
    with pytest.raises(DataError, match=r"data\.synthetic\.holdout above 0"):
        build(folder).loader("synthetic_val")
    one = generate(tmp_path / "one", good(build())[:1])
    with pytest.raises(DataError, match="were made from one part"):
        build({"path": one, "holdout": 0.2})


@pytest.mark.parametrize("known", ["groups.csv", "auto"])
def test_parts_photographed_twice_are_held_out_whole(tmp_path: Path, known: str) -> None:
    root = make_mvtec(tmp_path / "tiles", shots_per_part=2)
    if known == "auto":
        (root / "tile" / "groups.csv").unlink()
    build = tiles(tmp_path)
    plain = build()
    folder = generate(tmp_path / "made", good(plain))
    data = build({"path": folder, "holdout": 0.4}, group_file="auto" if known == "auto" else None)
    group = {s.name: s.group for s in good(data)}
    part = {f"synthetic/{row['image']}": group[row["source"]] for row in rows(folder / "manifest.csv")}
    assert all(s.group and s.group == part[s.name] for split in ("train", "synthetic_val") for s in made(data, split))
    held, trained = ({s.group for s in made(data, split)} for split in ("synthetic_val", "train"))
    assert held
    assert not held & trained
    if known == "auto":  # joined by the pictures of the data set alone
        assert {s.name: s.group for s in data._divided} == {s.name: s.group for s in build(group_file="auto")._divided}


# ---- what must not train --------------------------------------------------------------------------------


def test_pictures_whose_source_does_not_train_are_left_out_and_counted(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    plain = build(val_fraction=0.25)
    stranger = Sample(path=good(plain)[0].path, name="tile/train/good/999.png", label=0, category="tile")
    other = Sample(path=good(plain)[0].path, name="rug/train/good/000.png", label=0, category="rug")
    sources = [*good(plain), *good(plain, "val"), *good(plain, "test"), stranger, other]
    folder = generate(tmp_path / "made", sources)
    with pytest.warns(UserWarning, match="that they were made from do not train") as caught:
        data = build({"path": folder, "types": ["hole"]}, val_fraction=0.25)
    counted = {
        "another category": 2, "a type not asked for": len(sources) - 1, "source in val": len(good(plain, "val")),
        "source in test": len(good(plain, "test")), "source not in the data set": 1,
    }  # fmt: skip
    told = next(str(w.message) for w in caught if "do not train" in str(w.message))
    assert all(f"{reason}: {number}" in told for reason, number in counted.items() if reason.startswith("source"))
    source = {f"synthetic/{row['image']}": row["source"] for row in rows(folder / "manifest.csv")}
    assert {source[s.name] for s in made(data)} == names(good(plain))
    data.write_records(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "synthetic.json").read_text())
    assert record["left_out"] == counted
    assert (record["generator"], record["train"]) == ("AnomalyDiffusion", len(good(plain)))
    useless = generate(tmp_path / "useless", good(plain, "test"))
    with pytest.raises(DataError, match=r"no picture of .*useless can be used \(source in test: 12\)"):
        build(useless, val_fraction=0.25)


@pytest.mark.parametrize("by", ["name", "group", "part", "first of a group"])
def test_a_generator_that_learnt_from_the_test_is_refused(tmp_path: Path, by: str) -> None:
    build = tiles(tmp_path)
    plain = build()
    crack = next(s for s in plain.samples["test"] if s.defect_type == "crack")
    hole = next(s for s in plain.samples["train"] if s.defect_type == "hole")
    group_file = None
    if by in ("group", "part"):
        pairs = [(s.name, "p" if s.name in (crack.name, "tile/test/crack/005.png") else "") for s in plain._divided]
        (tmp_path / "g.csv").write_text("path,group\n" + "".join(f"{name},{group}\n" for name, group in pairs))
        group_file = str(tmp_path / "g.csv")
    learnt = {
        "name": (crack.name, ""),
        "group": ("elsewhere.png", "p"),
        "part": ("tile/test/crack/005.png", ""),
        "first of a group": ("elsewhere.png", crack.name),
    }[by]
    folder = generate(tmp_path / "made", good(plain), trained_on=[(hole.name, hole.group), learnt])
    with pytest.raises(DataError, match=r"learnt from \d pictures, or their parts, that test here .*test/crack/00"):
        build(folder, group_file=group_file)
    honest = generate(tmp_path / "honest", good(plain), trained_on=[(hole.name, hole.group)])
    build(honest, group_file=group_file)
    with pytest.warns(UserWarning, match="mirrored training pictures"):
        mirrored = build(folder, group_file=group_file, test="mirrored_train")
    assert names(mirrored.samples["test"]) == {
        f"{s.name}#mirrored" for s in mirrored.samples["train"] if not made_by(s)
    }


def made_by(sample: Sample) -> bool:
    return sample.name.startswith("synthetic/")


def test_a_generator_that_learnt_from_the_validation_is_told_and_recorded(tmp_path: Path) -> None:
    build = tiles(tmp_path, val_fraction=0.25)
    plain = build()
    validates = plain.samples["val"][0].name
    folder = generate(tmp_path / "made", good(plain), trained_on=[(validates, ""), (good(plain)[0].name, "")])
    with pytest.warns(UserWarning, match="learnt from 1 pictures, or their parts, that validate here"):
        data = build(folder)
    data.write_records(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "synthetic.json").read_text())["learnt_validation"] == [validates]


def test_one_class_data_take_no_defects(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    with pytest.raises(UserError, match=r"one_class trains on good pictures only"):
        build(folder, setting="one_class")


def test_the_guard_compares_generated_pictures_with_the_test(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    copied = Path(next(s.path for s in made(build({"path": folder, "holdout": 0.1})) if s.defect_type == "crack"))
    tested = next(s for s in build().samples["test"] if s.defect_type == "crack")
    save(np.asarray(Image.open(tested.path).convert("RGB"))[:, ::-1], copied)
    for cache in ("ram", "disk"):
        with pytest.warns(UserWarning, match="near-duplicate"):
            data = build({"path": folder, "holdout": 0.1}, leakage="warn", cache=cache)
        pair = next(leak for leak in data.leaks if leak.name_b == tested.name and leak.orientation == "mirrored")
        assert pair.name_a == "synthetic/tile/test/crack/" + copied.name
        assert pair.distance == pytest.approx(0, abs=1e-3)
        assert {split for leak in data.leaks for split in (leak.split_a, leak.split_b)} == {"train", "test"}
    data.write_records(tmp_path / "run")
    assert (tmp_path / "run" / "leakage.png").is_file()
    assert {row["path"] for row in rows(tmp_path / "run" / "groups.csv")} == names(data._divided)
    with pytest.raises(DataError, match="near-duplicate"):
        build(folder, leakage="error")


# ---- classes and layouts --------------------------------------------------------------------------------


def test_labels_are_those_of_the_types(tmp_path: Path) -> None:
    build = tiles(tmp_path, target="type")
    folder = generate(tmp_path / "made", good(build()), kinds=["hole", "crack", "scratch", "good"])
    data = build({"path": folder, "types": ["hole", "crack"]})
    assert {(s.defect_type, s.label) for s in made(data)} == {("crack", 1), ("hole", 2)}
    with pytest.raises(DataError, match="pictures of scratch, which is no class of this"):
        build({"path": folder, "types": ["scratch"]})
    assert {s.label for s in made(build({"path": folder, "types": ["scratch"]}, target="binary"))} == {1}
    with pytest.raises(DataError, match="pictures of good"):
        build({"path": folder, "types": ["hole", "good"]}, target="defects")


def test_normal_pictures_train_as_such_without_a_mask(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()), kinds=["crack", "good"])  # with a mask, as inpainting has
    data = build(folder)
    fine = [s for s in made(data) if s.defect_type == "good"]
    assert len(fine) == 12
    assert {(s.label, s.mask) for s in fine} == {(0, None)}
    assert data.counts()["train (synthetic)"] == {"good": 12, "defective": 12}
    for batch in data.loader("train"):
        for mask, name in zip(batch["mask"], batch["name"], strict=True):
            assert not mask.any() or name not in names(fine)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ratio": 0.5}, {"good": 6, "crack": 2}),  # 12 good ones and 4 defects train
        ({"ratio": 1, "types": ["good"]}, {"good": 12}),
        ({"per_type": 5}, {"good": 5, "crack": 5}),
        ({"types": {"good": 3}}, {"good": 3}),
    ],
)
def test_numbers_of_normal_pictures(tmp_path: Path, options: dict[str, Any], expected: dict[str, int]) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()), kinds=["crack", "good"], unmarked=["good"])
    assert Counter(s.defect_type for s in made(build({"path": folder} | options))) == expected


def test_normal_pictures_are_held_out_and_share_the_turns_of_generated_ones(tmp_path: Path) -> None:
    build = tiles(tmp_path, sampler="balanced", batch_size=8, batches_per_epoch=40)
    folder = generate(tmp_path / "made", good(build()), kinds=["crack", "hole", "good"], unmarked=["good"])
    data = build({"path": str(folder), "share": 0.25, "holdout": 0.25})
    assert Counter(s.defect_type for s in made(data, "synthetic_val")) == {"crack": 3, "hole": 3, "good": 3}
    drawn = [data.samples["train"][i] for batch in data.train_dataloader() for i in batch["index"]]
    counts = Counter(("made" if s.source != "real" else "real", s.label) for s in drawn)
    shares = {kind: count / len(drawn) for kind, count in counts.items()}
    expected = {("made", 0): 0.25 / 3, ("made", 1): 0.5 / 3, ("real", 0): 0.25, ("real", 1): 0.5}
    assert shares == pytest.approx(expected, abs=0.03)
    with pytest.raises(UserError, match="alone leaves nothing of crack, hole"):
        build({"path": str(folder), "alone": True, "types": ["good"]})


def test_defects_without_masks_train_where_no_masks_are_asked_for(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()), kinds=["crack"], unmarked=["crack"])
    assert len(made(build(folder, with_masks=False))) == 12
    with pytest.raises(DataError, match=r"mask missing: 12[^$]*with_masks=false[^$]*a defect, but no mask is given"):
        build(folder)


def test_a_picture_made_from_a_defective_one_needs_that_one_to_train(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    plain = build()
    cracks = {split: [s for s in plain.samples[split] if s.defect_type == "crack"] for split in ("train", "test")}
    folder = generate(tmp_path / "made", cracks["train"] + cracks["test"], kinds=["crack", "good"])
    with pytest.warns(UserWarning, match=r"source in test: 8"):
        data = build(folder)
    data.write_records(tmp_path / "run")
    used = {row["made_from"] for row in rows(tmp_path / "run" / "synthetic.csv")}
    assert used == names(cracks["train"])
    assert Counter(s.defect_type for s in made(data)) == {"crack": 2, "good": 2}
    assert len(made(build(generate(tmp_path / "some", cracks["train"]), target="defects"))) == 4


def test_kinds_of_defect_are_told_apart_without_the_pictures_behind_them(tmp_path: Path) -> None:
    """Good pictures are not in the data set, so none is evaluated; but a part of which a defect is."""
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", [replace(s, group=s.name) for s in good(build())])
    data = build(folder, target="defects")
    assert {(s.defect_type, s.label) for s in made(data)} == {("crack", 0), ("hole", 1)}
    assert len(made(data)) == len(made(build(folder)))
    assert not good(data)
    seen = sorted({row["made_from"] for row in rows_of(data, tmp_path)})
    test = next(s.name for s in data.samples["test"])
    everything = [
        path.relative_to(tmp_path / "tiles").as_posix() for path in (tmp_path / "tiles").rglob("test/*/*.png")
    ]
    groups = tmp_path / "parts.csv"
    groups.write_text("path,group\n" + "".join(f"{name},{seen[0] if name == test else ''}\n" for name in everything))
    with pytest.warns(UserWarning, match=r"2 generated pictures are not used.*source of a part that is evaluated: 2"):
        fewer = build(folder, target="defects", group_file=str(groups))
    assert {row["made_from"] for row in rows_of(fewer, tmp_path)} == set(seen[1:])


def rows_of(data: DefectDataModule, tmp_path: Path) -> list[dict[str, str]]:
    data.write_records(tmp_path / "records")
    return rows(tmp_path / "records" / "synthetic.csv")


def test_several_categories_take_their_own(tmp_path: Path) -> None:
    make_mvtec(tmp_path / "tiles", categories=("rug", "tile"))
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    both = Counter((s.category, s.defect_type) for s in made(build({"path": folder, "per_type": 2})))
    assert both == {(category, kind): 2 for category in ("rug", "tile") for kind in ("crack", "hole")}
    assert {s.category for s in made(build(folder, category="rug"))} == {"rug"}


def test_crops_of_photographs(tmp_path: Path) -> None:
    make_crops_csv(tmp_path / "photos", masks=True)
    settings: dict[str, Any] = {"annotations": "crops.csv", "leakage": "off", "val_fraction": 0, "with_masks": True}

    def build(**more: Any) -> CustomCrops:
        data = CustomCrops(str(tmp_path / "photos"), **(settings | more))
        data.setup("fit")
        return data

    plain = build()
    folder = generate(tmp_path / "made", good(plain), kinds=["defective"])
    data = build(synthetic=folder)
    assert {(s.label, s.group, s.box) for s in made(data)} == {(1, s.group, None) for s in good(plain)}
    assert next(iter(data.train_dataloader()))["image"].shape[1:] == (3, 24, 24)
    photo = plain.samples["test"][0].group
    leaky = generate(tmp_path / "leaky", good(plain), kinds=["defective"], trained_on=[("another crop", photo)])
    with pytest.raises(DataError, match="that test here"):
        build(synthetic=leaky)


@pytest.mark.filterwarnings("ignore:data.synthetic")
def test_solar_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_elpv(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    plain = ELPV(leakage="off")
    plain.setup("fit")
    folder = generate(tmp_path / "made", good(plain), kinds=["defective"])
    data = ELPV(leakage="off", synthetic=str(folder), grades="four")
    data.setup("fit")
    assert {s.label for s in made(data)} == {3}
    assert {s.category for s in made(data)} == {"mono", "poly"}


@pytest.mark.filterwarnings("ignore:data.synthetic")
@pytest.mark.parametrize(
    ("grades", "labels"), [("binary", (0, 0, 1, 1)), ("four", (0, 1, 2, 3)), ("extremes", (0, None, None, 1))]
)
def test_solar_cells_of_all_grades(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grades: Any, labels: tuple[int | None, ...]
) -> None:
    make_elpv(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    plain = ELPV(leakage="off")
    plain.setup("fit")
    kinds = ("good", "defective 1/3", "defective 2/3", "defective")
    folder = generate(tmp_path / "made", plain.samples["train"], kinds=kinds, unmarked=kinds)

    def build(*types: str) -> ELPV:
        data = ELPV(leakage="off", synthetic={"path": str(folder), "types": [*types]}, grades=grades)
        data.setup("fit")
        return data

    there = {kind: label for kind, label in zip(kinds, labels, strict=True) if label is not None}
    assert {(s.defect_type, s.label) for s in made(build(*there))} == set(there.items())
    if None in labels:
        with pytest.raises(DataError, match="pictures of defective 1/3, which is no class"):
            build("defective 1/3")


def test_masks_of_classes_are_no_masks_of_defects(tmp_path: Path) -> None:
    make_voc(tmp_path)
    with pytest.raises(UserError, match=r"data\.synthetic: masks of generated pictures mark defects"):
        PascalVOC(str(tmp_path), synthetic=str(tmp_path))
    PascalVOC(str(tmp_path), synthetic=None)


# ---- files ----------------------------------------------------------------------------------------------


def test_records_list_what_was_used_and_splits_are_of_the_real_samples(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    plain = build()
    folder = generate(tmp_path / "made", good(plain))
    options = {"path": folder, "ratio": 2, "holdout": 0.25}
    data = build(options)
    plain.write_records(tmp_path / "plain")
    data.write_records(tmp_path / "run")
    assert (tmp_path / "run" / "splits.csv").read_text() == (tmp_path / "plain" / "splits.csv").read_text()
    assert not (tmp_path / "plain" / "synthetic.csv").exists()
    used = {row["name"]: row for row in rows(tmp_path / "run" / "synthetic.csv")}
    source = {f"synthetic/{row['image']}": row["source"] for row in rows(folder / "manifest.csv")}
    assert {name: row["split"] for name, row in used.items()} == {
        s.name: split for split in ("train", "synthetic_val") for s in made(data, split)
    }
    assert all(row["made_from"] == source[name] for name, row in used.items())
    record = json.loads((tmp_path / "run" / "synthetic.json").read_text())
    assert (record["train"], record["synthetic_val"]) == (8, 6)
    assert record["left_out"] == {"more than asked for": 24 - 14}
    for run, synthetic, count in (("run", None, 0), ("plain", options, 8), ("run", options, 8)):
        again = build(synthetic, seed=0, split_file=str(tmp_path / run / "splits.csv"))
        assert {s: names(again.samples[s]) - names(made(again, s)) for s in ("train", "test")} == {
            s: names(plain.samples[s]) for s in ("train", "test")
        }
        assert len(made(again)) == count


def test_bad_files_stop_the_run_or_are_left_out(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    cracks = sorted((folder / "tile" / "test" / "crack").glob("*.png"))
    cracks[0].write_bytes(b"no picture")
    save(np.zeros((32, 40), np.uint8), folder / "tile" / "ground_truth" / "crack" / f"{cracks[1].stem}_mask.png")
    save(np.full((9, 9), 255, np.uint8), folder / "tile" / "ground_truth" / "crack" / f"{cracks[2].stem}_mask.png")
    with pytest.raises(DataError) as caught:
        build(folder)
    for kind, path in zip(("unreadable", "empty mask", "mask of another size"), cracks, strict=False):
        assert kind in str(caught.value)
        assert f"synthetic/tile/test/crack/{path.name}" in str(caught.value)
    with pytest.warns(UserWarning, match="Left out of the data set"):
        data = build(folder, on_bad_file="skip")
    assert len(made(data)) == 24 - 3
    data.write_records(tmp_path / "run")
    assert len(rows(tmp_path / "run" / "skipped.csv")) == 3
    assert len(rows(tmp_path / "run" / "synthetic.csv")) == 21
    data.loader("train").batch(list(range(len(data.samples["train"]))))
    cracks[0].unlink()
    with pytest.raises(DataError, match="is not there, but"):
        build(folder, on_bad_file="skip")


def test_only_what_is_used_is_looked_at(tmp_path: Path) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    used = {s.path for s in made(build({"path": folder, "ratio": 1}))}
    for path in (folder / "tile" / "test").glob("*/*.png"):
        if str(path) not in used:
            path.write_bytes(b"no picture")
    data = build({"path": folder, "ratio": 1}, cache="disk")
    assert {s.path for s in made(data)} == used


@pytest.mark.parametrize("fault", ["no folder", "foreign", "unfinished", "real", "clash"])
def test_folders_that_are_no_generated_data_set(tmp_path: Path, fault: str) -> None:
    build = tiles(tmp_path)
    folder = tmp_path / "made"
    if fault != "no folder":
        generate(folder, good(build()), generator="real" if fault == "real" else "AnomalyDiffusion")
    if fault == "foreign":
        (folder / "about.json").write_text("{}")
    if fault == "unfinished":
        (folder / "manifest.csv").unlink()
    if fault == "clash":
        crack = next((folder / "tile" / "test" / "crack").glob("*.png"))
        make_mvtec(tmp_path / "tiles" / "synthetic", itself=True)
        home = tmp_path / "tiles" / "synthetic"
        text = (folder / "manifest.csv").read_text()
        (folder / "manifest.csv").write_text(text.replace(f"tile/test/crack/{crack.name}", "test/crack/000.png"))
        save(np.asarray(Image.open(crack)), folder / "test" / "crack" / "000.png")
        assert (home / "test" / "crack" / "000.png").is_file()
    message = {
        "no folder": "is no generated data set: it has no about.json",
        "foreign": "is not of a generated data set",
        "unfinished": "its generation has not finished",
        "real": "names its generator 'real'",
        "clash": "the names of generated ones .synthetic/test/crack/000.png",
    }[fault]
    with pytest.raises(DataError, match=message):
        build(folder)


# ---- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, r"data\.synthetic\.ratio is 0; expected more than 0"),
        ({"ratio": float("nan")}, r"ratio is nan"),
        ({"per_type": 0}, r"data\.synthetic\.per_type is 0; expected 1 or more"),
        ({"holdout": 1.0}, r"data\.synthetic\.holdout is 1; expected at least 0"),
        ({"share": 0.0}, r"data\.synthetic\.share is 0; expected more than 0"),
        ({"types": []}, r"data\.synthetic\.types is \[\]; expected names"),
        ({"types": {"crack": 0}}, r"expected names, or a number of 1 or more"),
        ({"ratio": 1, "per_type": 2}, "exclude each other"),
        ({"ratio": 1, "types": {"crack": 2}}, "exclude each other"),
        ({"rato": 1}, r"data\.synthetic has no rato; it has path, ratio"),
        ({"path": ""}, r"data\.synthetic\.path is missing"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.of({"path": "made"} | options)


def test_a_ratio_needs_real_defects(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "tiles", defects={"crack": 2})  # the first third of two pictures is none
    assert root.exists()
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()), kinds=["crack"])
    with pytest.raises(UserError, match=r"there are none; give data\.synthetic\.per_type"):
        build({"path": folder, "ratio": 2})
    assert len(made(build({"path": folder, "per_type": 2}))) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", [["{folder}"], ["{{path: {folder}, ratio: 1}}"], [None, "path", "ratio"]])
def test_the_command_line_takes_a_folder_or_options(tmp_path: Path, words: list[str]) -> None:
    build = tiles(tmp_path)
    folder = generate(tmp_path / "made", good(build()))
    given = ["--data.synthetic", words[0].format(folder=folder)] if words[0] else []
    for key, value in zip(words[1:], (str(folder), "1"), strict=False):
        given += [f"--data.synthetic.{key}", value]
    arguments = ["--data", "MVTecAD", "--data.root", str(tmp_path / "tiles"), "--data.setting", "few_shot", *given]
    cli = LightningCLI(
        BoringModel, DefectDataModule, subclass_mode_data=True, run=False, save_config_callback=None, args=arguments
    )
    cli.datamodule.setup("fit")
    defects = sum(s.label == 1 and s.source == "real" for s in cli.datamodule.samples["train"])
    wanted = defects if len(words) > 1 or "ratio" in str(words[0]) else 2 * len(good(cli.datamodule))
    assert len(made(cli.datamodule)) == wanted


class Recorder(pl.LightningModule):
    """Notes what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[str] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen += batch["name"]
        return self.layer(batch["label"].float()[:, None]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_sees_both_and_its_checkpoint_opens_with_weights_only(tmp_path: Path) -> None:
    build = tiles(tmp_path, drop_last=False)
    data = build({"path": generate(tmp_path / "made", good(build())), "ratio": 2, "holdout": 0.25})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    task = Recorder()
    trainer.fit(task, data)
    assert sorted(task.seen) == sorted(names(data.samples["train"]))
    assert sum(name.startswith("synthetic/") for name in task.seen) == 8
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["datamodule_hyper_parameters"]["synthetic"]
    assert stored == {"path": str(tmp_path / "made"), "ratio": 2, "holdout": 0.25}


# ---- the few-shot split that the generator and its judges share ------------------------------------------


def test_few_shot_is_the_first_third_and_the_rest_exactly(tmp_path: Path) -> None:
    sizes = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "f": 8, "g": 9}
    make_mvtec(tmp_path / "tiles", defects=sizes, size=(12, 12))
    data = tiles(tmp_path)()
    for kind, n in sizes.items():
        files = sorted((tmp_path / "tiles" / "tile" / "test" / kind).glob("*.png"))
        assert len(files) == n
        found = {split: [s.path for s in data.samples[split] if s.defect_type == kind] for split in ("train", "test")}
        assert sorted(found["train"]) == [str(file) for file in files[: n // 3]]
        assert sorted(found["test"]) == [str(file) for file in files[n // 3 :]]
    assert not {s.path for s in data.samples["train"]} & {s.path for s in data.samples["test"]}
