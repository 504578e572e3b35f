"""The documentation builds without a warning, and every code block in it does what the page says.

Blocks of a page run in order, in one temporary folder, offline:

- ```sh          by bash; what it exports stays for the next block
- ```python      in one namespace for the page
- ```toml        must parse
- ```text, ```console and blocks without a language are shown, not run

A comment on the line above a block changes that:

- <!-- file: NAME -->        the block is written to the file NAME, for the blocks after it
- <!-- status: N -->         the last command of the block must end with status N
- <!-- not run: REASON -->   skipped with this reason

Blocks inside of a comment (<!-- unseen … -->) run too, and readers do not see them: stand-ins for the reader's data.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import agl_bench
from agl_bench.cli import cli
from agl_bench.registry.plugins import Plugins

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>file|status|not run): (?P<said>[^\n]*?) -->\n)?"
    r"^(?P<fence>```+)(?P<language>[\w{}:-]*)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
SHOWN = ("", "text", "console", "{toctree}", "{click}", "{eval-rst}")
LIMIT = 15  # blocks that no test runs


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with what the comment above it says."""

    line: int
    language: str
    text: str
    mark: str
    said: str


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("fence")) + 1
        yield Block(line, found["language"], found["text"], found["mark"] or "", found["said"] or "")


def is_run(block: Block) -> bool:
    return block.language not in SHOWN and block.mark != "not run"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as HTML; a warning is an error."""
    pytest.importorskip("sphinx", reason="needs the extra docs")
    out = tmp_path_factory.mktemp("docs") / "html"
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", str(DOCS), str(ROOT), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("page", [p for p in PAGES if any(map(is_run, blocks_of(p)))], ids=lambda p: p.stem)
def test_every_block_does_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = dict(os.environ) | {"AGL_BENCH_OFFLINE": "1", "AGL_BENCH_DATA": "data", "COLUMNS": "120"}
    run["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{run['PATH']}"
    for name in ("AGL_BENCH_WORK", "AGL_BENCH_CACHE", "MLFLOW_TRACKING_URI", "HF_TOKEN"):
        run.pop(name, None)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page):
        place = f"{page.relative_to(ROOT)}:{block.line}"
        if block.mark == "file":
            (tmp_path / block.said).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.said).write_text(block.text, encoding="utf-8")
        if not is_run(block):
            continue
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "python" and block.mark != "file":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
        elif block.language == "sh":
            run = _run(block, run, place)


def _run(block: Block, environment: dict[str, str], place: str) -> dict[str, str]:
    """Run a block of shell commands; the environment after it."""
    expected = int(block.said) if block.mark == "status" else 0
    text = block.text + ("\nenv -0 > .environment\n" if not expected else "")
    done = subprocess.run(["bash", "-e", "-u", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == expected, f"{place} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}"
    if expected:
        return environment
    kept = Path(".environment").read_text(encoding="utf-8").split("\0")
    return dict(line.split("=", 1) for line in kept if "=" in line)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_block_that_is_not_run_says_why(page: Path):
    blocks = list(blocks_of(page))
    unknown = [(b.line, b.language) for b in blocks if b.language not in (*SHOWN, "sh", "python", "toml")]
    assert not unknown, f"{page.name}: nothing runs these; write sh, python or toml, or console for what is not run"
    skipped = [f"{page.name}:{b.line}: {b.said}" for b in blocks if b.mark == "not run"]
    assert all(line.partition(": ")[2] for line in skipped)
    if skipped:
        pytest.skip("; ".join(skipped))


def test_few_blocks_are_not_run():
    skipped = [b for p in PAGES for b in blocks_of(p) if b.mark == "not run"]
    assert len(skipped) <= LIMIT


def test_builds_without_a_warning(built: Path):
    assert (built / "index.html").is_file()
    assert (built / "docs" / "index.html").is_file()


def test_reference_has_every_command(built: Path):
    html = (built / "docs/reference/commands.html").read_text(encoding="utf-8")
    text = re.sub("<[^>]+>", "", html)
    for name, command in cli.commands.items():
        assert f'id="agl-bench-{name}"' in html, name
        for option in command.params:
            for word in option.opts:
                shown = word if word.startswith("-") else option.metavar or word.upper()
                assert shown in text, f"{name} {shown}"


def test_reference_has_every_public_name(built: Path):
    html = (built / "docs/reference/api.html").read_text(encoding="utf-8")
    assert [name for name in agl_bench.__all__ if f'id="agl_bench.{name}"' not in html] == []
    import agl_bench.testing as kit

    assert [name for name in kit.__all__ if f'id="agl_bench.testing.{name}"' not in html] == []


def test_reference_has_every_plugin_and_setting(built: Path):
    from agl_bench.interfaces.tunable import tunables

    for entry in Plugins.discover(strict=True).entries():
        if not entry.provider.startswith("agl-bench "):
            continue
        html = (built / f"docs/reference/{entry.kind}s.html").read_text(encoding="utf-8")
        assert f"<h2>{entry.name}<" in html, entry.name
        for setting in tunables(entry.load()):
            assert f"{entry.name}.{setting}<" in html


def test_reference_has_every_setting_of_the_protocol(built: Path):
    html = (built / "docs/reference/protocol.html").read_text(encoding="utf-8")
    assert [name for name in agl_bench.Protocol().settings() if f">{name}<" not in html] == []


def test_every_environment_variable_is_documented():
    page = (DOCS / "reference/environment.md").read_text(encoding="utf-8")
    code = "".join(
        p.read_text(encoding="utf-8")
        for folder in ("agl_bench", "plugins/agl_bench_plugins")
        for p in (ROOT / folder).rglob("*.py")
    )
    named = set(re.findall(r"AGL_BENCH_[A-Z_]+", page))
    assert named == set(re.findall(r"AGL_BENCH_[A-Z]+(?:_[A-Z]+)*", code))
