"""One picture (or one crop of it) and everything that is known about it before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "val", "test", "predict")
REAL = "real"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Identity of one sample; `dataclasses.replace` makes changed copies.

    Attributes:
        path: the picture's file, absolute.
        name: `path` relative to the data set's root with forward slashes (crops append
            `#x,y,width,height`, a mirrored copy `#mirrored`): unique in a data set, and the same
            on every machine.
        label: class index; -1 when unknown (pictures to predict).
        mask: the mask's file, absolute, or None.
        category: the product, such as MVTec AD's `hazelnut`; may be empty.
        defect_type: `good` or the kind of defect; may be empty.
        group: the physical part behind the picture. Samples of one group stay in one split;
            empty means that the sample is its own group.
        source: `real`, or the name of the generator that made the picture.
        box: crop window (x, y, width, height) in pixels of the upright picture, or None for all.
        mirror: whether the picture is flipped left-right after decoding.
        split: the split that the data set's own layout prescribes; empty where it is ours to choose.
    """

    path: str
    name: str
    label: int
    mask: str | None = None
    category: str = ""
    defect_type: str = ""
    group: str = ""
    source: str = REAL
    box: tuple[int, int, int, int] | None = None
    mirror: bool = False
    split: str = ""
