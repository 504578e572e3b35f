"""The one loop that trains every selector.

    for each epoch:
        outer steps, if they are due and the selector has parameters that learn from validation
        one pass over the training spots
        validation
        on, back to the best state, or end: the protocol's schedule (`course.py`)
    restore the best state

Iterating a `Trainer` yields one `EpochRecord` per epoch; recorder, progress bar, pruner and checkpoints are plain
consumers: between two epochs `Trainer.state` is all that the rest depends on. The test spots are not in the store that
it gets.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from agl_bench.data.room import Room
from agl_bench.data.store import SpotStore, device_memory
from agl_bench.errors import BadPlugin, Diverged, NoGradients, TooLittleMemory
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.selector import Selector, Step
from agl_bench.interfaces.spots import SpotBatch
from agl_bench.maths.hypergradient import Hypergradient, Moments, Sum
from agl_bench.maths.losses import LOSSES, SEPARABLE
from agl_bench.maths.seeds import generator_for, seed_for
from agl_bench.protocol import Protocol
from agl_bench.training.course import Course
from agl_bench.training.evaluate import BATCH, pcc_by_section, predict
from agl_bench.training.inputs import left_alone
from agl_bench.training.model import Model
from agl_bench.training.precision import fast
from agl_bench.training.records import EpochRecord, Fit, OuterPass

State = tuple[dict[str, Tensor], dict[str, Tensor]]  # of model and selector
HALF = 0.5 + 1e-5  # a weight of exactly one half, where some selectors start, is not above it by rounding


@dataclass(frozen=True)
class DevelopmentRows:
    """Rows of the development store, by purpose; (spots,) int64 on the host.

    `held_out` may be the validation rows, where the protocol holds nothing else out.
    """

    train: np.ndarray
    held_out: np.ndarray
    validation: np.ndarray


class Signal:
    """Signal-to-noise of a gradient from one look-ahead to the next, accumulated on the device.

    Σ over entries of mean² / Σ of variance, square root; for a scalar |mean| / standard deviation. Means run over the
    last look-aheads with weights that fade by a tenth each, and the squared mean is corrected for what noise alone
    would give it, so that noise reads 0.
    """

    FADING = 0.9

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.means = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
        self.squares = {n: torch.zeros((), dtype=torch.float64, device=p.device) for n, p in parameters.items()}
        self.count = 0

    def state(self) -> dict[str, Any]:
        """Everything accumulated so far; the tensors themselves."""
        return {"means": self.means, "squares": self.squares, "count": self.count}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, in a signal of the same parameters."""
        for name, mean in self.means.items():
            mean.copy_(state["means"][name])
            self.squares[name].copy_(state["squares"][name])
        self.count = state["count"]

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """The gradient of one look-ahead."""
        self.count += 1
        for name, gradient in gradients.items():
            gradient = gradient.double()
            self.means[name].lerp_(gradient, 1 - self.FADING)
            self.squares[name].lerp_(gradient.square().sum(), 1 - self.FADING)

    def to_noise(self) -> float | None:
        """The ratio; None for fewer than two look-aheads. Waits for the device."""
        if self.count < 2:
            return None
        whole = 1 - self.FADING**self.count  # the weights add up to this
        # Share of the noise that is left in the mean: Σ weight² of weights that add up to one.
        left = (1 - self.FADING) / (1 + self.FADING) * (1 - self.FADING ** (2 * self.count)) / whole**2
        length = float(sum(m.square().sum() for m in self.means.values())) / whole**2
        noise = max(float(sum(self.squares.values())) / whole - length, 0.0) / (1 - left)
        signal = max(length - left * noise, 0.0)
        return (signal / noise) ** 0.5 if noise > 0 else None


