"""Generated pictures that train beside the real ones: `data.synthetic`, for every data module with {0, 1} masks.

    data.synthetic: generated/                       all accepted pictures of a generated data set train
    data.synthetic: {path: generated/, ratio: 2, types: [crack, hole], holdout: 0.2}
    data.synthetic: {path: generated/, share: 0.25}      a quarter of each batch, with sampler: balanced

Most are defects; normal pictures train as such, and have no mask whatever the set says. A defect may lack its mask
where the data set is used without masks (`data.with_masks`).

1. Offered are the accepted pictures of the manifest (`lit_defect.generation.store`) whose category is in the data set
   and whose type is asked for.
2. A picture made from one, normal or defective, that does not train here is left out: it shows what is evaluated.
   Where a data set is used without its normal pictures none of them is, and of those made from them only the ones whose
   part is evaluated are left out. Of pictures that are not of the data set (`about.json` says so: an editing of
   `data.predict_root`) nobody knows what part they show; they train, and only the search for near-duplicates of
   `data.leakage` compares what was made of them with the test.
3. A generator that learnt from what tests here is refused, one that learnt from what validates is warned of; what a
   base of one's own was trained on is part of that.
4. What was made from a share `holdout` of the pictures behind them is a split of its own, "synthetic_val", to select
   models on. It does not depend on `ratio` and `per_type`: runs that differ in them are selected on the same pictures.
5. Of the rest, all train or as many as are asked for. Each picture has a lot, a hash of the seed and its name: the
   types take turns and give their lowest lots first, so a larger number contains the smaller one.

The real samples and their splits are those of the same settings without `synthetic`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Required, TypedDict

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_defect.data.samples import REAL, Sample
from lit_defect.data.splits import UNUSED, some
from lit_defect.errors import DataError, UserError
from lit_defect.generation.store import Row, read_about, read_manifest, read_trained_on

SYNTHETIC_VAL = "synthetic_val"
PREFIX = "synthetic/"  # of the names of generated pictures
OTHER_CATEGORY, OTHER_TYPE, FOREIGN = "another category", "a type not asked for", "source not in the data set"
EVALUATED = "source of a part that is evaluated"
SPARE = "more than asked for"
_GENERATED = -1  # no class has it


class SyntheticOptions(TypedDict, total=False):
    """How a configuration writes `data.synthetic`.

    Attributes:
        path: folder of a generated data set.
        ratio: defects to train on, as a multiple of the real defective training pictures, and normal pictures as the
            same multiple of the real normal ones; null takes all.
        types: names of the types to use (that of the normal class, such as `good`, is one), or how many pictures of
            each; null takes all types.
        per_type: so many pictures of every type. As in `types`, a type of two categories counts as two.
        holdout: share of the pictures behind them that is held out as `synthetic_val`.
        share: how much of what is drawn is generated, of whatever class, where the sampler is `balanced`. They take
            the turns of normal pictures, so that real defects come up as often as without them; null counts them to
            their class.
        alone: whether real defects are kept out of training, as in the protocol of AnomalyDiffusion's authors.
    """

    path: Required[str]
    ratio: float | None
    types: list[str] | dict[str, int] | None
    per_type: int | None
    holdout: float
    share: float | None
    alone: bool


@dataclass(frozen=True)
class Recipe:
    """`data.synthetic`, checked; the attributes are those of `SyntheticOptions`."""

    path: Path
    ratio: float | None = None
    types: list[str] | dict[str, int] | None = None
    per_type: int | None = None
    holdout: float = 0.0
    share: float | None = None
    alone: bool = False

    @classmethod
    def of(cls, value: str | Path | Mapping[str, Any]) -> Recipe:
        """Raises UserError if an option is unknown, out of range, or contradicts another."""
        options = dict(value) if isinstance(value, Mapping) else {"path": value}
        if strange := options.keys() - cls.__dataclass_fields__.keys():
            raise UserError(f"data.synthetic has no {some(strange)}; it has {', '.join(cls.__dataclass_fields__)}.")
        if not options.get("path"):
            raise UserError("data.synthetic.path is missing: the folder of a generated data set.")
        recipe = cls(**{**options, "path": Path(options["path"]).expanduser().absolute()})
        recipe._check()
        return recipe

    def _check(self) -> None:
        if self.ratio is not None and not 0 < self.ratio < math.inf:
            raise UserError(f"data.synthetic.ratio is {self.ratio:g}; expected more than 0, or null for all pictures.")
        if self.per_type is not None and self.per_type < 1:
            raise UserError(f"data.synthetic.per_type is {self.per_type}; expected 1 or more, or null for all.")
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.synthetic.holdout is {self.holdout:g}; expected at least 0 and less than 1.")
        if self.share is not None and not 0 < self.share < 1:
            raise UserError(f"data.synthetic.share is {self.share:g}; expected more than 0 and less than 1, or null.")
        numbers = self.types if isinstance(self.types, dict) else {}
        if self.types is not None and (not self.types or any(number < 1 for number in numbers.values())):
            raise UserError(f"data.synthetic.types is {self.types}; expected names, or a number of 1 or more for each.")
        if sum((self.ratio is not None, self.per_type is not None, bool(numbers))) > 1:
            raise UserError("data.synthetic: ratio, per_type and numbers in types exclude each other; give one.")

    def most(self, kind: str) -> int | None:
        """How many pictures of a type may train; None for any number."""
        return self.types[kind] if isinstance(self.types, dict) else self.per_type


def alone(real: Sequence[Sample], generated: Sequence[Sample], normal_class: int | None) -> list[Sample]:
    """The real samples with the defects of the training split unused, whose place generated ones take.

    Raises:
        UserError: of a class that defects trained there is no generated picture.
    """
    wanted = {(s.label, s.defect_type) for s in real if s.split == "train" and s.label != normal_class}
    there = {s.label for s in generated if s.split == "train"}
    if missing := sorted({kind for label, kind in wanted if label not in there}):
        raise UserError(f"data.synthetic.alone leaves nothing of {some(missing)}: generate some, or leave alone out.")
    return [replace(s, split=UNUSED) if s.split == "train" and s.label != normal_class else s for s in real]


def turns(samples: Sequence[Sample], normal_class: int | None, share: float) -> tuple[list[int], dict[int, float]]:
    """By which labels training samples are drawn, and how often, so that generated ones are `share` of the draws.

    Classes take turns equally often, but for the normal one, which gives up the turns of the generated pictures.

    Raises:
        UserError: there are no normal pictures, or they have fewer turns than that.
    """
    real = {sample.label for sample in samples if sample.source == REAL}
    if normal_class not in real:
        raise UserError(
            "data.synthetic.share gives generated pictures the turns of normal ones, and no normal one trains: "
            "leave it out"
        )
    assert normal_class is not None
    if share >= 1 / len(real):
        raise UserError(
            f"data.synthetic.share is {share:g}; normal pictures, one of {len(real)} classes, are 1/{len(real)} of "
            "what is drawn: expected less"
        )
    weights = dict.fromkeys(real, 1 / len(real)) | {normal_class: 1 / len(real) - share, _GENERATED: share}
    return [sample.label if sample.source == REAL else _GENERATED for sample in samples], weights


@dataclass(frozen=True)
class Choice:
    """The generated pictures that a run uses, and how it came to them.

    Attributes:
        samples: with the split `train` or `synthetic_val`, by name.
        made_from: name of the picture behind each, by the sample's name.
        left_out: how many accepted pictures are not used, by reason.
        learnt_validation: names of the validation pictures that the generator learnt from.
        about: the generated data set's `about.json`.
    """

    recipe: Recipe
    samples: list[Sample]
    made_from: Mapping[str, str]
    left_out: Counter[str]
    learnt_validation: list[str]
    about: Mapping[str, Any]

    def write(self, folder: Path, used: Sequence[Sample]) -> None:
        """Writes synthetic.csv, a line for each of the `used` samples (what inspection left), and synthetic.json."""
        header = ("name", "split", "label", "category", "defect_type", "group", "made_from")
        with (folder / "synthetic.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(
                [header, *([getattr(s, key) for key in header[:-1]] + [self.made_from[s.name]] for s in used)]
            )
        splits = Counter(sample.split for sample in used)
        content = {
            "path": str(self.recipe.path),
            **{key: self.about.get(key) for key in ("generator", "base", "tokens", "seed")},
            "train": splits["train"],
            SYNTHETIC_VAL: splits[SYNTHETIC_VAL],
            "left_out": dict(self.left_out.most_common()),
            "learnt_validation": self.learnt_validation,
        }
        (folder / "synthetic.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def choose(
    recipe: Recipe,
    real: Sequence[Sample],
    *,
    label_of: Callable[[str], int | None],
    normal_class: int | None,
    seed: int,
    by_design: bool = False,
    unused: Collection[str] = (),
) -> Choice:
    """The generated pictures that train beside `real`, and those that are held out.

    Args:
        real: all samples of the data set, with their splits; generated ones that it lists itself are no real defects.
        label_of: label of a defect type; None if the data set has no such class.
        normal_class: label of the pictures without a defect; None if there is no such class.
        seed: decides the lots.
        by_design: the test shows training pictures anyway (`mirrored_train`): the generator may know them.
        unused: names of normal pictures of the data set that are not among `real`, as none of them is used.

    Raises:
        DataError: the folder holds no finished generated data set, the generator learnt from what tests, a type is
            unknown, a name is taken, or nothing is left to train on.
        UserError: `ratio` without a real picture to multiply.
    """
    about = read_about(recipe.path)
    generator = about.get("generator")
    if not isinstance(generator, str) or generator in ("", REAL):
        raise DataError(f"{recipe.path}: about.json names its generator {generator!r}; expected a name but '{REAL}'.")
    validated = [] if by_design else _learnt(recipe.path, real)
    place = {sample.name: sample for sample in real}
    offered, left_out = _offered(recipe, [row for row in read_manifest(recipe.path) if row["accepted"]], place)
    found = {row["defect_type"]: label_of(row["defect_type"]) for row in offered}
    labels = {kind: label for kind, label in found.items() if label is not None}
    if odd := found.keys() - labels.keys():
        raise DataError(
            f"{recipe.path} has pictures of {some(odd)}, which is no class of this data set. "
            "Generate from the same data set, or leave the type out of data.synthetic.types."
        )
    evaluated = {sample.group for sample in real if sample.split in ("val", "test") and sample.group}
    foreign = bool(about.get("options", {}).get("foreign"))  # then names that are the data set's, too, mean others
    usable = [row for row in offered if foreign or _trains(row, place, unused, evaluated, left_out)]
    _tell(recipe, len(usable), left_out)
    # A group file of this run may know of more parts than the generator did.
    known = {sample.name: sample.group for sample in real if sample.group and not foreign}
    groups = {row["source"]: known.get(row["source"]) or row["source_group"] for row in usable}
    held, rest = _hold_out(recipe, usable, groups, seed)
    drawn = []
    for normal in (False, True):
        alike = [row for row in rest if (labels[row["defect_type"]] == normal_class) == normal]
        trained = sum(s.split == "train" and (s.label == normal_class) == normal and s.source == REAL for s in real)
        drawn += _draw(recipe, alike, trained, "normal" if normal else "defective", seed)
    if spare := len(rest) - len(drawn):
        left_out[SPARE] = spare

    samples = []
    for split, rows in (("train", drawn), (SYNTHETIC_VAL, held)):
        for row in rows:
            label = labels[row["defect_type"]]
            made = _sample(recipe.path, row, label, groups[row["source"]], generator, split)
            samples.append(replace(made, mask=None) if label == normal_class else made)
    if taken := {sample.name for sample in samples} & place.keys():
        raise DataError(f"the data set has pictures of its own with the names of generated ones ({some(taken)}).")
    made_from = {PREFIX + row["image"]: row["source"] for row in usable}
    return Choice(recipe, sorted(samples, key=lambda s: s.name), made_from, left_out, validated, about)


def _learnt(root: Path, real: Sequence[Sample]) -> list[str]:
    """Names of the validation pictures that the generator has learnt from, with a warning; DataError for the test.

    A picture is known to it by name, or by another picture of its part.
    """
    trained_on = read_trained_on(root)
    known = {text for entry in trained_on for text in entry if text}
    known |= {sample.group for sample in real if sample.group and sample.name in known}
    names: dict[str, list[str]] = {
        split: sorted(s.name for s in real if s.split == split and known & {s.name, s.group})
        for split in ("val", "test")
    }
    if names["test"]:
        raise DataError(
            f"the generator of {root} has learnt from {len(names['test'])} pictures, or their parts, that test here "
            f"({some(names['test'])}): its pictures tell of the test. Set data.split_file to the splits.csv of the "
            "run that trained it, or train it on this split."
        )
    if names["val"]:
        rank_zero_warn(
            f"data.synthetic: the generator has learnt from {len(names['val'])} pictures, or their parts, that "
            f"validate here ({some(names['val'])}), which flatters validation. Set data.split_file to the splits.csv "
            "of the run that trained it."
        )
    return names["val"]


def _offered(recipe: Recipe, accepted: Sequence[Row], place: Mapping[str, Sample]) -> tuple[list[Row], Counter[str]]:
    """The accepted pictures of the data set's categories and the recipe's types, and how many are not."""
    categories = {sample.category for sample in place.values()}
    here = [row for row in accepted if row["category"] in categories]
    kinds = {row["defect_type"] for row in here}
    for kind in recipe.types or ():
        if kind not in kinds:
            near = get_close_matches(kind, kinds, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            there = some(kinds) or "none for this data set's categories"
            raise DataError(f"data.synthetic.types: {recipe.path} has no accepted picture of {kind}: {there}.{hint}")
    offered = [row for row in here if recipe.types is None or row["defect_type"] in recipe.types]
    left_out = Counter({OTHER_CATEGORY: len(accepted) - len(here), OTHER_TYPE: len(here) - len(offered)})
    return offered, +left_out


def _trains(
    row: Row, place: Mapping[str, Sample], unused: Collection[str], evaluated: Collection[str], left_out: Counter[str]
) -> bool:
    """Whether the picture behind a generated one trains, or might; if not, it is counted."""
    source = place.get(row["source"])
    if source is not None:
        fault = "" if source.split == "train" else f"source in {source.split or 'no split'}"
    else:
        fault = FOREIGN if row["source"] not in unused else EVALUATED if row["source_group"] in evaluated else ""
    if fault:
        left_out[fault] += 1
    return not fault


def _tell(recipe: Recipe, usable: int, left_out: Counter[str]) -> None:
    """Warns of pictures that are left out for their sources; DataError if nothing else is there."""
    lost = {reason: number for reason, number in left_out.items() if reason.startswith("source")}
    reasons = ", ".join(f"{reason}: {number}" for reason, number in lost.items())
    if not usable:
        told = ", ".join(f"{reason}: {number}" for reason, number in left_out.items()) or "it has accepted none"
        raise DataError(
            f"data.synthetic: no picture of {recipe.path} can be used ({told}). Generate from the training pictures of "
            "this data set, with the same data.root and split."
        )
    if lost:
        rank_zero_warn(
            f"data.synthetic: {sum(lost.values())} generated pictures are not used, as the pictures that they "
            f"were made from do not train ({reasons})."
        )


def _hold_out(recipe: Recipe, rows: Sequence[Row], groups: Mapping[str, str], seed: int) -> tuple[list[Row], list[Row]]:
    """Those that are held out and the others; what was made from one part stays together."""
    if not recipe.holdout:
        return [], list(rows)
    part = {source: group or source for source, group in groups.items()}
    units = sorted(set(part.values()), key=lambda unit: _lot(seed, "holdout", unit))
    if len(units) < 2:
        raise DataError(
            f"data.synthetic.holdout: all pictures of {recipe.path} that can be used were made from one part, and what "
            "is held out must come from others. Generate from more pictures, or set it to 0."
        )
    number = min(max(1, math.floor(recipe.holdout * len(units) + 0.5)), len(units) - 1)
    chosen = set(units[:number])
    held = [row for row in rows if part[row["source"]] in chosen]
    return held, [row for row in rows if part[row["source"]] not in chosen]


def _draw(recipe: Recipe, rows: Sequence[Row], real: int, what: str, seed: int) -> list[Row]:
    """As many as the recipe asks for, the types in turn and within a type by lot; all if there are no more.

    Args:
        recipe: what is asked for.
        rows: defects, or normal pictures.
        real: how many real ones of that kind train.
        what: `defective` or `normal`.
        seed: decides the lots.
    """
    kinds: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _lot(seed, "draw", row["image"])):
        kinds[row["category"], row["defect_type"]].append(row)
    few = {kind: len(found) for kind, found in kinds.items() if len(found) < (recipe.most(kind[1]) or 0)}
    if few:
        told = ", ".join(f"{'/'.join(filter(None, kind))} has {number}" for kind, number in sorted(few.items()))
        rank_zero_warn(f"data.synthetic: fewer pictures than asked for: {told}. They all train.")
    capped = [found[: recipe.most(kind)] for (_, kind), found in kinds.items()]
    if recipe.ratio is None or not rows:
        return [row for found in capped for row in found]
    if not real:
        raise UserError(
            f"data.synthetic.ratio multiplies the real {what} training pictures, and there are none; "
            "give data.synthetic.per_type."
        )
    wanted = max(1, math.floor(recipe.ratio * real + 0.5))
    if wanted > len(rows):
        rank_zero_warn(
            f"data.synthetic.ratio {recipe.ratio:g} asks for {wanted} {what} pictures ({real} real ones train) and "
            f"{len(rows)} are there. They all train."
        )
    turns = [(turn, row) for found in capped for turn, row in enumerate(found)]
    turns.sort(key=lambda entry: (entry[0], _lot(seed, "draw", entry[1]["image"])))
    return [row for _, row in turns[:wanted]]


def _sample(root: Path, row: Row, label: int, group: str, generator: str, split: str) -> Sample:
    return Sample(
        path=str(root / row["image"]),
        name=PREFIX + row["image"],
        label=label,
        mask=str(root / row["mask"]) if row["mask"] else None,
        category=row["category"],
        defect_type=row["defect_type"],
        group=group,
        source=generator,
        split=split,
    )


def _lot(seed: int, *words: str) -> bytes:
    return hashlib.blake2b("\0".join((str(seed), *words)).encode(), digest_size=16).digest()
