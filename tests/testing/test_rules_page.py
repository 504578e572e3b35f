"""docs/rules.md: a heading for each rule and no other, what the rule says, and an example that keeps it."""

import inspect
import re
from pathlib import Path

import pytest

from agl_bench.testing import BackboneContract, DatasetContract, SelectorContract
from agl_bench.testing.verdicts import PAGE, PREFIX, anchor

ROOT = Path(__file__).parents[2]
CONTRACTS = {"selector": SelectorContract, "backbone": BackboneContract, "dataset": DatasetContract}
PARTS = re.split(r"^#{1,3} ", (ROOT / PAGE).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def slug(heading):
    """Of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


SECTIONS = {slug(part.partition("\n")[0]): part for part in PARTS}
RULES = {anchor(door, name): (door, name) for door, contract in CONTRACTS.items() for name in contract.rules()}


@pytest.fixture(scope="module")
def examples():
    """The classes of each section; the blocks run in order, in one namespace."""
    namespace, found = {"__name__": "page"}, {}
    for where, part in SECTIONS.items():
        for block in BLOCK.findall(part):
            before = dict(namespace)
            exec(compile(block, where, "exec"), namespace)
            new = [v for k, v in namespace.items() if isinstance(v, type) and before.get(k) is not v]
            found[where] = [cls for cls in new if cls.__module__ == "page"]
    return found


def test_every_rule_has_its_heading_and_the_other_way_round():
    doors = tuple(f"{door}-" for door in CONTRACTS)
    assert {where for where in SECTIONS if where.startswith(doors)} == set(RULES)
    assert len(SECTIONS) == len(PARTS), "two headings have one anchor"


@pytest.mark.parametrize("where", RULES)
def test_the_section_says_what_the_rule_says(where):
    door, name = RULES[where]
    rule = " ".join(inspect.getdoc(getattr(CONTRACTS[door], PREFIX + name)).split())
    quoted = " ".join(line.removeprefix("> ") for line in SECTIONS[where].splitlines() if line.startswith("> "))
    assert quoted == rule


@pytest.mark.parametrize("where", RULES)
def test_the_example_keeps_the_rule(where, examples, tmp_path):
    door, name = RULES[where]
    cls = examples[where][-1]
    plugin, attributes = (cls(), {"root": tmp_path}) if door == "dataset" else (cls, {})
    assert CONTRACTS[door].of(plugin, **attributes).check(name).problem is None


def test_links_to_sections():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= set(SECTIONS)
