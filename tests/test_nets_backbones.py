"""The wrapper around timm networks, over families: features, frozen parts, parameter groups."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from lit_defect.errors import UserError
from lit_defect.nets.backbones import Backbone

# name, image size, D, first and last trained parameter of the last block (worked out by hand)
FAMILIES = [
    ("test_byobnet", None, 256, "stages.3.0", "head.fc.bias"),
    ("resnet18", None, 512, "layer4.0.conv1.weight", "fc.bias"),
    ("tf_efficientnet_lite0", None, 1280, "blocks.6.0.conv_pw.weight", "classifier.bias"),
    ("mobilenetv2_050", None, 1280, "blocks.6.0.conv_pw.weight", "classifier.bias"),
    ("mobilenetv3_small_050", None, 1024, "conv_head.weight", "classifier.bias"),
    ("convnext_atto", None, 320, "stages.3.downsample.0.weight", "head.fc.bias"),
    ("densenet121", None, 1024, "features.denseblock4.denselayer1.norm1.weight", "classifier.bias"),
    ("vit_tiny_patch16_224", 64, 192, "blocks.11.norm1.weight", "head.bias"),
    ("swin_tiny_patch4_window7_224", 56, 768, "layers.3.downsample.norm.weight", "head.fc.bias"),
]
NAMES = [family[0] for family in FAMILIES]
SMALL = "test_resnet"


def make(name: str, **arguments) -> Backbone:
    size = next((f[1] for f in FAMILIES if f[0] == name), None)
    torch.manual_seed(0)
    return Backbone(name, num_classes=3, image_size=size, **arguments)


def images_for(backbone: Backbone, n: int = 2) -> torch.Tensor:
    fixed = backbone.model.pretrained_cfg.get("fixed_input_size")
    return torch.rand(n, 3, *(backbone.input_size if fixed else (64, 64)))


def trained_names(backbone: Backbone) -> list[str]:
    return [name for name, p in backbone.model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("name", "size", "width", "first", "last"), FAMILIES, ids=NAMES)
def test_family(name, size, width, first, last):
    backbone = make(name).eval()
    images = images_for(backbone)
    with torch.no_grad():
        features = backbone.features(images)
        logits = backbone(images)
        torch.testing.assert_close(logits, backbone.model(images))
    torch.testing.assert_close(logits, backbone.head(features))
    assert features.shape == (2, width)
    assert backbone.num_features == width
    assert logits.shape == (2, 3)

    assert len(trained_names(backbone.unfreeze("head"))) == 2
    block = trained_names(backbone.unfreeze("last_block"))
    assert block[0].startswith(first)
    assert block[-1] == last
    everything = [n for n, _ in backbone.model.named_parameters()]
    assert block == everything[-len(block) :]
    assert trained_names(backbone.unfreeze("all")) == everything


@pytest.mark.parametrize("part", ["head", "last_block", "all"])
@pytest.mark.parametrize("name", [SMALL, "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_step_changes_what_is_trained_and_nothing_else(name, part):
    backbone = make(name, drop_rate=0.5).unfreeze(part).train()
    before = copy.deepcopy(backbone.state_dict())
    trained = {f"model.{n}" for n in trained_names(backbone)}
    kernels = {k for k in trained if before[k].ndim > 1}  # a ConvNeXt norm behind a layer scale of 1e-6 rests
    optimizer = torch.optim.SGD(backbone.parameter_groups(lr=0.1, weight_decay=0.1), lr=0.1)
    for _ in range(2):
        loss = nn.functional.cross_entropy(backbone(images_for(backbone, 4)), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = backbone.state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    statistics = {k for k in changed if "running_" in k or "num_batches" in k}
    assert changed - statistics <= trained
    assert kernels <= changed
    # BatchNorm goes on only where its own weights are trained.
    assert all(f"{k.rpartition('.')[0]}.weight" in trained for k in statistics)
    if part == "all" and name in (SMALL, "tf_efficientnet_lite0"):
        assert statistics


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_tiny_patch16_224", "resnet18"])
def test_features_of_a_frozen_network_are_constant(name):
    backbone = make(name, drop_rate=0.9).unfreeze("head").train()
    images = images_for(backbone)
    features = backbone.features(images)
    assert backbone.constant_features
    assert not features.requires_grad
    assert torch.equal(features, backbone.features(images))
    assert torch.equal(features, backbone.eval().features(images))
    assert backbone.head(features).requires_grad
    assert not backbone.unfreeze("last_block").constant_features


def test_dropout_acts_where_the_network_trains():
    backbone = make(SMALL, drop_rate=0.9).unfreeze("all").train()
    assert backbone.model.training
    backbone.unfreeze("head")
    assert not backbone.model.training
    backbone.unfreeze("last_block")
    assert backbone.model.training
    assert not backbone.model.layer1.training
    assert backbone.model.layer4.training
    assert not backbone.eval().model.layer4.training


def test_vgg_features_are_fc7():
    backbone = make("vgg11").eval()
    images = torch.rand(1, 3, 64, 64)
    names = trained_names(backbone.unfreeze("last_block"))
    assert names[0] == "pre_logits.fc1.weight"
    assert len(names) == 6
    with torch.no_grad():
        seen = []
        backbone.model.get_classifier().register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        backbone.model(images)
        assert torch.equal(backbone.features(images), seen[0])
    assert seen[0].shape == (1, 4096)
    assert seen[0].min() >= 0  # after the ReLU


def test_normalise_and_what_a_checkpoint_carries():
    backbone = make(SMALL)
    mean, std = (backbone.model.pretrained_cfg[k] for k in ("mean", "std"))
    pixel = torch.tensor([0.2, 0.4, 0.9]).view(1, 3, 1, 1)
    expected = [(x - m) / s for x, m, s in zip((0.2, 0.4, 0.9), mean, std, strict=True)]
    torch.testing.assert_close(backbone.normalise(pixel).flatten(), torch.tensor(expected))
    network = timm.create_model(SMALL, num_classes=3)
    assert set(backbone.state_dict()) == {f"model.{k}" for k in network.state_dict()} | {"mean", "std"}


def test_without_head():
    backbone = Backbone(SMALL).eval()
    images = torch.rand(2, 3, 64, 64)
    assert backbone.head(backbone.features(images)).shape == (2, backbone.num_features)
    assert trained_names(backbone.unfreeze("head")) == []
    assert all(n.startswith("layer4.") for n in trained_names(backbone.unfreeze("last_block")))


def test_image_size():
    assert Backbone(SMALL).input_size == (160, 160)
    assert Backbone(SMALL, image_size=96).input_size == (96, 96)
    vit = Backbone("test_vit", image_size=(64, 96), num_classes=2).eval()
    assert vit.input_size == (64, 96)
    assert vit(torch.rand(1, 3, 64, 96)).shape == (1, 2)
    with pytest.raises(UserError, match="timm cannot build twins_pcpvt_small"):
        Backbone("twins_pcpvt_small", image_size=60)
    with pytest.raises(UserError, match="one linear classifier"):
        Backbone("sequencer2d_s", num_classes=2)


def test_unknown_part():
    with pytest.raises(UserError, match="none of head, last_block, all"):
        make(SMALL).unfreeze("neck")


def test_parameter_groups_by_hand():
    backbone = make("resnet18")
    groups = backbone.parameter_groups(lr=0.8, weight_decay=0.1, layer_decay=0.5)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = dict(backbone.model.named_parameters())
    assert len(found) == len(named) == sum(len(g["params"]) for g in groups)
    # stem, eight residual blocks, classifier: ten layers
    for name, steps in (
        ("fc.weight", 0),
        ("layer4.1.conv2.weight", 1),
        ("layer4.0.downsample.0.weight", 2),
        ("layer1.0.conv1.weight", 8),
        ("conv1.weight", 9),
    ):
        assert found[id(named[name])] == (pytest.approx(0.8 * 0.5**steps), 0.1)
    for name in ("fc.bias", "layer4.1.bn2.weight", "bn1.bias"):
        assert found[id(named[name])][1] == 0.0
    frozen = backbone.unfreeze("head").parameter_groups(lr=0.8, weight_decay=0.1, layer_decay=0.5)
    assert {id(p) for g in frozen for p in g["params"]} == {id(named["fc.weight"]), id(named["fc.bias"])}


def test_layers_that_learn_alike_are_one_group():
    backbone = make("resnet18")
    groups = backbone.parameter_groups(lr=0.8, weight_decay=0.1)
    assert sorted((g["lr"], g["weight_decay"]) for g in groups) == [(0.8, 0.0), (0.8, 0.1)]
    assert len({id(p) for g in groups for p in g["params"]}) == len(list(backbone.model.parameters()))
    assert len(backbone.parameter_groups(lr=0.8, weight_decay=0.0)) == 1


def test_position_embeddings_have_no_weight_decay():
    backbone = make("vit_tiny_patch16_224")
    groups = backbone.parameter_groups(lr=1.0, weight_decay=0.1)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert id(backbone.model.pos_embed) not in decayed
    assert id(backbone.model.cls_token) not in decayed
    assert id(backbone.model.blocks[0].attn.qkv.weight) in decayed


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_groups_serve_timms_optimizers_and_torchs_schedules(optimizer):
    from timm.optim import create_optimizer_v2

    backbone = make(SMALL)
    groups = backbone.parameter_groups(lr=0.1, weight_decay=0.05, layer_decay=0.5)
    expected = [(g["lr"], g["weight_decay"]) for g in groups]
    made = create_optimizer_v2(groups, opt=optimizer, lr=0.1, weight_decay=0.05)
    assert [(g["lr"], g["weight_decay"]) for g in made.param_groups] == expected
    torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5)
    assert [g["lr"] for g in made.param_groups] == [pytest.approx(lr / 2) for lr, _ in expected]


def test_fingerprint_follows_the_features():
    backbone = make(SMALL)
    first = backbone.fingerprint()
    assert make(SMALL).fingerprint() == first
    with torch.no_grad():
        backbone.model.fc.weight.zero_()
    assert backbone.fingerprint() == first
    with torch.no_grad():
        backbone.model.bn1.running_mean[0] += 1e-3
    assert backbone.fingerprint() != first
    headless = Backbone(SMALL)
    headless.model.load_state_dict(make(SMALL).model.state_dict(), strict=False)
    assert headless.fingerprint() == first


# name, layers behind the strides, (C, stride) of each map
MAPS = [
    ("resnet18", ["layer2", "layer3", "layer4"], [(128, 8), (256, 16), (512, 32)]),
    ("tf_efficientnet_lite0", ["blocks.2", "blocks.4", "blocks.6"], [(40, 8), (112, 16), (320, 32)]),
    ("vgg19", ["features.26", "features.35", "features.36"], [(512, 8), (512, 16), (512, 32)]),
    ("convnext_atto", ["stages.1", "stages.2", "stages.3"], [(80, 8), (160, 16), (320, 32)]),
    ("convnext_tiny", ["stages.1", "stages.2", "stages.3"], [(192, 8), (384, 16), (768, 32)]),
    (
        "densenet121",
        ["features.denseblock2", "features.denseblock3", "features.norm5"],
        [(512, 8), (1024, 16), (1024, 32)],
    ),
    ("vit_tiny_patch16_224", ["blocks.11"], [(192, 16)]),
    ("swin_tiny_patch4_window7_224", ["layers.1", "layers.2", "layers.3"], [(192, 8), (384, 16), (768, 32)]),
]


def shown_by_hooks(backbone: Backbone, layers: list[str], images: torch.Tensor) -> list[torch.Tensor]:
    """What the named layers give during a plain forward pass, copied before a later layer can overwrite it."""
    seen: dict[str, torch.Tensor] = {}
    modules = dict(backbone.model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.clone()}))
        for name in layers
    ]
    backbone(images)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in layers]


@pytest.mark.parametrize(("name", "layers", "shapes"), MAPS, ids=[m[0] for m in MAPS])
def test_maps_are_what_the_layers_give_and_come_with_the_features(name, layers, shapes):
    backbone = make(name).eval()
    if not hasattr(backbone.model, "forward_intermediates"):
        pytest.skip("this timm shows no maps of it")  # VGG before 1.0.22, DenseNet before 1.0.31
    images = images_for(backbone)
    strides = [stride for _, stride in shapes]
    assert backbone.map_layers(strides) == layers
    with torch.no_grad():
        features, maps = backbone.maps(images, strides)
        assert torch.equal(features, backbone.features(images))
        expected = shown_by_hooks(backbone, layers, images)
    height, width = images.shape[-2:]
    assert [tuple(m.shape) for m in maps] == [(2, c, -(-height // s), -(-width // s)) for c, s in shapes]
    for found, wanted in zip(maps, expected, strict=True):
        if name.startswith("vit"):  # tokens: the class token, then the patches row by row
            wanted = wanted[:, 1:].transpose(1, 2).unflatten(2, found.shape[-2:])
        elif name.startswith("swin"):
            wanted = wanted.permute(0, 3, 1, 2)
        assert torch.equal(found, wanted)


def test_maps_are_made_in_one_pass_in_the_order_asked_for():
    backbone = make("resnet18").eval()
    images = torch.rand(2, 3, 72, 40)  # not a multiple of 32
    passes = []
    backbone.model.layer1.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        features, (coarse, fine, again) = backbone.maps(images, (32, 4, 32))
    assert len(passes) == 1
    assert features.shape == (2, 512)
    assert coarse.shape == (2, 512, 3, 2)
    assert fine.shape == (2, 64, 18, 10)
    assert coarse is again


@pytest.mark.parametrize("part", ["head", "last_block", "all"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_maps_of_networks_that_train(name, part):
    backbone = make(name, drop_rate=0.5).unfreeze(part).train()
    images = images_for(backbone, 4)
    torch.manual_seed(1)
    expected = backbone.features(images)
    torch.manual_seed(1)
    features, maps = backbone.maps(images)
    assert torch.equal(features, expected)
    assert features.requires_grad == (part != "head")
    assert [m.requires_grad for m in maps] == {
        "head": [False] * 3,
        "last_block": [False, False, True],
        "all": [True] * 3,
    }[part]
    if part == "head":
        assert torch.equal(features, backbone.eval().features(images))
        return
    (features.mean() + sum(m.mean() for m in maps)).backward()  # no layer has overwritten what another needs
    assert all(p.grad is not None for p in backbone.model.parameters() if p.requires_grad and p.ndim == 4)


def test_maps_in_channels_last_and_in_bfloat16():
    backbone = make("resnet18").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features, maps = backbone.maps(images)
        backbone.to(memory_format=torch.channels_last)
        striped = images.to(memory_format=torch.channels_last)
        features_too, maps_too = backbone.maps(striped)
        assert maps_too[0].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(features_too, features)
        torch.testing.assert_close(maps_too, maps)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, rounded_maps = backbone.maps(images)
            assert torch.equal(rounded, backbone.features(images))
    torch.testing.assert_close(rounded_maps[2].float(), maps[2], rtol=0.1, atol=0.1)


def test_strides_that_a_network_lacks():
    with pytest.raises(UserError, match=r"strides of the maps: \[8, 16, 32\], but vit_tiny.* strides \[16\]"):
        make("vit_tiny_patch16_224").maps(torch.rand(1, 3, 64, 64))
    with pytest.raises(UserError, match=r"\[2, 4, 8, 16, 32\]"):
        make(SMALL).map_layers([8, 64])
    with pytest.raises(UserError, match=r"maps: \[\], but"):
        make(SMALL).map_layers([])


def test_a_network_of_which_timm_shows_no_layers():
    backbone = make(SMALL)
    del backbone.model.feature_info  # some networks of older versions have none
    with pytest.raises(UserError, match=f"timm gives no maps of {SMALL}; choose another"):
        backbone.maps(images_for(backbone))


# --- frozen from the input on ---

# name, image size, number of stages without head, first trained parameter with two stages frozen
STAGES = [
    ("resnet18", None, 5, "layer2.0.conv1.weight"),
    ("tf_efficientnet_lite0", None, 8, "blocks.1.0.conv_pw.weight"),
    ("convnext_atto", None, 6, "stages.1.downsample.0.weight"),
    ("vit_tiny_patch16_224", 64, 13, "blocks.1.norm1.weight"),
    ("swin_tiny_patch4_window7_224", 56, 6, "layers.1.downsample.norm.weight"),
]


@pytest.mark.parametrize(("name", "size", "stages", "first"), STAGES, ids=[row[0] for row in STAGES])
def test_freeze_keeps_the_first_stages(name, size, stages, first):
    backbone = Backbone(name, num_classes=0, image_size=size)
    everything = [key for key, _ in backbone.model.named_parameters()]
    assert trained_names(backbone.freeze(0)) == everything
    assert trained_names(backbone.freeze(2)) == everything[everything.index(first) :]
    assert trained_names(backbone.freeze(stages - 1))
    with pytest.raises(UserError, match=rf"frozen_stages = {stages}: {name} has {stages}"):
        backbone.freeze(stages)
    with pytest.raises(UserError, match="frozen_stages = -1"):
        backbone.freeze(-1)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("stages", [0, 1, 3])
def test_a_step_leaves_frozen_stages_and_resting_norms(stages, norms):
    backbone = Backbone("resnet18").freeze(stages, norms=norms).train()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts some at 0, and nothing before them learns at first
    assert backbone.training
    assert not backbone.constant_features
    before = copy.deepcopy(backbone.model.state_dict())
    parts = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parts, lr=0.1, weight_decay=0.1)
    backbone.features(backbone.normalise(torch.rand(4, 3, 48, 48))).square().mean().backward()
    optimizer.step()
    frozen = ("conv1", "bn1", "layer1", "layer2")[: {0: 0, 1: 2, 3: 4}[stages]]
    for key, value in backbone.model.state_dict().items():
        statistics = "running" in key or "num_batches" in key
        rests = key.startswith(frozen) if frozen else False
        assert torch.equal(value, before[key]) == (rests or (statistics and norms)), key
    # A round through eval mode, as a validation makes, brings back neither.
    backbone.eval()
    assert not any(module.training for module in backbone.modules())
    backbone.train()
    resting = {name for name, module in backbone.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    resting = {name for name in resting if not backbone.model.get_submodule(name).training}
    assert ("layer4.0.bn1" in resting) == norms
    assert ("bn1" in resting) == (norms or stages > 0)


def test_freeze_and_unfreeze_follow_each_other():
    backbone = Backbone("resnet18", num_classes=3)
    everything = trained_names(backbone)
    backbone.freeze(3, norms=True).unfreeze("all").train()
    assert trained_names(backbone) == everything
    backbone.unfreeze("head").freeze(1).train()
    assert trained_names(backbone) == [name for name in everything if not name.startswith(("conv1.", "bn1."))]
    assert backbone.model.layer1[0].bn1.training
    assert not backbone.model.bn1.training


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_network_built_for_another_size_says_so(name):
    network, images = Backbone(name, image_size=64).eval(), torch.rand(1, 3, 48, 64)
    for use in (network.features, lambda given: network.maps(given, [16])):
        with pytest.raises(UserError, match=rf"{name} is built .*64x64.* 48x64: set model.init_args.image_size"):
            use(images)
