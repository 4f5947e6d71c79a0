"""Words for what can be measured in a picture, so that a base trained on normal pictures learns to listen to them.

Photographs of one product come without captions, and a U-Net that reads the same sentence for all of them learns to
ignore it: no token could make a defect afterwards. Therefore a base also sees normal pictures with an arbitrary local
edit (`anomalies`), and each picture is described by what is measurably so: how bright it is, and of the edit its
tone, size, shape and place.

    a photo of a bright tile
    a photo of a dark tile with a small dark spot at the top left
    a mask of a tile with a large bright streak at the center

The last kind shows the edit's mask instead, for mask embeddings that are inverted on the same base.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

PHOTO, MASK = "a photo of a", "a mask of a"
LIGHTS = ("dark", "plain", "bright")
TONES = ("dark", "rough", "bright")
SIZES = ("tiny", "small", "large")
SHAPES = ("spot", "streak")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
_DARK, _BRIGHT = 0.35, 0.65  # mean grey value, between which a picture is plain
_STEP = 0.06  # change of the mean, above which an edit is darker or brighter than what it replaced
_TINY, _SMALL = 0.01, 0.05  # shares of the picture
_LONG = 3.0  # ratio of the axes from which a spot is a streak


def light_of(picture: npt.NDArray[np.float32]) -> str:
    """How bright a picture (3, H, W) in [0, 1] is."""
    mean = float(picture.mean())
    return LIGHTS[(mean >= _DARK) + (mean >= _BRIGHT)]


def edit_of(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> str:
    """Tone, size, shape and place of a local edit.

    Args:
        before, after: (3, H, W) in [0, 1].
        mask: (H, W), not empty.
    """
    rows, columns = np.nonzero(mask)
    change = float((after - before)[:, mask].mean())
    tone = TONES[(change > -_STEP) + (change > _STEP)]
    share = len(rows) / mask.size
    size = SIZES[(share >= _TINY) + (share >= _SMALL)]
    spread = np.cov(np.stack([rows, columns])) if len(rows) > 1 else np.eye(2)
    least, most = np.linalg.eigvalsh(spread + np.eye(2) / 12)  # a pixel has a width of its own
    shape = SHAPES[int((most / least) ** 0.5 >= _LONG)]
    height, width = mask.shape
    row, column = (rows.mean() + 0.5) / height, (columns.mean() + 0.5) / width  # of the centre, 0 to 1
    place = f"{ROWS[int(3 * row)]} {COLUMNS[int(3 * column)]}"
    return f"with a {size} {tone} {shape} at the {place}"


def vocabulary(names: Iterable[str]) -> list[str]:
    """Every sentence a base may be told about these products, for the tokenizer to know all words of."""
    edits = [" ".join(words) for words in itertools.product(SIZES, TONES, SHAPES)]
    places = [" ".join(words) for words in itertools.product(ROWS, COLUMNS)]
    sentences = [f"with a {edit} at the {place}" for edit, place in itertools.product(edits, places)]
    return [f"{kind} {light} {name}" for kind in (PHOTO, MASK) for light in LIGHTS for name in names] + sentences


def longest_caption(name: str) -> str:
    """Words for an edited picture of `name`; all that there are have the same number."""
    return f"{PHOTO} {LIGHTS[0]} {name} with a {SIZES[0]} {TONES[0]} {SHAPES[0]} at the {ROWS[0]} {COLUMNS[0]}"


def make_tokenizer(texts: Iterable[str], length: int) -> Any:
    """A CLIPTokenizer whose vocabulary is the words of `texts`; other words are spelt in their bytes.

    Args:
        length: tokens of a prompt, its start and end among them.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    # Ends of words are tokens of their own kind, which the trainer would make of those it meets, in no fixed order; so
    # would be the merges, and a resumed run's tokenizer not that of the first.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # type: ignore[assignment]
    learner.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in letters)],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab()
    merges: Any = [tuple(pair) for pair in _merges(learner)]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def _merges(learner: Any) -> list[Any]:
    import json

    merges = json.loads(learner.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
