"""Seeds by name."""

from __future__ import annotations

import itertools

import torch

from agl_bench.maths.seeds import generator_for, seed_for


def test_known_values_stay() -> None:
    """A change here would change every stored result."""
    assert seed_for(0) == 4761921975702974394
    assert seed_for(0, "folds", "S1") == 7489778935568828405
    assert seed_for(42, "weights", "tiny/S1.0") == 3080821206051628325


def test_every_name_and_their_borders_matter() -> None:
    names = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("a", ""), ("", "a"), ("1",), ("a", "b", "c")]
    seeds = [seed_for(root, *words) for root, words in itertools.product((0, 1, 11, -1), names)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_equal_by_name_and_leave_the_global_one() -> None:
    before = torch.get_rng_state()
    first, again, other = (
        torch.rand(5, generator=generator_for(3, *names)) for names in (("x", "1"), ("x", "1"), ("x", "2"))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
