"""Prompts with learnt tokens: the ids against the tokenizers themselves, the states against a text encoder whose table was given the vectors as new words."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lit_defect.diffusion.prompts import encode_prompt, text_states
from lit_defect.errors import UserError

WORDS = ["a", "photo", "of", "metal", "nut", "with", "on", "wood", "##en", "crack", ",", "table", "the"]
LENGTH = 20
CLIP_SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def clip() -> Any:
    """Byte pairs without merges: a token for each letter."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters), *CLIP_SPECIAL])}
    merges = [("o", "f</w>"), ("p", "h"), ("ph", "o")]
    vocab |= {"".join(pair): len(vocab) + i for i, pair in enumerate(merges)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=40)


def bert(**options: Any) -> Any:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocab = {name: i for i, name in enumerate(names)}
    return BertTokenizer(vocab=vocab, **{"model_max_length": LENGTH, **options})


TOKENIZERS = {"clip": clip, "bert": bert, "bert_left": lambda: bert(padding_side="left")}


def own(tokenizer: Any, text: str, length: int) -> list[int]:
    """What the tokenizer itself makes of a text."""
    return list(tokenizer(text, padding="max_length", max_length=length, truncation=True)["input_ids"])


# --- ids ---


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["", "a photo of a metal nut", "a  Photo of, a"])
def test_words_alone_are_the_tokenizers_own_ids(name, text):
    tokenizer = TOKENIZERS[name]()
    prompt = encode_prompt(tokenizer, text, slots=0)
    assert prompt.ids.tolist() == own(tokenizer, text, tokenizer.model_max_length)
    assert prompt.ids.dtype == torch.int64
    assert (prompt.positions, prompt.text, prompt.cut) == ((), text, "")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["a photo of a *", "* on a nut", "*", "a nut with * on the wood"])
def test_without_the_learnt_tokens_the_ids_are_those_of_the_words(name, template):
    tokenizer = TOKENIZERS[name]()
    length = tokenizer.model_max_length
    prompt = encode_prompt(tokenizer, template, slots=5)
    assert prompt.ids.shape == (length,)
    assert list(prompt.positions) == list(range(prompt.positions[0], prompt.positions[0] + 5))
    rest = np.delete(prompt.ids.numpy(), prompt.positions)
    assert rest.tolist() == own(tokenizer, template.replace("*", " "), length - 5)
    assert (prompt.text, prompt.cut) == (template, "")


def test_learnt_tokens_stand_between_the_words_around_the_placeholder():
    tokenizer = bert()
    prompt = encode_prompt(tokenizer, "a nut with * on the wood", slots=3)
    words = tokenizer.convert_ids_to_tokens(prompt.ids.tolist())
    assert words[:4] == ["[CLS]", "a", "nut", "with"]
    assert prompt.positions == (4, 5, 6)
    assert words[7:] == ["on", "the", "wood", "[SEP]", *["[PAD]"] * (LENGTH - 11)]


def test_category_is_written_in_words():
    tokenizer = bert()
    prompt = encode_prompt(tokenizer, "a photo of a {category} with * on the {category}", 2, "metal_nut")
    assert prompt.text == "a photo of a metal nut with * on the metal nut"
    plain = encode_prompt(tokenizer, "a photo of a metal nut with * on the metal nut", 2)
    assert prompt.ids.tolist() == plain.ids.tolist()
    assert prompt.positions == plain.positions


def test_words_after_that_do_not_fit_are_cut_whole_and_named():
    # 18 places between [CLS] and [SEP]: 2 words, 12 vectors, and 4 tokens more. "wooden" is 2 tokens.
    tokenizer = bert()
    full = encode_prompt(tokenizer, "photo with * on a wooden", slots=12)
    assert full.cut == ""
    assert full.ids[-1] == tokenizer.sep_token_id
    cut = encode_prompt(tokenizer, "photo with * on the metal wooden table", slots=12)
    assert (cut.text, cut.cut) == ("photo with * on the metal", "wooden table")
    assert tokenizer.convert_ids_to_tokens(cut.ids[15:].tolist()) == ["on", "the", "metal", "[SEP]", "[PAD]"]
    assert cut.positions == full.positions == tuple(range(3, 15))


def test_learnt_tokens_that_do_not_fit_are_refused():
    tokenizer = bert()
    exact = encode_prompt(tokenizer, "photo of *", slots=16)
    assert exact.positions == tuple(range(3, 19))
    with pytest.raises(UserError, match=r"template = 'photo of \*': .*17 learnt tokens.* need 19 places .* 18;"):
        encode_prompt(tokenizer, "photo of *", slots=17)


@pytest.mark.parametrize(("limit", "length"), [(10**30, 77), (512, 77), (77, 77), (24, 24)])
def test_a_prompt_is_as_long_as_the_tokenizer_says_and_at_most_77(limit, length):
    assert len(encode_prompt(bert(model_max_length=limit), "a photo of *", slots=3).ids) == length


def test_templates_that_make_no_sense_are_refused():
    tokenizer = bert()
    for template in ("a photo", "a * photo of *"):
        with pytest.raises(UserError, match=r"model\.init_args\.template = .*expected one \"\*\", where the 2 learnt"):
            encode_prompt(tokenizer, template, slots=2)
    with pytest.raises(UserError, match=r"template = 'a \*': expected no \"\*\""):
        encode_prompt(tokenizer, "a *", slots=0)
    with pytest.raises(UserError, match=r"there is no category to put for \{category\}"):
        encode_prompt(tokenizer, "a {category} *", slots=2, category=" ")


