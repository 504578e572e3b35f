"""The bound for planted data: all helpful genes and nothing else, and only where somebody knows them."""

from __future__ import annotations

import pytest
import torch

from agl_bench import BadSpec, Selector, TrainingView
from agl_bench.testing import toy_genes, toy_step, toy_truth, toy_view
from agl_bench_plugins.selectors.oracle import Oracle

GENES = toy_genes(4, 20)


def test_it_is_the_mean_of_primary_and_helpful_losses() -> None:
    oracle = Oracle(toy_view(GENES, planted=True))
    losses, step = toy_step(GENES)
    helpful = toy_truth(GENES) > 0
    assert int(helpful.sum()) == 10
    torch.testing.assert_close(oracle(losses, step), losses[GENES.primary | helpful].mean())
    assert torch.equal(oracle.used, GENES.primary | helpful)


def test_it_is_a_control_and_the_only_kind_that_may_know() -> None:
    assert Oracle.is_control and not Selector.is_control


def test_useless_genes_do_not_count_as_helpful() -> None:
    truth = torch.where(GENES.rank == 3, 1.0, -0.25)
    view = TrainingView(GENES, torch.zeros(3, 24), torch.Generator(), truth=truth)
    assert torch.equal(Oracle(view).used, GENES.primary | (GENES.rank == 3))


def test_where_nobody_knows_it_says_so() -> None:
    with pytest.raises(BadSpec, match=r"must know which genes help.*--datasets synthetic"):
        Oracle(toy_view(GENES))
