"""Prompts with learnt vectors in them: textual inversion (Gal et al., ICLR 2023) as AnomalyDiffusion uses it.

    prompt = encode_prompt(tokenizer, "a photo of a {category} with *", slots=12, category="metal_nut")
    states = text_states(text_encoder, prompt.ids.expand(B, -1), inserted, prompt.positions)    # inserted (B, 12, d)

The placeholder becomes as many tokens as there are vectors; the vectors then take the places of the embeddings that
the text encoder looks up for these tokens, and everything after that is the text encoder's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_defect.errors import UserError
from lit_defect.transfer import sent

PLACEHOLDER = "*"
CATEGORY = "{category}"
LONGEST = 77  # tokens that the text encoders of latent diffusion models take; some of their tokenizers name no limit
_KEY = "model.init_args.template"


@dataclass(frozen=True)
class Prompt:
    """A sentence as a text encoder takes it.

    Attributes:
        ids: (L,) int64, with the tokenizer's own tokens around it and padded to its full length.
        positions: of the inserted tokens in `ids`.
        text: what it says; the placeholder stands for the inserted tokens.
        cut: words at its end that did not fit, "" if all did; they are not in `text`.
    """

    ids: Tensor
    positions: tuple[int, ...]
    text: str
    cut: str


def encode_prompt(tokenizer: Any, template: str, slots: int, category: str = "") -> Prompt:
    """The tokens of a prompt with room for `slots` vectors.

    Args:
        tokenizer: of transformers. L is its `model_max_length`, at most 77.
        template: with one "*" where the vectors go, none when there are no slots; `{category}` stands for the
            category, in words.
        slots: k + n.
        category: as the data set spells it; underscores become spaces.

    Raises:
        UserError: another number of placeholders, `{category}` without one, vectors that do not fit, or a tokenizer
            without a token to pad with.
    """
    pieces = template.split(PLACEHOLDER)
    if len(pieces) != (2 if slots else 1):
        wanted = f'one "{PLACEHOLDER}", where the {slots} learnt tokens go' if slots else f'no "{PLACEHOLDER}"'
        raise UserError(f"{_KEY} = {template!r}: expected {wanted}")
    if CATEGORY in template and not category.strip():
        raise UserError(f"{_KEY} = {template!r}: there is no category to put for {CATEGORY}; leave it out")
    words = [piece.replace(CATEGORY, category.replace("_", " ")) for piece in pieces]
    before, after = words if slots else ("", words[0])
    length = min(int(tokenizer.model_max_length), LONGEST)
    opening, closing = _around(tokenizer)
    room = length - len(opening) - len(closing)
    head = [*_tokens(tokenizer, before.rstrip()), *[_filler(tokenizer)] * slots]
    if len(head) > room:
        raise UserError(
            f"{_KEY} = {template!r}: the words up to the {slots} learnt tokens and these need {len(head)} places of "
            f"the text encoder's {room}; take fewer tokens or words"
        )
    kept, tail = _fitting(tokenizer, after, room - len(head))
    ids = [*opening, *head, *tail, *closing]
    padding = [_pad(tokenizer)] * (length - len(ids))
    left = tokenizer.padding_side == "left"
    ids = [*padding, *ids] if left else [*ids, *padding]
    first = left * len(padding) + len(opening) + len(head) - slots
    return Prompt(
        torch.tensor(ids),
        tuple(range(first, first + slots)),
        (before + PLACEHOLDER * bool(slots) + after[:kept]).strip(),
        after[kept:].strip(),
    )


def encode_prompts(tokenizer: Any, template: str, slots: int, categories: Iterable[str]) -> dict[str, Prompt]:
    """The prompt of each category, with the vectors at the same places in all; warns of words that are cut off.

    Args: see `encode_prompt`.

    Raises:
        UserError: as there, or names of different lengths before the vectors.
    """
    made = {category: encode_prompt(tokenizer, template, slots, category) for category in categories}
    if len({prompt.positions for prompt in made.values()}) > 1:
        raise UserError(
            f"{_KEY} = {template!r}: the categories have names of different lengths, so that the vectors would stand "
            'at different places: put {category} behind the "*"'
        )
    if cut := max((prompt.cut for prompt in made.values()), key=len, default=""):
        rank_zero_warn(
            f'{_KEY} = {template!r}: "{cut}" does not fit behind the {slots} learnt tokens and is cut off; take fewer '
            "tokens or words"
        )
    return made


def text_states(
    text_encoder: nn.Module, ids: Tensor, inserted: Tensor | None = None, positions: Sequence[int] = ()
) -> Tensor:
    """The last hidden states of prompts, differentiable in the inserted vectors.

    Args:
        text_encoder: of transformers (CLIPTextModel) or diffusers (LDMBertModel); takes ids (B, L).
        ids: (B, L) int64.
        inserted: (B, k + n, d), or None for prompts of words only.
        positions: k + n places of the vectors in the ids.

    Returns:
        (B, L, D)

    Raises:
        ValueError: other than one vector of the text encoder's width for each prompt and position.
    """
    with _taking_places(text_encoder, inserted, positions, len(ids)):
        output = text_encoder(ids)
    found: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return found


@contextmanager
def _taking_places(text_encoder: Any, inserted: Tensor | None, positions: Sequence[int], batch: int) -> Iterator[None]:
    """While it is open the inserted vectors take the places of the ids' own embeddings."""
    if inserted is None:
        yield
        return
    table: nn.Embedding = text_encoder.get_input_embeddings()
    expected = (batch, len(positions), table.embedding_dim)
    if inserted.shape != expected:
        raise ValueError(f"inserted vectors of shape {tuple(inserted.shape)}: expected {expected}")
    places = sent(torch.tensor(positions), inserted.device)

    def replace(module: nn.Module, arguments: object, embedded: Tensor) -> Tensor:
        return embedded.index_copy(1, places, inserted.to(embedded.dtype))

    hook = table.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of words alone."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text.strip() else []


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    marked = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(marked["input_ids"]), list(marked["special_tokens_mask"])
    if 0 not in special:
        raise UserError("model.init_args.base: its tokenizer makes no token of the letter a")
    return ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :]


def _filler(tokenizer: Any) -> int:
    """The token that holds the place of a vector; it is never looked at."""
    return (_tokens(tokenizer, PLACEHOLDER) or [0])[0]


def _pad(tokenizer: Any) -> int:
    if tokenizer.pad_token_id is None:
        raise UserError("model.init_args.base: its tokenizer has no token to pad with; set its pad_token and save it")
    return int(tokenizer.pad_token_id)


def _fitting(tokenizer: Any, text: str, room: int) -> tuple[int, list[int]]:
    """How many characters of a text, in whole words, are at most `room` tokens, and these."""
    ends = [0, *(word.end() for word in re.finditer(r"\S+", text))]
    return next((end, found) for end in reversed(ends) if len(found := _tokens(tokenizer, text[:end])) <= room)
