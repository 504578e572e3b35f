"""The rules of the selector door."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from agl_bench.data.loans import Loans
from agl_bench.errors import AglBenchError, BadSpec
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.interfaces.selector import Selector, Step, TrainingView
from agl_bench.interfaces.tunable import Value, tunables
from agl_bench.maths.hypergradient import Hypergradient, Implicit
from agl_bench.maths.losses import LOSSES
from agl_bench.testing.lookahead import LookAhead
from agl_bench.testing.moving import OneType, left_behind
from agl_bench.testing.process import leaves_the_process
from agl_bench.testing.settings import check_metadata, check_settings, draw, ends
from agl_bench.testing.states import Bits, bits_of, changed, global_states, said, state_of, stirred_states
from agl_bench.testing.toy import (
    AUXILIARY,
    PRIMARY,
    SPOTS,
    WIDTH,
    ToyCell,
    through_a_file,
    toy_genes,
    toy_step,
    toy_view,
)
from agl_bench.testing.verdicts import Contract, Skip, Unavailable, Verdict, listed, repeatable, rule
from agl_bench.testing.watch import opened_in
from agl_bench.testing.work import Work, arrays
from agl_bench.training.records import EpochRecord
from agl_bench.training.trainer import Trainer

LARGE = 20_000  # genes of the largest sections, and of the rule about them
FEW, MANY = 400, 800  # genes between which work is compared
NUMBERS = 30  # a step may fill so many times the memory of the step of the mean of all losses
SECONDS = 10.0  # of processor time for building and one step at 20,000 genes, where the mean takes hundredths
TRIALS = 6  # random settings


class SelectorContract(Contract):
    """Rules of the selector door. Set `selector` to the class, `settings` to what the constructor needs."""

    door = "selector"
    selector: ClassVar[type[Selector]]
    settings: ClassVar[Mapping[str, Any]] = {}
    _works: ClassVar[dict[int, dict[str, Work]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._works = {}

    # What the rules look at ------------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """The toy world's device, which is the CPU unless the selector needs a GPU.

        Raises:
            Unavailable: if it needs one and there is none.
        """
        if not self.selector.needs_gpu:
            return "cpu"
        if not torch.cuda.is_available():
            raise Unavailable("it needs a GPU, and there is none here")
        return "cuda"

    def view(self, genes: GeneSplit | None = None, seed: int = 0, expression: Tensor | None = None) -> TrainingView:
        """A toy view, with the truth for a control."""
        if expression is None and self.device != "cpu":
            expression = toy_view(genes).expression.to(self.device)
        return toy_view(
            genes,
            seed,
            planted=self.selector.is_control,
            expression=expression,
            has_counts=self.selector.needs_counts,
        )

    def make(self, view: TrainingView | None = None, **settings: Any) -> Selector:
        """An instance on the toy view, or on another one, or with other settings."""
        with repeatable():
            return self.selector(view or self.view(), **{**self.settings, **settings}).to(self.device)

    def step(self, selector: Selector, **choices: Any) -> tuple[Tensor, Step]:
        """Losses and the toy step that made them, of the genes that the selector uses."""
        return toy_step(selector.genes, used=selector.used, device=self.device, **choices)

    def call(self, selector: Selector, losses: Tensor, step: Step) -> Tensor:
        """What the selector makes of a training batch, after it has observed it."""
        with repeatable():
            selector.observe(losses, step)
            return selector(losses, step)  # type: ignore[no-any-return]

    def slope(self, selector: Selector, **choices: Any) -> Tensor:
        """∂total/∂losses (genes,) on the toy step."""
        losses, step = self.step(selector, **choices)
        (slope,) = torch.autograd.grad(self.call(selector, losses, step), losses, allow_unused=True)
        return torch.zeros_like(losses) if slope is None else slope

    # What it says of itself ------------------------------------------------------------------------------------------

    @rule()
    def test_settings_are_tunable(self) -> None:
        """Every setting is a keyword-only argument with an annotation and a default inside its range."""
        check_settings(self.selector)

    @rule()
    def test_says_where_it_is_from(self) -> None:
        """`reference` names the publication or idea, and the class has a docstring whose first line says what it is."""
        check_metadata(self.selector)

    @rule(needs=["settings_are_tunable"])
    def test_builds(self) -> None:
        """The constructor takes a training view, calls `super().__init__(view)` and builds with the settings given."""
        selector = self.selector(self.view(), **self.settings)
        assert "genes" in vars(selector), "the constructor does not call super().__init__(view)"

    @rule(needs=["builds"])
    def test_leaves_the_process_as_it_is(self) -> None:
        """Constructor, `observe`, `forward` and `learn` change no setting of the process and replace no function."""
        leaves_the_process(self._uses())

    @rule(needs=["builds"])
    def test_attributes_are_of_their_types(self) -> None:
        """`learns_from`, `learning_rate`, `hypergradient` and the flags are what the door says they are."""
        selector = self.make()
        wrong = [
            f"{name} is {value!r}, not {wanted}"
            for name, value, wanted, is_right in (
                *(
                    (n, getattr(selector, n), "True or False", isinstance(getattr(selector, n), bool))
                    for n in ("is_control", "needs_gpu", "needs_second_order", "needs_counts")
                ),
                (
                    "learns_from",
                    selector.learns_from,
                    "'training' or 'validation'",
                    selector.learns_from in ("training", "validation"),
                ),
                (
                    "learning_rate",
                    selector.learning_rate,
                    "a number above 0",
                    _is_number(selector.learning_rate) and 0 < selector.learning_rate < float("inf"),
                ),
                (
                    "hypergradient",
                    selector.hypergradient,
                    "an instance of agl_bench.Hypergradient",
                    isinstance(selector.hypergradient, Hypergradient),
                ),
                (
                    "max_genes",
                    selector.max_genes,
                    "None or a whole number above 0",
                    selector.max_genes is None or (type(selector.max_genes) is int and selector.max_genes > 0),
                ),
            )
            if not is_right
        ]
        assert not wrong, "; ".join(wrong)
        late = sorted({"needs_gpu", "needs_counts", "max_genes", "is_control"} & vars(selector).keys())
        assert not late, f"{listed(late)} is read from the class, before there is an instance; set it in the class body"

    # What it returns -------------------------------------------------------------------------------------------------

    @rule(needs=["attributes_are_of_their_types", "leaves_the_process_as_it_is"])
    def test_returns_a_finite_scalar_on_the_graph(self) -> None:
        """`forward` returns a finite scalar that depends on the losses."""
        selector = self.make()
        losses, step = self.step(selector)
        total = self.call(selector, losses, step)
        assert isinstance(total, Tensor), f"it returns {type(total).__name__}, not a tensor of shape ()"
        assert total.shape == (), f"it returns a tensor of shape {tuple(total.shape)}, not of shape ()"
        assert bool(total.isfinite()), f"it returns {total.item()}"
        assert total.requires_grad, "what it returns is not on the graph of the losses: something detaches it"

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_every_primary_gene_counts(self) -> None:
        """The slope of the result is positive on every primary gene, and finite everywhere."""
        for factor in (1.0, 1e-3, 1e2):  # a good fit and a bad one
            selector = self.make()
            losses, step = self.step(selector)
            losses = losses * factor
            (slope,) = torch.autograd.grad(self.call(selector, losses, step), losses)
            where = "" if factor == 1 else f", with losses times {factor:g}"
            assert bool(slope.isfinite().all()), (
                f"the slope of {_first(selector, ~slope.isfinite())} is not finite{where}"
            )
            primary = slope[selector.genes.primary]
            lowest = float(primary.min())
            worst = _first(selector, (slope == lowest).cpu() & selector.genes.primary)
            assert lowest > 0, f"the slope of primary gene {worst} is {lowest:g}, not above 0{where}"

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_works_with_every_loss(self) -> None:
        """Correlation and squared error, batches of two spots and of many, narrow and wide features all work."""
        for loss in LOSSES:
            for spots, width in ((2, WIDTH), (SPOTS, 1), (SPOTS, 33)):
                slope = self.slope(self.make(), loss=loss, spots=spots, width=width)
                where = f"with protocol.loss = {loss}, {spots} spots and {width} features"
                assert bool(slope.isfinite().all()), f"a slope is not finite {where}"

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_unused_genes_have_no_weight(self) -> None:
        """If `used` leaves genes out, it holds every primary gene, stays as it is, and the others have no slope."""
        selector = self.make()
        if selector.used is None:
            raise Skip("it uses all genes (`used` is None)")
        used, genes = selector.used.clone(), selector.genes
        assert used.shape == (len(genes.names),) and used.dtype == torch.bool, (
            f"`used` is {used.dtype} of shape {tuple(used.shape)}, not torch.bool of shape ({len(genes.names)},)"
        )
        assert bool(used.cpu()[genes.primary].all()), "`used` leaves out a primary gene"
        losses, step = toy_step(genes, device=self.device)  # of all genes: those that are not used must not matter
        (slope,) = torch.autograd.grad(self.call(selector, losses, step), losses)
        assert bool((slope[~used] == 0).all()), "a gene that is not in `used` has a slope"
        assert torch.equal(selector.used, used), "`used` has changed after a step; the trainer reads it once"

    # What it may change ----------------------------------------------------------------------------------------------

    @rule(needs=["returns_a_finite_scalar_on_the_graph", "leaves_the_view_as_it_is"])
    def test_forward_is_pure(self) -> None:
        """`forward` changes neither state nor inputs, and gives the same result twice (it also runs in look-aheads)."""
        selector = self.make()
        losses, step = self.step(selector)
        selector.observe(losses, step)
        before, given, drawn = state_of(selector), _given(losses, step), selector.generator.get_state()
        with repeatable():
            first = selector(losses, step)
        altered = given.changed()
        assert not altered, f"it changes {listed(altered)} in place; make new tensors instead"
        touched = changed(before, state_of(selector))
        assert not touched, f"it changes {listed(touched)}; what changes from batch to batch belongs in `observe`"
        assert torch.equal(selector.generator.get_state(), drawn), (
            "it draws from the generator; draw in the constructor or in `observe`"
        )
        with repeatable():
            second = selector(losses, step)
        assert torch.equal(first, second), f"it gives {first.item():g}, and for the same batch then {second.item():g}"

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_observe_changes_buffers_only(self) -> None:
        """`observe` changes persistent buffers and nothing else: no parameter, no attribute, not the losses."""
        if self.selector.observe is Selector.observe:
            raise Skip("it does not observe")
        selector = self.make()
        before, kept = state_of(selector), set(selector.state_dict())
        parameters = {n: p.detach().clone() for n, p in selector.named_parameters()}
        losses, step = self.step(selector)
        given = _given(losses, step)
        selector.observe(losses, step)
        losses_again, step_again = self.step(selector, seed=5)
        selector.observe(losses_again, step_again)
        altered = given.changed()
        assert not altered, f"it changes {listed(altered)} in place"
        moved = [n for n, p in selector.named_parameters() if not torch.equal(p.detach(), parameters[n])]
        assert not moved, f"it moves the parameter {listed(moved)}; parameters move in `learn` alone"
        lost = [name for name in changed(before, state_of(selector)) if name not in kept]
        assert not lost, (
            f"it changes {listed(lost)}, which is no persistent buffer: a training that goes on after a kill has lost "
            "it; use register_buffer"
        )
        taped = [n for n, b in selector.named_buffers() if b.requires_grad]
        assert not taped, f"buffer {listed(taped)} is on a graph: change it under torch.no_grad()"
        torch.autograd.grad(selector(losses_again, step_again), losses_again)  # the graph is still there

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_learn_moves_its_own_parameters(self) -> None:
        """`learn` leaves finite parameters, the same objects as before, and needs nothing but the gradients."""
        selector = self.make()
        own = _own(selector)
        if not own or selector.learns_from != "validation":
            raise Skip("it has no parameters that learn from validation")
        optimizer = torch.optim.Adam(own.values(), lr=selector.learning_rate)
        for sign in (1.0, -1.0):
            with torch.no_grad():
                selector.learn({n: torch.full_like(p, sign) for n, p in own.items()}, optimizer)
        after = _own(selector)
        replaced = [n for n, p in own.items() if after.get(n) is not p]
        assert not replaced, f"parameter {listed(replaced)} is another object now: change it in place"
        broken = [n for n, p in own.items() if not bool(p.isfinite().all())]
        assert not broken, f"parameter {listed(broken)} is not finite after two steps"
        assert bool(self.slope(selector).isfinite().all()), "a slope is not finite after two steps"

    @rule(needs=["leaves_the_process_as_it_is"])
    def test_leaves_the_view_as_it_is(self) -> None:
        """Neither building a selector nor using it changes what the view shows: expression, counts, genes, places."""
        view, loans = self.view(), Loans()
        for name in ("expression", "position", "section", *(["counts"] if self.selector.needs_counts else [])):
            loans.lend(f"view.{name}", getattr(view, name))
        for name in ("primary", "rank", "score"):
            loans.lend(f"view.genes.{name}", getattr(view.genes, name))
        for use in self._uses(view):
            with contextlib.suppress(Exception):  # a matter of other rules
                use()
        touched = loans.changed()
        assert not touched, f"{listed(touched)} was changed in place; work on a copy"

    # Randomness ------------------------------------------------------------------------------------------------------

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_randomness_is_not_global(self) -> None:
        """Random numbers come from `view.generator` alone: no global generator is drawn from or seeded."""
        for what in self._uses():
            untouched = stirred_states()
            what()
            drawn = [name for name, state in global_states().items() if state != untouched[name]]
            assert not drawn, (
                f"it uses the global generator of {listed(drawn)} in `{what.__name__}`; draw from view.generator"
            )

    def _uses(self, view: TrainingView | None = None) -> Iterator[Callable[[], object]]:
        """The constructor, and then each method."""
        built: list[Selector] = []

        def __init__() -> None:
            built.append(self.selector(view or self.view(), **self.settings).to(self.device))

        yield __init__
        if not built:
            return
        selector = built[0]
        losses, step = self.step(selector)
        own = _own(selector)

        def observe() -> None:
            selector.observe(losses, step)

        def forward() -> None:
            selector(losses, step)

        def learn() -> None:
            with torch.no_grad():
                selector.learn({n: torch.ones_like(p) for n, p in own.items()}, torch.optim.Adam(own.values()))

        yield observe
        yield forward
        if own and selector.learns_from == "validation":
            yield learn

    @rule(
        needs=[
            "unused_genes_have_no_weight", "forward_is_pure", "learn_moves_its_own_parameters",
            "leaves_the_view_as_it_is",
        ]
    )  # fmt: skip
    def test_same_seed_same_result(self) -> None:
        """Built twice with equal seeds it is the same, and two trainings are equal bit for bit."""
        first, second = (self.make(self.view(seed=5)) for _ in range(2))
        different = changed(bits_of(first), bits_of(second))
        assert not different, f"{listed(different)} differs between two instances of one seed; draw from view.generator"
        assert torch.equal(self.slope(first), self.slope(second)), "two instances of one seed have different slopes"
        one, two = self.training(), self.training()
        assert one == two, f"two trainings of one seed differ, first in {_first_difference(one, two)}"

    # Genes -----------------------------------------------------------------------------------------------------------

    @rule(needs=["same_seed_same_result", "forward_is_pure", "randomness_is_not_global"])
    def test_gene_order_does_not_matter(self) -> None:
        """Permuting the genes permutes the slopes and leaves the result."""
        genes = toy_genes()
        order = torch.randperm(len(genes.names), generator=torch.Generator().manual_seed(6))
        moved = GeneSplit(
            tuple(genes.names[i] for i in order), genes.primary[order], genes.rank[order], genes.score[order]
        )
        view = self.view(genes)
        other = self.view(moved, expression=view.expression[:, order.to(self.device)])
        a, b = self.slope(self.make(view)), self.slope(self.make(other), order=order)
        moved_slopes = a[order.to(self.device)]
        worst = int((moved_slopes - b).abs().argmax())
        assert torch.allclose(moved_slopes, b, rtol=1e-4, atol=1e-6), (
            f"slopes do not follow the genes: that of {moved.names[worst]} is {float(moved_slopes[worst]):g}, and "
            f"{float(b[worst]):g} where the genes are in another order; use genes.rank, not the column"
        )

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_few_auxiliary_genes(self) -> None:
        """0 and 1 auxiliary genes work."""
        for auxiliary in (0, 1):
            try:
                slope = self.slope(self.make(self.view(toy_genes(PRIMARY, auxiliary))))
            except Exception as error:
                raise AssertionError(f"with {auxiliary} auxiliary genes: {said(error)}") from error
            assert bool(slope.isfinite().all()), f"a slope is not finite with {auxiliary} auxiliary genes"

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_gene_counts_at_their_ends(self) -> None:
        """A setting that counts genes works at its smallest value and above the number of auxiliary genes."""
        counts = [t for t in tunables(self.selector).values() if t.kind is int and t.range and t.range.high > AUXILIARY]
        counts = [t for t in counts if t.name not in self.settings]
        if not counts:
            raise Skip("no setting of it counts genes")
        for tunable in counts:
            assert tunable.range is not None
            for value in (int(tunable.range.low), AUXILIARY, min(int(tunable.range.high), 3 * AUXILIARY)):
                told = f"with {tunable.name} = {value} and {AUXILIARY} auxiliary genes"
                try:
                    slope = self.slope(selector := self.make(None, **{tunable.name: value}))
                except Exception as error:
                    raise AssertionError(f"{told}: {said(error)}") from error
                assert bool(slope.isfinite().all()), f"a slope is not finite {told}"
                assert bool((slope[selector.genes.primary] > 0).all()), f"a primary gene does not count {told}"

    @rule(needs=["gene_counts_at_their_ends"])
    def test_sampled_settings_build(self) -> None:
        """Both ends of every range, every choice, and random settings build and give finite slopes."""
        known = {n: t for n, t in tunables(self.selector).items() if n not in self.settings}
        if not known:
            raise Skip("it has no settings")
        rng = np.random.default_rng(0)
        trials: list[tuple[dict[str, Value], bool]] = [  # settings, and whether they may contradict each other
            ({name: value}, tunable.range is None) for name, tunable in known.items() for value in ends(tunable)
        ]
        trials += [({n: draw(t, rng) for n, t in known.items()}, True) for _ in range(TRIALS)]
        for settings, may_refuse in trials:
            told = ", ".join(f"{name} = {value}" for name, value in settings.items())
            try:
                slope = self.slope(self.make(None, **settings))
            except Exception as error:
                if may_refuse and isinstance(error, BadSpec):
                    continue  # it says in a sentence what does not go together
                raise AssertionError(f"with {told}: {said(error)}") from error
            assert bool(slope.isfinite().all()), f"a slope is not finite with {told}"

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_unscored_genes(self) -> None:
        """Genes whose ranking has no score (NaN) work."""
        genes = toy_genes()
        score = genes.score.clone()
        score[genes.rank >= AUXILIARY - 3] = float("nan")
        genes = GeneSplit(genes.names, genes.primary, genes.rank, score, unscored=3)
        assert bool(self.slope(self.make(self.view(genes))).isfinite().all()), "a slope is not finite: a NaN score"

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_constant_genes(self) -> None:
        """Genes that do not vary over the training spots work, primary ones too."""
        genes = toy_genes()
        for constant in (0.0, 1.0):
            expression = self.view(genes).expression.clone()
            still = (genes.rank >= AUXILIARY - 3) | (torch.arange(len(genes.names)) == int(genes.primary.nonzero()[0]))
            expression[:, still.to(self.device)] = constant
            slope = self.slope(selector := self.make(self.view(genes, expression=expression)))
            named = _first(selector, ~slope.isfinite())
            assert bool(slope.isfinite().all()), f"the slope of {named} is not finite where genes are constant"

    # State -----------------------------------------------------------------------------------------------------------

    @rule(needs=["same_seed_same_result", "observe_changes_buffers_only"])
    def test_state_round_trip(self) -> None:
        """`state_dict` holds everything: a fresh instance of another seed with the state loaded acts the same."""
        selector = self.make(self.view(seed=7))
        with torch.no_grad():
            for parameter in selector.parameters():
                parameter.add_(0.01)
        self.slope(selector)
        other = self.make(self.view(seed=8))
        other.load_state_dict(selector.state_dict())
        other.generator.set_state(selector.generator.get_state())
        assert torch.equal(self.slope(selector), self.slope(other)), (
            "the loaded selector acts differently: something that matters is no parameter and no persistent buffer"
        )

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_moves_between_devices(self) -> None:
        """Every tensor moves with `.to`: checked by changing the type of floating-point state."""
        selector = self.make().double()
        if kept := left_behind(selector):
            raise AssertionError(f"{listed(kept)} would stay on the host: a plain attribute; use register_buffer")
        losses, step = self.step(selector, dtype=torch.float64)
        try:
            with OneType():
                total = self.call(selector, losses, step)
        except RuntimeError as error:
            raise AssertionError(f"it cannot be moved by .to(…): {said(error)}") from error
        assert total.dtype == torch.float64, (
            f"its result is {total.dtype} after .double(): a tensor is a plain attribute; use register_buffer"
        )

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_runs_on_cuda(self) -> None:
        """On a CUDA device it does what it does on the CPU."""
        if not torch.cuda.is_available():
            raise Skip("it needs a GPU, and there is none here")
        view = self.view(expression=toy_view().expression.cuda())
        with repeatable():
            selector = self.selector(view, **self.settings).cuda()
            losses, step = toy_step(selector.genes, used=selector.used, device="cuda")
            selector.observe(losses, step)
            (slope,) = torch.autograd.grad(selector(losses, step), losses)
        assert slope.is_cuda and bool(slope.isfinite().all()), "a slope is not finite on CUDA"
        if not self.selector.needs_gpu:
            assert torch.allclose(slope.cpu(), self.slope(self.make()), rtol=1e-3, atol=1e-5), "slopes differ on CUDA"

    @rule(needs=["state_round_trip"])
    def test_goes_on_after_a_kill(self) -> None:
        """A training that is cut off and taken up by a fresh trainer ends as if nothing had been, bit for bit."""
        whole, parted = self.training(), self.training(killed_after=1)
        assert whole == parted, (
            f"after a kill the training differs, first in {_first_difference(whole, parted)}: something that matters "
            "is neither a parameter, nor a persistent buffer, nor drawn from view.generator"
        )

    # Learning --------------------------------------------------------------------------------------------------------

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_parameters_get_gradients(self) -> None:
        """Every learnt parameter gets a finite gradient from its declared source."""
        selector = self.make()
        own = _own(selector)
        if not own:
            raise Skip("it has no parameters")
        if selector.learns_from == "training":
            losses, step = self.step(selector)
            found = torch.autograd.grad(self.call(selector, losses, step), list(own.values()), allow_unused=True)
            gradients = {
                n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(own.items(), found, strict=True)
            }
        else:
            gradients = self._look_ahead(selector).hypergradients(selector.hypergradient, own)
        for name, gradient in gradients.items():
            assert bool(gradient.isfinite().all()), f"the gradient of {name} is not finite"
            assert bool(gradient.abs().sum() > 0), f"{name} gets no gradient from {selector.learns_from}"

    def _look_ahead(self, selector: Selector, dtype: torch.dtype = torch.float32) -> LookAhead:
        """A look-ahead of a small model."""
        with repeatable():
            losses, step = self.step(selector, dtype=dtype)
            selector.observe(losses, step)
        return LookAhead(selector, dtype, self.device)

    @rule(needs=["parameters_get_gradients", "forward_is_pure"])
    def test_hypergradient_is_exact(self) -> None:
        """What learns from validation follows the derivative of the outer loss, as finite differences say."""
        view = self.view(expression=self.view().expression.double())
        selector = self.make(view).double()
        own = _own(selector)
        if not own or selector.learns_from != "validation":
            raise Skip("it has no parameters that learn from validation")
        engine, problem = selector.hypergradient, self._look_ahead(selector, torch.float64)
        if isinstance(engine, Implicit):
            problem.check_implicit(engine, own)
        elif engine.is_exact:
            problem.check_against_differences(engine, own)
        else:
            raise Skip(f"its engine {type(engine).__name__} does not say that it is exact (`is_exact`)")

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_second_order_is_declared(self) -> None:
        """What differentiates twice in `observe` or `forward` says so: `needs_second_order`."""
        selector = self.make()
        if selector.needs_second_order:
            raise Skip("it says so")
        genes = selector.genes
        _, step = self.step(selector)
        once = _Once.apply(step.features)
        assert step.head is not None
        prediction = once @ step.head.T
        made = LOSSES["squared_error"](prediction, step.target)
        if step.columns is not None:
            made = torch.zeros(len(genes.names), device=self.device).index_copy(0, step.columns, made)
        try:
            self.call(selector, made, replace(step, prediction=prediction, features=once)).backward()  # type: ignore[no-untyped-call]
        except _Twice:
            raise AssertionError(
                "it differentiates through a gradient, and needs_second_order is False; set needs_second_order = True"
            ) from None

    # What it may see -------------------------------------------------------------------------------------------------

    def training(self, *, is_measured: bool = True, killed_after: int | None = None) -> dict[str, Bits]:
        """What there was after each epoch of a small training by the real trainer, by moment.

        Args:
            is_measured: see `ToyCell`.
            killed_after: the epoch after which a fresh trainer takes over.
        """
        if self.device != "cpu":
            raise Skip("it needs a GPU; toy trainings are on the CPU")
        with repeatable():
            learns = bool(_own(probe := self.make())) and probe.learns_from == "validation"
            cell = ToyCell(is_measured=is_measured, learns=learns)
            build: Callable[[TrainingView], Selector] = functools.partial(self.selector, **self.settings)
            trainer = cell.trainer(build, planted=self.selector.is_control)
            used = trainer.selector.used
            found = {"the selector as built": bits_of(trainer.selector)}
            if used is not None:
                found["the selector as built"]["used"] = used.numpy().tobytes()
            for record in _epochs(trainer):
                found[f"epoch {record.epoch}"] = _trained(trainer, record)
                if record.epoch == killed_after:
                    state = through_a_file(trainer.state())
                    trainer = cell.trainer(build, planted=self.selector.is_control)
                    trainer.resume(state)
                    for later in _epochs(trainer):
                        found[f"epoch {later.epoch}"] = _trained(trainer, later)
                    break
            found["the end"] = {"weights": trainer.best_weights.numpy().tobytes()} if is_measured else {}
        return found

    @rule(needs=["same_seed_same_result"])
    def test_sees_training_spots_only(self) -> None:
        """Until validation nothing depends on validation or test expression, nor on held-out auxiliary genes."""
        measured = self.training()
        gc.collect()  # what peeks through the collector must find the data of the second training, not of the first
        advice = "use view and step alone"
        try:
            unknown = self.training(is_measured=False)
        except (AglBenchError, RuntimeError, ValueError) as error:
            raise AssertionError(
                f"it looks at spots that it must not see: where their expression is NaN, it fails ({said(error)}); "
                f"{advice}"
            ) from error
        measured["the end"] = {}
        assert measured == unknown, (
            "it looks at spots that it must not see: where their expression is NaN, something else comes out, first "
            f"in {_first_difference(measured, unknown)}; {advice}"
        )

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_opens_no_data(self) -> None:
        """It opens nothing in the data folder: what it knows of expression it knows from the view."""
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, AGL_BENCH_DATA=folder):
            root = Path(os.environ.get("AGL_BENCH_DATA", "data"))
            with opened_in(root, Path("data")) as opened:
                try:
                    self.slope(self.make())
                except OSError as error:
                    assert folder not in str(error), f"it looks for data of its own: {said(error)}"
                    raise
        named = sorted({f"{event} of {path.replace(str(root.resolve()), 'AGL_BENCH_DATA')}" for event, path in opened})
        assert not named, f"it looks into the data folder ({listed(named)}); use view.expression"

    # What it may cost ------------------------------------------------------------------------------------------------

    def _work(self, genes: int) -> dict[str, Work]:
        """How much it works with so many genes: when it is built, in a training step, in an outer step."""
        if genes not in self._works:
            self._works[genes] = self._measured(genes)
        return self._works[genes]

    def _measured(self, genes: int) -> dict[str, Work]:
        view = self.view(toy_genes(PRIMARY, genes - PRIMARY))
        found = {name: Work(name) for name in ("`__init__`", "a training step", "an outer step")}
        building, training, outer = found.values()
        with repeatable():
            with building, arrays(building):
                selector = self.selector(view, **self.settings).to(self.device)
            losses, step = self.step(selector)
            with training:
                selector.observe(losses, step)
                selector(losses, step).backward()
            if genes < LARGE and _own(selector) and selector.learns_from == "validation":
                problem = self._look_ahead(selector)
                with outer:
                    problem.hypergradients(selector.hypergradient, _own(selector))
        return found

    def most(self, genes: int) -> int:
        """So many genes, or fewer where it says that it copes with fewer only."""
        return min(genes, self.selector.max_genes or genes)

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_no_loop_over_genes(self) -> None:
        """The number of operations does not grow with the number of genes: no loop over genes, nor a hidden one."""
        few, many = self._few_and_many()
        for where, work in many.items():
            more = work.operations - few[where].operations
            assert more <= 20 + few[where].operations // 4, (
                f"it loops over genes in {where}: {few[where].operations:,} operations with {FEW} genes, "
                f"{work.operations:,} with {MANY}; treat all genes at once, e.g. by step.alignment"
            )

    @rule(needs=["returns_a_finite_scalar_on_the_graph"])
    def test_waits_for_no_result(self) -> None:
        """A training step asks no result of the device: no `.item()`, no `if` on a tensor."""
        selector = self.make()
        for _ in range(2):  # what is asked once and kept does not count
            losses, step = self.step(selector)
            with Work("a training step") as work:
                selector.observe(losses, step)
                selector(losses, step).backward()
        assert work.waits == 0, (
            f"a training step waits {work.waits} times for a number on the host; keep it a tensor, and choose by "
            "torch.where"
        )

    @rule(needs=["no_loop_over_genes"])
    def test_memory_grows_with_genes(self) -> None:
        """No tensor grows with the square of the number of genes."""
        few, many = self._few_and_many()
        for where, work in many.items():
            is_linear = work.largest < 3 * few[where].largest or work.largest < MANY * MANY // 4
            assert is_linear, (
                f"{where} makes a tensor of shape {work.shape} with {MANY} genes: it grows with the square of their "
                f"number, which is 1.6 GB with {LARGE:,} genes"
            )
            more = work.array_bytes - few[where].array_bytes
            assert more < MANY * MANY // 2 or work.array_bytes < 3 * few[where].array_bytes, (
                f"{where} makes arrays of {work.array_bytes / 1e6:.1f} MB with {MANY} genes, and of "
                f"{few[where].array_bytes / 1e6:.1f} MB with {FEW}: they grow with the square of the number of genes"
            )

    def _few_and_many(self) -> tuple[dict[str, Work], dict[str, Work]]:
        if self.selector.max_genes is not None and self.selector.max_genes < MANY:
            raise Skip(f"it copes with {self.selector.max_genes:,} genes at most (`max_genes`)")
        return self._work(FEW), self._work(MANY)

    @rule(needs=["no_loop_over_genes", "memory_grows_with_genes"])
    def test_works_at_20000_genes(self) -> None:
        """With 20,000 genes it stays within a budget of memory and time, generous beside the mean of all losses."""
        if self.selector.max_genes is not None and self.selector.max_genes < LARGE:
            raise Skip(f"it copes with {self.selector.max_genes:,} genes at most (`max_genes`)")
        started = time.process_time()
        work = self._work(LARGE)
        seconds = time.process_time() - started
        losses, _ = toy_step(toy_genes(PRIMARY, LARGE - PRIMARY), device=self.device)
        with Work("the mean of all losses") as mean:
            losses.mean().backward()  # type: ignore[no-untyped-call]
        for where, most in (("`__init__`", NUMBERS * SPOTS * LARGE), ("a training step", NUMBERS * mean.numbers)):
            times = NUMBERS * work[where].numbers / most
            assert times < NUMBERS, (
                f"{where} fills {times:.0f} times the memory "
                f"{'of the training expression' if where == '`__init__`' else 'of a step on the mean of all losses'}; "
                f"{NUMBERS} times are allowed"
            )
        assert seconds < SECONDS, f"it takes {seconds:.0f} s of processor time to build and for one step"


class _Twice(Exception):
    """Somebody differentiates through a gradient."""


class _Once(torch.autograd.Function):
    """The identity, which says when it is differentiated twice."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """The same."""
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """The same."""
        return _Marked.apply(cotangents[0])


class _Marked(torch.autograd.Function):
    """The identity, which must not be differentiated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """The same."""
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """Nothing comes back."""
        raise _Twice


