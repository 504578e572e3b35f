"""The rules of the three doors, as checks: for `agl-bench check`, and for a plug-in's own tests::

    from agl_bench.testing import SelectorContract
    from my_package import MySelector

    class TestMySelector(SelectorContract):
        selector = MySelector
        settings = {"k": 10}                                        # what the constructor is to be given
        broken = {"test_gene_order_does_not_matter": "it ranks genes by their names, on purpose"}

Each rule is one method whose docstring is the rule; the command line and pytest run the same methods. `broken` names
rules that are known to be broken: strict expected failures. The same rules, one parameter each::

    @pytest.mark.parametrize("name", SelectorContract.rules())
    @pytest.mark.parametrize("cls", [MySelector, MyOtherSelector])
    def test_mine(cls, name):
        assert SelectorContract.of(cls).check(name).problem is None

docs/rules.md has a paragraph on each rule: why there is such a rule, and how to mend what breaks it.
"""

from agl_bench.testing.backbone import BackboneContract, check_backbone
from agl_bench.testing.dataset import DatasetContract, check_dataset
from agl_bench.testing.selector import SelectorContract, check_selector
from agl_bench.testing.toy import toy_genes, toy_spots, toy_step, toy_truth, toy_view
from agl_bench.testing.verdicts import Contract, Skip, Unavailable, Verdict, rule

__all__ = [
    "BackboneContract",
    "Contract",
    "DatasetContract",
    "SelectorContract",
    "Skip",
    "Unavailable",
    "Verdict",
    "check_backbone",
    "check_dataset",
    "check_selector",
    "rule",
    "toy_genes",
    "toy_spots",
    "toy_step",
    "toy_truth",
    "toy_view",
]
