"""Any architecture and encoder of segmentation-models-pytorch (smp), with weights, for images of any size.

    images in [0, 1] -> pad to the network's multiple -> normalise -> encoder -> decoder -> logits (B, C, H, W), cut

The encoder is one of smp's own (`resnet34`, `mit_b0`, ...) or, as `tu-<name>`, any of timm's. Its weights follow the
table of `weights.py`:

| weights | smp's own encoder | `tu-` encoder |
|---|---|---|
| `null` | random | random |
| `hub`, `hub:TAG` | smp's weights of that tag; `imagenet` where it has one | timm's |
| a file, `package:NAME` | of the encoder, or of torchvision's or timm's same network | as `weights.py` has it |

Every tensor of the encoder must be found; nothing is loaded by halves. Layers that no output depends on are
dropped (those below `encoder_depth`, a classifier's): they would count as parameters, and stop training on several
GPUs.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_defect.errors import UserError
from lit_defect.nets.canvas import Canvas
from lit_defect.nets.fitting import fingerprint, fit, read_state
from lit_defect.nets.weights import Triple, create_model, find_weights, knock_at_hub, other_ways, own_statistics

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of images in [0, 1]

_OURS = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params")
_OWN_SIZE = "give it the pictures' size by model.init_args.options: {img_size: ...}, or choose another encoder"
_BUILD_ERRORS = (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError, NotImplementedError)


class SegmentationNet(nn.Module):
    """An smp network with its normalisation.

    The state_dict is the network's (prefix `model.`), the mean and the std.

    Args:
        model: smp's network.
        mean, std: of the images that the encoder's weights expect, for images in [0, 1].
        name: what was built, for the fingerprint.
    Attributes:
        multiple: what the network needs height and width to be divisible by; `forward` pads to it.
        least: sides that the network needs at least.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: Triple, std: Triple, name: str) -> None:
        super().__init__()
        self.model: Any = model
        self.name = name
        self.multiple = int(model.encoder.output_stride) * (2 if type(model).__name__ == "DPT" else 1)  # it halves
        self.least = 8 * self.multiple if type(model).__name__ == "PAN" else 1  # it halves three times
        self._canvas = Canvas(self.multiple)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, C, H, W).

        Raises:
            UserError: the encoder is built for pictures of another size, or the batch is too small to be trained on.
        """
        height, width = images.shape[-2:]
        try:
            return self._canvas(self._logits, images)
        except AssertionError as error:  # of transformers with windows
            raise UserError(
                f"model.init_args.encoder: {self.name} does not take pictures of {height}x{width}: {error}; {_OWN_SIZE}"
            ) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # of BatchNorm
                raise
            raise UserError(
                f"{self.name} averages the picture to one value per channel, and its BatchNorm cannot be trained on "
                f"a batch of {len(images)} picture of {height}x{width}: raise data.init_args.batch_size to 2 or more "
                "(and have no last batch of 1), or choose another model.init_args.architecture, such as unet"
            ) from error

    def _logits(self, padded: Tensor) -> Tensor:
        self._check_size(padded)
        return self.model((padded - self.mean) / self.std)

    def _check_size(self, padded: Tensor) -> None:
        height, width = padded.shape[-2:]
        if min(height, width) < self.least:
            raise UserError(f"{self.name} takes pictures of {self.least}x{self.least} or more, not {height}x{width}")
        for module in self.model.encoder.modules():
            size: Any = getattr(module, "img_size", None)
            if getattr(module, "strict_img_size", False) and size and (height, width) != tuple(size):
                raise UserError(
                    f"model.init_args.encoder: {self.name} is built for pictures of {size[0]}x{size[1]}, not "
                    f"{height}x{width}; {_OWN_SIZE}"
                )

    def fingerprint(self) -> str:
        """Identity of the map from images to logits: equal for equal networks and weights."""
        return fingerprint(self.state_dict(), prefix=self.name)


def make_segmenter(
    architecture: str,
    encoder: str,
    weights: str | None,
    *,
    classes: int,
    options: dict[str, Any] | None = None,
) -> SegmentationNet:
    """The network called `architecture` on the encoder called `encoder`.

    Args:
        architecture: smp's name in any case: unet, UnetPlusPlus, deeplabv3plus, segformer, dpt, ...
        encoder: one of smp's, or `tu-` and timm's name.
        weights: of the encoder; see the table at the top of the file. The decoder starts at random.
        classes: C, at least 1.
        options: further arguments of smp's class (`encoder_depth`, `decoder_channels`, ...), and for a `tu-` encoder of
            timm's (`img_size`, `drop_path_rate`, ...).

    Raises:
        UserError: unknown architecture, encoder or option, a combination that smp does not build, or weights
            that are missing, out of reach or do not fit.
    """
    kind = _architecture(architecture)
    _check_encoder(encoder)
    given = dict(options or {})
    for_timm = _check_options(kind, encoder, given)
    if encoder.startswith("tu-"):
        model, for_timm = _build_with_timm(kind, encoder, classes, given, for_timm)
        mean, std = _load_timm(model.encoder, encoder.removeprefix("tu-"), weights, for_timm)
    else:
        model = _build(kind, encoder, classes, given)
        mean, std = _load_smp(model.encoder, encoder, weights)
    name = f"{kind.__name__} with {encoder}" + (f" {json.dumps(given, sort_keys=True, default=str)}" if given else "")
    network = SegmentationNet(model, mean, std, name)
    _drop_unused(network, _own_size(encoder, for_timm))
    return network


# --- names and options ---


def _architecture(name: str) -> Any:
    """smp's class; U-Net, UNet++ and DeepLabV3+ are understood as their authors write them."""
    import segmentation_models_pytorch as smp

    known = smp.MODEL_ARCHITECTURES_MAPPING
    plain = name.lower().replace("+", "plus").replace("-", "").replace("_", "")
    if plain not in known:
        raise UserError(
            f"model.init_args.architecture = {name!r}: unknown{_near(plain, known)}; there is {', '.join(known)}"
        )
    return known[plain]


