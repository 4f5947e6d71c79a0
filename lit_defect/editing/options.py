"""How pictures are edited: what of them, by which function, how strongly, and what is accepted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lit_defect.errors import UserError

KEY = "model.init_args.edit"
NETWORK_KEY = "model.init_args.network"

Mode = Literal["img2img", "inpaint", "instruct_pix2pix", "variation", "reference_only", "ip_adapter"]
Content = Literal["original", "fill", "latent_noise", "latent_nothing"]
NO_MASK = "none"


@dataclass(frozen=True)
class Network:
    """How the pipeline is opened.

    Attributes:
        dtype: of its weights and computation; `auto` is float16 on GPUs (bfloat16 where the trainer's precision says
            so) and float32 on the CPU.
        lora: folders or hub names with LoRA weights of diffusers, or runs of a `StableDiffusionLoRA`.
        lora_scale: of all of them, or one for each.
        embeddings: textual-inversion files or hub names; the token is the one that the file names.
        ip_adapter: folder or hub name, with the file's path in it behind a colon:
            `h94/IP-Adapter:models/ip-adapter_sd15.safetensors`.
        ip_adapter_scale: how much the reference counts.
        attention_slicing: less memory, slower.
        vae_slicing: pictures through the autoencoder one at a time.
        vae_tiling: large pictures through the autoencoder in tiles.
        offload: parts of the network rest in main memory: `none`, `model`, `sequential`.

    Raises:
        UserError: a number out of range.
    """

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    lora: list[str] = field(default_factory=list)
    lora_scale: float | list[float] = 1.0
    embeddings: list[str] = field(default_factory=list)
    ip_adapter: str | None = None
    ip_adapter_scale: float = 0.6
    attention_slicing: bool = False
    vae_slicing: bool = True
    vae_tiling: bool = False
    offload: Literal["none", "model", "sequential"] = "none"

    def __post_init__(self) -> None:
        if isinstance(self.lora_scale, list) and len(self.lora_scale) != len(self.lora):
            raise UserError(
                f"{NETWORK_KEY}.lora_scale = {self.lora_scale}: expected one number, or one for each of the "
                f"{len(self.lora)} in {NETWORK_KEY}.lora"
            )
        for key, numbers in (("lora_scale", self.lora_scales), ("ip_adapter_scale", [self.ip_adapter_scale])):
            if not all(number >= 0 for number in numbers):
                raise UserError(f"{NETWORK_KEY}.{key} = {getattr(self, key)}: expected 0 or more")

    @property
    def lora_scales(self) -> list[float]:
        """Of each LoRA."""
        return self.lora_scale if isinstance(self.lora_scale, list) else [self.lora_scale] * len(self.lora)


@dataclass(frozen=True)
class Edit:
    """Options of an editing; those of other modes are of no effect.

    Attributes:
        sources: types of the pictures that are edited, such as `good` or `crack`; null for the normal class.
        result: type of what comes out, or several, of which each picture gets each; null for its own type.
        count: pictures asked for of each category, type of source and result, or by type of source; null for one of
            each picture.
        prompt: a sentence, several (each picture draws one), or either by type of the result. `{category}`, `{type}`
            (of the result) and `{caption}` are put in.
        negative_prompt: what guidance leads away from.
        captioner: image-to-text model of transformers (hub name or folder) that makes `{caption}`.
        sampler: as Stable Diffusion's web interface calls it, such as `DPM++ 2M Karras` or `Euler a`.
        steps: of the whole reverse process.
        strength: of denoising; one number, or one for each type of source. Without effect in `instruct_pix2pix` and
            `variation`, which begin with noise.
        steps_convention: how many steps a strength s leaves of N: int(N s) + 1 (`webui`) or int(N s) (`diffusers`).
        guidance: scale of classifier-free guidance; none up to 1.
        image_guidance: of instruct-pix2pix: how closely the source is followed, 1 or more; of no effect without
            guidance.
        noise_level: of `variation` by unCLIP: noise on the picture's embedding, 0 to 1000.
        references: of `reference_only` and `ip_adapter`: a type of training picture, such as `hole`, or a folder, in
            which no picture of the data set may lie that is evaluated. They keep their aspect unless `stretch` is set.
        style_fidelity: of `reference_only`: 0.5 is balanced, 1 is "ControlNet is more important"; cubed with Stable
            Diffusion XL, as the web interface does.
        reference_attention, reference_adain: what of it is done.
        masks: `none` edits all of the picture, `own` what the picture's own mask marks, `augmented` real masks of
            the result's type, moved and changed; `random` blobs on the object; a folder with a mask for each picture
            (`NAME.png`) or for each type (as `MaskDiffusion` writes it); or a list of boxes
            (`path,x,y,width,height`); pictures without a mask of their own or there are left out. Masks of pictures
            that are evaluated are refused. Stable Diffusion 3 and Flux take masks in mode `inpaint` only.
        mask_threshold: grey value from which on a mask's pixel counts; null refuses masks of more than two values.
        mask_area: of `random` masks, least and largest share of the object.
        foreground: where defects may lie: `auto` (estimated), `all`, or a folder of object masks.
        content: what stands in the mask at first.
        mask_blur: standard deviation of the mask's blur, pixels of the picture: it widens the box of `only_masked`, and
            the network draws where the mask is or its blur covers by half. The paste stays within the mask.
        area: whether the `whole` picture goes through the network or `only_masked`, the box of the mask.
        padding: pixels of the picture around that box, before it is enlarged to `size`.
        size: working (height, width); null takes that of the picture (or of the box), padded to what fits.
        stretch: whether a picture is stretched to `size`, as data modules stretch to `image_size` what a base of one's
            own is trained on; else it keeps its aspect, and what is missing is added and cut off again.
        paste: what goes back into the picture, inside the mask only: the `picture`, or the `change` against the
            autoencoder's own reconstruction, so that the grain of the photograph stays; `none` takes it as it comes.
        feather: pixels inside the mask over which an edit fades in.
        put_back: whether the photographs that crops were cut from are written, too, with the edited crop.
        candidates: of each picture, of which the best is taken.
        least_change: grey levels within the mask, on average, below which nothing has happened.
        most_change: grey levels above which it is another picture; null for no limit.
        least_covered: share of the mask that must have changed, where the label is repaired.
        least_contrast: share of the real training defects of the result's type that stand out less from their
            surroundings than an edit has to, where masks are known; 0 lets every candidate pass.
        most_seam: how far the step across the mask's border may exceed the source's own there, grey levels; null for
            no limit.
        repair: whether the label of a new defect is where the picture changed within the mask, not all of it; of no
            effect where the data set is used without masks.
        keep_rejected: whether rejected candidates are written, too.
        batch: pictures that go through the network together; each candidate is one.
        output: folder of the data set; null for `edited` in the run's folder.

    Raises:
        UserError: a number out of range.
    """

    sources: list[str] | None = None
    result: str | list[str] | None = None
    count: int | dict[str, int] | None = None
    prompt: str | list[str] | dict[str, str | list[str]] = "a photo of a {category} with a {type}"
    negative_prompt: str = ""
    captioner: str | None = None
    sampler: str = "DPM++ 2M Karras"
    steps: int = 40
    strength: float | dict[str, float] = 0.75
    steps_convention: Literal["webui", "diffusers"] = "webui"
    guidance: float = 7.0
    image_guidance: float = 1.5
    noise_level: int = 0
    references: str | None = None
    style_fidelity: float = 0.5
    reference_attention: bool = True
    reference_adain: bool = True
    masks: str = NO_MASK
    mask_threshold: int | None = None
    mask_area: tuple[float, float] = (0.005, 0.05)
    foreground: str = "auto"
    content: Content = "original"
    mask_blur: float = 4.0
    area: Literal["whole", "only_masked"] = "whole"
    padding: int = 32
    size: tuple[int, int] | None = None
    stretch: bool = False
    paste: Literal["picture", "change", "none"] = "picture"
    feather: float = 4.0
    put_back: bool = False
    candidates: int = 1
    least_change: float = 3.0
    most_change: float | None = None
    least_covered: float = 0.3
    least_contrast: float = 0.1
    most_seam: float | None = None
    repair: bool = True
    keep_rejected: bool = False
    batch: int = 4
    output: str | None = None

    def __post_init__(self) -> None:
        numbers = self.count.values() if isinstance(self.count, dict) else [self.count]
        if any(number is not None and number < 1 for number in numbers):
            raise UserError(f"{KEY}.count = {self.count}: expected at least 1")
        for key in ("steps", "candidates", "batch"):
            if getattr(self, key) < 1:
                raise UserError(f"{KEY}.{key} = {getattr(self, key)}: expected at least 1")
        strengths = self.strength.values() if isinstance(self.strength, dict) else [self.strength]
        if not all(0 < strength <= 1 for strength in strengths):
            raise UserError(
                f"{KEY}.strength = {self.strength}: expected more than 0 (which changes nothing), at most 1"
            )
        if self.stretch and self.size is None:
            raise UserError(f"{KEY}.stretch = true needs a size: set {KEY}.size to that of the base's training")
        for key in ("style_fidelity", "least_covered", "least_contrast"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{KEY}.{key} = {getattr(self, key)}: expected a number from 0 to 1")
        for key in ("mask_blur", "padding", "feather", "guidance", "least_change"):
            if not getattr(self, key) >= 0:
                raise UserError(f"{KEY}.{key} = {getattr(self, key)}: expected 0 or more")
        if not self.image_guidance >= 1:
            raise UserError(
                f"{KEY}.image_guidance = {self.image_guidance}: expected 1 or more; below that diffusers leaves out "
                "all guidance, that by the prompt, too"
            )
        if not 0 < self.mask_area[0] <= self.mask_area[1] <= 1:
            raise UserError(f"{KEY}.mask_area = {list(self.mask_area)}: expected two rising shares of the object")
        if self.mask_threshold is not None and not 1 <= self.mask_threshold <= 255:
            raise UserError(f"{KEY}.mask_threshold = {self.mask_threshold}: expected a grey value from 1 to 255")
        if not 0 <= self.noise_level <= 1000:
            raise UserError(f"{KEY}.noise_level = {self.noise_level}: expected 0 to 1000")

    def strength_of(self, kind: str) -> float:
        """Of a source of this type.

        Raises:
            UserError: there is none for it.
        """
        return float(self._of("strength", kind))

    def count_of(self, kind: str) -> int | None:
        """Pictures asked for of sources of this type; None for one of each.

        Raises:
            UserError: there is none for it.
        """
        return None if self.count is None else int(self._of("count", kind))

    def _of(self, key: str, kind: str) -> Any:
        value = getattr(self, key)
        if not isinstance(value, dict):
            return value
        if kind not in value:
            raise UserError(f"{KEY}.{key} has none for {kind}; it has {', '.join(value)}")
        return value[kind]

    def resolved(self) -> dict[str, Any]:
        """Every option that decides the pixels."""
        incidental = ("count", "output", "keep_rejected", "batch", "put_back")
        return {key: value for key, value in asdict(self).items() if key not in incidental}
