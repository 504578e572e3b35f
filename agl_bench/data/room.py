"""How many spots go through a model at a time, where the memory of the device decides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from agl_bench.errors import TooLittleMemory

T = TypeVar("T")


@dataclass
class Room:
    """Spots at a time: all that were asked for, until the device has run out of memory.

    Attributes:
        asked: spots at a time where memory suffices.
        spots: at most so many now.
    """

    asked: int
    spots: int = field(init=False)

    def __post_init__(self) -> None:
        self.spots = self.asked

    @property
    def is_halved(self) -> bool:
        """Whether memory has not sufficed."""
        return self.spots < self.asked

    def halve(self, tried: int) -> None:
        """The device has run out of memory with `tried` spots: half of them from now on.

        Raises:
            TooLittleMemory: if it was a single one.
        """
        if tried < 2:
            raise TooLittleMemory(
                "out of device memory with a single spot; use a smaller backbone, or a device with more memory"
            )
        self.spots = (tried + 1) // 2
        torch.cuda.empty_cache()  # so that what was cut for the larger batches can be cut anew


def forward(rows: np.ndarray, room: Room, results: Callable[[list[np.ndarray]], Generator[T, None, None]]) -> list[T]:
    """What a model in evaluation mode makes of `rows`, batch by batch; those that do not fit are halved.

    There each spot is on its own, so that this changes results by rounding at most.

    Args:
        rows: (spots,).
        room: for a batch; halved where the device runs out of memory.
        results: batches of rows -> one result for each, in order.
    """
    found: list[T] = []
    done = 0
    while done < len(rows):
        batches = [rows[start : start + room.spots] for start in range(done, len(rows), room.spots)]
        left = iter(batches)
        with contextlib.suppress(torch.OutOfMemoryError), contextlib.closing(results(batches)) as parts:
            for part, batch in zip(parts, left, strict=True):
                found.append(part)
                done += len(batch)
        if done < len(rows):
            room.halve(min(room.spots, len(rows) - done))
    return found