def _check_encoder(name: str) -> None:
    import timm
    from segmentation_models_pytorch.encoders import get_encoder_names

    own, timms = get_encoder_names(), timm.list_models()
    if name in own or (name.startswith("tu-") and timm.is_model(name.removeprefix("tu-"))):
        return
    if timm.is_model(name):
        raise UserError(f"model.init_args.encoder = {name!r}: a network of timm's is written tu-{name}")
    near = _near(name, [*own, *(f"tu-{timm_name}" for timm_name in timms)])
    raise UserError(
        f"model.init_args.encoder = {name!r}: neither an encoder of segmentation-models-pytorch nor tu- and a network "
        f"of timm's{near}"
    )


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=4, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _check_options(kind: Any, encoder: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not smp's own but timm's."""
    known = [
        name
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in ("self", *_OURS) and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    others = {name: value for name, value in options.items() if name not in known}
    for name in others:
        # smp drops what an own encoder does not know without a word.
        misspelt = not encoder.startswith("tu-") or bool(difflib.get_close_matches(name, known, n=1, cutoff=0.8))
        if name in _OURS or misspelt:
            raise UserError(
                f"model.init_args.options: {name!r} is no option of {kind.__name__} with {encoder}"
                f"{_near(name, known)}; there is {', '.join(known)}"
            )
    return others


# --- building ---


def _build(kind: Any, encoder: str, classes: int, options: dict[str, Any]) -> Any:
    try:
        return kind(encoder_name=encoder, encoder_weights=None, in_channels=3, classes=classes, **options)
    except _BUILD_ERRORS as error:
        raise UserError(
            f"model.init_args: segmentation-models-pytorch cannot build {kind.__name__} with the encoder {encoder}"
            f"{f' and the options {options}' if options else ''}: {error}"
        ) from error


def _build_with_timm(
    kind: Any, encoder: str, classes: int, options: dict[str, Any], for_timm: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The network, and what timm was asked for.

    Transformers that are built for one size are asked to take any, unless the size is among the options.
    """
    if kind.__name__ == "DPT":
        options = options | {"num_classes": 0}  # smp keeps the whole timm network, its classifier too
    any_size = ({"dynamic_img_size": True}, {"strict_img_size": False})  # ViT's word for it, and Swin's
    chosen = {"img_size", "dynamic_img_size", "strict_img_size"} & for_timm.keys()
    for more in any_size if _own_size(encoder, {}) and not chosen else ():
        try:
            return _build(kind, encoder, classes, options | more), for_timm | more
        except UserError as error:
            if not isinstance(error.__cause__, TypeError):
                raise
    return _build(kind, encoder, classes, options), for_timm


def _own_size(encoder: str, for_timm: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) that an encoder is built for; None if it takes any."""
    import timm

    config: Any = timm.models.get_pretrained_cfg(encoder.removeprefix("tu-")) if encoder.startswith("tu-") else None
    if config is None or not config.fixed_input_size:
        return None
    size = for_timm.get("img_size", config.input_size[1:])
    return (size, size) if isinstance(size, int) else tuple(size)


def _drop_unused(network: SegmentationNet, size: tuple[int, int] | None) -> None:
    """Put an identity in place of every layer that the logits do not depend on."""
    side = max(4 * network.multiple, network.least)
    height, width = size or (side, side)
    network.eval()
    parameters = dict(network.model.named_parameters())
    try:
        with torch.enable_grad():
            logits = network(torch.zeros(1, 3, height, width))
    except (RuntimeError, ValueError) as error:  # of encoders whose maps are not the halves of one another
        raise UserError(
            f"model.init_args.encoder: {network.name} does not run on a picture of {height}x{width}: {error}; choose "
            "another encoder"
        ) from error
    gradients = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
    network.train()
    used = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    dropped: list[str] = []
    for name, module in list(network.model.named_modules()):
        inside = [f"{name}.{key}" for key, _ in module.named_parameters()]
        if name and inside and not used.intersection(inside) and not name.startswith(tuple(dropped)):
            dropped.append(f"{name}.")
            network.model.set_submodule(name, nn.Identity())


# --- weights ---


def _load_timm(encoder: Any, name: str, weights: str | None, arguments: dict[str, Any]) -> tuple[Triple, Triple]:
    """Fill smp's wrapper of a timm network from timm's own network; gives mean and std."""
    if weights is None:
        return IMAGENET
    try:
        full = create_model(name, weights, num_classes=0, **arguments)
    except UserError:
        # A checkpoint of a segmenter holds the encoder alone, under the names of smp's wrapper.
        path = Path(weights).expanduser()
        state = read_state(path) if path.is_file() else {}
        if not state or fit(encoder.model, state, classifier="fc"):
            raise
        mean, std = own_statistics(state)
        return (mean, std) if mean and std else IMAGENET
    # timm's wrappers for features join the names of nested layers by underscores, and may stand before them.
    source = {key.replace(".", "_"): tensor for key, tensor in full.state_dict().items()}
    filled, missing = {}, []
    for key, tensor in encoder.model.state_dict().items():
        flat = key.replace(".", "_")
        found = source.get(flat, source.get(flat.removeprefix("model_")))
        if found is None or found.shape != tensor.shape:
            missing.append(key)
        else:
            filled[key] = found
    if missing:
        raise UserError(
            f"model.init_args.weights = {weights}: {len(missing)} tensors of the encoder tu-{name} are not among "
            f"timm's ({', '.join(missing[:3])}); choose another encoder"
        )
    encoder.model.load_state_dict(filled)
    return tuple(full.pretrained_cfg["mean"]), tuple(full.pretrained_cfg["std"])


def _load_smp(encoder: nn.Module, name: str, weights: str | None) -> tuple[Triple, Triple]:
    """Fill one of smp's own encoders; gives mean and std."""
    if weights is None:
        return IMAGENET
    kind, _, tag = weights.partition(":")
    if kind == "hub":
        path, mean, std = _hub_file(name, tag)
        state = read_state(path)
    else:
        found = find_weights(weights, name)
        path, state = found.path, read_state(found.path)
        own_mean, own_std = (found.mean, found.std) if found.mean else own_statistics(state)
        mean, std = (own_mean, own_std) if own_mean and own_std else IMAGENET
    misfit = fit(encoder, state, classifier="fc")
    if misfit:
        raise UserError(f"model.init_args.weights: {path} does not fit the encoder {name}.\n{misfit}")
    return mean, std


def _hub_file(name: str, tag: str) -> tuple[Path, Triple, Triple]:
    """The cached file of smp's weights, with mean and std; asks the network only when there is none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from segmentation_models_pytorch.encoders import encoders

    offered = encoders[name]["pretrained_settings"]
    wanted = tag or ("imagenet" if "imagenet" in offered else next(iter(offered), ""))
    if wanted not in offered:
        tags = ", ".join(offered) or "none"
        raise UserError(f"model.init_args.weights = hub:{tag}: no weights of {name} on the hub; its tags are: {tags}")
    repo, revision = offered[wanted]["repo_id"], offered[wanted]["revision"]
    paths = []
    for file in ("config.json", "model.safetensors"):
        cached = try_to_load_from_cache(repo, file, revision=revision)
        if not isinstance(cached, str):
            try:
                knock_at_hub()
                cached = hf_hub_download(repo, file, revision=revision)
            except Exception as error:  # the client's errors have changed their base class between versions
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise UserError(
                    f"model.init_args.weights: could not fetch {repo} from the hub ({reason}).\n"
                    f"{other_ways('hub', name)}\n- an encoder of timm's with weights that you have: encoder: tu-NAME"
                ) from error
        paths.append(Path(cached))
    config = json.loads(paths[0].read_text(encoding="utf-8"))
    if config.get("input_space", "RGB") != "RGB":
        raise UserError(f"model.init_args.weights: those of {name} ({wanted}) are for BGR pictures; choose another tag")
    scale = config.get("input_range", (0, 1))[1]  # 255 for weights that were trained on bytes
    mean, std = (tuple(value / scale for value in config[key]) for key in ("mean", "std"))
    return paths[1], mean, std
