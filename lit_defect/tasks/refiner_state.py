"""What a refiner's checkpoint was trained with, against what it is asked to do now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_defect.errors import UserError
from lit_defect.tasks.stages import FirstStage

_WEIGHTS = (
    "conditioning", "prediction", "beta_schedule", "train_steps", "channels", "layers", "attention", "patch"
)  # fmt: skip
_CHAINS = ("strength", "start", "label_input")


def check_weights(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `UserError` if an option differs that the weights depend on; the others may change from test to test."""
    for key in _WEIGHTS:
        then, asked = _plain(before.get(key)), _plain(now.get(key))
        one_network = key == "conditioning" and {then, asked} == {"joint", "replace"}  # with two loops around it
        if key in before and then != asked and not one_network:
            raise UserError(f"the checkpoint was trained with model.init_args.{key} = {then}, not {asked}")


def check_latents(checkpoint: Mapping[str, Any], source: str | None, identity: str | None) -> None:
    """Raises `UserError` if other latents were trained on than those of the autoencoder `source`, wherever it lies.

    Args:
        checkpoint: of the refiner.
        source: of its autoencoder now; None for none.
        identity: hash of that.
    """
    before = checkpoint.get("hyper_parameters", {}).get("latent", source)
    known = checkpoint.get("autoencoder")  # which checkpoints of before have not
    same = before == source if None in (known, identity) else known == identity
    if not same:
        raise UserError(
            f"the checkpoint was trained with model.init_args.latent = {before}, and {source} is not the same"
        )


def compare_chains(
    checkpoint: Mapping[str, Any], now: Mapping[str, Any], stage1: FirstStage | None, *, goes_on: bool
) -> None:
    """Warn if chains leave from elsewhere than those that a network with `train_on: prediction` was trained on.

    Raises:
        UserError: a training that goes on (`goes_on`) behind another first stage.
    """
    before = checkpoint.get("hyper_parameters", {})
    if before.get("train_on") != "prediction":
        return
    moved = [f"{key} {before[key]} -> {now[key]}" for key in _CHAINS if key in before and before[key] != now[key]]
    if moved:
        rank_zero_warn(
            f"the refiner was trained on chains that start otherwise ({', '.join(moved)}): trained anew it may do "
            "better"
        )
    known = checkpoint.get("stage1")
    if known and stage1 is not None and known["fingerprint"] != stage1.fingerprint:
        text = f"the refiner was trained behind {known['source']}, and model.init_args.stage1 is {stage1.source}"
        if goes_on:
            raise UserError(f"{text}: go on with the same first stage")
        rank_zero_warn(f"{text}, another network or other maps")


def _plain(option: Any) -> Any:
    """A sequence as a list, however a checkpoint keeps it."""
    return list(option) if isinstance(option, tuple | list) else option
