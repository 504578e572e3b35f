"""The one loop: exactness, fairness, reproducibility, restoration, and what it must never see or touch."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
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
from agl_bench.data.store import Csr, Dense, Mapped, SpotStore
from agl_bench.errors import BadPlugin, Diverged
from agl_bench.interfaces.spots import SpotBatch
from agl_bench.maths.hypergradient import SGD, Adam, FiniteDifference, Implicit, Moments, OneStep, Unrolled
from agl_bench.maths.seeds import seed_for
from agl_bench.protocol import load_preset
from agl_bench.training.evaluate import evaluate, pcc_by_section, predict
from agl_bench.training.precision import fast
from agl_bench.training.records import EpochRecord, OuterPass
from agl_bench.training.trainer import Signal, Trainer
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
    Dkgsb: {"learning_rate": 0.1, "temperature": 0.1, "batches": "same"},
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
    columns = trainer.genes.primary.nonzero().squeeze(1)
    return predict(trainer.whole, trainer.store, torch.arange(len(trainer.store)), columns)


# ---- Exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_pgl_is_a_narrow_head_trained_alone(make_toy: Callable, dtype: torch.dtype, tolerance: float) -> None:
    wide, narrow = make_toy(), make_toy(only_primary=True)
    assert narrow.genes.auxiliary_count == 0 and wide.genes.auxiliary_count > 20
    one, two = wide.trainer(Pgl, dtype=dtype), narrow.trainer(Agl, dtype=dtype)
    two.model.backbone.load_state_dict(one.model.backbone.state_dict())
    assert two.model is two.whole and two.model.head.weight.shape == one.model.head.weight.shape
    primary, start = wide.genes.primary, state(one.whole)
    with torch.no_grad():
        two.model.head.weight.copy_(start["head.weight"][primary])
        two.model.head.bias.copy_(start["head.bias"][primary])
    for a, b in zip(run(one), run(two), strict=True):
        assert a.validation_pcc == pytest.approx(b.validation_pcc, rel=0, abs=tolerance)
        assert a.training_loss == pytest.approx(b.training_loss, rel=0, abs=tolerance)
    # The correlation leaves the offset free: its gradient is rounding alone, which Adam blows up to a step.
    a, b = (p - p.mean(0) for p in map(primary_predictions, (one, two)))
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    for name in ("head.weight", "head.bias"):  # no gradient, no motion
        assert torch.equal(state(one.whole)[name][~primary], start[name][~primary])
        assert not torch.equal(state(one.whole)[name][primary], start[name][primary])


def test_one_epoch_is_adam_on_the_mean_of_the_losses(make_toy: Callable) -> None:
    toy = make_toy(epochs=1, batch_size=1000, batches_within_section=False, augment=False, weight_decay=0.1)
    trainer = toy.trainer(Agl, dtype=torch.float64)
    reference = toy.model().double()
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3, weight_decay=0.1)
    rows = torch.from_numpy(toy.rows.train)
    prediction, target = reference(toy.development.spots(rows))[1], toy.development.expression_of()[rows]
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
    rows, columns = toy.rows.validation, toy.genes.primary.nonzero().squeeze(1)
    prediction = predict(trainer.whole, toy.development, torch.from_numpy(rows), columns).double().numpy()
    target = toy.development.expression_of()[rows][:, columns].double().numpy()
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
    toy.development.expression_of()[toy.rows.validation, column] = 0.1
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
        features = torch.tanh(self.mix(spots.patches.flatten(1).to(self.mix.weight.dtype)))  # type: ignore[union-attr]
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
        found.append((run(trainer), state(trainer.whole), state(trainer.selector), trainer.fit.effective_weights))
    one, two = found
    assert one[0] == two[0]
    assert equal(one[1], two[1]) and equal(one[2], two[2]) and torch.equal(one[3], two[3])


def test_another_seed_changes_weights_and_batches(make_toy: Callable) -> None:
    one, two = (make_toy().trainer(Pgl, seed=seed) for seed in (0, 1))
    assert not equal(state(one.whole), state(two.whole)) and not equal(state(one.model), state(two.model))
    two.model.load_state_dict(one.model.state_dict())
    assert run(one) != run(two)


Seen = tuple[tuple[int, ...], bytes, bytes, bytes]


def watched(trainer: Trainer) -> list[Seen]:
    """A list to which every batch adds its rows, pixels, positions and expression of the primary genes."""
    log: list[Seen] = []

    def watch(store: SpotStore, primary: Tensor) -> None:
        original = store.stream

        def stream(batches: Any, augment: Any = None, *, expression: bool = True) -> Iterator[SpotBatch]:
            for made in original(batches, augment, expression=expression):
                if expression:  # else it is for a prediction
                    shown = (made.spots.patches, made.spots.position, made.expression[:, primary])
                    log.append((tuple(made.row.tolist()), *(t.numpy().tobytes() for t in shown)))  # type: ignore
                yield made

        store.stream = stream  # type: ignore[method-assign]

    watch(trainer.store, trainer.primary_columns)
    watch(trainer.scored, torch.arange(len(trainer.primary_columns)))
    return log


def test_all_selectors_see_the_same(make_toy: Callable) -> None:
    """Initial weights, batches, augmentation and dropout of the training passes; likewise of the outer passes."""
    initial, training, outer = [], {}, {}
    for selector, settings in SELECTORS.items():
        toy = make_toy(epochs=2)
        trainer = toy.trainer(selector, Dropping, **settings)
        initial.append(state(trainer.whole))
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
    trainer = toy.trainer(Dkgsb, batches="same")
    log = watched(trainer)
    section = toy.development.section_on_host
    for _ in trainer:
        rows = [list(r) for r, *_ in log]
        outer_pass, training_pass = rows[: 2 * len(rows) // 3], rows[2 * len(rows) // 3 :]
        inner, held_out = outer_pass[::2], outer_pass[1::2]
        for batches in (inner, training_pass):
            assert Counter(chain(*batches)) == Counter(toy.rows.train.tolist())
            assert all(len(set(section[b])) == 1 for b in batches)
            sizes = [len(b) for b in batches]
            assert max(sizes) <= 12 and max(sizes) - min(sizes) <= 1
        assert set(chain(*held_out)) == set(toy.rows.held_out.tolist())
        assert all(len(set(section[b])) == 1 for b in held_out)
        log.clear()


def test_batches_may_mix_sections(make_toy: Callable) -> None:
    toy = make_toy(batches_within_section=False)
    batches = toy.trainer(Pgl)._batches(toy.rows.train, "train", 0, toy.protocol.batch_size)
    assert any(len(set(toy.development.section_on_host[b])) == 2 for b in batches)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), toy.rows.train)


@pytest.mark.parametrize(("augment", "outer_augment"), [(True, False), (False, True)])
def test_augmentation_is_where_the_protocol_says(make_toy: Callable, augment: bool, outer_augment: bool) -> None:
    toy = make_toy(epochs=1, augment=augment, outer_augment=outer_augment)
    trainer = toy.trainer(Dkgsb)
    log = watched(trainer)
    run(trainer)
    plain = toy.development.spots(torch.arange(len(toy.development))).patches
    changed = {name: [] for name in ("train", "held_out")}
    for rows, pixels, *_ in log:
        name = "train" if rows[0] in toy.rows.train else "held_out"
        changed[name].append(pixels != plain[list(rows)].numpy().tobytes())
    assert set(changed["train"]) == {augment} and set(changed["held_out"]) == {outer_augment}


@pytest.mark.parametrize(("start", "every", "due"), [(0, 1, [0, 1, 2, 3]), (1, 2, [1, 3]), (3, 1, [3]), (9, 1, [])])
def test_outer_steps_are_taken_when_the_protocol_says(make_toy: Callable, start: int, every: int, due: list) -> None:
    trainer = make_toy(outer_start=start, outer_every=every).trainer(Dkgsb)
    records = run(trainer)
    assert [r.epoch for r in records if r.outer_loss is not None] == due
    assert [r.epoch for r in records if r.outer_signal_to_noise is not None] == due
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
    splits, late_prefixes = True, ("layers.4.", "layers.5.")

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

    def early(self, spots: Spots) -> Tensor:
        return self.layers[:4](spots.patches.to(self.layers[0].weight.dtype))

    def late(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.layers[4:](hidden))


MODES = ("reverse", "forward", "replay")
RULES = (SGD(0.5), Adam())
ENGINES: list[Any] = [
    *(Unrolled(1, SGD(0.5), mode) for mode in MODES),
    *(Unrolled(3, rule, mode) for rule in RULES for mode in (*MODES, "auto")),
    *(Unrolled(3, SGD(0.5), mode, batches="new") for mode in MODES),
    *(OneStep(), Implicit(2), Implicit(2, "cg"), FiniteDifference(2, delta=1e-3)),
]


@pytest.mark.parametrize("reach", ["all", "late"])
@pytest.mark.parametrize("method", ENGINES, ids=repr)
def test_an_outer_pass_moves_the_selector_alone(make_toy: Callable, method: Any, reach: str) -> None:
    trainer = make_toy(epochs=2).trainer(Dkgsb, Normed, temperature=0.1)
    trainer.selector.hypergradient = replace(method, reach=reach)
    run(trainer)  # statistics and optimiser states are under way
    model, selector, moments = (
        state(trainer.model),
        state(trainer.selector),
        copy.deepcopy(trainer.optimizer.state_dict()),
    )
    trainer.optimizer.zero_grad()
    outer = trainer._outer_pass(7)
    assert 0 < outer.loss < 2
    assert equal(state(trainer.model), model) and "backbone.layers.1.running_mean" in model
    assert all(p.grad is None for p in trainer.model.parameters())
    assert str(trainer.optimizer.state_dict()) == str(moments)
    assert all(m.track_running_stats for m in trainer.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert not equal(state(trainer.selector), selector)


def outer_pass(trainer: Trainer, method: Any = None, epoch: int = 0) -> tuple[OuterPass, list[dict[str, Tensor]]]:
    """An outer pass and the gradient of each of its look-aheads."""
    trainer.selector.hypergradient = method or trainer.selector.hypergradient
    found: list[dict[str, Tensor]] = []
    original = trainer._hypergradient

    def recorded(*arguments: Any) -> Any:
        outer, gradients = original(*arguments)
        found.append(gradients)
        return outer, gradients

    trainer._hypergradient = recorded  # type: ignore[method-assign]
    try:
        return trainer._outer_pass(epoch), found
    finally:
        trainer._hypergradient = original  # type: ignore[method-assign]


@pytest.mark.parametrize("reach", ["all", "late"])
@pytest.mark.parametrize("backbone", [Normed, Dropping], ids=lambda b: b.__name__)
def test_all_ways_of_the_look_ahead_agree(make_toy: Callable, backbone: type[Backbone], reach: Any) -> None:
    """Through batch statistics and dropout: each step has one mask, however often it is computed."""
    found = []
    for mode in ("reverse", "forward", "replay"):
        trainer = make_toy(epochs=2).trainer(Dkgsb, backbone, temperature=0.1, dtype=torch.float64)
        outer, gradients = outer_pass(trainer, Unrolled(3, SGD(0.5), mode, reach))
        found.append((outer.loss, float(gradients[0]["cutoff"]), trainer.selector.cutoff.item()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-6)


@pytest.mark.parametrize("backbone", [Normed, Dropping], ids=lambda b: b.__name__)
def test_finite_differences_agree_with_the_look_ahead(make_toy: Callable, backbone: type[Backbone]) -> None:
    """Both ends of a difference have the same masks."""
    found = []
    for method in (Unrolled(2, SGD(0.5), "reverse"), FiniteDifference(2, SGD(0.5))):
        trainer = make_toy(epochs=2).trainer(Dkgsb, backbone, temperature=0.1, dtype=torch.float64)
        found.append(float(outer_pass(trainer, method)[1][0]["cutoff"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_settling_changes_no_look_ahead(make_toy: Callable) -> None:
    """Nor its dropout."""
    found = []
    for mode in ("auto", "reverse"):
        trainer = make_toy(epochs=2).trainer(Amal, Dropping)
        outer, gradients = outer_pass(trainer, Unrolled(2, SGD(0.5), mode))
        assert trainer.hypergradient == Unrolled(2, SGD(0.5), "reverse")
        found.append((outer, gradients[0]["logits"]))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_validation_leaves_everything_as_it_is(make_toy: Callable) -> None:
    trainer = make_toy().trainer(Agl, Normed)
    trainer.model.train()
    before = state(trainer.model)
    trainer._validate()
    assert equal(state(trainer.model), before) and trainer.model.training


def test_an_outer_step_is_adam_on_the_hypergradient(make_toy: Callable) -> None:
    """The first step of Adam has the size of the learning rate and the sign of the gradient."""
    toy = make_toy(batch_size=1000, batches_within_section=False, augment=False)
    trainer = toy.trainer(Dkgsb, inner="sgd", learning_rate=0.01, temperature=0.1, start=0.4, dtype=torch.float64)
    cutoff = trainer.selector.cutoff
    before = cutoff.item()

    def outer_after(value: float) -> float:
        with torch.no_grad():
            cutoff.fill_(value)
        inner = trainer.store.batch(torch.from_numpy(toy.rows.train))
        held_out = trainer.scored.batch(torch.from_numpy(toy.rows.held_out))
        outer, _ = trainer._hypergradient([[inner]], [held_out], {"cutoff": cutoff}, 0)
        return float(outer)

    slope = (outer_after(before + 1e-5) - outer_after(before - 1e-5)) / 2e-5
    expected = outer_after(before)
    found, (gradients,) = outer_pass(trainer)
    assert found.loss == pytest.approx(expected, rel=0, abs=1e-12) and found.signal_to_noise is None  # of one batch
    assert cutoff.item() - before == pytest.approx(-0.01 * np.sign(slope), rel=1e-3)
    assert float(gradients["cutoff"]) == pytest.approx(slope, rel=1e-5)


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


# ---- Outputs that no loss reads -------------------------------------------------------------------------------------


def with_every_output(selector: type[Selector]) -> type[Selector]:
    """The same selector, but it does not say which genes it uses."""
    return type(selector.__name__, (selector,), {"used": property(lambda self: None, lambda self, value: None)})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("loss", ["pearson", "squared_error"])
@pytest.mark.parametrize("selector", [Pgl, RandomK, HvgK], ids=lambda s: s.__name__)
def test_outputs_that_are_not_used_change_nothing(
    make_toy: Callable, selector: type[Selector], loss: str, dtype: torch.dtype, tolerance: float
) -> None:
    trainers, records = [], []
    for cls in (selector, with_every_output(selector)):
        trainers.append(make_toy(loss=loss).trainer(cls, dtype=dtype, **SELECTORS[selector]))
        start = state(trainers[-1].whole)
        records.append(run(trainers[-1]))
    one, two = trainers
    assert one.model is not one.whole and one.store.genes < len(one.genes.names)
    assert two.model is two.whole and two.store.genes == len(two.genes.names)
    for a, b in zip(*records, strict=True):
        for name in ("validation_pcc", "training_loss", "effective"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=0, abs=tolerance)
        assert (a.epoch, a.selected, a.is_best) == (b.epoch, b.selected, b.is_best)
    used, narrow, wide = one.selector.used, state(one.whole), state(two.whole)
    for name, tensor in wide.items():
        if loss == "pearson" and name == "head.bias":  # free: its gradient is rounding, which Adam blows up to a step
            continue
        torch.testing.assert_close(narrow[name], tensor, rtol=0, atol=tolerance)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(narrow[name][~used], start[name][~used])
        assert not torch.equal(narrow[name][used], start[name][used])
    torch.testing.assert_close(one.fit.effective_weights, two.fit.effective_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["whole", "learner"])
def test_a_look_ahead_sees_the_genes_that_are_used(make_toy: Callable, how: str) -> None:
    class Half(Dkgsb):
        def __init__(self, view: TrainingView, **settings: Any) -> None:
            super().__init__(view, **settings)
            self.used = view.genes.primary | (view.genes.rank < 9)

        def forward(self, losses: Tensor, step: Step) -> Tensor:
            reached = view_mask.to(losses.dtype)
            return self.weighted_mean(losses, reached * torch.sigmoid((self.cutoff - self.rho) / self.temperature))

    found = []
    for cls in (Half, with_every_output(Half)):
        toy = make_toy(epochs=2)
        view_mask = toy.genes.rank < 9
        trainer = toy.trainer(cls, dtype=torch.float64, temperature=0.1)
        found.append(outer_pass(trainer, Unrolled(2, SGD(0.5), "reverse" if how == "whole" else "forward")))
    assert found[0][0].loss == pytest.approx(found[1][0].loss, rel=0, abs=1e-12)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one["cutoff"], two["cutoff"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda used: used[:-1], r"Spoilt\.used must be a bool tensor of shape \(\d+,\), got torch\.bool \(\d+,\)"),
        (lambda used: used[None], r"Spoilt\.used must be a bool tensor of shape .*, got torch\.bool \(1, \d+\)"),
        (lambda used: used.float(), r"Spoilt\.used must be a bool tensor of shape .*, got torch\.float32"),
        (lambda used: used.nonzero().squeeze(1), r"Spoilt\.used must be a bool tensor of shape .*, got torch\.int64"),
        (lambda used: torch.zeros_like(used), r"Spoilt\.used leaves out a primary gene"),
        (lambda used: used & (used.cumsum(0) > 1), r"Spoilt\.used leaves out a primary gene"),
    ],
    ids=["short", "two axes", "numbers", "indices", "nothing", "one too few"],
)
def test_a_bad_choice_of_genes_is_named(make_toy: Callable, spoil: Callable, sentence: str) -> None:
    class Spoilt(Pgl):
        def __init__(self, view: TrainingView) -> None:
            super().__init__(view)
            self.used = spoil(self.used)

    with pytest.raises(BadPlugin, match=sentence):
        make_toy().trainer(Spoilt)


def test_a_selector_that_uses_every_gene_trains_the_whole_model(make_toy: Callable) -> None:
    trainer = make_toy().trainer(HvgK, k=50_000)
    assert trainer.selector.used.all() and trainer.model is trainer.whole


# ---- Look-aheads ----------------------------------------------------------------------------------------------------


class Split(Backbone):
    """Two smooth layers, of which a look-ahead may move the second one; counts its calls."""

    width, patch_px, learning_rate = 6, 16, 1e-3
    splits, late_prefixes = True, ("after.",)

    def __init__(self, example: Spots) -> None:
        super().__init__(example)
        self.mix, self.after = nn.Linear(768, self.width), nn.Linear(self.width, self.width)
        self.calls: list[int] = []

    def early(self, spots: Spots) -> Tensor:
        self.calls.append(len(spots.position))
        return torch.tanh(self.mix(2 * spots.patches.flatten(1).to(self.mix.weight.dtype) - 1))

    def late(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.after(hidden))


def one_look_ahead(trainer: Trainer, method: Any, moments: Moments | None = None) -> tuple[float, dict[str, Tensor]]:
    """On two inner batches and one of held-out spots."""
    trainer.hypergradient = method
    trainer.model.train()
    count = 12
    inner = [[trainer.store.batch(torch.arange(s, s + count))] for s in (0, count)]
    outer = [trainer.scored.batch(torch.from_numpy(trainer.rows.held_out[:count]))]
    own = dict(trainer.selector.named_parameters())
    loss, gradients = trainer._hypergradient(inner if method.batches == "new" else inner[:1], outer, own, 0, moments)
    return float(loss), gradients


LATE = [
    Unrolled(3, SGD(0.5), "reverse"),
    Unrolled(3, SGD(0.5), "forward"),
    Unrolled(3, Adam(epsilon=1e-3), "replay"),
    Unrolled(2, SGD(0.5), "reverse", batches="new"),
    OneStep(),
    Implicit(3),
    FiniteDifference(2, SGD(0.5)),
]


@pytest.mark.parametrize("method", LATE, ids=repr)
def test_a_late_look_ahead_is_a_full_one_with_the_early_part_frozen(make_toy: Callable, method: Any) -> None:
    found = []
    for reach in ("late", "frozen", "all"):
        trainer = make_toy().trainer(Dkgsb, Split, dtype=torch.float64, temperature=0.1)
        trainer.model.backbone.mix.requires_grad_(reach != "frozen")
        found.append(one_look_ahead(trainer, replace(method, reach="late" if reach == "late" else "all")))
    late, frozen, everything = found
    assert late[0] == pytest.approx(frozen[0], rel=0, abs=1e-13)
    torch.testing.assert_close(late[1]["cutoff"], frozen[1]["cutoff"], rtol=1e-9, atol=1e-14)
    assert abs(float(late[1]["cutoff"] / everything[1]["cutoff"]) - 1) > 1e-3


@pytest.mark.parametrize("method", LATE, ids=repr)
def test_a_backbone_that_does_not_split_is_moved_as_a_whole(make_toy: Callable, method: Any) -> None:
    found = [one_look_ahead(make_toy().trainer(Amal), replace(method, reach=reach)) for reach in ("late", "all")]
    assert found[0][0] == found[1][0] and torch.equal(found[0][1]["logits"], found[1][1]["logits"])


@pytest.mark.parametrize(("batches", "looked_at"), [("same", 2), ("new", 3)])
@pytest.mark.parametrize("mode", ["reverse", "forward", "replay", "auto"])
def test_the_early_part_is_computed_once_for_each_batch(
    make_toy: Callable, mode: Any, batches: Any, looked_at: int
) -> None:
    """However many steps look at it."""
    trainer = make_toy().trainer(Amal, Split)
    method = Unrolled(2, SGD(0.5), mode, "late", batches)
    calls = trainer.model.backbone.calls
    trainer.selector.hypergradient = method
    one_look_ahead(trainer, method)
    assert len(calls) == looked_at


def test_late_parameters_are_those_of_the_late_part_and_the_head(make_toy: Callable) -> None:
    trainer = make_toy().trainer(Dkgsb, Split)
    late = trainer.model.late_parameters()
    assert set(late) == {"head.weight", "head.bias", "backbone.after.weight", "backbone.after.bias"}
    assert all(p is dict(trainer.model.named_parameters())[n] for n, p in late.items())
    trainer.model.backbone.after.bias.requires_grad_(False)
    assert "backbone.after.bias" not in trainer.model.late_parameters()


def looked_at(trainer: Trainer, epoch: int = 0) -> list[tuple[list[list[tuple[int, ...]]], list[tuple[int, ...]]]]:
    """The rows of the inner groups and of the outer group, for each look-ahead of an outer pass."""
    found: list[Any] = []
    original = trainer._hypergradient

    def recorded(inner: Any, outer: Any, *rest: Any) -> Any:
        *inner, outer = [list(group) for group in (*inner, outer)]
        rows = [[tuple(b.row.tolist()) for b in group] for group in (*inner, outer)]
        found.append((rows[:-1], rows[-1]))
        return original(inner, outer, *rest)

    trainer._hypergradient = recorded  # type: ignore[method-assign]
    trainer._outer_pass(epoch)
    trainer._hypergradient = original  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("mode", ["reverse", "forward", "replay"])
@pytest.mark.parametrize("batches", ["same", "new"])
def test_inner_losses_are_of_one_batch_or_of_one_each(make_toy: Callable, batches: Any, mode: Any) -> None:
    toy = make_toy()
    trainer = toy.trainer(Dkgsb)
    trainer.selector.hypergradient = Unrolled(3, SGD(0.5), mode, batches=batches)
    seen: list[tuple[int, ...]] = []
    original = trainer._losses

    def losses(features: Tensor, prediction: Tensor, batch: SpotBatch, *rest: Any) -> Any:
        seen.append(tuple(batch.row.tolist()))
        return original(features, prediction, batch, *rest)

    trainer._losses = losses  # type: ignore[method-assign]
    log = looked_at(trainer)
    count = len(trainer._batches(toy.rows.train, "train", 0, 12))
    calls = 6 if mode == "replay" else 3
    assert len(log) == count and len(seen) == count * calls
    for number, (inner, outer) in enumerate(log):
        here = seen[number * calls : (number + 1) * calls]
        given = [group[0] for group in inner]
        assert len(inner) == len(set(given)) == (3 if batches == "new" else 1) and len(outer) == 1
        expected = given * (3 // len(given))
        assert here == expected + (expected[::-1] if mode == "replay" else [])
    rows = Counter(chain(*(batch for inner, _ in log for group in inner for batch in group)))
    assert rows == Counter(dict.fromkeys(toy.rows.train.tolist(), 3 if batches == "new" else 1))


@pytest.mark.parametrize("average", [1, 2, 3, 0])
@pytest.mark.parametrize("batches", ["same", "new"])
def test_losses_of_a_look_ahead_are_means_over_batches(make_toy: Callable, batches: Any, average: int) -> None:
    toy = make_toy(outer_batches=average, outer_batch_size=9)
    trainer = toy.trainer(Dkgsb)
    trainer.selector.hypergradient = Unrolled(2, SGD(0.5), "forward", batches=batches)
    log = looked_at(trainer)
    many, many_outer = (len(trainer._batches(r, "", 0, 9)) for r in (toy.rows.train, toy.rows.held_out))
    assert many > 3 > many_outer > 1
    of_each = average or many
    assert len(log) == -(-many // of_each)
    for inner, outer in log:
        assert [len(group) for group in inner] == [of_each] * (2 if batches == "new" else 1)
        assert len(outer) == min(average or many_outer, many_outer)
    first = {r for inner, _ in log for group in inner for batch in group for r in batch}
    assert first == set(toy.rows.train.tolist())


@pytest.mark.parametrize(
    "method", [Unrolled(3, SGD(0.5), "forward"), Unrolled(3, SGD(0.5), "replay"), OneStep()], ids=repr
)
def test_a_look_ahead_on_several_batches_is_that_of_their_mean_loss(make_toy: Callable, method: Any) -> None:
    """Against central differences of plain steps on the mean of the losses."""
    trainer = make_toy().trainer(Dkgsb, dtype=torch.float64, temperature=0.1)
    trainer.hypergradient = method
    train, held_out = trainer.rows.train, trainer.rows.held_out
    inner = [trainer.store.batch(torch.from_numpy(train[s : s + 12])) for s in (0, 12, 24)]
    outer = [trainer.scored.batch(torch.from_numpy(held_out[s : s + 7])) for s in (0, 7)]
    cutoff = trainer.selector.cutoff
    rate = method.rule.learning_rate if isinstance(method, Unrolled) else trainer.rate
    loss, gradients = trainer._hypergradient([inner], outer, {"cutoff": cutoff}, 0)

    def after(value: float) -> float:
        model = copy.deepcopy(trainer.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        with torch.no_grad():
            cutoff.fill_(value)
        for _ in range(method.steps):
            optimizer.zero_grad()
            for batch in inner:
                features, prediction = model(batch.spots)
                losses = trainer.losses_of(prediction, batch.expression)
                (trainer.selector(losses, Step(features, prediction, batch.expression, batch.row, 0)) / 3).backward()
            optimizer.step()
        scored = [trainer.losses_of(model(b.spots)[1][:, trainer.primary_columns], b.expression).mean() for b in outer]
        return float(sum(scored).detach()) / 2

    before = cutoff.item()
    slope = (after(before + 1e-5) - after(before - 1e-5)) / 2e-5
    assert float(loss) == pytest.approx(after(before), rel=0, abs=1e-12)
    assert float(gradients["cutoff"]) == pytest.approx(slope, rel=1e-4)


class Carrying(Dkgsb):
    """Its look-ahead carries the training optimiser on."""

    def __init__(self, view: TrainingView, **settings: Any) -> None:
        super().__init__(view, **settings)
        self.hypergradient = Unrolled(2, Adam(carried=True))


def carried(trainer: Trainer) -> list[Moments | None]:
    """The moments of each look-ahead from here on."""
    found: list[Moments | None] = []
    original = trainer._hypergradient

    def recorded(*arguments: Any) -> Any:
        found.append(arguments[4])
        return original(*arguments)

    trainer._hypergradient = recorded  # type: ignore[method-assign]
    return found


def test_carried_moments_are_those_of_the_training_optimiser(make_toy: Callable) -> None:
    trainer = make_toy(epochs=2).trainer(Carrying)
    found, epochs = carried(trainer), iter(trainer)
    next(epochs)
    count = len(found)
    parameters = dict(trainer.model.named_parameters())
    for moments in found:  # before the first step
        assert moments.count == 0 and set(moments.slots) == set(parameters)
        assert all((s == 0).all() and s.shape == parameters[n].shape for n, g in moments.slots.items() for s in g)
    kept = {n: {k: v.clone() for k, v in trainer.optimizer.state[p].items()} for n, p in parameters.items()}
    trainer._outer_pass(1)
    assert len(found) == 2 * count
    for moments in found[count:]:
        assert moments.count == count == int(kept["head.weight"]["step"])
        for name, slots in moments.slots.items():
            for slot, key in zip(slots, ("exp_avg", "exp_avg_sq"), strict=True):
                assert torch.equal(slot, kept[name][key]) and slot.bool().any()


def test_a_carried_step_is_the_next_one_of_the_training_optimiser(make_toy: Callable) -> None:
    trainer = make_toy(epochs=1).trainer(Carrying, dtype=torch.float64, temperature=0.1)
    run(trainer)
    batch = trainer.store.batch(torch.arange(12))
    outer = trainer.scored.batch(torch.from_numpy(trainer.rows.held_out))
    trainer.hypergradient = Unrolled(1, Adam(carried=True), "reverse")
    moments = trainer._moments()
    loss, _ = trainer._hypergradient([[batch]], [outer], dict(trainer.selector.named_parameters()), 0, moments)
    features, prediction = trainer.model(batch.spots)
    losses, step = trainer._losses(features, prediction, batch, 0)
    trainer.optimizer.zero_grad()
    trainer._combine(losses, step).backward()
    trainer.optimizer.step()
    _, prediction = trainer.model(outer.spots, None, trainer.primary_columns)
    expected = trainer.losses_of(prediction, outer.expression).mean()
    assert float(loss) == pytest.approx(expected.item(), rel=0, abs=1e-12)


def test_other_rules_start_from_nothing(make_toy: Callable) -> None:
    for settings in ({"inner": "sgd"}, {"inner": "adam", "carried": False}):
        trainer = make_toy(epochs=2).trainer(Dkgsb, **settings)
        found = carried(trainer)
        run(trainer)
        assert found and all(m is None for m in found)
    trainer = make_toy(epochs=2).trainer(Dkgsb)
    trainer.selector.hypergradient = OneStep()  # has no rule at all
    assert trainer._moments() is None


# ---- The paper's losses of a look-ahead ------------------------------------------------------------------------------

ADAM = Adam(epsilon=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("divided", "same"), [(SGD(0.5), SGD(0.5 / 64)), (ADAM, replace(ADAM, epsilon=64e-4))], ids=["SGD", "Adam"]
)
def test_a_divisor_of_the_inner_loss_shortens_sgd_and_weighs_up_epsilon(
    make_toy: Callable, mode: Any, divided: Any, same: Any
) -> None:
    """(m / 64) / (√v / 64 + ε) = m / (√v + 64 ε)."""
    found = []
    for divisor, rule in ((64.0, divided), (1.0, same), (1.0, divided)):
        trainer = make_toy(inner_divisor=divisor).trainer(Dkgsb, dtype=torch.float64, temperature=0.1)
        found.append(one_look_ahead(trainer, Unrolled(2, rule, mode)))
    one, two, without = found
    assert one[0] == pytest.approx(two[0], rel=0, abs=1e-12)
    torch.testing.assert_close(one[1]["cutoff"], two[1]["cutoff"], rtol=1e-9, atol=0)
    assert abs(float(one[1]["cutoff"] / without[1]["cutoff"]) - 1) > 0.01


def test_epsilon_of_higher_stands_before_the_bias_correction(make_toy: Callable) -> None:
    """At the first step √(1 − β₂) = 0.0316 of what torch.optim adds after it."""
    found = []
    for rule in (replace(ADAM, corrected=False), replace(ADAM, epsilon=1e-4 / 0.001**0.5)):
        trainer = make_toy().trainer(Dkgsb, dtype=torch.float64, temperature=0.1)
        found.append(one_look_ahead(trainer, Unrolled(1, rule, "reverse")))
    assert found[0][0] == pytest.approx(found[1][0], rel=0, abs=1e-12)
    torch.testing.assert_close(found[0][1]["cutoff"], found[1][1]["cutoff"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("detach", [False, True])
def test_a_constant_weight_sum_leaves_out_the_mean_of_the_others(make_toy: Callable, detach: bool) -> None:
    """dE/dt = −(rate / W) Σ w' ⟨∇L_j, ∇E⟩, and live ⟨∇L_j − ∇(weighted mean), ∇E⟩ (one SGD step)."""
    trainer = make_toy(detach_weight_sum=detach).trainer(Dkgsb, dtype=torch.float64, temperature=0.1, bounded=False)
    _, gradients = one_look_ahead(trainer, OneStep(0.5))
    inner = trainer.store.batch(torch.arange(12))
    outer = trainer.scored.batch(torch.from_numpy(trainer.rows.held_out[:12]))
    rho = trainer.genes.relative_rank(torch.float64)
    w = torch.sigmoid((trainer.selector.cutoff.detach() - rho) / 0.1)
    slope = torch.where(trainer.primary, 0, w * (1 - w) / 0.1)
    w = torch.where(trainer.primary, 1, w)
    parameters = dict(trainer.model.named_parameters())
    losses = trainer.losses_of(trainer.model(inner.spots)[1], inner.expression)
    each = [torch.autograd.grad(part, list(parameters.values()), retain_graph=True) for part in losses]
    mean = [sum(w[j] * g[i] for j, g in enumerate(each)) / w.sum() for i in range(len(parameters))]
    ahead = {n: (p - 0.5 * g).detach().requires_grad_() for (n, p), g in zip(parameters.items(), mean, strict=True)}
    _, prediction = torch.func.functional_call(trainer.model, ahead, (outer.spots, None, trainer.primary_columns))
    along = torch.autograd.grad(trainer.losses_of(prediction, outer.expression).mean(), list(ahead.values()))
    expected = 0.0
    for s, of_gene in zip(slope, each, strict=True):
        less = of_gene if detach else [g - m for g, m in zip(of_gene, mean, strict=True)]
        expected -= (
            0.5 / float(w.sum()) * float(s) * sum(float((g * v).sum()) for g, v in zip(less, along, strict=True))
        )
    assert float(gradients["cutoff"]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    "method", [Unrolled(2, SGD(0.5), "forward"), Unrolled(2, SGD(0.5), "replay"), OneStep(0.5)], ids=repr
)
def test_the_inner_loss_is_a_mean_over_random_subsets(make_toy: Callable, method: Any) -> None:
    """Drawn anew for each step; against central differences of plain steps."""
    trainer = make_toy(inner_subsets=5, inner_subset_size=7).trainer(Dkgsb, dtype=torch.float64, temperature=0.1)
    loss, gradients = one_look_ahead(trainer, method)
    inner = trainer.store.batch(torch.arange(12))
    outer = trainer.scored.batch(torch.from_numpy(trainer.rows.held_out[:12]))
    drawn = [trainer._subsets(12, "0", "0", f"{h}.0") for h in range(2)]
    assert [[len(set(s.tolist())) for s in subsets] for subsets in drawn] == [[7] * 5] * 2
    assert len({tuple(s.tolist()) for subsets in drawn for s in subsets}) == 10
    cutoff = trainer.selector.cutoff
    before = cutoff.item()

    def after(value: float) -> float:
        model = copy.deepcopy(trainer.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with torch.no_grad():
            cutoff.fill_(value)
        for subsets in drawn[: method.steps]:
            optimizer.zero_grad()
            features, prediction = model(inner.spots)
            step = Step(features, prediction, inner.expression, inner.row, 0)
            parts = [trainer.selector(trainer.losses_of(prediction[s], inner.expression[s]), step) for s in subsets]
            (sum(parts) / 5).backward()
            optimizer.step()
        _, prediction = model(outer.spots)
        return float(trainer.losses_of(prediction[:, trainer.primary_columns], outer.expression).mean().detach())

    slope = (after(before + 1e-5) - after(before - 1e-5)) / 2e-5
    assert loss == pytest.approx(after(before), rel=0, abs=1e-12)
    assert float(gradients["cutoff"]) == pytest.approx(slope, rel=1e-4)


def test_a_batch_that_is_smaller_than_a_subset_is_its_only_subset(make_toy: Callable) -> None:
    found = []
    for subsets in (0, 3):
        trainer = make_toy(inner_subsets=subsets).trainer(Amal, dtype=torch.float64, temperature=0.1)
        found.append(one_look_ahead(trainer, OneStep(0.5)))
    assert found[0][0] == pytest.approx(found[1][0], rel=0, abs=1e-12)
    torch.testing.assert_close(found[0][1]["logits"], found[1][1]["logits"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("reach", ["all", "late"])
@pytest.mark.parametrize("backbone", [Normed, Dropping], ids=lambda b: b.__name__)
def test_the_outer_loss_may_be_that_of_a_model_in_use(make_toy: Callable, backbone: type[Backbone], reach: Any) -> None:
    """With running statistics and without dropout; the inner steps stay as in training."""
    trainer = make_toy(outer_mode="eval", epochs=1).trainer(Dkgsb, backbone, dtype=torch.float64, temperature=0.1)
    run(trainer)  # running statistics are under way
    before = state(trainer.model)
    loss, _ = one_look_ahead(trainer, Unrolled(1, SGD(0.0), "reverse", reach))
    outer = trainer.scored.batch(torch.from_numpy(trainer.rows.held_out[:12]))

    def plain(training: bool) -> float:
        model = copy.deepcopy(trainer.model).train(training)
        torch.manual_seed(seed_for(0, "dropout", "outer", "0", "0", "outer"))
        prediction = model(outer.spots, None, trainer.primary_columns)[1]
        return float(trainer.losses_of(prediction, outer.expression).mean())

    assert loss == pytest.approx(plain(training=False), rel=0, abs=1e-12)
    assert abs(loss - plain(training=True)) > 1e-4
    assert equal(state(trainer.model), before) and trainer.model.training
    pair = [
        one_look_ahead(trainer, method)[1]["cutoff"].item()
        for method in (Unrolled(2, SGD(0.5), "forward", reach), FiniteDifference(2, SGD(0.5), reach=reach))
    ]
    assert pair[0] == pytest.approx(pair[1], rel=1e-4)
    trainer.protocol = replace(trainer.protocol, outer_mode="train")
    assert one_look_ahead(trainer, Unrolled(1, SGD(0.0), "reverse", reach))[0] == pytest.approx(plain(True), abs=1e-12)


@pytest.mark.parametrize("over", ["training", "held_out"])
def test_a_pass_takes_the_training_or_the_held_out_spots_once(make_toy: Callable, over: str) -> None:
    toy = make_toy(inner_batch_size=20, outer_batch_size=9, outer_pass_over=over)
    trainer = toy.trainer(Dkgsb)
    trainer.selector.hypergradient = OneStep()
    log = looked_at(trainer)
    inner, outer = Counter(chain(*(b for i, _ in log for b in i[0]))), Counter(chain(*(b for _, o in log for b in o)))
    many, many_outer = (len(trainer._batches(r, "", 0, s)) for r, s in ((toy.rows.train, 20), (toy.rows.held_out, 9)))
    assert many != many_outer and len(log) == (many if over == "training" else many_outer)
    taken, rows = (inner, toy.rows.train) if over == "training" else (outer, toy.rows.held_out)
    assert taken == Counter(rows.tolist())
    assert 9 < max(len(b) for i, _ in log for b in i[0]) <= 20 and max(len(b) for _, o in log for b in o) <= 9


# ---- The schedule: a warm start, rounds, outer steps to convergence --------------------------------------------------

QUICK = {"epochs": 30, "patience": 2, "round_patience": 2, "outer_patience": 2, "learning_rate": 0.002}
V1 = QUICK | {"schedule": "two_stage", "warm_start": "learners", "outer_restart": True}


def scripted(trainer: Trainer, scores: dict[str, list[float]]) -> list[str]:
    """A log of what the trainer does, which from here on sees these validation scores, by purpose of the pass before.

    Passes of training are named by their purpose, those of outer steps "outer TURN".
    """
    log: list[str] = []
    given = {name: iter(values) for name, values in scores.items()}
    train, outer, renew = trainer._train_pass, trainer._outer_pass, trainer._renew_optimizer

    def train_pass(epoch: int, purpose: str = "train") -> Any:
        log.append("warm" if trainer.course.is_warming else purpose)
        return train(epoch, purpose)

    def outer_pass(epoch: int, turn: int = 0) -> OuterPass:
        log.append(f"outer {turn}")
        return outer(epoch, turn)

    def renew_optimizer() -> None:
        log.append("new optimiser")
        renew()

    trainer._train_pass, trainer._outer_pass = train_pass, outer_pass  # type: ignore[method-assign]
    trainer._renew_optimizer = renew_optimizer  # type: ignore[method-assign]
    trainer._validate = lambda: torch.tensor([[next(given[log[-1]])]])  # type: ignore[method-assign]
    return log


def test_the_first_schedule_goes_through_its_stages_in_order(make_toy: Callable) -> None:
    trainer = make_toy(**V1).trainer(Dkgsb, **SELECTORS[Dkgsb])
    # A warm start; a round with a gain; one without.
    scores = {
        "warm": [0.1, 0.3, 0.2, 0.1],
        "trial": [0.2, 0.4, 0.3, 0.4, *(0.1, 0.0, 0.1)],
        "train": [0.2, 0.5, 0.5, 0.4, *(0.5, 0.4)],
    }
    log = scripted(trainer, scores)
    records = run(trainer)
    trial = ["new optimiser", "trial"]
    first = [step for turn in range(4) for step in (f"outer {turn}", *trial)]
    second = [step for turn in range(3) for step in (f"outer {turn}", *trial)]
    back = ["new optimiser"]
    assert log == [*["warm"] * 4, *back, *first, *["train"] * 4, *back, *second, *["train"] * 2]
    assert [r.round for r in records] == [0] * 4 + [1] * 4 + [2] * 2
    assert [r.epoch for r in records] == list(range(10))
    assert [len(r.outer) for r in records] == [0] * 4 + [4, 0, 0, 0, 3, 0]
    assert [p.validation_pcc for p in records[4].outer] == pytest.approx([0.2, 0.4, 0.3, 0.4])
    assert records[4].outer_loss == pytest.approx(np.mean([p.loss for p in records[4].outer]))
    assert (trainer.fit.best_epoch, trainer.fit.epochs) == (5, 10)
    assert trainer.fit.validation_pcc == pytest.approx(0.5)


def test_the_selector_of_the_best_pass_is_kept_and_the_model_is_what_it_was(make_toy: Callable) -> None:
    trainer = make_toy(**QUICK, outer_start=1).trainer(Dkgsb, Normed, **SELECTORS[Dkgsb])
    next(iter(trainer))
    model, moments = state(trainer.model), copy.deepcopy(trainer.optimizer.state_dict())
    scripted(trainer, {"trial": [0.3, 0.5, 0.4, 0.4]})
    seen, original = [], trainer._validate

    def validate() -> Tensor:
        seen.append((state(trainer.selector), state(trainer.model)))
        return original()

    trainer._validate = validate  # type: ignore[method-assign]
    passes = trainer._outer_steps(1)
    assert len(passes) == len(seen) == 4
    assert equal(state(trainer.selector), seen[1][0]) and not equal(seen[1][0], seen[3][0])
    assert equal(state(trainer.model), model) and str(trainer.optimizer.state_dict()) == str(moments)
    assert not any(equal(copy_of_model, model) for _, copy_of_model in seen)


def test_every_copy_is_trained_from_the_same_state_on_the_same_batches(make_toy: Callable) -> None:
    """So that their scores differ by the selector alone: one that cannot move has one score."""
    trainer = make_toy(**QUICK).trainer(Dkgsb, Dropping, **SELECTORS[Dkgsb] | {"learning_rate": 0.0})
    trainer.model.train()
    scores = [p.validation_pcc for p in trainer._outer_steps(0)]
    assert len(scores) == 3 and len(set(scores)) == 1  # the first and two without a gain


def test_outer_steps_end_at_their_most(make_toy: Callable) -> None:
    trainer = make_toy(**QUICK, outer_passes=3).trainer(Dkgsb, **SELECTORS[Dkgsb])
    scripted(trainer, {"trial": [0.1, 0.2, 0.3, 0.4]})
    assert len(trainer._outer_steps(0)) == 3


@pytest.mark.parametrize("restart", [False, True])
def test_a_selector_may_begin_anew(make_toy: Callable, restart: bool) -> None:
    toy = make_toy(outer_restart=restart, outer_every=2)
    trainer = toy.trainer(Dkgsb, **SELECTORS[Dkgsb])
    begun, original = [], trainer._outer_pass

    def outer_pass(*arguments: Any) -> OuterPass:
        begun.append((trainer.selector.cutoff.item(), len(trainer.outer_optimizer.state)))
        return original(*arguments)

    trainer._outer_pass = outer_pass  # type: ignore[method-assign]
    records = run(trainer)
    assert begun[0] == (0.5, 0)
    assert begun[1] == ((0.5, 0) if restart else (records[1].parameters["cutoff"], 1))
    assert records[0].parameters["cutoff"] != 0.5


def test_a_warm_start_is_a_training_on_all_genes(make_toy: Callable) -> None:
    reference = run(make_toy(**QUICK).trainer(Agl, Dropping))
    trainer = make_toy(**V1).trainer(Dkgsb, Dropping, **SELECTORS[Dkgsb])
    records = run(trainer)
    count = sum(r.round == 0 for r in records)
    assert len(reference) == count < len(records)
    for warm, plain in zip(records[:count], reference, strict=True):
        assert replace(warm, parameters={}, round=1) == plain
        assert warm.parameters == {"cutoff": 0.5} and warm.selected == trainer.genes.auxiliary_count


def test_a_stage_begins_at_the_best_state_of_the_one_before(make_toy: Callable) -> None:
    trainer = make_toy(**V1).trainer(Dkgsb, Normed, **SELECTORS[Dkgsb])
    scripted(trainer, {"warm": [0.1, 0.3, 0.2, 0.1], "trial": [0.1] * 9, "train": [0.4, 0.3, 0.3, 0.2, 0.2]})
    states, begun, original = [], [], trainer._go_back

    def go_back(best: Any) -> Any:
        result = original(best)
        begun.append((state(trainer.model), len(trainer.optimizer.state), trainer._steps))
        return result

    trainer._go_back = go_back  # type: ignore[method-assign]
    for _ in trainer:
        states.append(state(trainer.model))
    for (model, *optimizer), best in zip(begun, (1, 4), strict=True):
        assert equal(model, states[best]) and optimizer == [0, 0]
    assert equal(state(trainer.model), states[4])


@pytest.mark.parametrize("selector", [s for s in SELECTORS if s not in LEARNERS], ids=lambda s: s.__name__)
@pytest.mark.parametrize(
    "settings",
    [V1 | {"inner_subsets": 3, "inner_divisor": 64.0}, V1 | {"warm_start": "none"}, {"outer_mode": "eval"}],
    ids=["first schedule", "without a warm start", "eval"],
)
def test_selectors_that_learn_nothing_do_not_see_the_schedule(
    make_toy: Callable, selector: type[Selector], settings: dict[str, Any]
) -> None:
    found = []
    for given in (QUICK | settings, QUICK):
        trainer = make_toy(**given).trainer(selector, Dropping, **SELECTORS[selector])
        found.append((run(trainer), state(trainer.whole), trainer.fit.effective_weights))
    assert found[0][0] == found[1][0] and equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("selector", [Pgl, Agl], ids=lambda s: s.__name__)
def test_a_warm_start_for_all_is_the_comparison_of_equal_length(make_toy: Callable, selector: type[Selector]) -> None:
    """All genes first; then the selector's own, from the best of it, in rounds."""
    reference = run(make_toy(**QUICK).trainer(Agl))
    trainer = make_toy(**V1 | {"warm_start": "all"}).trainer(selector)
    records = run(trainer)
    count = len(reference)
    assert [replace(r, round=1) for r in records[:count]] == reference
    assert {r.round for r in records[count:]} >= {1, 2} and not any(r.outer for r in records)
    own = trainer.genes.auxiliary_count if selector is Agl else 0
    assert {r.selected for r in records[count:]} == {own}
    assert (trainer.model is trainer.whole) == (selector is Agl)
    assert _pcc_of(trainer) == trainer.fit.validation_pcc


def _pcc_of(trainer: Trainer) -> float:
    """Of the restored whole model."""
    rows = torch.from_numpy(trainer.rows.validation)
    columns = trainer.genes.primary.nonzero().squeeze(1)
    prediction = predict(trainer.whole, trainer.whole_store, rows, columns)
    section = trainer.whole_store.section_on_host[trainer.rows.validation]
    return float(pcc_by_section(prediction, trainer.validation_target, section).nanmean(1).nanmean())


@pytest.mark.parametrize("preset", ["paper_v1", "paper_v2", "paper_v3"])
@pytest.mark.parametrize("selector", LEARNERS, ids=lambda s: s.__name__)
def test_each_schedule_of_the_paper_is_the_same_bit_for_bit(
    make_toy: Callable, selector: type[Selector], preset: str
) -> None:
    settings = load_preset(preset)
    kept = {
        k: v for k, v in settings.protocol.items() if k.startswith(("outer", "inner", "schedule", "warm", "detach"))
    }
    small = QUICK | {"outer_batch_size": 12, "inner_batch_size": 20, "inner_subset_size": 9, "epochs": 12}
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        given = settings.plugins[selector.__name__.lower()] | {"temperature": 0.1}
        patience = min(kept["outer_patience"], 2)
        trainer = make_toy(**kept | small | {"outer_patience": patience}).trainer(selector, Dropping, **given)
        found.append((run(trainer), state(trainer.whole), state(trainer.selector)))
    (records, model, own), again = found
    assert again[0] == records and equal(again[1], model) and equal(again[2], own)
    rounds, passes = {r.round for r in records}, [len(r.outer) for r in records]
    if preset == "paper_v1":
        assert rounds >= {0, 1} and max(passes) >= 3
    else:
        assert rounds == {1} and passes == [0] + [1] * (len(records) - 1)
        assert trainer.hypergradient.steps == (1 if selector is Amal else 12 if preset == "paper_v3" else 2)


# ---- Signal to noise ------------------------------------------------------------------------------------------------


def ratio(gradients: np.ndarray) -> float:
    """With fading weights: root of the squared length of the mean, free of noise, over the summed variance."""
    weights = 0.9 ** np.arange(len(gradients))[::-1]
    weights /= weights.sum()
    flat = gradients.reshape(len(gradients), -1)
    mean = weights @ flat
    noise = (weights @ (flat - mean) ** 2).sum() / (1 - (weights**2).sum())
    return float(np.sqrt(max((mean**2).sum() - (weights**2).sum() * noise, 0) / noise))


def measured(gradients: np.ndarray) -> float | None:
    signal = Signal({"own": torch.zeros(gradients.shape[1:])})
    for gradient in gradients:
        signal.add({"own": torch.from_numpy(np.asarray(gradient))})
    return signal.to_noise()


@pytest.mark.parametrize("shape", [(2,), (5,), (60,), (2, 3), (40, 2, 3)])
def test_the_signal_is_that_of_numpy(shape: tuple[int, ...]) -> None:
    gradients = np.random.default_rng(0).normal(2.0, 1.0, shape)
    assert measured(gradients) == pytest.approx(ratio(gradients), rel=1e-9) and ratio(gradients) > 0.5


def test_several_parameters_are_one_gradient() -> None:
    gradients = np.random.default_rng(0).normal(1.0, 1.0, (20, 5))
    signal = Signal({"one": torch.zeros(2), "two": torch.zeros(3)})
    for g in torch.from_numpy(gradients):
        signal.add({"one": g[:2], "two": g[2:]})
    assert signal.to_noise() == pytest.approx(ratio(gradients), rel=1e-9)


def test_the_signal_of_a_known_process() -> None:
    """Mean 3, deviation ½; and noise alone reads about 0."""
    rng = np.random.default_rng(1)
    found = [measured(rng.normal(3.0, 0.5, 300)) for _ in range(30)]
    assert np.median(found) == pytest.approx(6.0, rel=0.15)
    noise = [measured(rng.normal(0.0, 0.5, (300, 4))) for _ in range(200)]
    assert np.median(noise) < 0.1 and np.mean(np.square(noise)) < 0.06


def test_one_gradient_or_one_without_noise_has_no_ratio() -> None:
    assert Signal({}).to_noise() is None
    assert measured(np.array([0.7])) is None and measured(np.ones((1, 3))) is None
    assert measured(np.zeros(8)) is None


def test_the_signal_of_a_record_is_that_of_the_gradients(make_toy: Callable) -> None:
    trainer = make_toy(epochs=2).trainer(Amal, temperature=0.1)
    first, gradients = outer_pass(trainer)
    assert first.signal_to_noise == pytest.approx(ratio(np.stack([g["logits"] for g in gradients])), rel=1e-4)
    second, more = outer_pass(trainer, epoch=1)  # the means run on from one pass to the next
    everything = np.stack([g["logits"] for g in gradients + more])
    assert second.signal_to_noise == pytest.approx(ratio(everything), rel=1e-4)


# ---- Precision and compilation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["pearson", "squared_error"])
def test_bfloat16_is_close(make_toy: Callable, loss: str) -> None:
    records, trainers = [], []
    for precision in ("fp32", "bf16"):
        trainers.append(make_toy(precision=precision, loss=loss).trainer(Dkgsb, **SELECTORS[Dkgsb]))
        records.append(run(trainers[-1]))
    for a, b in zip(*records, strict=True):
        assert a.validation_pcc == pytest.approx(b.validation_pcc, rel=0, abs=0.05)
        assert a.training_loss == pytest.approx(b.training_loss, rel=0.02)
        assert a.training_loss != b.training_loss  # it has been used
    tensors = [*trainers[1].model.state_dict().values(), *trainers[1].selector.state_dict().values()]
    moments = [v for s in trainers[1].optimizer.state.values() for v in s.values()]
    assert all(t.dtype == torch.float32 for t in (*tensors, *moments))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("selector", LEARNERS, ids=lambda s: s.__name__)
def test_look_aheads_are_in_full_precision(make_toy: Callable, selector: type[Selector], precision: str) -> None:
    trainers = [make_toy(precision=p).trainer(selector, Split) for p in ("fp32", precision)]
    run(trainers[0])
    trainers[1].model.load_state_dict(trainers[0].model.state_dict())
    trainers[1].selector.load_state_dict(trainers[0].selector.state_dict())
    trainers[1].optimizer.load_state_dict(trainers[0].optimizer.state_dict())  # some look-aheads carry it on
    trainers[1]._steps = trainers[0]._steps
    found = []
    for trainer in trainers:
        trainer.signal = None
        trainer.outer_optimizer.state.clear()
        found.append(outer_pass(trainer, epoch=3))
    assert found[0][0] == found[1][0]
    assert all(equal(one, two) for one, two in zip(found[0][1], found[1][1], strict=True))
    assert trainers[1]._validate().equal(trainers[0]._validate())  # nor is validation rounded


def test_tf32_changes_nothing_on_a_cpu(make_toy: Callable) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    one, two = (make_toy(precision=p).trainer(Dkgsb, **SELECTORS[Dkgsb]) for p in ("fp32", "tf32"))
    assert run(one) == run(two) and equal(state(one.model), state(two.model))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("backward", [False, True])
def test_tf32_is_on_inside_and_put_back(backward: bool) -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [f.allow_tf32 for f in flags]
    try:
        for initial in (False, True):
            for f in flags:
                f.allow_tf32 = initial
            with pytest.raises(ValueError, match="inside"), fast("tf32", torch.device("cpu"), backward=backward):
                assert all(f.allow_tf32 for f in flags)
                raise ValueError("inside")
            assert [f.allow_tf32 for f in flags] == [initial] * 2
    finally:
        for f, b in zip(flags, before, strict=True):
            f.allow_tf32 = b


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("cc")), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_are_the_same(make_toy: Callable) -> None:
    records, states = [], []
    for compiled in (False, True):
        settings = {"epochs": 2, "batch_size": 1000, "batches_within_section": False}
        trainer = make_toy(compile=compiled, **settings).trainer(Dkgsb, **SELECTORS[Dkgsb])
        assert (trainer.trained is trainer.model) != compiled
        records.append(run(trainer))
        states.append(state(trainer.whole))
    for a, b in zip(*records, strict=True):
        assert a.training_loss == pytest.approx(b.training_loss, rel=0, abs=1e-5)
        assert a.outer_loss == pytest.approx(b.outer_loss, rel=0, abs=1e-5)
    assert states[0].keys() == states[1].keys()


# ---- Where the data are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", [HvgK, Dkgsb], ids=lambda s: s.__name__)
def test_where_and_how_data_are_kept_changes_no_bit(make_toy: Callable, selector: type[Selector]) -> None:
    found = []
    forms = {"dense": Dense, "csr": Csr, "mapped": Mapped}
    for form, patches_on in itertools.product(forms, ("device", "host", "mapped")):
        toy = make_toy(place={"form": form, "patches_on": patches_on})
        trainer = toy.trainer(selector, **SELECTORS[selector])
        assert isinstance(toy.development.matrix, forms[form])
        found.append((run(trainer), state(trainer.whole), state(trainer.selector), trainer.fit.effective_weights))
    for records, model, own, weights in found[1:]:
        assert records == found[0][0] and equal(model, found[0][1]) and equal(own, found[0][2])
        assert torch.equal(weights, found[0][3])


# ---- What goes wrong ------------------------------------------------------------------------------------------------


def test_a_loss_of_nan_names_epoch_and_gene(make_toy: Callable) -> None:
    toy = make_toy(loss="squared_error")
    toy.development.expression_of()[toy.rows.train[3], 7] = torch.nan
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
    *others, tested = toy.table.matrices  # the third section is tested
    mixed = np.random.default_rng(0).permutation(tested.toarray().ravel()).reshape(tested.shape)
    other = make_toy(replace(toy.table, matrices=(*others, sparse.csr_matrix(mixed))))
    one, two = (t.trainer(selector, **SELECTORS[selector]) for t in (toy, other))
    assert run(one) == run(two)
    assert equal(state(one.whole), state(two.whole)) and equal(state(one.selector), state(two.selector))
    rows = torch.from_numpy(toy.rows.train)
    scores = [evaluate(t.whole, b.test, b.development, rows, b.genes.primary) for t, b in ((one, toy), (two, other))]
    assert not np.allclose(scores[0].pearson, scores[1].pearson)  # the change is there