class Trainer:
    """Owns optimisers, batches, randomness, outer steps, early stopping and the best state.

    Everything random is seeded by purpose and epoch, and never by the selector: all selectors see the same batches and
    the same augmentations.

    Where a batch is too much for the memory of the device, its gradient is added up from parts of it, half as many
    spots at a time, if that changes nothing but rounding and the draws of dropout: the loss must be a mean over spots,
    and neither a layer nor the selector may look at a whole batch. Else the batch size that fits is found and named:
    that is a condition of the comparison, which no training may change on its own.

    Attributes:
        room: spots of a training batch that pass through the model at a time.
        evaluation_room: likewise of spots that are predicted, where any number will do.
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
        self.selector, self.rows, self.genes, self.protocol, self.seed = selector, rows, genes, protocol, seed
        self.whole, self.whole_store = model, store
        self.used_columns = self._used_columns(store.device)
        self.primary = genes.primary.to(store.device)
        self.scored = store.narrow(self.primary.nonzero().squeeze(1))  # held-out and validation spots
        self.validation_rows = torch.from_numpy(rows.validation).to(store.device)
        self.validation_target = self.scored.expression_of(self.validation_rows)
        self.losses_of = LOSSES[protocol.loss]
        self.rate = model.backbone.learning_rate if protocol.learning_rate == "backbone" else protocol.learning_rate
        self.own = {n: p for n, p in selector.named_parameters() if p.requires_grad}
        self._observes = type(selector).observe is not Selector.observe
        self.course = Course(protocol, learns=bool(self.own) and selector.learns_from == "validation")
        self.outer_optimizer = self._new_outer_optimizer() if self.course.learns else None
        self.first_own = {n: p.detach().clone() for n, p in self.own.items()}
        self.room, self.evaluation_room = Room(protocol.batch_size), Room(BATCH)
        self.hypergradient: Hypergradient | None = None  # settled at the first outer step
        self.signal: Signal | None = None
        self.epoch = -1  # the last one that has ended
        self.best_state: State = ({}, {})  # from the end of the first epoch
        self.best_weights = torch.empty(0)
        self._fit: Fit | None = None
        self._use(None if self.course.is_warming else self.used_columns)

    def _use(self, columns: Tensor | None) -> None:
        """Train the genes `columns`, all if None, with a new optimiser.

        Outputs that no loss will ever read are left out of the head, the optimiser and the batches.
        """
        self.columns = columns
        self.model = self.whole if columns is None else self.whole.narrow(columns)
        self.store = self.whole_store if columns is None else self.whole_store.narrow(columns)
        is_primary = self.primary if columns is None else self.primary[columns]
        self.primary_columns = is_primary.nonzero().squeeze(1)
        # First-order steps only: what is compiled cannot be differentiated twice.
        is_compiled = self.protocol.compile and not self.selector.needs_second_order
        self.trained = torch.compile(self.model) if is_compiled else self.model
        self.trained_parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.late_names = [n for n in self.model.late_parameters() if n.startswith("backbone.")]
        self._renew_optimizer()

    def _renew_optimizer(self) -> None:
        """A training optimiser without a past."""
        groups: list[dict[str, object]] = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        if self.own and not self.course.learns:
            own = list(self.own.values())
            groups.append({"params": own, "lr": self.selector.learning_rate, "weight_decay": 0.0})
        # One kernel for all parameters instead of a dozen operations for each.
        self.optimizer = torch.optim.Adam(groups, lr=self.rate, weight_decay=self.protocol.weight_decay, fused=True)
        self._steps = 0

    def _new_outer_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.own.values(), lr=self.selector.learning_rate)

    def _used_columns(self, device: torch.device) -> Tensor | None:
        """(used,) the genes that the selector uses, None if that is all of them."""
        used = self.selector.used
        if used is None:
            return None
        name, genes = type(self.selector).__name__, len(self.genes.names)
        if used.shape != (genes,) or used.dtype != torch.bool:
            raise BadPlugin(
                f"{name}.used must be a bool tensor of shape ({genes},), got {used.dtype} {tuple(used.shape)}"
            )
        if not used.cpu()[self.genes.primary].all():
            raise BadPlugin(f"{name}.used leaves out a primary gene; every primary gene takes part")
        return None if used.all() else used.to(device).nonzero().squeeze(1)

    @property
    def fit(self) -> Fit:
        """How training ended; there once the trainer has been iterated to its end."""
        if self._fit is None:
            raise RuntimeError("the trainer has not been iterated to its end")
        return self._fit

    @property
    def rooms(self) -> dict[str, int]:
        """Spots at a time in "training" and in "evaluation", where memory did not suffice for all; for the record."""
        rooms = {"training": self.room, "evaluation": self.evaluation_room}
        return {name: room.spots for name, room in rooms.items() if room.is_halved}

    def __iter__(self) -> Iterator[EpochRecord]:
        while self._goes_on():
            epoch, started = self.epoch + 1, time.perf_counter()
            outer = self._outer_steps(epoch) if self.course.outer_is_due(epoch) else ()
            training_loss, weights = self._train_pass(epoch)
            pcc = self._validate()
            score = _mean(pcc)
            is_best = self.course.take(epoch, score)
            if is_best:
                self.best_state, self.best_weights = self._state(), weights.clone()
            self.epoch = epoch
            yield EpochRecord(
                epoch=epoch,
                training_loss=training_loss,
                validation_pcc=score,
                validation_nan_genes=int(pcc.isnan().sum()),
                selected=self._selected(weights),
                effective=float(weights[~self.primary].sum()),
                parameters={n: float(p.detach()) for n, p in self.selector.named_parameters() if p.numel() == 1},
                is_best=is_best,
                round=self.course.round,
                outer=outer,
                seconds=time.perf_counter() - started,
            )
        self._restore(self.best_state)
        engine = repr(self.hypergradient) if self.hypergradient else ""
        weights = self.best_weights.float().cpu()
        self._fit = Fit(self.course.best_epoch, self.course.best, weights, self.epoch + 1, engine)

    def _goes_on(self) -> bool:
        """Whether another epoch follows, from the best state where the schedule says so."""
        if self.epoch < 0:
            return True
        step = self.course.next(self.epoch)
        if step == "back":
            self.best_state = self._go_back(self.best_state)
        return step != "end" and self.epoch + 1 < self.protocol.epochs

    def state(self) -> dict[str, Any]:
        """All that the epochs to come depend on: tensors and plain values, for `torch.load(weights_only=True)`.

        Asked for between two epochs. The tensors are the trainer's own: write or copy them before the next one.
        """
        return {
            "epoch": self.epoch,
            "course": self.course.state(),
            "whole": dict(self.whole.state_dict()),
            "narrow": None if self.columns is None else dict(self.model.state_dict()),
            "selector": dict(self.selector.state_dict()),
            "first_own": self.first_own,
            "optimizer": self.optimizer.state_dict(),
            "steps": self._steps,
            "outer_optimizer": self.outer_optimizer and self.outer_optimizer.state_dict(),
            "signal": self.signal and self.signal.state(),
            "engine": self._settled(),
            "best_state": self.best_state,
            "best_weights": self.best_weights,
            "rooms": [self.room.spots, self.evaluation_room.spots],
            "random": self._random(),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, in a fresh trainer of the same arguments: the rest is the same bit for bit.

        Args:
            state: its tensors may lie anywhere.
        """
        device = self.store.device
        self.epoch = state["epoch"]
        self.course.resume(state["course"])
        self._use(None if self.course.is_warming else self.used_columns)
        self.whole.load_state_dict(state["whole"])
        if state["narrow"] is not None:
            self.model.load_state_dict(state["narrow"])
        self.selector.load_state_dict(state["selector"])
        self.first_own = {n: t.to(device) for n, t in state["first_own"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self._steps = state["steps"]
        if self.outer_optimizer is not None:
            self.outer_optimizer.load_state_dict(state["outer_optimizer"])
        if state["signal"] is not None:
            self.signal = Signal(self.own)
            self.signal.resume(state["signal"])
        if state["engine"] is not None:
            engine: Any = self.selector.hypergradient
            self.hypergradient = replace(engine, **state["engine"]) if state["engine"] else engine
        model, selector = ({n: t.to(device) for n, t in part.items()} for part in state["best_state"])
        self.best_state = model, selector
        self.best_weights = state["best_weights"].to(device)
        self.room.spots, self.evaluation_room.spots = state["rooms"]
        self._draw_again_from(state["random"])

    def _random(self) -> dict[str, Tensor | None]:
        """The random states that training goes on from."""
        return {
            "torch": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(self.store.device) if self.store.device.type == "cuda" else None,
            "selector": self.selector.generator.get_state(),
        }

    def _draw_again_from(self, random: Mapping[str, Any]) -> None:
        """Back to what `_random` gave."""
        torch.set_rng_state(random["torch"])
        if random["device"] is not None:
            torch.cuda.set_rng_state(random["device"], self.store.device)
        self.selector.generator.set_state(random["selector"])

    def _settled(self) -> dict[str, Any] | None:
        """What was settled of the selector's hypergradient; None if that is still to come."""
        before: Any = self.selector.hypergradient
        after: Any = self.hypergradient
        if after is None or after is before:
            return None if after is None else {}
        if not is_dataclass(after) or type(after) is not type(before):
            return None  # it is settled once more
        return {f.name: v for f in fields(after) if (v := getattr(after, f.name)) != getattr(before, f.name)}

    def _go_back(self, best_state: State) -> State:
        """The best state as the start of a stage, with a new optimiser; that state, of the genes that are used."""
        self._restore(best_state)
        if self.columns is self.used_columns:
            self._renew_optimizer()
        else:  # a warm start takes all genes
            self._use(self.used_columns)
        return self._state()

    def _restore(self, state: State) -> None:
        """Take a state up, into the whole model too."""
        self.model.load_state_dict(state[0])
        self.selector.load_state_dict(state[1])
        if self.columns is not None:
            self.whole.widen(self.model, self.columns)

    def _train_pass(self, epoch: int, purpose: str = "train") -> tuple[float, Tensor]:
        """One pass over the training spots: mean loss, and the effective weight of every gene at its last step.

        Batches, augmentation and dropout depend on the epoch and the purpose.
        """
        self.model.train()
        torch.manual_seed(seed_for(self.seed, "dropout", purpose, str(epoch)))
        augment = self._augmentation(purpose, epoch) if self.protocol.augment else None
        total = torch.zeros((), device=self.store.device, dtype=torch.float64)
        broken = torch.zeros(len(self.genes.names), dtype=torch.bool, device=self.store.device)
        batches = self._batches(self.rows.train, purpose, epoch, self.protocol.batch_size)
        weights = torch.empty(0)
        for number, batch in enumerate(self.store.stream(batches, augment), start=1):
            loss, losses, weights = self._gradients(batch, epoch, weigh=number == len(batches))
            self.optimizer.step()
            total += loss
            broken = torch.where(broken.any(), broken, ~losses.isfinite())  # those of the first bad batch
        self._steps += len(batches)
        mean = float(total) / len(batches)  # read once per epoch: no step waits for the device
        if not np.isfinite(mean):
            gene = next((n for n, b in zip(self.genes.names, broken.tolist(), strict=True) if b), None)
            raise Diverged(
                f"the training loss became {mean} in epoch {epoch}"
                + (f", first at gene {gene}" if gene else "")
                + "; lower protocol.learning_rate or the selector's learning rate"
            )
        return mean, weights

    def _gradients(self, batch: SpotBatch, epoch: int, *, weigh: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Lay the gradients of a training batch into the parameters, with as many spots at a time as there is room for.

        Returns:
            Its loss (), losses (genes,), and effective weights (genes,) if `weigh`; detached.
        """
        observed = _copy(self.selector) if self._observes else None
        while True:
            before, spots = self._random(), min(self.room.spots, len(batch.row))
            self.optimizer.zero_grad(set_to_none=True)
            with contextlib.suppress(torch.OutOfMemoryError):
                if spots == len(batch.row):
                    return self._at_once(batch, epoch, weigh=weigh)
                return self._in_parts(batch, epoch, spots, weigh=weigh)
            # Nothing has moved yet but the random states and what the selector has observed; what the failed step has
            # left in memory is let go.
            self._draw_again_from(before)
            if observed is not None:
                self.selector.load_state_dict(observed)
            if why := self._indivisible():
                raise self._too_little(batch, epoch, why)
            self.room.halve(spots)

    def _at_once(self, batch: SpotBatch, epoch: int, *, weigh: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See `_gradients`."""
        features, prediction = self._predicted(batch)
        losses, step = self._losses(features, prediction, batch, epoch, at=self.trained_parameters)
        loss = self._training_loss(losses, step)
        weights = self._effective_weights(loss, losses) if weigh else torch.empty(0)
        with fast(self.protocol.precision, self.store.device, backward=True):
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), losses.detach(), weights

    def _in_parts(self, batch: SpotBatch, epoch: int, spots: int, *, weigh: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See `_gradients`: first the losses, with no graph of the model; then their slopes part by part.

        The selector sees the losses of the whole batch, once, so that it need not be linear in them. Dropout draws for
        each part, twice the same.
        """
        parts = [(part, len(part.row) / len(batch.row)) for part in batch.split(spots)]
        states, seen = [], []
        with torch.no_grad():
            for part, _ in parts:
                states.append(self._random())
                seen.append(self._predicted(part))
            features, prediction = (torch.cat(tensors).requires_grad_() for tensors in zip(*seen, strict=True))
            losses, step = self._losses(features, prediction, batch, epoch)
        losses.requires_grad_()
        try:
            loss = self._training_loss(losses, step)
        except NoGradients:
            name = type(self.selector).__name__
            raise self._too_little(batch, epoch, f"{name} looks at the gradients of a whole batch") from None
        weights = self._effective_weights(loss, losses) if weigh else torch.empty(0)
        loss.backward()  # type: ignore[no-untyped-call]
        if features.grad is not None or prediction.grad is not None:
            name = type(self.selector).__name__
            raise self._too_little(batch, epoch, f"{name} looks at the predictions of a whole batch")
        if losses.grad is None:
            raise self._detached()
        after = self._random()
        for (part, share), state in zip(parts, states, strict=True):
            self._draw_again_from(state)
            of_part, _ = self._losses(*self._predicted(part), part, epoch)
            with fast(self.protocol.precision, self.store.device, backward=True):
                (of_part * losses.grad * share).sum().backward()  # type: ignore[no-untyped-call]
        self._draw_again_from(after)
        return loss.detach(), losses.detach(), weights

    def _indivisible(self) -> str:
        """Why a training batch must not be parted; "" if it may."""
        if self.protocol.loss not in SEPARABLE:
            return f"the loss '{self.protocol.loss}' of a batch is no mean over its parts"
        if any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules()):
            return "batch normalisation looks at a whole batch"
        return ""

    def _too_little(self, batch: SpotBatch, epoch: int, why: str) -> TooLittleMemory:
        """What to say where a training batch does not fit and must not be parted. The training is over."""

        def try_with(spots: int) -> None:
            part = batch.split(spots)[0]
            for _ in range(2):  # in the second step the optimiser has its moments, in memory too
                self.optimizer.zero_grad(set_to_none=True)
                self._at_once(part, epoch, weigh=True)
                self.optimizer.step()

        tried = len(batch.row)
        most = _halved(tried, try_with)
        remedy = f"set protocol.batch_size={most}, which fits, for all that is compared, or use" if most else ""
        other = "" if self.protocol.precision == "bf16" else " or --precision bf16"
        return TooLittleMemory(
            f"out of device memory with {tried} spots in a batch, and {why}: {remedy or 'not even 2 fit, so use'} "
            f"a smaller backbone{other}"
        )

    def _too_little_ahead(self, epoch: int, sizes: tuple[int, int], batches: tuple[int, int]) -> TooLittleMemory:
        """Likewise where a look-ahead does not fit.

        Args:
            epoch: for the selector.
            sizes: spots of a batch of the inner and of the outer loss.
            batches: that each of the losses averages.
        """
        method = self.hypergradient or self.selector.hypergradient
        groups = method.steps if method.batches == "new" else 1

        def first(store: SpotStore, rows: np.ndarray, spots: int, count: int) -> Iterator[SpotBatch]:
            here = torch.from_numpy(rows[:spots]).to(store.device)
            return (store.batch(here) for _ in range(count))

        def try_with(spots: int) -> None:
            inner, outer = (min(spots, size) for size in sizes)
            self._hypergradient(
                [first(self.store, self.rows.train, inner, batches[0]) for _ in range(groups)],
                first(self.scored, self.rows.held_out, outer, batches[1]), self.own, epoch, self._moments(),
            )  # fmt: skip

        most = _halved(max(sizes), try_with)
        remedy = "not even 2 fit, so"
        if most:
            keys = ["outer_batch_size"] if sizes[1] > most else []
            keys += ["inner_batch_size"] if self.protocol.inner_batch_size > most else []
            remedy = "set " + " and ".join(f"protocol.{k}={most}" for k in keys) + " for all that is compared, or"
        return TooLittleMemory(
            f"out of device memory in a look-ahead with {max(sizes)} spots in a batch: {remedy} lower "
            "protocol.outer_batches or use a smaller backbone"
        )

    def _predicted(self, batch: SpotBatch) -> tuple[Tensor, Tensor]:
        """Features and prediction of a first-order step."""
        with contextlib.ExitStack() as mode:
            mode.enter_context(fast(self.protocol.precision, self.store.device))
            if self.selector.needs_second_order:
                mode.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
            mode.enter_context(left_alone(type(self.model.backbone).__name__, **vars(batch.spots)))
            features, prediction = self.trained(batch.spots)
        if features.dtype == torch.bfloat16:  # selectors see one type, in training as in look-aheads
            return features.float(), prediction.float()
        return features, prediction

    def _training_loss(self, losses: Tensor, step: Step) -> Tensor:
        """The loss of a first-order step, which the selector has observed."""
        if self.course.is_warming:
            loss = losses.mean()
        else:
            shown = {name: getattr(step, name) for name in ("features", "prediction", "target", "row")}
            with left_alone(type(self.selector).__name__, losses=losses, **shown):
                self.selector.observe(losses, step)
                loss = self._combine(losses, step)
        if not loss.requires_grad:
            raise self._detached()
        return loss

    def _outer_steps(self, epoch: int) -> tuple[OuterPass, ...]:
        """One pass of outer steps, or passes until the selector has converged.

        Converged: `outer_patience` passes without a gain in the validation PCC of a copy of the model that is trained
        for one epoch with the weights at hand, always from the same state and on the same batches; the selector of the
        best pass is kept. As in the authors' first code, later passes look ahead from that copy. The model is in the
        end what it was.
        """
        if self.protocol.outer_restart:
            self.selector.load_state_dict(self.first_own, strict=False)
            self.outer_optimizer, self.signal = self._new_outer_optimizer(), None
        if not self.protocol.outer_patience:
            return (self._outer_pass(epoch),)
        start, optimizer, steps = _copy(self.model), self.optimizer, self._steps
        passes: list[OuterPass] = []
        best, best_turn, best_selector = -float("inf"), 0, _copy(self.selector)
        for turn in range(self.protocol.outer_passes):
            made = self._outer_pass(epoch, turn)
            self.model.load_state_dict(start)
            self._renew_optimizer()
            weights = self._train_pass(epoch, "trial")[1]
            score = _mean(self._validate())
            passes.append(replace(made, validation_pcc=score, selected=self._selected(weights)))
            if score > best:
                best, best_turn, best_selector = score, turn, _copy(self.selector)
            if turn - best_turn >= self.protocol.outer_patience:
                break
        self.model.load_state_dict(start)
        self.selector.load_state_dict(best_selector)
        self.optimizer, self._steps = optimizer, steps
        return tuple(passes)

    def _outer_pass(self, epoch: int, turn: int = 0) -> OuterPass:
        """One pass over the training spots, with an outer step for each group of `outer_batches` of its batches.

        The model stays as it is, only the selector moves. Passes of an epoch differ by `turn`.
        """
        assert self.outer_optimizer is not None
        p = self.protocol
        self.model.train()
        when = f"{epoch}.{turn}" if turn else str(epoch)
        augment = self._augmentation("inner", when) if p.augment else None
        augment_outer = self._augmentation("outer", when) if p.outer_augment else None
        outer_size = p.outer_batch_size or p.batch_size
        inner_size = p.inner_batch_size or outer_size
        streams = contextlib.ExitStack()  # prefetching ends with the pass, also where a look-ahead fails
        inner, held_out = (
            streams.enter_context(contextlib.closing(store.stream(self._endless(rows, name, when, size), chosen)))
            for store, rows, name, size, chosen in (
                (self.store, self.rows.train, "inner", inner_size, augment),
                (self.scored, self.rows.held_out, "outer", outer_size, augment_outer),
            )
        )
        self.signal = self.signal or Signal(self.own)
        moments = self._moments()
        total = torch.zeros((), device=self.store.device, dtype=torch.float64)
        many, many_outer = (
            sum(-(-len(g) // size) for g in self._groups(rows))
            for rows, size in ((self.rows.train, inner_size), (self.rows.held_out, outer_size))
        )
        averaged, averaged_outer = (min(p.outer_batches or m, m) for m in (many, many_outer))
        # A pass: as many look-aheads as take every training spot once into their first inner loss, or every held-out
        # spot once into their outer loss.
        count = -(-many // averaged) if p.outer_pass_over == "training" else -(-many_outer // averaged_outer)
        method = self.hypergradient or self.selector.hypergradient
        per_look_ahead = method.steps if method.batches == "new" else 1
        with streams:
            for number in range(count):
                groups = [itertools.islice(inner, averaged) for _ in range(per_look_ahead)]
                taken, ahead = itertools.islice(held_out, averaged_outer), turn * count + number
                found = None
                with contextlib.suppress(torch.OutOfMemoryError):
                    found = self._hypergradient(groups, taken, self.own, epoch, moments, ahead)
                if found is None:
                    raise self._too_little_ahead(epoch, (inner_size, outer_size), (averaged, averaged_outer))
                outer, gradients = found
                self.signal.add(gradients)
                with torch.no_grad():
                    # Autograd may answer with one number seen many times, which nobody can write into.
                    self.selector.learn({n: g.contiguous() for n, g in gradients.items()}, self.outer_optimizer)
                total += outer
        return OuterPass(float(total) / count, self.signal.to_noise())

    def _hypergradient(
        self,
        inner: Sequence[Iterable[SpotBatch]],
        outer: Iterable[SpotBatch],
        own: Mapping[str, Tensor],
        epoch: int,
        moments: Moments | None = None,
        look_ahead: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Outer loss after the look-ahead on `inner`, and its gradient for the selector's parameters.

        Both losses are means over batches, `inner` of one group of batches for all steps or of one for each. Means of
        losses rather than of hypergradients: m batches on either side make m² pairs.

        Normalisation layers use the statistics of the batch at hand, as in training, and keep no running ones (but
        `outer_mode = eval`: the outer loss uses the running ones of the model, and no dropout); other buffers are
        copies. Nothing leaks out of a look-ahead. Dropout masks and random subsets belong to the step, however often
        its loss is asked for. Weight decay is not part of the look-ahead, which is always in full precision.
        """
        method = self.hypergradient or self.selector.hypergradient
        is_late = method.reach == "late" and self.model.backbone.splits
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if is_late:
            parameters = dict(self.model.late_parameters())
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}

        def draw_dropout(part: str) -> None:
            torch.manual_seed(seed_for(self.seed, "dropout", "outer", str(epoch), str(look_ahead), part))

        # Fused attention has no second derivative.
        with _without_running_statistics(self.model), sdpa_kernel(SDPBackend.MATH):
            # What a look-ahead does not move is computed once for all its steps.
            draw_dropout("early")
            groups = [[self._early(b) if is_late else (b, None) for b in group] for group in inner]
            with self._outer_mode():
                held_out = [self._early(b) if is_late else (b, None) for b in outer]

            # One part for each batch, so that one batch's graph is in memory at a time where the engine can.
            def inner_loss(at: Mapping[str, Tensor], selector_at: Mapping[str, Tensor], number: int) -> Sum:
                group = groups[number % len(groups)]

                def part(index: int) -> Tensor:
                    draw_dropout(f"{number}.{index}")
                    batch, hidden = group[index]
                    features, prediction = functional_call(self.model, {**at, **buffers}, (batch.spots, hidden))
                    subsets = self._subsets(len(batch.row), str(epoch), str(look_ahead), f"{number}.{index}")
                    losses, step = self._losses(features, prediction, batch, epoch, subsets, at)
                    return self._combine(losses, step, selector_at) / (len(group) * self.protocol.inner_divisor)

                return part(0) if len(group) == 1 else map(part, range(len(group)))

            def outer_loss(at: Mapping[str, Tensor]) -> Iterator[Tensor]:
                draw_dropout("outer")
                for batch, hidden in held_out:
                    arguments = (batch.spots, hidden, self.primary_columns)
                    with self._outer_mode():
                        _, prediction = functional_call(self.model, {**at, **buffers}, arguments)
                    yield self.losses_of(prediction, batch.expression).mean() / len(held_out)

            if self.hypergradient is None:
                method = method.settled(inner_loss, parameters, own, device_memory(self.store.device))
                self.hypergradient = method
            return method(inner_loss, outer_loss, parameters, own, self.rate, moments)

    @contextlib.contextmanager
    def _outer_mode(self) -> Iterator[None]:
        """The model in the mode that the protocol wants for the outer loss; in training mode afterwards."""
        self.model.train(self.protocol.outer_mode == "train")
        try:
            yield
        finally:
            self.model.train()

    def _subsets(self, spots: int, *names: str) -> list[Tensor]:
        """Random subsets of a batch over which the inner loss is a mean; none = the batch itself."""
        if not self.protocol.inner_subsets:
            return []
        generator = generator_for(self.seed, "subsets", *names)
        return [
            torch.randperm(spots, generator=generator)[: self.protocol.inner_subset_size].to(self.store.device)
            for _ in range(self.protocol.inner_subsets)
        ]

    @torch.no_grad()
    def _early(self, batch: SpotBatch) -> tuple[SpotBatch, Tensor]:
        """A batch without what the backbone looks at, and what the early part makes of it."""
        hidden = self.model.backbone.early(batch.spots)
        return replace(batch, spots=replace(batch.spots, patches=None, embedding=None)), hidden

    def _moments(self) -> Moments | None:
        """Adam's moments of the model's parameters, zeros before its first step."""
        rule = getattr(self.hypergradient or self.selector.hypergradient, "rule", None)
        if not getattr(rule, "carried", False):
            return None
        slots = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                state = self.optimizer.state.get(parameter)
                if state:
                    slots[name] = (state["exp_avg"], state["exp_avg_sq"])
                else:
                    slots[name] = (torch.zeros_like(parameter),) * 2
        return Moments(slots, self._steps)

    def _losses(
        self,
        features: Tensor,
        prediction: Tensor,
        batch: SpotBatch,
        epoch: int,
        subsets: Sequence[Tensor] = (),
        at: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Step]:
        """Losses (genes,) of a batch, or their means over subsets of it; 0 for genes that the selector does not use.

        With `at`, the parameters that the prediction was made with, the step can tell the gradients of single genes.
        """
        if subsets:
            target = batch.expression
            parts = [self.losses_of(prediction.index_select(0, s), target.index_select(0, s)) for s in subsets]
            losses = torch.stack(parts).mean(0)
        else:
            losses = self.losses_of(prediction, batch.expression)
        if self.columns is not None:
            every = torch.zeros(len(self.genes.names), dtype=losses.dtype, device=losses.device)
            losses = every.index_copy(0, self.columns, losses)
        step = Step(features, prediction, batch.expression, batch.row, epoch, columns=self.columns)
        if at is None:
            return losses, step
        backbone = tuple(t for n, t in at.items() if n.startswith("backbone."))
        late = tuple(at[n] for n in self.late_names if n in at) if self.model.backbone.splits else backbone
        return losses, replace(step, head=at["head.weight"], shared=backbone, late=late)

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
        return slope.detach() / slope.detach()[self.primary].mean()

    def _selected(self, weights: Tensor) -> int:
        """Auxiliary genes of more than half the weight of a primary one."""
        return int((weights[~self.primary] > HALF).sum())

    def _validate(self) -> Tensor:
        """PCC of the primary genes within each section of the validation spots, (sections, primary)."""
        prediction = predict(self.model, self.scored, self.validation_rows, self.primary_columns, self.evaluation_room)
        section = self.store.section_on_host[self.rows.validation]
        return pcc_by_section(prediction, self.validation_target, section).cpu()

    def _batches(self, rows: np.ndarray, purpose: str, epoch: int | str, size: int) -> list[np.ndarray]:
        """The batches of one pass, of nearly equal size and at most `size` spots.

        Equal sizes rather than a small last batch: the correlation loss of a few spots is noise.
        """
        rng = np.random.default_rng(seed_for(self.seed, "batches", purpose, str(epoch)))
        batches = []
        for group in self._groups(rows):
            count = -(-len(group) // size)
            batches += np.array_split(rng.permutation(group), count)
        return [batches[i] for i in rng.permutation(len(batches))]

    def _groups(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows that may share a batch: those of a section, or all of them."""
        if not self.protocol.batches_within_section:
            return [rows]
        section = self.store.section_on_host[rows]
        return [rows[section == s] for s in np.unique(section)]

    def _endless(self, rows: np.ndarray, purpose: str, epoch: int | str, size: int) -> Iterator[np.ndarray]:
        """Batches of `rows` for ever, shuffled anew in each pass."""
        for turn in itertools.count():
            yield from self._batches(rows, f"{purpose}.{turn}", epoch, size)

    def _augmentation(self, purpose: str, epoch: int | str) -> torch.Generator:
        return generator_for(self.seed, "augmentation", purpose, str(epoch), device=self.store.device)

    def _state(self) -> State:
        """Copies of the states of model and selector."""
        return _copy(self.model), _copy(self.selector)


def _copy(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {n: t.clone() for n, t in module.state_dict().items()}


def _halved(spots: int, try_with: Callable[[int], None]) -> int:
    """The first of spots / 2, spots / 4, … that the memory of the device suffices for; 0 if not even 2."""
    while spots > 2:
        spots = (spots + 1) // 2
        torch.cuda.empty_cache()
        with contextlib.suppress(torch.OutOfMemoryError):
            try_with(spots)
            return spots
    return 0


def _mean(pcc: Tensor) -> float:
    """Mean over sections of the mean over genes of (sections, genes); NaN only if no gene varies anywhere."""
    return float(pcc.nanmean(1).nanmean())


@contextlib.contextmanager
def _without_running_statistics(model: Model) -> Iterator[None]:
    """Normalisation layers in training mode neither update nor read running statistics inside."""
    layers = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    try:
        for layer in layers:
            layer.track_running_stats = False  # type: ignore[assignment]
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True  # type: ignore[assignment]
