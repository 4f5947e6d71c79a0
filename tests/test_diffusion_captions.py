"""Captions: a tokenizer that has every word of them whole and spells all others, and words that agree with pictures made by hand."""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
import pytest
import torch

from lit_defect.diffusion.captions import COLUMNS, ROWS, edit_of, light_of, make_tokenizer, vocabulary
from lit_defect.diffusion.prompts import encode_prompt
from lit_defect.tasks import variations
from lit_defect.tasks.variations import Variations, spoken
from tests.anomalies import Stripes

NAMES = ["tile", "metal nut", "Zipper", "größe", "screw m8"]
OTHERS = ["zebra", "tiles", "naïve", "日本語", "crack🙂", "anti-static", "don't", "x", "12.5%", "a/b_c"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([*vocabulary(NAMES), "anomaly defect damage"], 32)


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- the tokenizer ---


def test_every_word_of_every_caption_is_a_token(tokenizer):
    sentences = [*vocabulary(NAMES[:4]), "anomaly defect damage"]
    for word in sorted({word for sentence in sentences for word in sentence.split()}):
        assert len(tokens(tokenizer, word)) == 1, word
    longest = max(sentences, key=len)
    assert len(tokens(tokenizer, longest)) == len(longest.split())


def test_a_name_with_a_number_costs_a_token_more_at_most(tokenizer):
    assert len(tokens(tokenizer, "screw m8")) <= 3


def test_different_words_are_different_tokens(tokenizer):
    words = sorted({word.lower() for sentence in vocabulary(NAMES[:4]) for word in sentence.split()})
    assert len({tokens(tokenizer, word)[0] for word in words}) == len(words)


@pytest.mark.parametrize("text", [*vocabulary(NAMES)[::7], *OTHERS, "a photo of a zebra crossing", ""])
def test_texts_are_decoded_as_they_were(tokenizer, text):
    ids = tokens(tokenizer, text)
    found = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # CLIP's own words and punctuation are set apart by blanks.
    assert found.replace(" ", "") == text.lower().replace(" ", "")
    assert all(0 <= i < len(tokenizer) for i in ids)


@pytest.mark.parametrize("word", OTHERS)
def test_other_words_are_spelt_and_never_unknown(tokenizer, word):
    ids = tokens(tokenizer, word)
    assert not set(ids) & set(tokenizer.all_special_ids), word
    assert 1 <= len(ids) <= len(word.encode())


def test_capitals_and_composed_letters_do_not_matter(tokenizer):
    assert tokens(tokenizer, "A Photo OF") == tokens(tokenizer, "a photo of")
    composed, apart = (unicodedata.normalize(form, "größe") for form in ("NFC", "NFD"))
    assert composed != apart
    assert tokens(tokenizer, composed) == tokens(tokenizer, apart)
    named_apart = make_tokenizer(vocabulary([apart]), 32)  # as some systems spell the names of folders
    assert len(tokens(named_apart, composed)) == 1


def test_start_end_and_length_are_clips(tokenizer):
    found = tokenizer("a photo of a tile", padding="max_length", truncation=True)["input_ids"]
    assert len(found) == tokenizer.model_max_length == 32
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|startoftext|>", "<|endoftext|>")
    assert found[0] == start
    assert found[6:] == [end] * 26
    assert not set(found[1:6]) & {start, end}
    assert encode_prompt(tokenizer, "a photo of a tile", 0).ids.tolist() == found


def test_it_is_the_same_each_time_and_whatever_the_order():
    texts = vocabulary(NAMES)
    first = make_tokenizer(texts, 32)
    for number in range(4):
        again = make_tokenizer(texts[number:] + texts[:number], 32)
        assert again.get_vocab() == first.get_vocab()
        assert [tokens(again, text) for text in OTHERS] == [tokens(first, text) for text in OTHERS]


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "CLIPTokenizerFast", "AutoTokenizer"])
def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path, kind):
    import transformers

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = getattr(transformers, kind).from_pretrained(tmp_path / "tokenizer")
    assert loaded.model_max_length == 32
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in (*vocabulary(NAMES)[::11], *OTHERS, ""):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_no_names_and_many_names_will_do():
    assert len(tokens(make_tokenizer(vocabulary([]), 20), "with a small dark spot")) == 5
    letters = "abcdefghij"
    names = ["".join(three) + "us" for three in itertools.product(letters, repeat=3)][::3]
    crowded = make_tokenizer(vocabulary(names), 20)
    assert all(len(tokens(crowded, name)) == 1 for name in names)


# --- how bright a picture is ---


