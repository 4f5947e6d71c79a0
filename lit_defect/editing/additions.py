"""What is put on top of a pipeline: LoRA, words of textual inversion, an IP-Adapter.

Each comes from a folder or file here, or from the hub as `owner/name`, with the file's path behind a colon where there
are several: `h94/IP-Adapter:models/ip-adapter_sd15.safetensors`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lit_defect.diffusion.pipeline_files import reason
from lit_defect.editing.options import KEY, NETWORK_KEY
from lit_defect.errors import UserError
from lit_defect.generation.store import find_trained_on
from lit_defect.nets.weights import knock_at_hub

LORA = "pytorch_lora_weights.safetensors"
Pictures = set[tuple[str, str]]


class _Place(NamedTuple):
    """Where weights are.

    Attributes:
        home: folder, or repository of the hub.
        file: path in it; None where it need not be told.
        options: of loading.
    """

    home: str
    file: str | None
    options: dict[str, Any]

    @property
    def trained_on(self) -> Pictures:
        return find_trained_on(Path(self.home))


def add_loras(pipe: Any, sources: list[str], scales: list[float]) -> Pictures:
    """Load LoRA weights beside one another; gives the pictures of one's own that they were trained on.

    Args:
        pipe: of diffusers.
        sources: folders, files, runs of a `StableDiffusionLoRA` (with a folder `lora`), or repositories.
        scales: of each.

    Raises:
        UserError: nothing there, a hub out of reach, or weights that are not for this model.
    """
    trained_on: Pictures = set()
    names = [f"lora_{number}" for number in range(len(sources))]
    for name, source in zip(names, sources, strict=True):
        with _loading("lora", source):
            place = _find("lora", source, "lora")
            pipe.load_lora_weights(place.home, weight_name=place.file, adapter_name=name, **place.options)
            if not any(name in loaded for loaded in pipe.get_list_adapters().values()):
                raise ValueError("none of its weights is for a network of this model")
            trained_on |= place.trained_on
    if names:
        pipe.set_adapters(names, adapter_weights=scales)
    return trained_on


def add_embeddings(pipe: Any, sources: list[str]) -> tuple[list[str], Pictures]:
    """Load words of textual inversion; gives them, and the pictures of one's own that they were trained on.

    Some files hold no word: those for Stable Diffusion XL, of `clip_l` and `clip_g`, and those of the web interface, of
    `emb_params`. Theirs is the file's name in <>.

    Raises:
        UserError: nothing there, a hub out of reach, a word that is known already, or vectors of another width.
    """
    words: list[str] = []
    trained_on: Pictures = set()
    for source in sources:
        with _loading("embeddings", source):
            if not hasattr(pipe, "load_textual_inversion"):
                raise ValueError(f"{type(pipe).__name__} takes none")
            place = _find("embeddings", source)
            before = set(pipe.tokenizer.get_vocab())
            if hasattr(pipe, "text_encoder_2"):
                _add_to_both(pipe, place)
            else:
                _add_to_one(pipe, place)
            added = set(pipe.tokenizer.get_vocab()) - before
            words += sorted(added - {f"{word}_{n}" for word in added for n in range(len(added))})  # of several vectors
            trained_on |= place.trained_on
    return words, trained_on


def _add_to_one(pipe: Any, place: _Place) -> None:
    """To the text encoder of Stable Diffusion 1.x and 2.x."""
    from safetensors import safe_open

    word = None  # that the file says
    if place.file and place.file.endswith(".safetensors"):
        path = _fetched(place)
        with safe_open(path, "pt") as file:
            word = f"<{path.stem}>" if set(file.keys()) == {"emb_params"} else None
    pipe.load_textual_inversion(place.home, token=word, weight_name=place.file, **place.options)


def _add_to_both(pipe: Any, place: _Place) -> None:
    """To both text encoders of Stable Diffusion XL."""
    from safetensors.torch import load_file

    path = _fetched(place)
    vectors = load_file(path)
    if not {"clip_l", "clip_g"} <= vectors.keys():
        raise ValueError(f"it has {', '.join(vectors)}; expected clip_l and clip_g, for the two text encoders")
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {name: getattr(pipe, name + suffix) for name in ("tokenizer", "text_encoder")}
        pipe.load_textual_inversion(vectors[key], token=f"<{path.stem}>", **parts)


def _fetched(place: _Place) -> Path:
    """The file, on this machine."""
    from huggingface_hub import hf_hub_download

    if place.file is None:
        raise ValueError("name the file")
    local = Path(place.home, place.file)
    return local if local.is_file() else Path(hf_hub_download(place.home, place.file, **place.options))


def add_ip_adapter(pipe: Any, source: str | None, scale: float) -> None:
    """Load an IP-Adapter with the image encoder that lies beside it.

    Raises:
        UserError: none is named, nothing there, a hub out of reach, or weights that are not for this model.
    """
    if source is None:
        raise UserError(
            f"{NETWORK_KEY}.ip_adapter is not set, and {KEY}.mode = ip_adapter needs one, such as "
            "h94/IP-Adapter:models/ip-adapter_sd15.safetensors"
        )
    with _loading("ip_adapter", source):
        place = _find("ip_adapter", source)
        if place.file is None:
            raise ValueError("name its file behind a colon, FOLDER:FILE")
        file = PurePosixPath(place.file)
        beside = "image_encoder"
        if file.parent.name == "sdxl_models" and "vit-h" in file.name:  # these two share that of the smaller models
            beside = "models/image_encoder"
        pipe.load_ip_adapter(
            place.home, subfolder=str(file.parent), weight_name=file.name, image_encoder_folder=beside, **place.options
        )
        pipe.set_ip_adapter_scale(scale)


def _find(key: str, source: str, inner: str = "") -> _Place:
    """Where the weights are that an option names.

    Args:
        key: of `Network`.
        source: what it says.
        inner: name of a folder that a run keeps them in.

    Raises:
        UserError: there is nothing, and it is no name of the hub; or a run that has not written them.
    """
    from huggingface_hub import constants

    home, _, file = source.partition(":")
    for path in (Path(source).expanduser(), Path(home).expanduser()):
        if path.is_file():
            return _Place(str(path.parent), path.name, {})
        if path.is_dir():
            within = path / inner
            if inner and not within.is_dir() and (path / "run.json").is_file():
                raise UserError(
                    f"{NETWORK_KEY}.{key}: the run {path} has no folder {inner!r}, which is written at its end; "
                    "finish it by fit --resume, or name another"
                )
            return _Place(str(within if inner and within.is_dir() else path), file or None, {})
    if home.count("/") != 1 or home.startswith((".", "/", "~")):
        raise UserError(f"{NETWORK_KEY}.{key}: there is no {source}, and it is no hub name like owner/name:file")
    offline = constants.HF_HUB_OFFLINE
    if not offline:
        try:
            knock_at_hub()
        except Exception:  # what is cached will do; if it is not, loading says so
            offline = True
    return _Place(home, file or (LORA if key == "lora" and offline else None), {"local_files_only": offline})


@contextmanager
def _loading(key: str, source: str) -> Iterator[None]:
    """What loading fails by is told with the option that it comes from."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # the libraries have no common error
        raise UserError(
            f"{NETWORK_KEY}.{key}: {source} cannot be put on this model ({reason(error)}); check that it was made for "
            "it, and that the hub is in reach if it comes from there"
        ) from error
