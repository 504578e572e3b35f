"""The one loop that trains every selector.

    for each epoch:
        outer steps, if the selector has parameters that learn from validation
        one pass over the training spots
        validation, early stopping
    restore the best state

Iterating a `Trainer` yields one `EpochRecord` per epoch; recorder, progress bar and pruner are plain consumers. The
test spots are not in the store that it gets.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from agl_bench.data.store import SpotStore
from agl_bench.errors import BadPlugin, Diverged
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.selector import Selector, Step
from agl_bench.interfaces.spots import SpotBatch
from agl_bench.maths.losses import LOSSES
from agl_bench.maths.seeds import generator_for, seed_for
from agl_bench.protocol import Protocol
from agl_bench.training.evaluate import pcc_by_section, predict
from agl_bench.training.model import Model
from agl_bench.training.records import EpochRecord, Fit

HALF = 0.5 + 1e-5  # a weight of exactly one half, where some selectors start, is not above it by rounding


@dataclass(frozen=True)
class DevelopmentRows:
    """Rows of the development store, by purpose; (spots,) int64 on the host.

    `held_out` may be the validation rows, where the protocol holds nothing else out.
    """

    train: np.ndarray
    held_out: np.ndarray
    validation: np.ndarray


class Trainer:
    """Owns optimisers, batches, randomness, outer steps, early stopping and the best state.

    Everything random is seeded by purpose and epoch, and never by the selector: all selectors see the same batches and
    the same augmentations.
    """

    def __init__(
        self,
        model: Model,
        selector: Selector,
        store: SpotStore,
        rows: DevelopmentRows,
        genes: GeneSplit,
        protocol: Protocol,
        *,
        seed: int,
    ) -> None:
        self.model, self.selector, self.store, self.rows = model, selector, store, rows
        self.genes, self.protocol, self.seed = genes, protocol, seed
        self.primary = genes.primary.to(store.device)
        self.primary_columns = self.primary.nonzero().squeeze(1)
        self.validation_rows = torch.from_numpy(rows.validation).to(store.device)
        self.validation_target = store.expression[self.validation_rows[:, None], self.primary_columns]
        self.losses_of = LOSSES[protocol.loss]
        self.rate = model.backbone.learning_rate if protocol.learning_rate == "backbone" else protocol.learning_rate
        own = [p for p in selector.parameters() if p.requires_grad]
        learns_outside = bool(own) and selector.learns_from == "validation"
        groups: list[dict[str, object]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        if own and not learns_outside:
            groups.append({"params": own, "lr": selector.learning_rate, "weight_decay": 0.0})
        self.optimizer = torch.optim.Adam(groups, lr=self.rate, weight_decay=protocol.weight_decay)
        self.outer_optimizer = torch.optim.Adam(own, lr=selector.learning_rate) if learns_outside else None
        self._fit: Fit | None = None

    @property
    def fit(self) -> Fit:
        """How training ended; there once the trainer has been iterated to its end."""
        if self._fit is None:
            raise RuntimeError("the trainer has not been iterated to its end")
        return self._fit

    def __iter__(self) -> Iterator[EpochRecord]:
        best_pcc, best_epoch, epoch = -float("inf"), 0, 0
        best_state, best_weights = self._state(), torch.empty(0)
        for epoch in range(self.protocol.epochs):
            started = time.perf_counter()
            outer_loss = self._outer_pass(epoch) if self._outer_is_due(epoch) else None
            training_loss, weights = self._train_pass(epoch)
            pcc = self._validate()
            validation = float(pcc.nanmean(1).nanmean())  # NaN only if no gene varies anywhere
            is_best = validation > best_pcc or epoch == 0
            if is_best:
                best_pcc = validation if validation == validation else -float("inf")
                best_epoch, best_state, best_weights = epoch, self._state(), weights.clone()
            auxiliary = weights[~self.primary]
            yield EpochRecord(
                epoch=epoch,
                training_loss=training_loss,
                validation_pcc=validation,
                validation_nan_genes=int(pcc.isnan().sum()),
                outer_loss=outer_loss,
                selected=int((auxiliary > HALF).sum()),
                effective=float(auxiliary.sum()),
                parameters={n: float(p.detach()) for n, p in self.selector.named_parameters() if p.numel() == 1},
                is_best=is_best,
                seconds=time.perf_counter() - started,
            )
            if epoch - best_epoch >= self.protocol.patience:
                break
        self.model.load_state_dict(best_state[0])
        self.selector.load_state_dict(best_state[1])
        self._fit = Fit(best_epoch, best_pcc, best_weights.float().cpu(), epoch + 1)

    def _train_pass(self, epoch: int) -> tuple[float, Tensor]:
        """One pass over the training spots: mean loss, and the effective weight of every gene at its last step."""
        self.model.train()
        torch.manual_seed(seed_for(self.seed, "dropout", "train", str(epoch)))
        augment = self._augmentation("train", epoch) if self.protocol.augment else None
        total = torch.zeros((), device=self.store.device, dtype=torch.float64)
        broken = torch.zeros(len(self.genes.names), dtype=torch.bool, device=self.store.device)
        batches = self._batches(self.rows.train, "train", epoch, self.protocol.batch_size)
        weights = torch.empty(0)
        for number, rows in enumerate(batches, start=1):
            losses, step = self._forward(self.store.batch(rows, augment), epoch)
            loss = self._combine(losses, step)
            if not loss.requires_grad:
                raise self._detached()
            if number == len(batches):
                weights = self._effective_weights(loss, losses)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach()
            broken = torch.where(broken.any(), broken, ~losses.detach().isfinite())  # those of the first bad batch
        mean = float(total) / len(batches)  # read once per epoch: no step waits for the device
        if not np.isfinite(mean):
            gene = next((n for n, b in zip(self.genes.names, broken.tolist(), strict=True) if b), None)
            raise Diverged(
                f"the training loss became {mean} in epoch {epoch}"
                + (f", first at gene {gene}" if gene else "")
                + "; lower protocol.learning_rate or the selector's learning rate"
            )
        return mean, weights

    def _outer_is_due(self, epoch: int) -> bool:
        p = self.protocol
        due = epoch >= p.outer_start and (epoch - p.outer_start) % p.outer_every == 0
        return due and self.outer_optimizer is not None

    def _outer_pass(self, epoch: int) -> float:
        """One outer step for each training batch; the model stays as it is, only the selector moves."""
        assert self.outer_optimizer is not None
        self.model.train()
        torch.manual_seed(seed_for(self.seed, "dropout", "outer", str(epoch)))
        augment = self._augmentation("inner", epoch) if self.protocol.augment else None
        augment_outer = self._augmentation("outer", epoch) if self.protocol.outer_augment else None
        size = self.protocol.outer_batch_size or self.protocol.batch_size
        inner_batches = self._batches(self.rows.train, "inner", epoch, size)
        held_out = self._endless(self.rows.held_out, epoch, size)
        own = {n: p for n, p in self.selector.named_parameters() if p.requires_grad}
        total = torch.zeros((), device=self.store.device, dtype=torch.float64)
        for rows in inner_batches:
            outer, gradients = self._hypergradient(
                self.store.batch(rows, augment), self.store.batch(next(held_out), augment_outer), own, epoch
            )
            for name, parameter in own.items():
                parameter.grad = gradients[name]
            self.outer_optimizer.step()
            total += outer
        return float(total) / len(inner_batches)

    def _hypergradient(
        self, inner: SpotBatch, outer: SpotBatch, own: Mapping[str, Tensor], epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Outer loss after the look-ahead on `inner`, and its gradient for the selector's parameters.

        Normalisation layers use the statistics of the batch at hand, as in training, and keep no running ones; other
        buffers are copies. Nothing leaks out of a look-ahead. Weight decay is not part of the look-ahead.
        """
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}

        def inner_loss(at: Mapping[str, Tensor], selector_at: Mapping[str, Tensor]) -> Tensor:
            losses, step = self._forward(inner, epoch, state={**at, **buffers})
            return self._combine(losses, step, selector_at)

        def outer_loss(at: Mapping[str, Tensor]) -> Tensor:
            losses, _ = self._forward(outer, epoch, state={**at, **buffers})
            return losses[self.primary_columns].mean()

        with _without_running_statistics(self.model):
            return self.selector.hypergradient(inner_loss, outer_loss, parameters, own, self.rate)

    def _forward(self, batch: SpotBatch, epoch: int, state: dict[str, Tensor] | None = None) -> tuple[Tensor, Step]:
        """Losses (genes,) of a batch, with the model's own parameters or those of `state`."""
        features, prediction = functional_call(self.model, state or {}, (batch.spots,))
        losses = self.losses_of(prediction, batch.expression)
        return losses, Step(features, prediction, batch.expression, batch.row, epoch)

    def _combine(self, losses: Tensor, step: Step, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss to train on, with the selector's own parameters or those given."""
        loss: Tensor = functional_call(self.selector, dict(parameters or {}), (losses, step))
        if not isinstance(loss, Tensor) or loss.shape != ():
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise BadPlugin(f"{type(self.selector).__name__}.forward must return a scalar tensor, got {shape}")
        return loss

    def _detached(self) -> BadPlugin:
        return BadPlugin(f"{type(self.selector).__name__}.forward returns what does not depend on the losses")

    def _effective_weights(self, loss: Tensor, losses: Tensor) -> Tensor:
        """∂loss/∂losses scaled to a mean of 1 over primary genes, (genes,): comparable across selectors."""
        (slope,) = torch.autograd.grad(loss, losses, retain_graph=True, allow_unused=True)
        if slope is None:
            raise self._detached()
        return slope.detach() / slope.detach()[self.primary_columns].mean()

    def _validate(self) -> Tensor:
        """PCC of the primary genes within each section of the validation spots, (sections, primary)."""
        prediction = predict(self.model, self.store, self.validation_rows, self.primary_columns)
        section = self.store.section_on_host[self.rows.validation]
        return pcc_by_section(prediction, self.validation_target, section).cpu()

    def _batches(self, rows: np.ndarray, purpose: str, epoch: int, size: int) -> list[Tensor]:
        """The batches of one pass, of nearly equal size and at most `size` spots, on the device.

        Equal sizes rather than a small last batch: the correlation loss of a few spots is noise.
        """
        rng = np.random.default_rng(seed_for(self.seed, "batches", purpose, str(epoch)))
        section = self.store.section_on_host[rows]
        groups = [rows[section == s] for s in np.unique(section)] if self.protocol.batches_within_section else [rows]
        batches = []
        for group in groups:
            count = -(-len(group) // size)
            batches += np.array_split(rng.permutation(group), count)
        batches = [batches[i] for i in rng.permutation(len(batches))]
        everything = torch.from_numpy(np.concatenate(batches)).to(self.store.device)  # one transfer for the pass
        return list(torch.split(everything, [len(b) for b in batches]))

    def _endless(self, rows: np.ndarray, epoch: int, size: int) -> Iterator[Tensor]:
        """Batches of `rows` for ever, shuffled anew in each pass."""
        turn = 0
        while True:
            yield from self._batches(rows, f"outer.{turn}", epoch, size)
            turn += 1

    def _augmentation(self, purpose: str, epoch: int) -> torch.Generator:
        return generator_for(self.seed, "augmentation", purpose, str(epoch), device=self.store.device)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the states of model and selector."""
        return tuple({n: t.clone() for n, t in m.state_dict().items()} for m in (self.model, self.selector))  # type: ignore[return-value]


@contextlib.contextmanager
def _without_running_statistics(model: Model) -> Iterator[None]:
    """Normalisation layers neither update nor read running statistics inside (they are in training mode)."""
    layers = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    try:
        for layer in layers:
            layer.track_running_stats = False  # type: ignore[assignment]
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True  # type: ignore[assignment]
