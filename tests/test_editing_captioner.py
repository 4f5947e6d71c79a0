"""Captions of pictures, by a tiny random BLIP that was built without a network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_defect.editing.captioner import Captioner
from lit_defect.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "nut", "crack", "tile", "hole", "of", "with"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(folder, bos_token="[DEC]").save_pretrained(folder)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "bos_token_id": 5, "sep_token_id": 3,
            "pad_token_id": 0, "eos_token_id": 3, "encoder_hidden_size": 16}  # fmt: skip
    torch.manual_seed(1)
    tiny["initializer_range"] = 0.5  # so that the words depend on the picture
    model = BlipForConditionalGeneration(
        BlipConfig(text_config={**tiny, **text}, vision_config={**tiny, "image_size": 32, "patch_size": 8})
    )
    model.text_decoder.cls.predictions.bias.data[:6] = -1e6  # no special tokens
    model.save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pictures() -> list[np.ndarray]:
    """Black, white, and a shade from the one to the other."""
    shade = np.linspace(0, 255, 48).astype(np.uint8)[:, None, None].repeat(17, 1).repeat(3, 2)
    return [np.zeros((20, 30, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8), shade]


def test_a_caption_for_each_picture(blip):
    shown = pictures()
    captions = Captioner(str(blip)).caption(shown)
    assert len(captions) == 3
    assert all(set(caption.split()) <= {*WORDS[6:]} for caption in captions), captions
    assert any(captions)
    assert len(set(captions)) > 1, "they say what they see"
    captioner = Captioner(str(blip))
    assert [captioner.caption([picture])[0] for picture in shown] == captions, "whatever the others are"
    assert captioner.caption([]) == []


def test_a_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"edit\.captioner: could not fetch owner/none from the hub \(it is not in"):
        Captioner("owner/none")


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def silent() -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("lit_defect.editing.captioner.knock_at_hub", silent)
    with pytest.raises(UserError, match=r"could not fetch owner/none from the hub \(no route\)\. Copy its folder here"):
        Captioner("owner/none")


def test_a_folder_of_something_else(blip, tmp_path):
    with pytest.raises(UserError, match=r"edit\.captioner: .* is no folder with a config\.json"):
        Captioner(str(tmp_path))
    with pytest.raises(UserError, match="is no folder with a config"):
        Captioner("blip")
    for file in blip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((blip / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UserError, match="cannot be opened as an image-to-text model"):
        Captioner(str(tmp_path))


def test_weights_that_lack_something(blip, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in blip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(blip / "model.safetensors")
    gone = next(key for key in state if "vision" in key and "fc1.weight" in key)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"its weights lack .*{gone.split('.', 1)[0]}"):
        Captioner(str(tmp_path))