@pytest.mark.parametrize(
    ("level", "word"), [(0.0, "dark"), (0.34, "dark"), (0.36, "plain"), (0.64, "plain"), (0.66, "bright"), (1.0, "bright")]
)  # fmt: skip
def test_the_light_is_the_mean_grey_value(level, word):
    assert light_of(np.full((3, 8, 12), level, np.float32)) == word
    mixed = np.zeros((3, 10, 100), np.float32)
    mixed[..., : round(100 * level)] = 1
    assert light_of(mixed) == word


# --- what an edit looks like ---

HEIGHT, WIDTH = 60, 90


def described(mask, change=0.5):
    """Words of an edit that changes a grey picture by `change` inside the mask, by type."""
    before = np.full((3, *mask.shape), 0.5, np.float32)
    before[:, ::2] += 0.01
    after = before + np.float32(change) * mask
    words = edit_of(before, after.astype(np.float32), mask).split()
    assert words[:2] == ["with", "a"]
    assert words[5:7] == ["at", "the"]
    return dict(zip(("size", "tone", "shape", "row", "column"), (*words[2:5], *words[7:]), strict=True))


def block(top, left, height, width, size=(HEIGHT, WIDTH)):
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


@pytest.mark.parametrize(("change", "word"), [(-0.5, "dark"), (-0.07, "dark"), (-0.05, "rough"), (0, "rough"), (0.05, "rough"), (0.07, "bright"), (0.5, "bright")])  # fmt: skip
def test_the_tone_is_the_change_of_the_mean_inside(change, word):
    assert described(block(10, 10, 5, 7), change)["tone"] == word


def test_changes_outside_the_mask_and_both_ways_inside_do_not_count():
    mask = block(10, 10, 10, 10)
    before = np.full((3, HEIGHT, WIDTH), 0.5, np.float32)
    after = before.copy()
    after[:, ~mask] = 1.0
    after[:, 10:15, 10:20], after[:, 15:20, 10:20] = 0.9, 0.1
    assert "rough" in edit_of(before, after, mask)


@pytest.mark.parametrize(
    ("side", "word"), [(1, "tiny"), (7, "tiny"), (8, "small"), (16, "small"), (17, "large"), (60, "large")]
)
def test_the_size_is_the_share_of_the_picture(side, word):
    """1 % of 60 x 90 pixels are 54, 5 % are 270."""
    assert described(block(0, 0, side, side))["size"] == word


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("long", "short", "word"), [(1, 1, "spot"), (2, 1, "spot"), (9, 9, "spot"), (10, 5, "spot"), (20, 8, "spot"), (4, 1, "streak"), (12, 3, "streak"), (40, 2, "streak")])  # fmt: skip
def test_the_shape_is_the_ratio_of_the_axes(long, short, word, turned):
    assert described(block(3, 3, *((long, short) if turned else (short, long))))["shape"] == word


def test_a_slanting_line_is_a_streak_and_a_disc_a_spot():
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    assert described((np.abs(rows - columns) < 2) & (rows > 10) & (rows < 40))["shape"] == "streak"
    assert described((rows - 30) ** 2 + (columns - 30) ** 2 < 100)["shape"] == "spot"


@pytest.mark.parametrize(("i", "row"), list(enumerate(ROWS)))
@pytest.mark.parametrize(("j", "column"), list(enumerate(COLUMNS)))
def test_the_place_is_the_third_of_the_centre(i, row, j, column):
    for top, left in ((20 * i, 30 * j), (20 * i + 15, 30 * j + 25)):  # both ends of the third
        found = described(block(top, left, 5, 5))
        assert (found["row"], found["column"]) == (row, column)


def test_a_mirror_image_is_on_the_other_side():
    rng, other = np.random.default_rng(0), {"left": "right", "center": "center", "right": "left"}
    upside = {"top": "bottom", "middle": "middle", "bottom": "top"}
    for size in ((30, 30), (31, 47), (64, 64), (96, 96)):
        for _ in range(200):
            h, w = rng.integers(1, 12, 2)
            mask = block(rng.integers(0, size[0] - h + 1), rng.integers(0, size[1] - w + 1), h, w, size)
            here, there = described(mask), described(mask[::-1, ::-1])
            centre = (np.argwhere(mask).mean(0) + 0.5) * 3 / size
            if np.allclose(centre, centre.round(), atol=1e-9) or np.isclose(centre, centre.round()).any():
                continue  # on the line between two thirds
            assert (there["row"], there["column"]) == (upside[here["row"]], other[here["column"]])
            assert {k: here[k] for k in ("size", "tone", "shape")} == {k: there[k] for k in ("size", "tone", "shape")}


@pytest.mark.parametrize(
    "mask", [block(0, 0, 1, 1), block(HEIGHT - 1, WIDTH - 1, 1, 1), np.ones((HEIGHT, WIDTH), bool)]
)
def test_the_smallest_and_the_largest_edit_have_words(mask):
    assert described(mask)["shape"] == "spot"


