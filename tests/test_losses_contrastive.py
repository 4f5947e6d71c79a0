"""Contrastive losses against their equations written as loops, and on two real processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from lit_defect.errors import UserError
from lit_defect.losses.contrastive import ntxent, ntxent_hard, one_class

N, M, D = 5, 7, 6


def views(n: int, seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


@pytest.fixture
def normal() -> Tensor:
    return views(N, 0)


@pytest.fixture
def anomaly() -> Tensor:
    return views(M, 1)


VALID = torch.tensor([True, False, True, True, False, True, True])
SOURCE = torch.tensor([4, 9, 4, 2, 9])


# --- the equations, term by term ---


def similarity(a: Tensor, b: Tensor) -> float:
    dot = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(p) ** 2 for p in a) * sum(float(q) ** 2 for q in b))


def ntxent_hard_by_loops(
    normal: Tensor, anomaly: Tensor, valid: Tensor, beta: float, tau: float, source: Tensor
) -> float:
    losses = []
    for view in range(2):
        for i in range(normal.shape[1]):
            anchor, twin = normal[view, i], normal[1 - view, i]
            positive = math.exp(similarity(anchor, twin) / tau)
            negatives = sum(
                math.exp(similarity(anchor, normal[v, j]) / tau)
                for v in range(2)
                for j in range(normal.shape[1])
                if source[j] != source[i]
            )
            hard = sum(
                math.exp(similarity(anchor, anomaly[v, j]) / tau)
                for v in range(2)
                for j in range(anomaly.shape[1])
                if valid[j]
            )
            losses.append(-math.log(positive / (positive + negatives + beta * hard)))
    return sum(losses) / len(losses)


def one_class_by_loops(normal: Tensor, anomaly: Tensor, valid: Tensor, tau: float) -> float:
    everything = [("normal", v, i, normal[v, i]) for v in range(2) for i in range(normal.shape[1])]
    everything += [("anomaly", v, i, anomaly[v, i]) for v in range(2) for i in range(anomaly.shape[1]) if valid[i]]
    losses = []
    for kind, v, i, anchor in everything:
        others = [x for x in everything if x[:3] != (kind, v, i)]
        denominator = sum(math.exp(similarity(anchor, x[3]) / tau) for x in others)
        alike = [x for x in others if x[0] == kind and (kind == "normal" or x[2] == i)]
        logs = [math.log(math.exp(similarity(anchor, x[3]) / tau) / denominator) for x in alike]
        losses.append(-sum(logs) / len(logs))
    return sum(losses) / len(losses)


def test_ntxent_worked_out_by_hand() -> None:
    # Two pictures, views (1, 0), (0, 1) and (1, 0), (0, -1), tau = 1/2. The first picture's views are at right
    # angles. Anchor z00: s = 0 to its twin; to the other picture 1 and 0. And so on, each row twin | others:
    #   z00: 0 | 1, 0     z10: 0 | 0, -1     z01: 0 | 1, 0     z11: 0 | 0, -1
    z = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]])
    e = math.exp
    with_one, with_minus_one = math.log(1 + e(2) + 1), math.log(1 + 1 + e(-2))
    assert ntxent(z, temperature=0.5).item() == pytest.approx((2 * with_one + 2 * with_minus_one) / 4, rel=1e-6)


def test_ntxent_is_its_equation(normal: Tensor) -> None:
    none = torch.zeros(0, dtype=torch.bool)
    expected = ntxent_hard_by_loops(normal, normal[:, :0], none, 1, 0.2, torch.arange(N))
    assert ntxent(normal).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_ntxent_hard_is_its_equation(normal: Tensor, anomaly: Tensor, beta: float, tau: float) -> None:
    expected = ntxent_hard_by_loops(normal, anomaly, VALID, beta, tau, SOURCE)
    loss = ntxent_hard(normal, anomaly, valid=VALID, beta=beta, temperature=tau, source=SOURCE)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("n", [1, N])
def test_one_class_is_its_equation(anomaly: Tensor, tau: float, n: int) -> None:
    normal = views(n, 3)
    expected = one_class_by_loops(normal, anomaly, VALID, tau)
    assert one_class(normal, anomaly, valid=VALID, temperature=tau).item() == pytest.approx(expected, rel=1e-5)


# --- what may not count ---


def losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    return {
        "ntxent_hard": lambda normal, anomaly, valid: ntxent_hard(normal, anomaly, valid=valid),
        "one_class": lambda normal, anomaly, valid: one_class(normal, anomaly, valid=valid),
    }


def test_a_picture_never_meets_itself_as_a_negative() -> None:
    # All samples of one picture: there is nothing to repel, whatever the views.
    z = views(N, 2).requires_grad_()
    loss = ntxent(z, source=torch.full((N,), 7))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("name", ["ntxent_hard", "one_class"])
def test_a_rejected_anomaly_is_as_if_absent(normal: Tensor, anomaly: Tensor, name: str) -> None:
    loss = losses()[name]
    kept = loss(normal, anomaly[:, VALID], VALID[VALID])
    torch.testing.assert_close(loss(normal, anomaly, VALID), kept)


@pytest.mark.parametrize("content", [0.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["ntxent_hard", "one_class"])
def test_a_rejected_anomaly_has_no_gradient_whatever_it_holds(
    normal: Tensor, anomaly: Tensor, name: str, content: float
) -> None:
    anomaly = anomaly.clone()
    anomaly[:, ~VALID] = content
    normal.requires_grad_(), anomaly.requires_grad_()
    losses()[name](normal, anomaly, VALID).backward()
    assert normal.grad is not None
    assert anomaly.grad is not None
    assert normal.grad.isfinite().all()
    assert not anomaly.grad[:, ~VALID].any()
    assert anomaly.grad[:, VALID].abs().amin(dim=2).gt(0).all()


@pytest.mark.parametrize("name", ["ntxent_hard", "one_class"])
def test_all_rejected_is_the_loss_without_anomalies(normal: Tensor, anomaly: Tensor, name: str) -> None:
    loss = losses()[name]
    none = torch.zeros(M, dtype=torch.bool)
    normal.requires_grad_()
    value = loss(normal, anomaly, none)
    value.backward()
    torch.testing.assert_close(value, loss(normal, anomaly[:, :0], none[:0]))
    assert normal.grad is not None
    assert normal.grad.isfinite().all()
    if name == "ntxent_hard":
        torch.testing.assert_close(value, ntxent(normal))


def test_the_anchors_own_pseudo_anomaly_is_a_negative() -> None:
    # One picture, both views (1, 0), and the pseudo-anomaly made from it, both views (0, 1): s = 1 and 0.
    normal = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    loss = ntxent_hard(normal, normal.flip(2), temperature=0.5, source=torch.tensor([3]))
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-6)


# --- numbers ---


@pytest.mark.parametrize("name", ["ntxent_hard", "one_class"])
def test_lengths_do_not_matter(normal: Tensor, anomaly: Tensor, name: str) -> None:
    loss = losses()[name]
    torch.testing.assert_close(loss(normal * 1e4, anomaly * 1e-4, VALID), loss(normal, anomaly, VALID))


@pytest.mark.parametrize("name", ["ntxent_hard", "one_class"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    normal, anomaly = views(3, 6, dtype=torch.float64), views(3, 7, dtype=torch.float64)
    valid = torch.tensor([True, False, True])
    inputs = (normal.requires_grad_(), anomaly.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: losses()[name](a, b, valid), inputs)


@pytest.mark.parametrize("name", ["ntxent_hard", "one_class"])
def test_a_very_low_temperature_stays_finite(normal: Tensor, anomaly: Tensor, name: str) -> None:
    function = {"ntxent_hard": ntxent_hard, "one_class": one_class}[name]
    normal.requires_grad_()
    loss = function(normal, anomaly, valid=VALID, temperature=1e-4)
    loss.backward()
    assert loss.isfinite()
    assert normal.grad is not None
    assert normal.grad.isfinite().all()


@pytest.mark.parametrize("name", ["ntxent", "ntxent_hard", "one_class"])
def test_logits_under_autocast_are_float32(normal: Tensor, anomaly: Tensor, name: str) -> None:
    function = {"ntxent": lambda a, _: ntxent(a), "ntxent_hard": ntxent_hard, "one_class": one_class}[name]
    expected = function(normal.bfloat16(), anomaly.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(normal.bfloat16(), anomaly.bfloat16())
    assert loss.dtype == expected.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("name", ["ntxent_hard", "one_class"])
def test_training_separates_anomalies(name: str) -> None:
    # A few steps on free vectors: normal twins come together, anomalies leave them.
    generator = torch.Generator().manual_seed(0)
    normal, anomaly = (torch.randn(2, 8, 16, generator=generator).requires_grad_() for _ in range(2))
    optimiser = torch.optim.Adam([normal, anomaly], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        losses()[name](normal, anomaly, torch.ones(8, dtype=torch.bool)).backward()
        optimiser.step()
    a, b = (torch.nn.functional.normalize(x.detach(), dim=2) for x in (normal, anomaly))
    twins = (a[0] * a[1]).sum(1)
    assert twins.min() > 0.9
    assert (a[0] @ b[0].T).mean() < 0.1
    pairs = (a[0] @ a[0].T)[~torch.eye(8, dtype=torch.bool)]
    if name == "one_class":  # the normal class is one
        assert pairs.min() > 0.9
    else:  # each picture is a class of its own
        assert pairs.mean() < 0.2


# --- bad arguments ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"beta": -0.5}, "beta = -0.5"),
        ({"beta": math.inf}, "beta = inf"),
    ],
)
def test_bad_settings_are_named(normal: Tensor, anomaly: Tensor, arguments: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ntxent_hard(normal, anomaly, **arguments)


def test_bad_shapes_are_named(normal: Tensor, anomaly: Tensor) -> None:
    with pytest.raises(ValueError, match="normal views are"):
        ntxent_hard(normal[0], anomaly)
    with pytest.raises(ValueError, match="normal views are"):
        one_class(normal[:, :0], anomaly)
    with pytest.raises(ValueError, match="pseudo-anomalous views are"):
        one_class(normal, anomaly[..., :-1])
    with pytest.raises(ValueError, match=r"valid is \(3,\), expected \(7,\)"):
        one_class(normal, anomaly, valid=VALID[:3])
    with pytest.raises(ValueError, match=r"source is \(2,\), expected \(5,\)"):
        ntxent(normal, source=SOURCE[:2])


# --- two processes ---

NAMES = ["ntxent", "ntxent_hard", "one_class"]
WORLD, LOCAL = 2, 4  # processes, pictures on each
GLOBAL_SOURCE = torch.tensor([0, 1, 2, 3, 1, 4, 5, 6])  # picture 1 lies on both processes
GLOBAL_VALID = torch.tensor([True, False, True, True, False, False, False, True])  # 3 on one, 1 on the other


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    size = (2, WORLD * LOCAL, 10)
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator)


def network() -> nn.Sequential:
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, D))


def loss_of(name: str, normal: Tensor, anomaly: Tensor, valid: Tensor, source: Tensor) -> Tensor:
    if name == "ntxent":
        return ntxent(normal, source=source)
    if name == "ntxent_hard":
        return ntxent_hard(normal, anomaly, valid=valid, beta=0.7, source=source)
    return one_class(normal, anomaly, valid=valid)


def through(net: nn.Module, normal: Tensor, anomaly: Tensor) -> tuple[Tensor, Tensor]:
    """Both kinds in one forward pass, as in training."""
    projected = net(torch.cat([normal, anomaly], dim=1).flatten(0, 1)).unflatten(0, (2, -1))
    return projected[:, : normal.shape[1]], projected[:, normal.shape[1] :]


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    found = {}
    for name in NAMES:
        net = DistributedDataParallel(network())
        normal, anomaly = through(net, *(x[:, mine] for x in batch()))
        # The same collective, with gradient, as LightningModule.all_gather(sync_grads=True).
        normal, anomaly = (torch.cat(all_gather(x.contiguous()), dim=1) for x in (normal, anomaly))
        valid, source = (torch.cat(all_gather(x[mine])) for x in (GLOBAL_VALID, GLOBAL_SOURCE))
        loss = loss_of(name, normal, anomaly, valid, source)
        loss.backward()
        found[name] = [loss.detach(), *gradients(net)]
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """Of each process: the loss and the averaged gradients, by name of the loss."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(on_one_rank, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_gradient_of_one(on_two_processes: list[dict[str, list[Tensor]]], name: str) -> None:
    net = network()
    loss = loss_of(name, *through(net, *batch()), GLOBAL_VALID, GLOBAL_SOURCE)
    loss.backward()
    expected = [loss.detach(), *gradients(net)]
    for found in on_two_processes:
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)
    # A loss that saw its own process only would be noticed.
    alone = network()
    for part in (slice(0, LOCAL), slice(LOCAL, 2 * LOCAL)):
        normal, anomaly = through(alone, *(x[:, part] for x in batch()))
        (loss_of(name, normal, anomaly, GLOBAL_VALID[part], GLOBAL_SOURCE[part]) / WORLD).backward()
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(gradients(alone), expected[1:], strict=True))
