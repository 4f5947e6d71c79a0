"""The autoencoder of label maps: shapes, the scale of its latents worked by hand, and what it leaves on disk."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_defect.diffusion.labels import one_hot
from lit_defect.errors import UserError
from lit_defect.nets.label_autoencoder import LabelAutoencoder


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = LabelAutoencoder(3, channels=(8, 12, 16), latent_channels=2).eval()
    network.class_names = ["background", "crack", "hole"]
    return network


def blocks(count=6, size=(16, 24), classes=3, void=True, seed=0):
    """Class ids (N, H, W): background with one rectangle of each other class, and some void."""
    rng = np.random.default_rng(seed)
    ids = torch.zeros(count, *size, dtype=torch.int64)
    for one in ids:
        for number in range(1, classes):
            y, x = (int(rng.integers(0, side - 6)) for side in size)
            one[y : y + 6, x : x + 6] = number
        if void:
            one[:, -1] = 255
    return ids


def batches(ids, size=2):
    return lambda: ((one_hot(part, 3), part) for part in ids.split(size))


def test_latents_are_smaller_by_the_factor_and_come_back(network):
    assert network.factor == 4
    latents = network.encode(one_hot(blocks(), 3))
    assert latents.shape == (6, 2, 4, 6)
    assert network.decode(latents).shape == (6, 3, 16, 24)
    logits, divergence = network(one_hot(blocks(), 3))
    assert logits.shape == (6, 3, 16, 24)
    assert divergence.shape == (6,)
    assert LabelAutoencoder(2, channels=(4, 4)).factor == 2


def test_decoding_takes_back_what_encoding_scales(network):
    labels = one_hot(blocks(), 3)
    raw = network.vae.encode(labels).latent_dist.mean
    network.fit_scale(batches(blocks()))
    latents = network.encode(labels)
    assert not torch.allclose(latents, raw)
    torch.testing.assert_close(network.decode(latents), network.vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


def test_the_divergence_is_that_of_kingma_and_welling(network):
    labels = one_hot(blocks(), 3)
    known = network.vae.encode(labels).latent_dist
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(known.mean, known.std), torch.distributions.Normal(0.0, 1.0)
    ).sum((1, 2, 3))
    torch.testing.assert_close(network(labels)[1], expected, rtol=1e-4, atol=1e-4)


def test_training_draws_latents_and_encoding_does_not(network):
    labels = one_hot(blocks(), 3)
    assert not torch.equal(network(labels)[0], network(labels)[0])
    assert torch.equal(network.encode(labels), network.encode(labels))


def test_every_class_weighs_the_same_in_the_scale(network, monkeypatch):
    """One pixel to a latent, whose values are given: 0 for background, 6 for crack, 99 for void; no hole."""
    ids = torch.zeros(4, 8, 8, dtype=torch.int64)
    ids[0, 0, 0] = 1
    ids[3, 7] = 255
    value = torch.tensor([0.0, 6.0])

    class Fixed:
        def __init__(self, labels):
            kind = torch.where(labels.any(1), labels.argmax(1), 2)
            plane = torch.tensor([*value, 99.0])[kind]
            self.mean = torch.stack([plane, 1 - plane], 1)

    monkeypatch.setattr(LabelAutoencoder, "_posterior", lambda self, labels: Fixed(labels))
    network.factor = 1
    network.fit_scale(batches(ids, 3))
    # Half of the weight at (0, 1), half at (6, -5): means 3 and -2, each channel's deviation 3.
    torch.testing.assert_close(network.shift, torch.tensor([3.0, -2.0]))
    assert float(network.scale) == pytest.approx(1 / 3)
    latents = network.encode(one_hot(ids, 3))
    assert latents[0, :, 0, 0].tolist() == pytest.approx([1, -1])
    assert latents[1, :, 0, 0].tolist() == pytest.approx([-1, 1])
    assert network.limit == pytest.approx(1.1 * 96 / 3)


def test_scaled_latents_of_balanced_classes_have_mean_0_and_variance_1(network):
    rng = np.random.default_rng(0)
    cells = torch.from_numpy(rng.permutation(np.arange(6 * 4 * 6) % 3).reshape(6, 4, 6))
    ids = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)  # each latent's block is of one class
    network.fit_scale(batches(ids))
    latents = network.encode(one_hot(ids, 3)).detach().double()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), atol=1e-4, rtol=0)
    assert float(latents.square().mean()) == pytest.approx(1, abs=1e-4)
    assert float(latents.abs().max()) == pytest.approx(network.limit / 1.1, rel=1e-4)


def test_how_masks_are_batched_does_not_matter(network):
    network.fit_scale(batches(blocks(), 1))
    first = network.shift.clone(), network.scale.clone(), network.limit
    network.fit_scale(batches(blocks(), 6))
    torch.testing.assert_close((network.shift, network.scale), first[:2])
    assert network.limit == pytest.approx(first[2])


def test_void_masks_alone_have_no_scale(network):
    with pytest.raises(UserError, match="void everywhere"):
        network.fit_scale(batches(torch.full((2, 8, 8), 255)))
    assert not network.fitted
    assert network.limit == math.inf


@pytest.mark.parametrize(("channels", "groups"), [((16, 32, 64), 4), ((12, 24), 3), ((8, 12, 16), 1), ((3, 6), 1)])
def test_norms_leave_each_group_channels_that_tell_the_classes_apart(channels, groups):
    """A norm of each channel alone takes the mean of the channel away: uniform label maps would all be alike."""
    norms = [part for part in LabelAutoencoder(3, channels).modules() if isinstance(part, torch.nn.GroupNorm)]
    assert norms
    assert {norm.num_groups for norm in norms} == {groups}


def test_a_small_network_learns_to_give_label_maps_back():
    torch.manual_seed(0)
    network = LabelAutoencoder(3, channels=(8, 16), latent_channels=4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    for step in range(120):
        ids = blocks(8, void=False, seed=step)
        logits, divergence = network(one_hot(ids, 3))
        loss = F.cross_entropy(logits, ids) + 1e-3 * divergence.mean() / ids[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    ids = blocks(8, void=False, seed=1000)
    found = network.decode(network.encode(one_hot(ids, 3))).argmax(1)
    for number in range(3):
        union = ((found == number) | (ids == number)).sum()
        assert ((found == number) & (ids == number)).sum() / union > 0.9


@pytest.mark.parametrize("size", [(18, 16), (16, 18)])
def test_sides_that_no_latent_covers_are_refused(network, size):
    with pytest.raises(UserError, match=rf"data\.image_size: .*{size[0]} x {size[1]} pixels.*multiples of 4"):
        network.encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (8,)}, r"model\.init_args\.channels = \[8\]"),
        ({"channels": (8, 0)}, r"model\.init_args\.channels = \[8, 0\]"),
        ({"latent_channels": 0}, r"model\.init_args\.latent_channels = 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        LabelAutoencoder(3, **options)


# ---- on disk --------------------------------------------------------------------------------------------


def test_a_folder_gives_the_same_autoencoder_back_and_diffusers_opens_it(network, tmp_path):
    network.fit_scale(batches(blocks()))
    network.save(tmp_path / "run" / "autoencoder")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["autoencoder"]
    loaded = LabelAutoencoder.load(tmp_path / "run" / "autoencoder")
    labels = one_hot(blocks(seed=1), 3)
    assert not loaded.training
    torch.testing.assert_close(loaded.encode(labels), network.encode(labels))
    torch.testing.assert_close(loaded.decode(loaded.encode(labels)), network.decode(network.encode(labels)))
    assert loaded.class_names == ["background", "crack", "hole"]
    assert (loaded.classes, loaded.latent_channels, loaded.factor, loaded.channels) == (3, 2, 4, (8, 12, 16))
    assert loaded.limit == pytest.approx(network.limit)

    from diffusers import AutoencoderKL

    plain = AutoencoderKL.from_pretrained(tmp_path / "run" / "autoencoder", local_files_only=True)
    mean = torch.tensor(plain.config.latents_mean)[:, None, None]
    scaled = (plain.encode(labels).latent_dist.mean - mean) * plain.config.scaling_factor
    torch.testing.assert_close(scaled, network.encode(labels))


def test_nothing_is_overwritten_and_nothing_is_saved_without_a_scale(network, tmp_path):
    with pytest.raises(UserError, match="no scale"):
        network.save(tmp_path / "a")
    network.fit_scale(batches(blocks()))
    network.save(tmp_path / "a")
    with pytest.raises(UserError, match="is not overwritten"):
        network.save(tmp_path / "a")


def test_a_save_that_breaks_off_leaves_nothing(network, tmp_path, monkeypatch):
    network.fit_scale(batches(blocks()))
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def checkpoint(network, path, **changes):
    state = {f"autoencoder.{key}": value for key, value in network.state_dict().items()}
    options = {"class_names": ["background", "crack", "hole"], "channels": (8, 12, 16), "latent_channels": 2}
    torch.save({"state_dict": state, "hyper_parameters": options} | changes, path)
    return path


def test_a_checkpoint_of_the_task_will_do(network, tmp_path):
    network.fit_scale(batches(blocks()))
    loaded = LabelAutoencoder.load(checkpoint(network, tmp_path / "best.ckpt"))
    labels = one_hot(blocks(seed=1), 3)
    torch.testing.assert_close(loaded.encode(labels), network.encode(labels))
    assert loaded.class_names == ["background", "crack", "hole"]


def test_what_is_no_autoencoder_is_told(network, tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        LabelAutoencoder.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds none"):
        LabelAutoencoder.load(tmp_path / "empty")
    with pytest.raises(UserError, match="without a scale"):
        LabelAutoencoder.load(checkpoint(network, tmp_path / "early.ckpt"))
    with pytest.raises(UserError, match="no checkpoint of the task MaskAutoencoder"):
        LabelAutoencoder.load(checkpoint(network, tmp_path / "other.ckpt", state_dict={"backbone.x": torch.zeros(1)}))
    (tmp_path / "cut.ckpt").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read"):
        LabelAutoencoder.load(tmp_path / "cut.ckpt")


def test_a_folder_of_another_version_is_refused(network, tmp_path):
    network.fit_scale(batches(blocks()))
    network.save(tmp_path / "a")
    file = tmp_path / "a" / "label_autoencoder.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    with pytest.raises(UserError, match="another format or version"):
        LabelAutoencoder.load(tmp_path / "a")
