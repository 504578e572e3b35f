"""The one loop: exactness, fairness, reproducibility, restoration, and what it must never see or touch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from scipy import sparse
from torch import Tensor, nn

from agl_bench import Backbone, Selector, Spots, Step, TrainingView
from agl_bench.errors import BadPlugin, Diverged
from agl_bench.training.evaluate import evaluate, predict
from agl_bench.training.records import EpochRecord
from agl_bench.training.trainer import Trainer
from agl_bench_plugins.selectors.agl import Agl
from agl_bench_plugins.selectors.amal import Amal
from agl_bench_plugins.selectors.dkgsb import Dkgsb
from agl_bench_plugins.selectors.hvg_k import HvgK
from agl_bench_plugins.selectors.pgl import Pgl
from agl_bench_plugins.selectors.random_k import RandomK

SELECTORS: dict[type[Selector], dict[str, Any]] = {
    Pgl: {},
    Agl: {},
    RandomK: {"k": 9},
    HvgK: {"k": 9},
    Dkgsb: {"learning_rate": 0.1, "temperature": 0.1},
    Amal: {"learning_rate": 0.1},
}
LEARNERS = [Dkgsb, Amal]


def run(trainer: Trainer) -> list[EpochRecord]:
    """All records; durations are no result."""
    return [replace(record, seconds=0.0) for record in trainer]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())


def primary_predictions(trainer: Trainer) -> Tensor:
    return predict(trainer.model, trainer.store, torch.arange(len(trainer.store)), trainer.primary_columns)


# ---- Exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_pgl_is_a_narrow_head_trained_alone(make_toy: Callable, dtype: torch.dtype, tolerance: float) -> None:
    wide, narrow = make_toy(), make_toy(only_primary=True)
    assert narrow.genes.auxiliary_count == 0 and wide.genes.auxiliary_count > 20
    one, two = wide.trainer(Pgl, dtype=dtype), narrow.trainer(Agl, dtype=dtype)
    two.model.backbone.load_state_dict(one.model.backbone.state_dict())
    with torch.no_grad():
        two.model.head.weight.copy_(one.model.head.weight[one.primary_columns])
        two.model.head.bias.copy_(one.model.head.bias[one.primary_columns])
    auxiliary = one.model.head.weight.detach()[~wide.genes.primary].clone()
    for a, b in zip(run(one), run(two), strict=True):
        assert a.validation_pcc == pytest.approx(b.validation_pcc, rel=0, abs=tolerance)
        assert a.training_loss == pytest.approx(b.training_loss, rel=0, abs=tolerance)
    # The correlation leaves the offset free: its gradient is rounding alone, which Adam blows up to a step.
    a, b = (p - p.mean(0) for p in map(primary_predictions, (one, two)))
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    assert torch.equal(one.model.head.weight[~wide.genes.primary], auxiliary)  # no gradient, no motion


def test_one_epoch_is_adam_on_the_mean_of_the_losses(make_toy: Callable) -> None:
    toy = make_toy(epochs=1, batch_size=1000, batches_within_section=False, augment=False, weight_decay=0.1)
    trainer = toy.trainer(Agl, dtype=torch.float64)
    reference = toy.model().double()
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3, weight_decay=0.1)
    rows = torch.from_numpy(toy.rows.train)
    prediction, target = reference(toy.development.spots(rows))[1], toy.development.expression[rows]
    correlation = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(prediction.T, target.T, strict=True)]
    )
    loss = (1 - correlation.nan_to_num(0.0)).mean()  # a gene that does not vary has loss 1
    loss.backward()
    optimizer.step()
    (record,) = run(trainer)
    assert record.training_loss == pytest.approx(loss.item(), rel=0, abs=1e-7)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, dict(reference.named_parameters())[name], rtol=0, atol=1e-6)


def test_validation_pcc_is_the_mean_over_sections_of_the_mean_over_genes(make_toy: Callable) -> None:
    toy = make_toy(epochs=1)
    trainer = toy.trainer(Pgl)
    (record,) = run(trainer)
    rows, columns = toy.rows.validation, trainer.primary_columns
    prediction = predict(trainer.model, trainer.store, torch.from_numpy(rows), columns).double().numpy()
    target = toy.development.expression[rows][:, columns].double().numpy()
    section = toy.table.section[toy.fold.validation]
    assert set(section) == {0, 1}
    means = [
        np.mean([scipy.stats.pearsonr(prediction[section == s, g], target[section == s, g])[0] for g in range(6)])
        for s in (0, 1)
    ]
    assert record.validation_pcc == pytest.approx(np.mean(means), rel=0, abs=1e-12)
    assert record.validation_nan_genes == 0


def test_genes_that_do_not_vary_in_the_validation_spots_are_counted(make_toy: Callable) -> None:
    toy = make_toy(epochs=1)
    column = int(toy.genes.primary.nonzero()[0])
    toy.development.expression[toy.rows.validation, column] = 0.1
    (record,) = run(toy.trainer(Pgl))
    assert record.validation_nan_genes == 2 and np.isfinite(record.validation_pcc)  # one gene in two sections


def test_the_protocol_can_overrule_the_learning_rate_of_the_backbone(make_toy: Callable) -> None:
    assert make_toy().trainer(Pgl).rate == 1e-3
    assert make_toy(learning_rate=0.5).trainer(Pgl).optimizer.param_groups[0]["lr"] == 0.5


# ---- Reproducibility and fairness -----------------------------------------------------------------------------------


class Dropping(Backbone):
    """Flat pixels with dropout, whose masks are kept."""

    width, patch_px, learning_rate = 6, 16, 1e-3

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.mix = nn.Linear(768, self.width)
        self.masks: list[Tensor] = []

    def forward(self, spots: Spots) -> Tensor:
        features = torch.tanh(self.mix(spots.patches.flatten(1)))  # type: ignore[union-attr]
        mask = nn.functional.dropout(torch.ones_like(features), 0.3, self.training)
        if self.training:
            self.masks.append(mask)
        return features * mask


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.__name__)
def test_same_seed_same_bits(make_toy: Callable, selector: type[Selector]) -> None:
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # what ran before must not matter
        trainer = make_toy().trainer(selector, Dropping, **SELECTORS[selector])
        torch.rand(noise)
        found.append((run(trainer), state(trainer.model), state(trainer.selector), trainer.fit.effective_weights))
    one, two = found
    assert one[0] == two[0]
    assert equal(one[1], two[1]) and equal(one[2], two[2]) and torch.equal(one[3], two[3])


def test_another_seed_changes_weights_and_batches(make_toy: Callable) -> None:
    one, two = (make_toy().trainer(Pgl, seed=seed) for seed in (0, 1))
    assert not equal(state(one.model), state(two.model))
    two.model.load_state_dict(one.model.state_dict())
    assert run(one) != run(two)


def watched(trainer: Trainer) -> list[tuple[tuple[int, ...], bytes]]:
    """A list to which every batch adds its rows and its pixels."""
    log: list[tuple[tuple[int, ...], bytes]] = []
    original = trainer.store.batch

    def batch(rows: Tensor, augment: torch.Generator | None = None) -> Any:
        made = original(rows, augment)
        log.append((tuple(rows.tolist()), made.spots.patches.numpy().tobytes()))  # type: ignore[union-attr]
        return made

    trainer.store.batch = batch  # type: ignore[method-assign]
    return log


def test_all_selectors_see_the_same(make_toy: Callable) -> None:
    """Initial weights, batches, augmentation and dropout of the training passes; likewise of the outer passes."""
    initial, training, outer = [], {}, {}
    for selector, settings in SELECTORS.items():
        toy = make_toy(epochs=2)
        trainer = toy.trainer(selector, Dropping, **settings)
        initial.append(state(trainer.model))
        log, masks = watched(trainer), trainer.model.backbone.masks
        count = len(trainer._batches(toy.rows.train, "train", 0, trainer.protocol.batch_size))
        training[selector], outer[selector] = [], []
        for _ in trainer:
            training[selector] += [*log[-count:], *masks[-count:]]
            outer[selector] += log[:-count]
            log.clear(), masks.clear()
        assert trainer.model.backbone.masks is masks
    assert all(equal(s, initial[0]) for s in initial)
    for seen in training.values():
        assert len(seen) == len(training[Pgl]) == 2 * 2 * count
        for one, two in zip(seen, training[Pgl], strict=True):
            assert torch.equal(one, two) if isinstance(one, Tensor) else one == two
    assert len(set(map(str, training[Pgl]))) == 2 * 2 * count  # and each time something new
    assert outer[Dkgsb] == outer[Amal] != []
    assert not any(outer[s] for s in SELECTORS if s not in LEARNERS)


def test_a_pass_goes_once_over_the_training_spots(make_toy: Callable) -> None:
    toy = make_toy(epochs=2)
    trainer = toy.trainer(Dkgsb)
    log = watched(trainer)
    section = toy.development.section_on_host
    for _ in trainer:
        rows = [list(r) for r, _ in log]
        outer_pass, training_pass = rows[: 2 * len(rows) // 3], rows[2 * len(rows) // 3 :]
        inner, held_out = outer_pass[::2], outer_pass[1::2]
        for batches in (inner, training_pass):
            assert Counter(chain(*batches)) == Counter(toy.rows.train.tolist())
            assert all(len(set(section[b])) == 1 for b in batches)
            sizes = [len(b) for b in batches]
            assert max(sizes) <= 12 and max(sizes) - min(sizes) <= 1
        assert set(chain(*held_out)) == set(toy.rows.held_out.tolist())
        log.clear()


def test_batches_may_mix_sections(make_toy: Callable) -> None:
    toy = make_toy(batches_within_section=False)
    batches = toy.trainer(Pgl)._batches(toy.rows.train, "train", 0, toy.protocol.batch_size)
    assert any(len(set(toy.development.section_on_host[b])) == 2 for b in batches)
    np.testing.assert_array_equal(torch.cat(batches).sort().values, toy.rows.train)


@pytest.mark.parametrize(("augment", "outer_augment"), [(True, False), (False, True)])
def test_augmentation_is_where_the_protocol_says(make_toy: Callable, augment: bool, outer_augment: bool) -> None:
    toy = make_toy(epochs=1, augment=augment, outer_augment=outer_augment)
    trainer = toy.trainer(Dkgsb)
    log = watched(trainer)
    run(trainer)
    plain = toy.development.spots(torch.arange(len(toy.development))).patches
    changed = {name: [] for name in ("train", "held_out")}
    for rows, pixels in log:
        name = "train" if rows[0] in toy.rows.train else "held_out"
        changed[name].append(pixels != plain[list(rows)].numpy().tobytes())
    assert set(changed["train"]) == {augment} and set(changed["held_out"]) == {outer_augment}


@pytest.mark.parametrize(("start", "every", "due"), [(0, 1, [0, 1, 2, 3]), (1, 2, [1, 3]), (3, 1, [3]), (9, 1, [])])
def test_outer_steps_are_taken_when_the_protocol_says(make_toy: Callable, start: int, every: int, due: list) -> None:
    trainer = make_toy(outer_start=start, outer_every=every).trainer(Dkgsb)
    records = run(trainer)
    assert [r.epoch for r in records if r.outer_loss is not None] == due
    cutoffs = [r.parameters["cutoff"] for r in records]
    moved = [e for e in range(1, 4) if cutoffs[e] != cutoffs[e - 1]]
    assert moved == [e for e in due if e > 0]
    assert all(r.outer_loss is None for r in run(make_toy().trainer(Agl)))


# ---- Stopping and restoring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", LEARNERS, ids=lambda s: s.__name__)
def test_the_best_state_is_restored(make_toy: Callable, selector: type[Selector]) -> None:
    trainer = make_toy(epochs=40, patience=3, learning_rate=0.005).trainer(selector, **SELECTORS[selector])
    states = []
    records = []
    for record in trainer:
        records.append(record)
        states.append((state(trainer.model), state(trainer.selector)))
    fit = trainer.fit
    curve = [r.validation_pcc for r in records]
    assert fit.best_epoch == int(np.argmax(curve)) and fit.validation_pcc == max(curve)
    assert fit.epochs == len(records) == fit.best_epoch + 3 + 1 < 40
    assert [r.is_best for r in records] == [c > max([-2, *curve[:e]]) for e, c in enumerate(curve)]
    assert equal(state(trainer.model), states[fit.best_epoch][0])
    assert equal(state(trainer.selector), states[fit.best_epoch][1])
    assert not equal(states[-1][0], states[fit.best_epoch][0]) and not equal(states[-1][1], states[fit.best_epoch][1])
    assert float(trainer._validate().nanmean(1).nanmean()) == fit.validation_pcc
    if selector is Dkgsb:
        assert records[fit.best_epoch].parameters["cutoff"] == trainer.selector.cutoff.item()
        assert records[fit.best_epoch].selected == int((fit.effective_weights[~trainer.primary] > 0.5).sum())


def test_running_statistics_are_restored(make_toy: Callable) -> None:
    trainer = make_toy(epochs=12, patience=2, learning_rate=0.3).trainer(Agl, Normed)
    run(trainer)
    assert trainer.fit.best_epoch < trainer.fit.epochs - 1
    assert float(trainer._validate().nanmean(1).nanmean()) == trainer.fit.validation_pcc


def test_all_epochs_without_early_stopping(make_toy: Callable) -> None:
    trainer = make_toy(epochs=4, patience=100).trainer(Pgl)
    with pytest.raises(RuntimeError, match="not been iterated to its end"):
        _ = trainer.fit
    assert [r.epoch for r in run(trainer)] == [0, 1, 2, 3] and trainer.fit.epochs == 4


# ---- What must not move ---------------------------------------------------------------------------------------------


class Normed(Backbone):
    """With BatchNorm, whose running statistics must not leak out of a look-ahead."""

    width, patch_px, learning_rate = 6, 16, 1e-3

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=4),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, 6),
            nn.BatchNorm1d(6),
        )

    def forward(self, spots: Spots) -> Tensor:
        return torch.tanh(self.layers(spots.patches))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("settings", [{"steps": 1}, {"steps": 3}, {"steps": 3, "inner": "adam"}], ids=str)
def test_an_outer_pass_moves_the_selector_alone(make_toy: Callable, settings: dict[str, Any], mode: str) -> None:
    trainer = make_toy(epochs=2).trainer(Dkgsb, Normed, **settings)
    trainer.selector.hypergradient = replace(trainer.selector.hypergradient, mode=mode)
    run(trainer)  # statistics and optimiser states are under way
    model, selector = state(trainer.model), state(trainer.selector)
    trainer.optimizer.zero_grad()
    outer = trainer._outer_pass(7)
    assert 0 < outer < 2
    assert equal(state(trainer.model), model) and "backbone.layers.1.running_mean" in model
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not equal(state(trainer.selector), selector)


@pytest.mark.parametrize("backbone", [Normed, Dropping], ids=lambda b: b.__name__)
def test_both_modes_of_the_look_ahead_agree(make_toy: Callable, backbone: type[Backbone]) -> None:
    """Through batch statistics and dropout."""
    found = []
    for mode in ("reverse", "forward"):
        trainer = make_toy(epochs=2).trainer(Dkgsb, backbone, temperature=0.1, steps=3)
        trainer.selector.hypergradient = replace(trainer.selector.hypergradient, mode=mode)
        found.append((trainer._outer_pass(0), float(trainer.selector.cutoff.grad), float(trainer.selector.cutoff)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_validation_leaves_everything_as_it_is(make_toy: Callable) -> None:
    trainer = make_toy().trainer(Agl, Normed)
    trainer.model.train()
    before = state(trainer.model)
    trainer._validate()
    assert equal(state(trainer.model), before) and trainer.model.training


def test_an_outer_step_is_adam_on_the_hypergradient(make_toy: Callable) -> None:
    """The first step of Adam has the size of the learning rate and the sign of the gradient."""
    toy = make_toy(batch_size=1000, batches_within_section=False, augment=False)
    trainer = toy.trainer(Dkgsb, learning_rate=0.01, temperature=0.1, start=0.4, dtype=torch.float64)
    cutoff = trainer.selector.cutoff
    before = float(cutoff)

    def outer_after(value: float) -> float:
        with torch.no_grad():
            cutoff.fill_(value)
        inner, held_out = (toy.development.batch(torch.from_numpy(r)) for r in (toy.rows.train, toy.rows.held_out))
        outer, _ = trainer._hypergradient(inner, held_out, {"cutoff": cutoff}, 0)
        return float(outer)

    slope = (outer_after(before + 1e-5) - outer_after(before - 1e-5)) / 2e-5
    assert outer_after(before) == pytest.approx(trainer._outer_pass(0), rel=0, abs=1e-12)
    assert float(cutoff) - before == pytest.approx(-0.01 * np.sign(slope), rel=1e-3)
    assert float(cutoff.grad) == pytest.approx(slope, rel=1e-5)


class Uncertain(Selector):
    """Kendall et al.: one log-variance for each gene, learnt with the model; the first one has no part in the loss."""

    learns_from = "training"
    learning_rate = 0.05

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view)
        self.log_variance = nn.Parameter(torch.ones(len(view.genes.names) + 1))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        s = self.log_variance[1:]
        return (losses * (-s).exp() + s).mean() + 0 * self.log_variance[0]


def test_parameters_that_learn_from_training_move_with_the_model(make_toy: Callable) -> None:
    toy = make_toy(epochs=1, batch_size=1000, batches_within_section=False, weight_decay=0.5)
    trainer = toy.trainer(Uncertain)
    model = state(trainer.model)
    (record,) = run(trainer)
    moved = trainer.selector.log_variance.detach() - 1
    assert record.outer_loss is None and trainer.outer_optimizer is None
    assert moved[0] == 0  # the weight decay of the model is not the selector's
    torch.testing.assert_close(moved[1:].abs(), torch.full_like(moved[1:], 0.05), rtol=1e-3, atol=0)
    assert not equal(state(trainer.model), model)


# ---- What goes wrong ------------------------------------------------------------------------------------------------


def test_a_loss_of_nan_names_epoch_and_gene(make_toy: Callable) -> None:
    toy = make_toy(loss="squared_error")
    toy.development.expression[toy.rows.train[3], 7] = torch.nan
    with pytest.raises(Diverged, match=rf"became nan in epoch 0, first at gene {toy.genes.names[7]}; lower"):
        run(toy.trainer(Agl))


def test_weights_of_nan_name_epoch_and_gene(make_toy: Callable) -> None:
    """Also with the correlation loss, for which a constant prediction is harmless."""
    toy = make_toy()
    trainer = toy.trainer(Agl)
    epochs = iter(trainer)
    next(epochs)
    with torch.no_grad():
        trainer.model.head.weight[7] = torch.nan
    with pytest.raises(Diverged, match=rf"became nan in epoch 1, first at gene {toy.genes.names[7]}; lower"):
        next(epochs)


def returning(how: Callable[[Tensor], Any], *, learns: bool = False) -> type[Selector]:
    """A selector that returns what a test says."""

    class Returns(Selector):
        def __init__(self, view: TrainingView) -> None:
            super().__init__(view)
            self.idle = nn.Parameter(torch.zeros(()), requires_grad=learns)

        def forward(self, losses: Tensor, step: Step) -> Tensor:
            result: Tensor = how(losses)
            return result

    return Returns


def test_an_infinite_total_of_finite_losses_names_the_epoch(make_toy: Callable) -> None:
    with pytest.raises(Diverged, match="became inf in epoch 0; lower"):
        run(make_toy(batch_size=1000, batches_within_section=False).trainer(returning(lambda losses: losses.sum() / 0)))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (lambda losses: losses, r"Returns\.forward must return a scalar tensor, got \(\d+,\)"),
        (lambda losses: losses.mean()[None], r"must return a scalar tensor, got \(1,\)"),
        (lambda losses: losses.mean().item(), "must return a scalar tensor, got float"),
        (lambda losses: None, "must return a scalar tensor, got NoneType"),
        (lambda losses: torch.zeros((), requires_grad=True) * 1, "does not depend on the losses"),
        (lambda losses: losses.mean().detach(), "does not depend on the losses"),
    ],
    ids=["vector", "one entry", "number", "nothing", "unrelated", "detached"],
)
def test_a_selector_that_returns_something_else_is_named(make_toy: Callable, how: Callable, sentence: str) -> None:
    with pytest.raises(BadPlugin, match=sentence):
        run(make_toy().trainer(returning(how)))


@pytest.mark.parametrize("how", [lambda losses: losses, lambda losses: None], ids=["vector", "nothing"])
def test_a_selector_that_learns_and_returns_something_else_is_named(make_toy: Callable, how: Callable) -> None:
    """Its look-ahead is what meets the result first."""
    with pytest.raises(BadPlugin, match=r"Returns\.forward must return a scalar tensor, got"):
        run(make_toy(outer_start=0).trainer(returning(how, learns=True)))


# ---- Effective weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.__name__)
def test_effective_weights(make_toy: Callable, selector: type[Selector]) -> None:
    toy = make_toy(epochs=2)
    trainer = toy.trainer(selector, **SELECTORS[selector])
    records = run(trainer)
    weights, primary = trainer.fit.effective_weights, toy.genes.primary
    rank = toy.genes.rank
    expected = {
        Pgl: lambda s: torch.zeros(len(rank)),
        Agl: lambda s: torch.ones(len(rank)),
        HvgK: lambda s: (rank < 9).float(),
        RandomK: lambda s: s.mask,
        Dkgsb: lambda s: torch.sigmoid((torch.sigmoid(4 * (s.cutoff - 0.5)) - toy.genes.relative_rank()) / 0.1),
        Amal: lambda s: torch.sigmoid(s.logits / 0.01),
    }[selector](trainer.selector).detach()
    expected = torch.where(primary, torch.ones_like(expected), expected)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    best = records[trainer.fit.best_epoch]
    assert best.effective == pytest.approx(float(expected[~primary].sum()), rel=1e-4)
    assert best.selected == int((expected[~primary] > 0.5).sum())
    if selector in (HvgK, RandomK):
        assert best.selected == 9 and weights[~primary].bool().sum() == 9
    if selector in LEARNERS:
        assert 0 < best.selected < toy.genes.auxiliary_count


# ---- The test spots -------------------------------------------------------------------------------------------------


def test_a_trainer_has_the_development_spots_and_no_others(make_toy: Callable) -> None:
    toy = make_toy()
    trainer = toy.trainer(Dkgsb)
    rows = np.concatenate([toy.fold.train, toy.fold.held_out, toy.fold.validation])
    assert not set(rows) & set(toy.fold.test) and len(rows) + len(toy.fold.test) == len(toy.table)
    assert trainer.store is toy.development and len(trainer.store) == len(rows)
    np.testing.assert_array_equal(trainer.store.position, toy.table.position[rows])
    np.testing.assert_array_equal(trainer.store.section_on_host, toy.table.section[rows])
    used = np.concatenate([toy.rows.train, toy.rows.held_out, toy.rows.validation])
    np.testing.assert_array_equal(used, np.arange(len(rows)))
    assert len(trainer.selector.rho) == len(toy.genes.names) and not hasattr(trainer.selector, "view")


@pytest.mark.parametrize("selector", [Pgl, Dkgsb], ids=lambda s: s.__name__)
def test_test_expression_changes_no_epoch(make_toy: Callable, selector: type[Selector]) -> None:
    toy = make_toy()
    expression = toy.table.expression.toarray()
    expression[toy.fold.test] = (
        np.random.default_rng(0).permutation(expression[toy.fold.test].ravel()).reshape(len(toy.fold.test), -1)
    )
    other = make_toy(replace(toy.table, expression=sparse.csr_matrix(expression)))
    one, two = (t.trainer(selector, **SELECTORS[selector]) for t in (toy, other))
    assert run(one) == run(two)
    assert equal(state(one.model), state(two.model)) and equal(state(one.selector), state(two.selector))
    rows = torch.from_numpy(toy.rows.train)
    scores = [evaluate(t.model, b.test, b.development, rows, b.genes.primary) for t, b in ((one, toy), (two, other))]
    assert not np.allclose(scores[0].pearson, scores[1].pearson)  # the change is there
