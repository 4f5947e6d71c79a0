"""Everything on a device that is not the CPU: what lies on another one is refused as CUDA refuses it.

The device is registered for good, so each test works in a process of its own, where the tests named here run once more
with a Trainer on that device.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="needs a C++ compiler and ninja"),
]
# Their asserts compare with tensors of the CPU, they start processes, or ask the compiler for code of the device.
OF_THE_CPU = (
    "two_processes or compiled or test_new_pictures or by_hand or only_what_is_learnt or every_loss "
    "or frozen_parts or only_the_adapters or autoencoder_of_the_best or not_the_last_epoch or what_a_run_leaves_and_a_prediction"
)
SYSTEMS = (
    "classification", "contrastive_runs", "contrastive", "segmentation", "refinement", "localization", "image_autoencoder",
    "latent_diffusion_runs", "anomaly_diffusion", "generation", "mask_diffusion", "editing_modes", "diffusion_lora",
)  # fmt: skip
# A GPU is waited for once a step where its answer decides what comes next: how many pictures change, which strips a
# mask has, whether an average has begun, which stored latents a batch takes, whether masks and pictures are valid;
# and where kornia's SSIM and the text encoders of transformers make their own constants.
NEEDED = {
    "copy to the host anomalies/base.py:_check",
    "copy to the host anomalies/perlin.py:strips_of",
    "copy to the device tasks/diffusion_lora.py:_weighed",
    "copy to the device tasks/image_autoencoder.py:loss",
    "copy to the host tasks/contrastive.py:_log_discards",
    "copy to the host tasks/latent_diffusion.py:training_step",
    "copy to the host tasks/pseudo.py:share_of",
    "item tasks/latent_diffusion.py:optimizer_step",
    "item tasks/pixels.py:targets",
    "item tasks/refinement.py:optimizer_step",
    "wait for the device (aten::nonzero) tasks/localization.py:_with_pseudo_anomalies",
    "wait for the device (aten::nonzero) tasks/pseudo.py:with_anomalies",
    "wait for the device (aten::nonzero) tasks/variations.py:_varied",
}
STRICT = """
import torch
from tests.second_device import install
install()
device = torch.device("second")
there, here = torch.rand(3, 4, device=device), torch.rand(3, 4)
def refused(call):
    try:
        call()
    except (RuntimeError, TypeError) as error:
        return str(error)
    raise AssertionError("was not refused")
assert "same device" in refused(lambda: there + here)
assert "aten::cat" in refused(lambda: torch.cat([there, here]))
assert "aten::mm" in refused(lambda: here @ there.T)
assert "convert second" in refused(lambda: there.numpy())
assert "generator" in refused(lambda: torch.rand(2, device=device, generator=torch.Generator()))
assert "indices" in refused(lambda: here[torch.tensor([0], device=device)])
assert "CUDA" in refused(lambda: torch.nn.functional.interpolate(there.byte()[None, None], (2, 2), mode="bilinear"))
assert torch.equal((there + torch.tensor(1.0)).cpu(), there.cpu() + 1)
assert torch.equal(there[torch.tensor([2, 0])].cpu(), there.cpu()[[2, 0]])
layer = torch.nn.Conv2d(3, 2, 3)
picture = torch.rand(1, 3, 8, 8)
expected = torch.autograd.grad(layer(picture).square().sum(), layer.weight)[0]
layer.to(device)
torch.testing.assert_close(torch.autograd.grad(layer(picture.to(device)).square().sum(), layer.weight)[0].cpu(), expected)
"""


def run(*words: str, waits: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(HOME), "SECOND_DEVICE_WAITS": str(waits or "")}
    done = subprocess.run([sys.executable, *words], cwd=HOME, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_the_device_is_strict_and_computes():
    run("-c", STRICT)


def test_every_experiment_runs_and_no_step_waits_for_more_than_it_must(tmp_path):
    select = ("-k", "experiment_runs or editing_runs", "tests/test_experiments.py")
    run("-m", "pytest", "-p", "tests.second_device.everywhere", *select, waits=tmp_path / "waits.json")
    told = json.loads((tmp_path / "waits.json").read_text())
    assert told["devices"].keys() == {"second"}
    assert told["steps"] > 30
    assert told["waits"].keys() <= NEEDED


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_runs(system):
    select = ("-k", f"not ({OF_THE_CPU})", f"tests/test_tasks_{system}.py")
    run("-m", "pytest", "-p", "tests.second_device.everywhere", *select)
