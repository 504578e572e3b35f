"""A checksum that sees every change of the bits, wherever a tensor lies in memory."""

import pytest
import torch

from agl_bench.maths.checksum import checksum

CHANGES = {
    "one value": lambda x: x[3, 4].add_(1e-7),
    "the sign of a zero": lambda x: x[0, 0].neg_(),
    "another NaN": lambda x: x.view(torch.int32)[1, 1].add_(1),
    "two rows that change places": lambda x: x.copy_(x.flip(0)),
    "two columns that change places": lambda x: x.copy_(x.roll(1, 1)),
    "all signs": lambda x: x[3:5].neg_(),
    "through .data": lambda x: x.data.mul_(2),
    "through .numpy()": lambda x: x.numpy().sort(0),
    "through a view": lambda x: x.T[2].zero_(),
}


def values(rows=700, columns=601):  # more than one block, and an odd number of values
    made = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))
    made[0, 0], made[1, 1] = 0.0, float("nan")
    return made


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_seen(what):
    x = values()
    before = checksum(x)
    assert torch.equal(checksum(x), before) and torch.equal(checksum(values()), before)
    CHANGES[what](x)
    assert not torch.equal(checksum(x), before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.int64, torch.float64])
def test_every_type_and_place(dtype):
    x = (10 * values(5, 3).nan_to_num()).to(dtype)
    for part in (x, x[1:], x[:, 1:], x[2]):
        before = checksum(part)
        assert torch.equal(checksum(part), before)
        part.copy_(part.clone().logical_not())
        assert not torch.equal(checksum(part), before)
    assert torch.equal(checksum(x.T), checksum(x.T.contiguous()))
    assert checksum(x[:0]) == 0