# --- pictures with their captions ---


def varied(count=400, **options):
    torch.manual_seed(3)
    images = torch.rand(count, 1, 1, 1).expand(-1, 3, 32, 32) * 0.8 + 0.1 + 0.05 * torch.rand(count, 3, 32, 32)
    chosen = {"edited": 0.5, "masks": 0.2, "augment": "flips", "light": 0.1, **options}
    return images, *Variations(None, **chosen).captioned(images, ["metal nut"] * count)


def test_captions_say_what_the_pictures_are():
    images, pictures, captions = varied()
    masks = [text.startswith("a mask of a ") for text in captions]
    edits = [" with a " in text for text in captions]
    assert 0.13 < np.mean(masks) < 0.27
    assert 0.6 < np.mean(edits) < 0.8
    assert all(edit for mask, edit in zip(masks, edits, strict=True) if mask)
    for picture, mask, text in zip(pictures, masks, captions, strict=True):
        assert (set(picture.unique().tolist()) == {0.0, 1.0}) == mask
        if mask:  # its size is in the caption
            share = float(picture[0].mean())
            assert text.split()[text.split().index("with") + 2] == ("tiny" if share < 0.01 else "small" if share < 0.05 else "large")  # fmt: skip
        elif " with a " not in text:
            assert text == f"a photo of a {light_of(picture.numpy())} metal nut"
    assert pictures.shape == images.shape
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1


def test_every_caption_has_its_words_in_the_tokenizer():
    tokenizer = make_tokenizer(vocabulary(["metal nut"]), 32)
    for text in set(varied()[2]):
        assert len(tokens(tokenizer, text)) == len(text.split())


def test_without_edits_and_light_a_picture_is_as_it_was():
    images, pictures, captions = varied(20, edited=0.0, masks=0.0, augment="none", light=0.0)
    assert torch.equal(images, pictures)
    assert captions == [f"a photo of a {light_of(image.numpy())} metal nut" for image in images]


def test_variations_follow_the_global_generator():
    (_, one, said), (_, other, again) = varied(40), varied(40)
    assert torch.equal(one, other)
    assert said == again


def test_pictures_without_captions_are_the_same_and_nothing_is_measured_in_them(monkeypatch):
    plan = Variations(None, edited=0.5, masks=0.2, augment="flips", light=0.1)
    images = torch.rand(40, 3, 32, 32)
    torch.manual_seed(5)
    pictures, _ = plan.captioned(images, ["tile"] * 40)
    monkeypatch.setattr(variations, "light_of", None)
    monkeypatch.setattr(variations, "edit_of", None)
    torch.manual_seed(5)
    assert torch.equal(plan(images), pictures)
    assert not torch.equal(plan(images), pictures)


def test_only_the_chosen_pictures_are_edited_in_all_kinds():
    seen = []

    class Watched(Stripes):
        def generate(self, images, uniforms):
            seen.append(images)
            return super().generate(images, uniforms)

    plan = Variations(Watched(ssim_scope="off"), edited=0.3, masks=0.2, augment="none", light=0.0)
    images = torch.full((400, 3, 32, 32), 0.5) + 0.1 * torch.rand(400, 3, 1, 1)
    images[300:] = 0.95  # too bright: no stripes are accepted
    torch.manual_seed(0)
    pictures, captions = plan.captioned(images, ["tile"] * 400)
    changed = (pictures != images).flatten(1).any(1)
    edited = sum(len(some) for some in seen)
    assert 160 < edited < 240
    assert 110 < int(changed.sum()) < edited
    assert not changed[300:].any(), "what the gate rejects stays plain"
    assert changed.tolist() == [" with a " in caption for caption in captions]
    tones = {caption.split(" with a ")[1].split()[1] for caption in captions if " with a " in caption}
    assert tones == {"dark", "bright"}, "both kinds are drawn"
    masks = torch.tensor([caption.startswith("a mask of") for caption in captions])
    assert 0.25 < float(masks.sum() / changed.sum()) < 0.55
    stripes = torch.zeros(32, 32)
    stripes[::4] = 1
    assert (pictures[masks] == stripes).all()
    assert torch.equal(pictures[changed & ~masks][:, :, 1::4], images[changed & ~masks][:, :, 1::4])


@pytest.mark.parametrize(("folder", "words"), [("magnetic_tile", "magnetic tile"), ("anti-static_mat", "anti static mat"), ("", "product"), ("_", "product")])  # fmt: skip
def test_a_folders_name_is_spoken(folder, words):
    assert spoken(folder) == words