def check_selector(cls: type, settings: Mapping[str, Any], rules: Iterable[str] = ()) -> list[Verdict]:
    """The verdicts of every rule of the selector door, or of some `rules`, on a class with these settings."""
    return list(SelectorContract.of(cls, settings=dict(settings)).verdicts(rules))


def _given(losses: Tensor, step: Step) -> Loans:
    """What a step is given, noted before the step."""
    loans = Loans()
    loans.lend("the losses", losses)
    for name in ("features", "prediction", "target", "row"):
        loans.lend(f"step.{name}", getattr(step, name))
    return loans


def _own(selector: Selector) -> dict[str, torch.nn.Parameter]:
    """What is learnt."""
    return {n: p for n, p in selector.named_parameters() if p.requires_grad}


def _first_difference(one: Mapping[str, Bits], two: Mapping[str, Bits]) -> str:
    """The first moment at which two trainings differ, and what does."""
    for moment, bits in one.items():
        different = changed(bits, two.get(moment, {}))
        if different:
            return f"{different[0]} of {moment}"
    return "what comes after it"


def _epochs(trainer: Trainer) -> Iterator[EpochRecord]:
    yield from trainer


def _trained(trainer: Trainer, record: EpochRecord) -> Bits:
    """What there is after an epoch, but for what validation says of it."""
    return {
        **{f"selector.{n}": b for n, b in bits_of(trainer.selector).items()},
        **{f"model.{n}": b for n, b in bits_of(trainer.model).items()},
        "the training loss": repr(record.training_loss).encode(),
        "the outer loss": repr(record.outer_loss).encode(),
        "the effective weights": repr((record.selected, record.effective)).encode(),
        "view.generator": trainer.selector.generator.get_state().numpy().tobytes(),
    }


def _first(selector: Selector, chosen: Tensor) -> str:
    """The name of the first of the chosen genes; "" if there is none."""
    return next((n for n, c in zip(selector.genes.names, chosen.tolist(), strict=True) if c), "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
