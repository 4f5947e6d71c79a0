"""`learnt.safetensors`: what an inversion has learnt, taken up by another run on the same base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lit_defect.errors import UserError
from lit_defect.tasks import AnomalyDiffusion
from lit_defect.tasks.learnt_files import start_from, write_learnt
from tests.anomaly_diffusion import make_base, make_parts, task_of, write_config

PAIRS = [("tile", "crack"), ("tile", "hole")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def opened(base: Path, pairs: list[tuple[str, str]] | None = None, **settings: object) -> AnomalyDiffusion:
    """A task with its networks, what it learns at random."""
    task = task_of(base, pairs=pairs or PAIRS, lora=2, **settings)
    task.configure_model()
    with torch.no_grad():
        for value in task.learnt_state().values():
            value.add_(torch.randn_like(value))
    return task


def test_what_was_written_is_taken_up_and_the_base_stays(base, tmp_path):
    one, other = opened(base), opened(base)
    before = {key: value.clone() for key, value in other.network.vae.state_dict().items()}
    write_learnt(one, tmp_path / "learnt.safetensors")
    assert any(
        not torch.equal(a, b) for a, b in zip(one.learnt_state().values(), other.learnt_state().values(), strict=True)
    )
    start_from(other, tmp_path / "learnt.safetensors")
    for key, value in one.learnt_state().items():
        assert torch.equal(value, other.learnt_state()[key]), key
    assert all(torch.equal(value, before[key]) for key, value in other.network.vae.state_dict().items())
    with safe_open(tmp_path / "learnt.safetensors", "pt") as file:
        assert file.metadata()["fingerprint"] == one.network.fingerprint


def test_what_the_other_has_learnt_from_is_not_forgotten(base, tmp_path):
    """It may test here, and a generated data set must tell."""
    one, other = opened(base), opened(base)
    one.learnt_from, other.learnt_from = {("tile/test/crack/007.png", "part 3"), ("b.png", "")}, {("own.png", "")}
    write_learnt(one, tmp_path / "l.safetensors")
    start_from(other, tmp_path / "l.safetensors")
    assert other.learnt_from == {("tile/test/crack/007.png", "part 3"), ("b.png", ""), ("own.png", "")}


def test_a_further_type_keeps_its_own_start(base, tmp_path):
    one = opened(base)
    other = opened(base, [("tile", "burn"), ("tile", "hole")])
    own = other.learnt["tokens"].weight.detach().clone()
    write_learnt(one, tmp_path / "l.safetensors")
    start_from(other, tmp_path / "l.safetensors")
    assert torch.equal(other.learnt["tokens"].weight[0], own[0])
    assert torch.equal(other.learnt["tokens"].weight[1], one.learnt["tokens"].weight[1])


def test_another_base_of_the_same_sizes_is_refused(base, tmp_path):
    write_learnt(opened(make_base(tmp_path / "other", seed=7)), tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=r"model\.init_args\.start: .* was learnt on another base"):
        start_from(opened(base), tmp_path / "l.safetensors")


@pytest.mark.parametrize("option", [{"anomaly_tokens": 3}, {"spatial_tokens": 0}, {"spatial_tokens": 3}])
def test_other_options_are_refused(base, tmp_path, option):
    write_learnt(opened(base), tmp_path / "l.safetensors")
    ((key, value),) = option.items()
    said = rf"model\.init_args\.{key} = {value}, but {tmp_path}/l\.safetensors was learnt with 2; take that"
    with pytest.raises(UserError, match=said):
        start_from(opened(base, **option), tmp_path / "l.safetensors")


def test_another_template_is_warned_of(base, tmp_path):
    one, other = opened(base), opened(base, template="a * on a wall")
    write_learnt(one, tmp_path / "l.safetensors")
    with pytest.warns(UserWarning, match=r"template = 'a \* on a wall', but .*l\.safetensors was learnt with 'a photo"):
        start_from(other, tmp_path / "l.safetensors")
    assert torch.equal(other.learnt["tokens"].weight, one.learnt["tokens"].weight)


def test_a_file_of_an_earlier_version_is_judged_by_its_shapes(base, tmp_path):
    write_learnt(opened(base), tmp_path / "l.safetensors")
    with safe_open(tmp_path / "l.safetensors", "pt") as file:
        about, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(state, tmp_path / "older.safetensors", {key: about[key] for key in about if key != "learnt_with"})
    start_from(opened(base), tmp_path / "older.safetensors")
    with pytest.raises(UserError, match="does not fit the options anomaly_tokens, spatial_tokens and lora"):
        start_from(opened(base, anomaly_tokens=3), tmp_path / "older.safetensors")


def test_missing_damaged_and_foreign_files_are_named(base, tmp_path):
    task = opened(base)
    with pytest.raises(UserError, match=r"there is no file .*nowhere"):
        start_from(task, tmp_path / "nowhere.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match=r"torn\.safetensors cannot be read"):
        start_from(task, tmp_path / "torn.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="holds nothing that an AnomalyDiffusion"):
        start_from(task, tmp_path / "foreign.safetensors")


def test_a_run_goes_on_from_the_file_of_another(base, tmp_path, lit_defect):
    root = make_parts(tmp_path / "tile")
    config = write_config(tmp_path / "c.yaml", root, base)
    lit_defect("fit", "--config", config, "--run_id", "first")
    learnt = tmp_path / "runs" / "tiny" / "first" / "learnt.safetensors"
    cli = lit_defect("fit", "--config", config, "--run_id", "next", "--model.start", learnt, "--model.lr", 1e-12)
    assert cli.trainer.global_step > 0
    with safe_open(learnt, "pt") as file:
        torch.testing.assert_close(cli.model.learnt["tokens"].weight.detach(), file.get_tensor("learnt.tokens.weight"))
