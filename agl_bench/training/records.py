"""What the trainer says after each epoch, and at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: counts from 0.
        training_loss: mean of the trained loss over the batches of the epoch.
        validation_pcc: mean over sections of the mean over primary genes of the PCC on the validation spots.
        validation_nan_genes: primary genes without a PCC, summed over sections.
        outer_loss: mean over the outer steps of the outer loss after the look-ahead; None if there were none.
        outer_signal_to_noise: of the selector's gradient over the last look-aheads, see `trainer.Signal`; None for
            fewer than two.
        selected: auxiliary genes whose effective weight is above half of a primary gene's (k, where there is a k).
        effective: sum of the effective weights of auxiliary genes, a primary gene counting 1.
        parameters: scalar parameters of the selector by name, e.g. its cut-off.
        is_best: whether validation improved.
        seconds: duration; not part of what must be reproducible.
    """

    epoch: int
    training_loss: float
    validation_pcc: float
    validation_nan_genes: int
    outer_loss: float | None
    outer_signal_to_noise: float | None
    selected: int
    effective: float
    parameters: dict[str, float] = field(default_factory=dict)
    is_best: bool = False
    seconds: float = 0.0


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
