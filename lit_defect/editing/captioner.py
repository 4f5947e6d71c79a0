"""Says in words what a picture shows, for the `{caption}` of a prompt.

    captions = Captioner("Salesforce/blip-image-captioning-base", device).caption(pictures)
    # ["a close up of a hazelnut on a black background", ...]

Any model of transformers that makes a text of a picture alone: BLIP, GIT, a VisionEncoderDecoder such as ViT-GPT2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_defect.editing.options import KEY
from lit_defect.errors import UserError
from lit_defect.generation.files import Picture
from lit_defect.nets.weights import knock_at_hub

_LONGEST = 40  # tokens of a caption


class Captioner:
    """An image-to-text model.

    Args:
        source: hub name, or a folder that it was saved to.
        device: that it works on.

    Raises:
        UserError: nothing there, a hub out of reach, another kind of model, or a damaged one.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.source = source
        folder, local = _located(source)
        options: Any = {"local_files_only": local, "trust_remote_code": False}
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, **options)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
            opened: Any = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **options
            )
            model, report = opened
            if report["missing_keys"]:  # transformers goes on with random numbers
                raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        except Exception as error:  # a foreign or damaged model fails in as many ways as there are files
            raise UserError(
                f"{KEY}.captioner: {source} cannot be opened as an image-to-text model ({_reason(error)})"
            ) from error
        self._model: Any = model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)

    def caption(self, pictures: Sequence[Picture]) -> list[str]:
        """One sentence for each picture (H, W, 3) uint8, the most probable; whatever the others are."""
        return [self._caption(picture) for picture in pictures]

    @torch.no_grad()
    def _caption(self, picture: Picture) -> str:
        pixels = self._processor(images=picture, return_tensors="pt")["pixel_values"].to(self._device)
        try:
            ids = self._model.generate(pixel_values=pixels, max_new_tokens=_LONGEST, do_sample=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{KEY}.captioner: {self.source} makes no text of a picture alone ({_reason(error)}); take one that "
                "captions, such as Salesforce/blip-image-captioning-base"
            ) from error
        text: str = self._tokenizer.decode(ids[0], skip_special_tokens=True)
        return " ".join(text.split())


def _located(source: str) -> tuple[str, bool]:
    """What transformers are told, and whether it is on this machine."""
    path = Path(source).expanduser()
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        if not (path / "config.json").is_file():
            raise UserError(
                f"{KEY}.captioner: {source} is no folder with a config.json and no hub name like owner/name"
            )
        return str(path), True
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, "config.json"), str):
        return source, constants.HF_HUB_OFFLINE
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("it is not in the cache, and HF_HUB_OFFLINE is set")
        knock_at_hub()
    except Exception as error:  # the client's errors have changed their base class between versions
        raise UserError(
            f"{KEY}.captioner: could not fetch {source} from the hub ({_reason(error)}). Copy its folder here and name "
            f"it, or write {KEY}.prompt without {{caption}}"
        ) from error
    return source, False


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
