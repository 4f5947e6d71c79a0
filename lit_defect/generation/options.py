"""How defects are generated: what is asked for, how it is sampled, and what is accepted.

    preset   sampler    steps  eta  strength  guidance  reweight  grow  candidates
    paper    ddim       200    1    1.0       1         paper     0     1            Hu et al., section 4
    fast     dpmsolver  10     -    0.9       2         official  1/4   2            36 network evaluations, not 200

Whatever is given beside a preset takes the place of its own value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_defect.errors import UserError

KEY = "model.init_args.generation"

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "sampler": "ddim",
        "steps": 200,
        "eta": 1.0,
        "strength": 1.0,
        "guidance": 1.0,
        "reweight": "paper",
        "grow": 0.0,
        "candidates": 1,
    },
    "fast": {
        "sampler": "dpmsolver",
        "steps": 10,
        "eta": None,
        "strength": 0.9,
        "guidance": 2.0,
        "reweight": "official",
        "grow": 0.25,
        "candidates": 2,
    },
}


@dataclass(frozen=True)
class Generation:
    """Options of a generation; those that are null are the preset's.

    Attributes:
        count: pictures of each (category, defect type) that are asked for; what no candidate passes is left out.
        types: defect types, or null for all that were learnt.
        preset: `fast` or `paper`.
        sampler: `ddpm`, `ddim`, `dpmsolver` or `unipc`.
        steps: of the whole reverse process.
        eta: of DDIM.
        strength: share of the process that is done, starting from the normal picture noised so far.
        guidance: scale of classifier-free guidance; 1 for none.
        reweight: adaptive attention re-weighting: `paper`, `official` (the authors' code) or `off`.
        grow: how far beyond its mask a defect may be drawn at first, as a share of the shorter side; less with every
            step, and in the end the normal picture is back there. The authors' code has 0.25 with its re-weighting.
        candidates: of each picture, of which the best is taken.
        masks: `augmented` real masks, or a folder that `MaskDiffusion` wrote.
        foreground: where a defect may lie: `auto` (estimated), `all`, or a folder of object masks.
        paste: what goes into the normal picture: the `change` against its own reconstruction, so that its grain stays
            whatever the base can't hold, or the generated `picture` as it is (the paper's, which keeps all of it).
        restore: whether the `change` is enlarged by the contrast that the autoencoder takes of real defects of its type
            (`generation.judgement.contrast_gain`); small defects need it. Nothing to do with `picture`.
        feather: pixels of the picture inside the mask over which the defect fades in.
        least_change: grey levels within the mask, on average, below which nothing has changed.
        least_covered: share of the mask that must have changed.
        least_contrast: share of the real training defects of a type that stand out less from their surroundings than a
            generated one has to; 0 lets every candidate pass.
        most_contrast: with a `change`, share of the real training defects of a type that stand out more than a
            generated one may: one that would is weakened until it stands out as a real one, drawn at random, does; 0
            leaves all.
        repair: whether the label is where the picture changed within the mask, not all of the mask.
        keep_rejected: whether rejected candidates are written, too.
        batch: pictures that go through the network together, each with its candidates, and twice under guidance;
            the same pictures on any number of processes.
        output: folder of the data set; null for `generated` in the run's folder.

    Raises:
        UserError: a number out of range.
    """

    count: int = 100
    types: list[str] | None = None
    preset: Literal["fast", "paper"] = "fast"
    sampler: Literal["ddpm", "ddim", "dpmsolver", "unipc"] | None = None
    steps: int | None = None
    eta: float | None = None
    strength: float | None = None
    guidance: float | None = None
    reweight: Literal["paper", "official", "off"] | None = None
    grow: float | None = None
    candidates: int | None = None
    masks: str = "augmented"
    foreground: str = "auto"
    paste: Literal["change", "picture"] = "change"
    restore: bool = True
    feather: float = 2.0
    least_change: float = 3.0
    least_covered: float = 0.3
    least_contrast: float = 0.1
    most_contrast: float = 0.1
    repair: bool = True
    keep_rejected: bool = False
    batch: int = 8
    output: str | None = None

    def __post_init__(self) -> None:
        for key in ("count", "batch", "candidates"):
            number = getattr(self, key)
            if number is not None and number < 1:
                raise UserError(f"{KEY}.{key} = {number}: expected at least 1")
        if self.guidance is not None and not self.guidance >= 1:
            raise UserError(f"{KEY}.guidance = {self.guidance}: expected 1 (none) or more")
        if self.grow is not None and not 0 <= self.grow <= 1:
            raise UserError(f"{KEY}.grow = {self.grow}: expected a share of the shorter side, 0 to 1")
        for key in ("least_contrast", "most_contrast"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{KEY}.{key} = {getattr(self, key)}: expected a share from 0 to 1")
        if self.least_contrast + self.most_contrast > 1:
            raise UserError(
                f"{KEY}.least_contrast and {KEY}.most_contrast leave no defect: expected no more than 1 in sum"
            )
        if not self.feather >= 0:
            raise UserError(f"{KEY}.feather = {self.feather}: expected pixels, 0 or more")

    def resolved(self) -> Mapping[str, Any]:
        """Every option that decides the pixels, the preset's where none is given."""
        given = asdict(self)
        own = PRESETS[self.preset]
        if given["sampler"] not in (None, own["sampler"]):
            own = own | {"eta": None}  # the preset's belongs to its sampler
        filled = {key: own[key] if key in own and value is None else value for key, value in given.items()}
        incidental = ("count", "types", "preset", "output", "keep_rejected", "batch")
        return {key: value for key, value in filled.items() if key not in incidental}
