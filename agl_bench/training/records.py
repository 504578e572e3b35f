"""What the trainer says after each epoch, and at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class OuterPass:
    """One pass of outer steps.

    Attributes:
        loss: mean over the outer steps of the outer loss after the look-ahead.
        signal_to_noise: of the selector's gradient over the last look-aheads, see `trainer.Signal`; None for fewer
            than two.
        validation_pcc: of a copy of the model trained for one epoch afterwards; None where no convergence is awaited.
        selected: auxiliary genes selected afterwards, as in `EpochRecord`; None likewise.
    """

    loss: float
    signal_to_noise: float | None
    validation_pcc: float | None = None
    selected: int | None = None


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: counts from 0.
        training_loss: mean of the trained loss over the batches of the epoch.
        validation_pcc: mean over sections of the mean over primary genes of the PCC on the validation spots.
        validation_nan_genes: primary genes without a PCC, summed over sections.
        outer: the passes of outer steps that the epoch opened with.
        selected: auxiliary genes whose effective weight is above half of a primary gene's (k, where there is a k).
        effective: sum of the effective weights of auxiliary genes, a primary gene counting 1.
        parameters: scalar parameters of the selector by name, e.g. its cut-off.
        is_best: whether validation improved.
        round: of the schedule, see `course.Course`; 0 is a warm start.
        seconds: duration; not part of what must be reproducible.
    """

    epoch: int
    training_loss: float
    validation_pcc: float
    validation_nan_genes: int
    selected: int
    effective: float
    parameters: dict[str, float] = field(default_factory=dict)
    is_best: bool = False
    round: int = 1
    outer: tuple[OuterPass, ...] = ()
    seconds: float = 0.0

    @property
    def outer_loss(self) -> float | None:
        """Mean over the outer steps of the outer loss after the look-ahead; None if there were none."""
        return sum(p.loss for p in self.outer) / len(self.outer) if self.outer else None

    @property
    def outer_signal_to_noise(self) -> float | None:
        """Of the last pass of outer steps, see `OuterPass`."""
        return self.outer[-1].signal_to_noise if self.outer else None

    def row(self) -> dict[str, float | None]:
        """Plain values by name, the selector's scalar parameters as "parameter.NAME"."""
        row = {k: v for k, v in vars(self).items() if k not in ("parameters", "outer")}
        row |= {"outer_loss": self.outer_loss, "outer_signal_to_noise": self.outer_signal_to_noise}
        return row | {f"parameter.{k}": v for k, v in self.parameters.items()}


@dataclass(frozen=True)
class Fit:
    """How training ended: the state that was restored.

    Attributes:
        best_epoch: the epoch with the highest validation PCC, whose model and selector were restored.
        validation_pcc: at that epoch.
        effective_weights: (genes,) at that epoch, float32 on the host; ∂loss/∂(loss of the gene), primary mean = 1.
        epochs: how many were trained.
        hypergradient: how the selector's gradient was obtained, with nothing left open; "" if it has none.
    """

    best_epoch: int
    validation_pcc: float
    effective_weights: Tensor
    epochs: int
    hypergradient: str = ""