def test_tokenizers_that_cannot_serve_are_refused():
    tokenizer = bert()
    tokenizer.pad_token = None
    with pytest.raises(UserError, match=r"model\.init_args\.base: its tokenizer has no token to pad with"):
        encode_prompt(tokenizer, "a *", slots=2)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    mute = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"b": 0}, [])), pad_token="b")
    with pytest.raises(UserError, match=r"makes no token of the letter a"):
        encode_prompt(mute, "b *", slots=2)


# --- states ---


def clip_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(config).eval().requires_grad_(False)


def ldm_encoder() -> nn.Module:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        vocab_size=30, d_model=16, encoder_layers=2, encoder_ffn_dim=24, encoder_attention_heads=2, head_dim=8,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LDMBertModel(config).eval().requires_grad_(False)


class Tuple(nn.Module):
    """A text encoder that answers with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = clip_encoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.inner(ids).to_tuple()


ENCODERS = {"clip": clip_encoder, "ldm": ldm_encoder, "tuple": Tuple}


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = ENCODERS[request.param]()
    # Fresh text encoders barely tell words apart: all of their numbers are a few hundredths.
    for parameter in made.parameters():
        parameter.mul_(10) if parameter.ndim > 1 else None
    return made


def table(encoder: nn.Module) -> nn.Embedding:
    return encoder.get_input_embeddings()


def with_new_words(encoder: nn.Module, vectors: torch.Tensor) -> nn.Module:
    """A copy whose vocabulary goes on with the vectors (M, d): textual inversion as it was published."""
    made = copy.deepcopy(encoder)
    weight = torch.cat([table(made).weight, vectors])
    embedding = table(made)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    embedding.num_embeddings = len(weight)
    return made


def test_vectors_act_as_new_words_of_the_vocabulary_would(encoder):
    torch.manual_seed(1)
    prompt = encode_prompt(bert(), "a photo of a * on the nut", slots=3)
    ids, inserted = prompt.ids.repeat(2, 1), torch.randn(2, 3, 16)
    words = ids.clone()
    words[:, list(prompt.positions)] = torch.arange(30, 36).view(2, 3)
    reference = with_new_words(encoder, inserted.flatten(0, 1))(words)
    expected = reference[0] if isinstance(reference, tuple) else reference.last_hidden_state
    found = text_states(encoder, ids, inserted, prompt.positions)
    assert found.shape == (2, LENGTH, 16)
    torch.testing.assert_close(found, expected)
    change = (found - text_states(encoder, ids)).abs().amax(dim=-1)  # (B, L)
    assert (change[:, list(prompt.positions)] > 0.01).all()


def test_words_alone_are_encoded_as_ever(encoder):
    ids = encode_prompt(bert(), "a photo", slots=0).ids[None]
    answer = encoder(ids)
    expected = answer[0] if isinstance(answer, tuple) else answer.last_hidden_state
    torch.testing.assert_close(text_states(encoder, ids), expected, rtol=0, atol=0)


def test_each_picture_of_a_batch_has_its_own_vectors(encoder):
    ids, inserted = torch.randint(5, 18, (3, LENGTH)), torch.randn(3, 2, 16)
    together = text_states(encoder, ids, inserted, (4, 7))
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(text_states(encoder, ids[one], inserted[one], (4, 7)), together[one])


def test_the_ids_that_hold_a_place_do_not_matter(encoder):
    ids, inserted = torch.randint(5, 18, (1, LENGTH)), torch.randn(1, 2, 16)
    other = ids.clone()
    other[:, [4, 7]] = (ids[:, [4, 7]] - 4) % 13 + 5
    assert (other != ids).sum() == 2
    found = [text_states(encoder, given, inserted, (4, 7)) for given in (ids, other)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_causal_encoder_is_the_same_before_the_first_vector():
    torch.manual_seed(0)
    encoder = clip_encoder()
    ids, inserted = torch.randint(5, 18, (1, LENGTH)), torch.randn(1, 2, 16)
    change = (text_states(encoder, ids, inserted, (6, 7)) - text_states(encoder, ids)).abs().amin(dim=(0, 2))
    assert (change[:6] == 0).all()
    assert (change[6:] > 0).all()


def test_gradient_reaches_the_vectors_and_nothing_of_the_encoder(encoder):
    ids = torch.randint(5, 18, (2, LENGTH))
    inserted = torch.randn(2, 3, 16, requires_grad=True)
    text_states(encoder, ids, inserted, (4, 5, 9))[:, 9:].square().sum().backward()
    assert inserted.grad is not None
    assert (inserted.grad.abs().sum(dim=-1) > 0).all()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_nothing_is_left_behind_in_the_encoder_whatever_happens(encoder):
    ids, inserted = torch.randint(5, 18, (2, LENGTH)), torch.randn(2, 3, 16)
    text_states(encoder, ids, inserted, (1, 2, 3))
    with pytest.raises(IndexError):
        text_states(encoder, ids + 100, inserted, (1, 2, 3))
    assert not table(encoder)._forward_hooks


def test_vectors_of_another_number_or_width_are_refused(encoder):
    ids = torch.randint(5, 18, (2, LENGTH))
    for shape in ((2, 2, 16), (1, 3, 16), (2, 3, 8)):
        with pytest.raises(ValueError, match=r"expected \(2, 3, 16\)"):
            text_states(encoder, ids, torch.zeros(shape), (1, 2, 3))
    assert not table(encoder)._forward_hooks
