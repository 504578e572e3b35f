"""The gradient of every gene at once against one backward pass for each gene."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from agl_bench import OneStep, Step
from agl_bench.errors import NoGradients
from agl_bench.maths.losses import LOSSES

SPOTS, GENES, WIDTH, INPUTS = 9, 13, 4, 5
CONSTANT = 7  # a gene whose target does not vary
PRIMARY = [0, 3, 6]
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
Within = Literal["features", "late", "all"]

NETWORKS: dict[str, Callable[[], nn.Sequential]] = {  # the last two layers are the late part
    "linear": lambda: nn.Sequential(nn.Identity(), nn.Linear(INPUTS, WIDTH)),
    "mlp": lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, WIDTH)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(INPUTS, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH)
    ),
}


def make_step(
    network: str = "mlp",
    loss: str = "pearson",
    dtype: torch.dtype = torch.float64,
    columns: Sequence[int] | None = None,
) -> tuple[Tensor, Step]:
    """Losses (genes,) of a small model, of all genes or of those of `columns`, and the step that made them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        backbone = NETWORKS[network]().to(dtype)
        head = nn.Linear(WIDTH, GENES if columns is None else len(columns)).to(dtype)
        spots, target = torch.randn(SPOTS, INPUTS, dtype=dtype), torch.rand(SPOTS, GENES, dtype=dtype)
    target[:, CONSTANT] = 0.5
    at = None if columns is None else torch.tensor(columns)
    target = target if at is None else target[:, at]
    features = backbone(spots)
    prediction = head(features)
    losses = LOSSES[loss](prediction, target)
    if at is not None:
        losses = torch.zeros(GENES, dtype=dtype).index_copy(0, at, losses)
    late = tuple(backbone[-2:].parameters())
    shared = tuple(backbone.parameters())
    return losses, Step(features, prediction, target, torch.arange(SPOTS), 0, head.weight, shared, late, at)


def row_by_row(losses: Tensor, step: Step, within: str) -> Tensor:
    """The gradient of each gene's loss, (genes, entries), by a backward pass for each."""
    at = {"features": (step.features,), "late": step.late, "all": step.shared}[within]
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
        parts = zip(at, found, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in parts]))
    return torch.stack(rows)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To the accuracy that is promised, of the largest entry."""
    assert found.shape == expected.shape and not found.requires_grad
    assert float(expected.abs().max()) > 0, "nothing to compare"
    assert float((found - expected).abs().max() / expected.abs().max()) < CLOSE[expected.dtype]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("columns", [None, [0, 2, 3, 6, 7, 11]], ids=["all genes", "narrow"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("within", ["features", "late", "all"])
def test_alignments_are_those_of_a_backward_pass_for_each_gene(
    within: Within, network: str, loss: str, columns: list[int] | None, dtype: torch.dtype
) -> None:
    losses, step = make_step(network, loss, dtype, columns)
    rows = row_by_row(losses, step, within)
    assert_close(step.alignment(losses, losses[PRIMARY].mean(), within), rows @ rows[PRIMARY].mean(0))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("columns", [None, [0, 2, 3, 6, 7, 11]], ids=["all genes", "narrow"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_norms_are_those_of_a_backward_pass_for_each_gene(
    network: str, loss: str, columns: list[int] | None, dtype: torch.dtype
) -> None:
    losses, step = make_step(network, loss, dtype, columns)
    found = step.norms(losses)
    assert_close(found, row_by_row(losses, step, "features").norm(dim=1))
    if loss == "pearson":
        assert found[CONSTANT] == 0


@pytest.mark.parametrize("within", ["features", "late", "all"])
def test_toward_may_be_any_loss_of_the_step(within: Within) -> None:
    """Not linear in the losses, and not of the losses alone."""
    losses, step = make_step()
    toward = losses[2:5].square().sum().exp() + step.prediction.square().mean()
    at = {"features": (step.features,), "late": step.late, "all": step.shared}[within]
    pulled = torch.autograd.grad(toward, at, retain_graph=True)
    pull = torch.cat([g.flatten() for g in pulled])
    assert_close(step.alignment(losses, toward, within), row_by_row(losses, step, within) @ pull)


def test_asking_leaves_the_graph_and_the_parameters_as_they_are() -> None:
    losses, step = make_step()
    for within in ("features", "late", "all"):
        first, second = (step.alignment(losses, losses[0], within) for _ in range(2))
        assert torch.equal(first, second)
    assert all(p.grad is None for p in step.shared)
    losses.mean().backward()
    assert all(p.grad is not None for p in step.shared)


def test_a_frozen_backbone_shares_nothing() -> None:
    """And a late part that no gradient reaches neither; with respect to the features there is one all the same."""
    losses, step = make_step("linear")
    plain = Step(step.features, step.prediction, step.target, step.row, 0, step.head)
    for within in ("late", "all"):
        assert torch.equal(plain.alignment(losses, losses[0], within), torch.zeros_like(losses))
    assert plain.alignment(losses, losses[0], "features").abs().sum() > 0


def test_a_step_without_a_head_says_so() -> None:
    losses, step = make_step()
    blind = Step(step.features, step.prediction, step.target, step.row, 0)
    for ask in (
        lambda: blind.slopes(losses),
        lambda: blind.norms(losses),
        lambda: blind.alignment(losses, losses[0]),
        lambda: blind.alignment(losses, losses[0], "all"),
    ):
        with pytest.raises(NoGradients, match="not to be had"):
            ask()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("mode", ["double backward", "jvp"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_step_gradients_of_gene_weights_are_minus_rate_times_alignment(
    network: str, loss: str, mode: Literal["double backward", "jvp"], dtype: torch.dtype
) -> None:
    """∂E(θ₁)/∂w_j = −rate · ⟨∇L_j(θ), ∇E(θ₁)⟩, all genes at once, against a backward pass for each gene."""
    rate = 0.3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(NETWORKS[network](), nn.Linear(WIDTH, GENES)).to(dtype)
        batches = [(torch.randn(SPOTS, INPUTS, dtype=dtype), torch.rand(SPOTS, GENES, dtype=dtype)) for _ in range(2)]
        weights = torch.rand(GENES, dtype=dtype)
    theta = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def losses_at(at: dict[str, Tensor], batch: int) -> Tensor:
        # Running statistics would be changed in place, which forward mode refuses and nothing here looks at.
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.track_running_stats = False
        prediction = torch.func.functional_call(model, {**at, **buffers}, (batches[batch][0],))
        return LOSSES[loss](prediction, batches[batch][1])

    _, found = OneStep(rate, mode=mode)(
        lambda at, phi, _: (phi["w"] * losses_at(at, 0)).sum(),
        lambda at: losses_at(at, 1)[PRIMARY].mean(),
        theta,
        {"w": weights},
        rate=1.0,
    )
    at = {n: p.clone().requires_grad_() for n, p in theta.items()}
    losses = losses_at(at, 0)
    rows = [torch.autograd.grad(one, list(at.values()), retain_graph=True) for one in losses]
    ahead = {
        n: (p - rate * sum(w * row[k] for w, row in zip(weights, rows, strict=True))).detach().requires_grad_()
        for k, (n, p) in enumerate(at.items())
    }
    pull = torch.autograd.grad(losses_at(ahead, 1)[PRIMARY].mean(), list(ahead.values()))
    expected = torch.stack([-rate * sum((g * v).sum() for g, v in zip(row, pull, strict=True)) for row in rows])
    assert_close(found["w"], expected)
