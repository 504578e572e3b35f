"""The rules of the backbone door."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from agl_bench.data.loans import Loans
from agl_bench.errors import BadSpec, FetchFailed, MissingData
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.spots import Spots
from agl_bench.interfaces.tunable import tunables
from agl_bench.testing.moving import OneType, left_behind
from agl_bench.testing.process import leaves_the_process
from agl_bench.testing.settings import check_metadata, check_settings, draw, ends
from agl_bench.testing.states import changed, global_states, said, state_of, stirred_states
from agl_bench.testing.toy import toy_spots
from agl_bench.testing.verdicts import Contract, Skip, Unavailable, Verdict, listed, repeatable, rule

LARGEST_PX = 256  # patches larger than that are not tried: they take minutes
TRIALS = 3  # random settings
SIGHTS = ("patches", "embedding", "position")


class BackboneContract(Contract):
    """Rules of the backbone door. Set `backbone` to the class, `settings` to what the constructor needs."""

    door = "backbone"
    backbone: ClassVar[type[Backbone]]
    settings: ClassVar[Mapping[str, Any]] = {}

    # What the rules look at ------------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """The toy spots' device, which is the CPU unless the backbone needs a GPU.

        Raises:
            Unavailable: if it needs one and there is none.
        """
        if not self.backbone.needs_gpu:
            return "cpu"
        if not torch.cuda.is_available():
            raise Unavailable("it needs a GPU, and there is none here")
        return "cuda"

    def spots(self, count: int, patch_px: int | None = None) -> Spots:
        """Toy spots of the size that the backbone wants."""
        if patch_px is None:
            known = tunables(self.backbone)
            default = known["patch_px"].default if "patch_px" in known else self.backbone.patch_px
            patch_px = int(self.settings.get("patch_px", default))
        return _on(toy_spots(count, patch_px=patch_px), self.device)

    def make(self, seed: int = 0, **settings: Any) -> Backbone:
        """An instance on toy spots."""
        with repeatable():
            torch.manual_seed(seed)
            spots = self.spots(4, settings.get("patch_px"))
            return self.backbone(spots, **{**self.settings, **settings}).to(self.device)

    # What it says of itself ------------------------------------------------------------------------------------------

    @rule()
    def test_settings_are_tunable(self) -> None:
        """Every setting is a keyword-only argument with an annotation and a default inside its range."""
        check_settings(self.backbone)

    @rule()
    def test_says_where_it_is_from(self) -> None:
        """`reference` names the publication or idea, and the class has a docstring whose first line says what it is."""
        check_metadata(self.backbone)

    @rule()
    def test_is_given_spots_alone(self) -> None:
        """Constructor and `forward` take spots and nothing else: expression is absent by type."""
        for name, method in (("__init__", self.backbone.__init__), ("forward", self.backbone.forward)):
            taken = [
                p.name
                for p in list(inspect.signature(method).parameters.values())[2:]
                if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
            ]
            assert not taken, f"{name} wants {listed(taken)} beside the spots, which nobody gives it"

    @rule(needs=["settings_are_tunable", "is_given_spots_alone"])
    def test_builds(self) -> None:
        """The constructor takes a few example spots and builds with the settings given."""
        self.make()

    @rule(needs=["builds"])
    def test_leaves_the_process_as_it_is(self) -> None:
        """Neither the constructor nor `forward` changes a setting of the process or replaces a function."""
        built: list[Backbone] = []

        def __init__() -> None:
            built.append(self.backbone(self.spots(4), **self.settings).to(self.device))

        def forward() -> None:
            for train in (True, False):
                built[0].train(train)(self.spots(4))

        leaves_the_process((__init__, forward))

    @rule(needs=["builds", "leaves_the_process_as_it_is"])
    def test_attributes_are_of_their_types(self) -> None:
        """`sees`, `width`, `patch_px`, `learning_rate` and the flags are what the door says they are."""
        backbone = self.make()
        wrong = [
            f"{name} is {getattr(backbone, name)!r}, not {wanted}"
            for name, wanted, is_right in (
                ("sees", f"one of {', '.join(SIGHTS)}", backbone.sees in SIGHTS),
                ("width", "a whole number above 0", type(backbone.width) is int and backbone.width > 0),
                ("patch_px", "a whole number above 0", type(backbone.patch_px) is int and backbone.patch_px > 0),
                (
                    "learning_rate",
                    "a number above 0",
                    isinstance(backbone.learning_rate, float) and 0 < backbone.learning_rate < float("inf"),
                ),
                (
                    "late_prefixes",
                    "a tuple of texts",
                    isinstance(backbone.late_prefixes, tuple)
                    and all(isinstance(p, str) for p in backbone.late_prefixes),
                ),
                *(
                    (name, "True or False", isinstance(getattr(backbone, name), bool))
                    for name in ("frozen", "splits", "is_control", "needs_gpu", "second_order")
                ),
            )
            if not is_right
        ]
        assert not wrong, "; ".join(wrong)

    # What it returns -------------------------------------------------------------------------------------------------

    @rule(needs=["attributes_are_of_their_types"])
    def test_width_is_true(self) -> None:
        """`forward` returns (spots, width), finite float32."""
        backbone = self.make()
        features = backbone(self.spots(3))
        assert isinstance(features, Tensor), f"it returns {type(features).__name__}, not a tensor"
        assert features.shape == (3, backbone.width), (
            f"it returns {tuple(features.shape)} for 3 spots, and width is {backbone.width}"
        )
        assert features.dtype == torch.float32, f"it returns {features.dtype}, not torch.float32"
        assert bool(features.isfinite().all()), "features are not finite"

    @rule(needs=["width_is_true"])
    def test_one_spot(self) -> None:
        """A batch of one spot works in evaluation mode and keeps its axis."""
        backbone = self.make().eval()
        features = backbone(self.spots(1))
        assert features.shape == (1, backbone.width), f"it returns {tuple(features.shape)} for one spot"

    @rule(needs=["evaluation_changes_nothing"])
    def test_evaluation_is_per_spot(self) -> None:
        """In evaluation mode the features of a spot do not depend on the other spots of its batch."""
        backbone = self.make().eval()
        spots = self.spots(4)
        with torch.no_grad():
            apart = float((backbone(spots)[:1] - backbone(_first(spots, 1))).abs().max())
        assert apart <= 1e-4, f"the other spots of a batch change the features of a spot by {apart:.2g} in evaluation"

    @rule(needs=["width_is_true"])
    def test_leaves_the_spots_as_they_are(self) -> None:
        """Neither building it nor `forward` changes patches, embeddings, positions or sections of the spots."""
        for train in (False, True):
            spots, loans = self.spots(4), Loans()
            for name in (*SIGHTS, "section"):
                if getattr(spots, name) is not None:
                    loans.lend(f"spots.{name}", getattr(spots, name))
            with repeatable():
                self.backbone(spots, **self.settings).to(self.device).train(train)(spots)
            touched = loans.changed()
            assert not touched, f"it changes {listed(touched)} in place; make new tensors instead"

    @rule(needs=["width_is_true"])
    def test_sees_what_it_says(self) -> None:
        """It works with nothing but what `sees` names, since the store loads nothing else."""
        backbone, spots = self.make().eval(), self.spots(2)
        hidden = {name: None for name in ("patches", "embedding") if name != backbone.sees}
        alone = replace(spots, **hidden)  # type: ignore[arg-type]
        try:
            with repeatable():
                self.backbone(alone, **self.settings)
            backbone(alone)
        except Exception as error:
            raise AssertionError(f"it sees {backbone.sees}, and with that alone it fails: {said(error)}") from error

    # Randomness and state --------------------------------------------------------------------------------------------

    @rule(needs=["width_is_true"])
    def test_same_seed_same_weights(self) -> None:
        """Equal seeds give equal weights."""
        first, second = self.make().state_dict(), self.make().state_dict()
        different = [n for n, t in first.items() if not torch.equal(t, second[n])]
        assert not different, f"{listed(different)} differs between two instances of one seed"

    @rule(needs=["width_is_true"])
    def test_randomness_is_not_its_own(self) -> None:
        """It seeds no generator, draws from torch's alone, and in evaluation mode from none."""

        def built(seed: int) -> dict[str, object]:
            stirred_states()
            torch.manual_seed(seed)
            before = global_states()
            self.backbone(self.spots(4), **self.settings)
            after = global_states()
            used = [n for n in before if not n.startswith("torch") and before[n] != after[n]]
            assert not used, f"the constructor uses the global generator of {listed(used)}; use torch's"
            return after

        assert built(1)["torch"] != built(2)["torch"], "the constructor seeds torch's global generator; leave it alone"
        for train in (True, False):
            backbone, before = self.make().train(train), stirred_states()
            backbone(self.spots(4))
            after = global_states()
            used = [n for n in before if before[n] != after[n] and not (train and n.startswith("torch"))]
            assert not used, f"`forward` uses the global generator of {listed(used)}{'' if train else ' in evaluation'}"

    @rule(needs=["leaves_the_spots_as_they_are", "randomness_is_not_its_own"])
    def test_evaluation_changes_nothing(self) -> None:
        """In evaluation mode `forward` changes no state and gives the same twice."""
        backbone, spots = self.make().eval(), self.spots(4)
        with torch.no_grad():
            before, first = state_of(backbone), backbone(spots)
            touched = changed(before, state_of(backbone))
            assert not touched, f"it changes {listed(touched)} in evaluation mode"
            assert torch.equal(first, backbone(spots)), "it gives other features for the same spots in evaluation mode"

    @rule(needs=["same_seed_same_weights", "evaluation_changes_nothing"])
    def test_state_round_trip(self) -> None:
        """`state_dict` holds everything: an instance of another seed with the state loaded gives the same features."""
        backbone = self.make(1)
        with torch.no_grad():
            for parameter in (p for p in backbone.parameters() if p.requires_grad):
                parameter.mul_(1.01)  # what is frozen may come from elsewhere, the same for every seed
        other = self.make(2, **dict(backbone.rebuilt_with))
        other.load_state_dict(backbone.state_dict())
        spots = self.spots(4)
        with torch.no_grad():
            assert torch.equal(backbone.eval()(spots), other.eval()(spots)), (
                "the loaded backbone gives other features: something that matters is neither a parameter nor a "
                "persistent buffer"
            )

    @rule(needs=["width_is_true"])
    def test_moves_between_devices(self) -> None:
        """Every tensor moves with `.to`: checked by changing the type of floating-point state."""
        backbone = self.make().double().eval()
        if kept := left_behind(backbone):
            raise AssertionError(f"{listed(kept)} would stay on the host: a plain attribute; use register_buffer")
        try:
            with OneType():
                features = backbone(_wide(self.spots(4)))
        except RuntimeError as error:
            raise AssertionError(f"it cannot be moved by .to(…): {said(error)}") from error
        assert features.dtype == torch.float64, (
            f"features are {features.dtype} after .double(): a tensor is a plain attribute; use register_buffer"
        )

    @rule(needs=["evaluation_changes_nothing"])
    def test_layout_does_not_matter(self) -> None:
        """Patches whose channels lie innermost in memory, as on a GPU, give the same features."""
        backbone, spots = self.make().eval(), self.spots(4)
        if backbone.sees != "patches":
            raise Skip(f"it sees {backbone.sees}, no patches")
        assert spots.patches is not None
        inside = replace(spots, patches=spots.patches.to(memory_format=torch.channels_last))
        with torch.no_grad():
            apart = float((backbone(spots) - backbone(inside)).abs().max())
        assert apart <= 1e-4, f"features change by {apart:.2g} with the layout of the patches; use reshape, not view"

    # Parts -----------------------------------------------------------------------------------------------------------

    @rule(needs=["width_is_true"])
    def test_parts_make_the_whole(self) -> None:
        """If it splits, `late` of `early` is `forward`, and `late_names` are the parameters that `late` uses."""
        backbone = self.make().eval()
        if not backbone.splits:
            raise Skip("it has no late part (`splits` is False)")
        spots = self.spots(4)
        with torch.no_grad():
            hidden = backbone.early(spots)
            assert torch.equal(backbone.late(hidden), backbone(spots)), "late(early(spots)) is not forward(spots)"
        named = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(backbone.late(hidden).square().sum(), list(named.values()), allow_unused=True)
        uses = {n for n, g in zip(named, found, strict=True) if g is not None}
        told = uses ^ {n for n in backbone.late_names() if n in named}
        assert not told, f"late_prefixes and late disagree about {listed(sorted(told))}"

    @rule(needs=["width_is_true"])
    def test_a_frozen_encoder_stays(self) -> None:
        """If it is frozen, `encode` gives one row for each spot, in training mode as well, and has no trained part."""
        backbone = self.make()
        if not backbone.frozen:
            raise Skip("it has no frozen encoder (`frozen` is False)")
        spots = self.spots(4)
        first = backbone.eval().encode(spots)
        second = backbone.train().encode(spots)
        assert first.shape[0] == 4 and first.ndim == 2, f"encode gives {tuple(first.shape)}, not (spots, n)"
        assert torch.equal(first, second), "encode depends on the training mode"
        assert not first.requires_grad, "encode has trained parameters"

    @rule(needs=["a_frozen_encoder_stays"])
    def test_encoded_once_is_as_live(self) -> None:
        """What a frozen encoder has made of the patches, kept and given in their place, leads to the same features."""
        backbone = self.make().eval()
        if not backbone.frozen:
            raise Skip("it has no frozen encoder (`frozen` is False)")
        spots = self.spots(4)
        with torch.no_grad():
            kept = backbone.encode(spots)
            one_by_one = torch.cat([backbone.encode(_first(spots, n))[-1:] for n in range(1, 5)])
            assert torch.allclose(kept, one_by_one, atol=1e-4), "encode depends on the other spots of a batch"
            live = backbone(spots)
            cached = backbone(replace(spots, patches=None, embedding=kept))
        assert torch.allclose(live, cached, atol=1e-5), "features differ where spots.embedding holds what encode gave"

    # Training --------------------------------------------------------------------------------------------------------

    @rule(needs=["width_is_true"])
    def test_parameters_get_gradients(self) -> None:
        """Every trained parameter gets a finite gradient from a batch of two spots in training mode."""
        backbone = self.make().train()
        own = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        if not own:
            raise Skip("nothing of it is trained")
        weights = torch.linspace(-1, 1, backbone.width, device=self.device)
        found = torch.autograd.grad((backbone(self.spots(2)) * weights).sum(), list(own.values()), allow_unused=True)
        absent = [n for n, g in zip(own, found, strict=True) if g is None]
        assert not absent, f"{listed(absent)} takes no part in the features; leave it out, or freeze it"
        broken = [n for n, g in zip(own, found, strict=True) if g is not None and not bool(g.isfinite().all())]
        assert not broken, f"the gradient of {listed(broken)} is not finite with two spots in a batch"

    @rule(needs=["parameters_get_gradients", "leaves_the_spots_as_they_are", "moves_between_devices"])
    def test_second_order(self) -> None:
        """Its second derivative is right: selectors that learn from validation need it."""
        backbone = self.make().double().train()
        if not backbone.second_order:
            raise Skip("it says that it has no second derivative (`second_order` is False)")
        own = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        if not own:
            raise Skip("nothing of it is trained")
        spots = _wide(self.spots(4))
        with torch.no_grad():  # a network as it begins lies on kinks: weights of 0 before a ReLU
            for parameter in own.values():
                parameter.add_(0.05 * torch.randn_like(parameter))

        def slopes(at: Mapping[str, Tensor], *, taped: bool = False) -> list[Tensor]:
            with repeatable(), sdpa_kernel(SDPBackend.MATH):  # as in a look-ahead: fused attention has no second one
                features = torch.func.functional_call(backbone, dict(at), (spots,))
                found = torch.autograd.grad(
                    features.square().sum(), list(at.values()), create_graph=taped, allow_unused=True
                )
            return [torch.zeros_like(p) if g is None else g for g, p in zip(found, at.values(), strict=True)]

        here = slopes(own, taped=True)
        length = torch.stack([g.detach().square().sum() for g in here]).sum().sqrt()
        along = [g.detach() / length for g in here]
        advice = "make its layers differentiable twice, or set second_order = False"
        try:
            found = torch.autograd.grad(here, list(own.values()), grad_outputs=along, allow_unused=True)
        except RuntimeError as error:
            raise AssertionError(f"it has no second derivative ({said(error)}); {advice}") from error
        claimed = sum(float((g * d).sum()) for g, d in zip(found, along, strict=True) if g is not None)
        delta = 1e-8  # so small that hardly any unit passes the kink of a ReLU
        ends = []
        for sign in (1, -1):
            moved = {
                n: (p.detach() + sign * delta * d).requires_grad_()
                for (n, p), d in zip(own.items(), along, strict=True)
            }
            ends.append(sum(float((g * d).sum()) for g, d in zip(slopes(moved), along, strict=True)))
        measured = (ends[0] - ends[1]) / (2 * delta)
        assert abs(claimed - measured) <= 1e-3 * abs(measured) + 1e-6 * float(length), (
            f"its second derivative is {claimed:.6g}, and {measured:.6g} by finite differences, along the gradient; "
            f"{advice}"
        )

    # Settings --------------------------------------------------------------------------------------------------------

    @rule(needs=["width_is_true"])
    def test_patch_size_is_as_declared(self) -> None:
        """An instance wants the patches that its class or its setting `patch_px` names."""
        backbone = self.make()
        known = tunables(self.backbone)
        wanted = self.settings.get("patch_px", known["patch_px"].default if "patch_px" in known else None)
        if wanted is None:
            wanted = self.backbone.patch_px
        assert backbone.patch_px == int(wanted), (
            f"patch_px of the instance is {backbone.patch_px}, and {wanted} was asked for: set self.patch_px"
        )

    @rule(needs=["width_is_true"])
    def test_sampled_settings_build(self) -> None:
        """Both ends of every range, every choice, and random settings build and give finite features."""
        known = {n: t for n, t in tunables(self.backbone).items() if n not in self.settings}
        if not known:
            raise Skip("it has no settings")
        rng = np.random.default_rng(0)
        trials: list[tuple[dict[str, Any], bool]] = [
            ({name: value}, tunable.range is None or name == "patch_px")
            for name, tunable in known.items()
            for value in ends(tunable)
        ]
        trials += [({n: draw(t, rng) for n, t in known.items()}, True) for _ in range(TRIALS)]
        for settings, may_refuse in trials:
            if settings.get("patch_px", 0) > LARGEST_PX:
                settings["patch_px"] = LARGEST_PX
            told = ", ".join(f"{name} = {value}" for name, value in settings.items())
            try:
                backbone = self.make(**settings).eval()
                with torch.no_grad():
                    features = backbone(self.spots(1, settings.get("patch_px")))
            except Exception as error:
                if may_refuse and isinstance(error, BadSpec | MissingData | FetchFailed):
                    continue  # it says in a sentence what does not go together, or what is not there
                raise AssertionError(f"with {told}: {said(error)}") from error
            assert features.shape == (1, backbone.width), f"with {told} it returns {tuple(features.shape)}"
            assert bool(features.isfinite().all()), f"features are not finite with {told}"


def check_backbone(cls: type, settings: Mapping[str, Any], rules: Iterable[str] = ()) -> list[Verdict]:
    """The verdicts of every rule of the backbone door, or of some `rules`, on a class with these settings."""
    return list(BackboneContract.of(cls, settings=dict(settings)).verdicts(rules))


def _first(spots: Spots, count: int) -> Spots:
    """The first spots."""
    patches, embedding = (None if t is None else t[:count] for t in (spots.patches, spots.embedding))
    return Spots(patches, spots.position[:count], spots.section[:count], embedding)


def _wide(spots: Spots) -> Spots:
    """Patches and embeddings in float64."""
    patches, embedding = (None if t is None else t.double() for t in (spots.patches, spots.embedding))
    return replace(spots, patches=patches, embedding=embedding)


def _on(spots: Spots, device: str) -> Spots:
    patches, embedding = (None if t is None else t.to(device) for t in (spots.patches, spots.embedding))
    return Spots(patches, spots.position.to(device), spots.section.to(device), embedding)
