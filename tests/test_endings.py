"""How the command ends and what it prints, whatever the terminal, the words or the disk are like."""

import contextlib
import errno
import io
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from agl_bench.bench.spec import Campaign, seeds_of
from agl_bench.bench.tune import read_search, space_of
from agl_bench.cli import cli, ending, main
from agl_bench.cli.ending import Signals
from agl_bench.cli.options import seconds, words
from agl_bench.cli.writing import check_writable, make_folder, write_text, writing
from agl_bench.errors import AglBenchError, BadSpec, CannotWrite, UnknownName
from agl_bench.protocol import read_toml
from agl_bench.registry.plugins import Plugins
from agl_bench.registry.watch import watched
from agl_bench.terminal import make_console, styled

HUGE = "9" * 5000
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def plugins():
    return Plugins.discover()


@pytest.fixture
def ended(monkeypatch):
    """Run a command in this process, with streams of one encoding; its status, output and errors."""
    handler = signal.getsignal(signal.SIGTERM)

    def ended(*words, encoding="utf-8"):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as caught:
            main(list(map(str, words)))
        monkeypatch.undo()
        out, err = (
            stream.detach().getvalue().decode(encoding, "replace") for stream in streams if stream.flush() is None
        )
        return caught.value.code or 0, out, err

    yield ended
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_encoding_ends_a_command(ended, encoding, tmp_path):
    for command in (("show", "clean"), ("list", "datasets"), ("show", "agl")):
        status, out, _ = ended(*command, encoding=encoding)
        assert status == 0 and out
    status, _, err = ended("status", "--work", tmp_path / "Σ[/b]:cat: \udcff", encoding=encoding)
    assert status == 2 and err.startswith("agl-bench: ") and "[/b]:cat:" in err


@pytest.mark.parametrize("name", ["a[/b]c", "[bold]x", "[link=x]y", ":cat:", "a\\[b", "[/]"])
def test_names_are_shown_as_they_are(capsys, name):
    from rich.table import Table

    console = make_console()
    console.print(f"{name} is there")
    console.print(styled((name, "bold"), " too"))
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    console.print(table)
    with console.status(styled(f"preparing {name}")):
        pass
    assert capsys.readouterr().out.count(name) == 5


@pytest.mark.parametrize("text", ["", "0s", "-1h", "nan", "inf", "1e9", "h", HUGE, f"{HUGE}h", "٣h", "1h 30m x", "3d"])
def test_no_durations(text):
    with pytest.raises(BadSpec, match="is not a duration"):
        seconds(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", HUGE, "1" * 19, "٣", "0x1", "nan", "True"])
def test_no_seeds(text):
    with pytest.raises(BadSpec, match="seed"):
        seeds_of([text])


@pytest.mark.parametrize("option", ["--checkpoint-every", "--gpus-per-cell", "--um"])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "", "1e999", "x"])
def test_no_numbers(ended, option, text):
    sound = ("prepare", "synthetic") if option == "--um" else ("run", "--selectors", "pgl", "--datasets", "synthetic")
    status, _, err = ended(*sound, option, text)
    assert status == 2 and option in err.splitlines()[-1] and "Traceback" not in err


def test_an_empty_path_is_not_this_folder(ended):
    paths = {
        (name, option.opts[0])
        for name, command in cli.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.type, click.Path)
    }
    assert len(paths) > 40
    for name in sorted({name for name, _ in paths}):
        option = next(o for n, o in sorted(paths) if n == name)
        status, _, err = ended(name, option, "")
        assert status == 2 and ("is empty" in err or "Missing argument" in err)


@pytest.mark.parametrize(
    "line",
    [
        "selectors = 5",
        "datasets = ['synthetic', 5]",
        "selectors = 5.5",
        "selectors = true",
        "selectors = {}",
        "selectors = []",
        "preset = []",
        "preset = false",
        "preset = 1",
        "datasets = [[]]",
        "backbone = 1979-05-27",
        "evaluation = 'outer'",
        "seeds = [-1]",
        "seeds = true",
        "fold = 0.5",
        "fold = []",
    ],
)
def test_a_line_that_an_option_overrides_may_not_be_wrong(plugins, line, tmp_path):
    (tmp_path / "grid.toml").write_text(line)
    given = {key: ["pgl"] if key == "selectors" else ["synthetic"] for key in ("selectors", "datasets")}
    with pytest.raises(AglBenchError):
        Campaign.of(
            plugins, file=tmp_path / "grid.toml", preset="smoke", **given, seeds=["0"], evaluation=["intra"],
            backbone=["tiny"], fold=["S1"],
        )  # fmt: skip


@pytest.mark.parametrize("option", ["seeds", "evaluation", "backbone", "fold", "selectors", "datasets"])
def test_an_empty_list_is_not_left_out(plugins, option):
    given = {"selectors": ["pgl"], "datasets": ["synthetic"]} | {option: [""]}
    with pytest.raises(BadSpec, match="is empty"):
        Campaign.of(plugins, **given)


@pytest.mark.parametrize("texts", [[""], [","], [" ", ",,"]])
def test_words_that_are_none(texts):
    with pytest.raises(BadSpec, match="--rule is empty"):
        words("--rule", texts)
    assert words("--rule", []) == [] and words("--rule", ["a, b", "c"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [f"a = {'[' * 5000}", f"a = {HUGE}", "a = {b = {c = ", "a = \x00", "a = 1\na = 2", "\ufeff=", "[a\n", "'"],
)
def test_a_file_that_is_no_toml(text, tmp_path):
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    with pytest.raises(BadSpec, match=r"a\.toml"):
        read_toml(tmp_path / "a.toml", allowed=("a",))


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent", "/dev/zero", tmp_path / ("x" * 300)):
        with pytest.raises(BadSpec, match="cannot read"):
            read_toml(Path(path), allowed=())


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate = {low = 1e-4, high = 1e-2, log = 'yes'}",
        "learning_rate = {low = 1e-4, high = 1e-2, log = 1}",
        "learning_rate = {low = 1e-2, high = 1e-4}",
        "learning_rate = {low = 1e-4, high = inf}",
        "learning_rate = {low = nan, high = 1}",
        "learning_rate = 'yes'",
        "learning_rate = []",
    ],
)
def test_a_search_that_is_none(plugins, line, tmp_path):
    (tmp_path / "search.toml").write_text(f"[protocol]\n{line}\n")
    campaign = Campaign.of(plugins, selectors=["pgl"], datasets=["synthetic"], preset="smoke", evaluation=["inter"])
    known = {"synthetic": ""}
    (spec, _), *_ = campaign.cells(plugins, tmp_path, device="cpu", fingerprint=known)
    with pytest.raises(BadSpec):
        space_of(plugins, campaign, spec, read_search(plugins, tmp_path / "search.toml", ()))
    (tmp_path / "search.toml").write_text("[dkgsb]\ntemperatur = true\n")  # who is not tuned may not be wrong either
    with pytest.raises(UnknownName, match="Did you mean 'temperature'"):
        read_search(plugins, tmp_path / "search.toml", ())


@pytest.fixture
def full_disk():
    """No file may grow beyond 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_does_not_fit_leaves_the_older_one(tmp_path, full_disk):
    (tmp_path / "a.json").write_text("older")
    with pytest.raises(CannotWrite, match=r"a\.json cannot be written \(File too large\); all is kept"):
        write_text(tmp_path / "a.json", "x" * 5000, "all is kept")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "older"
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"


TABLE = """
import resource, signal, warnings
from pathlib import Path

import anndata
import numpy as np

from agl_bench.cli.writing import writing
from agl_bench.comparison.export import write_h5ad
from agl_bench.errors import CannotWrite

warnings.simplefilter("error")
data = anndata.AnnData(np.random.default_rng(0).random((50, 50)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with writing("x.h5ad"):
        write_h5ad(data, Path("x.h5ad"))
except CannotWrite as error:
    print(error)
"""


def test_a_table_that_does_not_fit(tmp_path):
    """In a process of its own: HDF5 keeps the broken file open, and may end the process when another one is closed."""
    done = subprocess.run([sys.executable, "-c", TABLE], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"x\.h5ad cannot be written \(", done.stdout)
    assert not list(tmp_path.iterdir())


def test_a_device_is_written_to_as_it_is():
    write_text(Path("/dev/null"), "x")
    with pytest.raises(CannotWrite, match="No space left on device"):
        write_text(FULL, "x" * 5000)
    assert FULL.is_char_device()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "x"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
        OSError("unable to write"),
        RuntimeError("Can't flush (file write failed: errno = 28, error message = 'No space left on device')"),
    ],
)
def test_errors_of_full_disks(error):
    with (
        pytest.raises(CannotWrite, match=r"^the report cannot be written \(.+\); kept$"),
        writing("the report", "kept"),
    ):
        raise error


def test_other_errors_stay():
    for error in (RuntimeError("a fault"), FileNotFoundError(errno.ENOENT, "No such file", "x")):
        with pytest.raises(type(error)) as caught, writing("the report"):
            raise error
        assert caught.value is error


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "absent" / "x", tmp_path / "file" / "x"):
        with pytest.raises(BadSpec, match="--json"):
            check_writable("--json", path)
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(BadSpec, match="--out"):
            make_folder("--out", path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("no name"), "no name"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; finished work is kept"),
        (PermissionError(errno.EACCES, "Permission denied", b"/a/\xff"), "/a/\\udcff: Permission denied"),
        (UnicodeEncodeError("utf-8", "spot \udcff", 5, 6, "surrogates not allowed"), "not UTF-8"),
        (AglBenchError(f"seed {HUGE} of http://me:secret@host"), "http://***@host"),
    ],
)
def test_errors_end_as_one_sentence(ended, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "main", fail)
    status, _, err = ended()
    assert status == 2 and words in err
    assert len(err.splitlines()) == 1 and len(err) < 300 and "secret" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_an_epoch_is_no_deed_of_a_plugin(number):
    with Signals() as signals, watched(is_import=False) as seen:
        os.kill(os.getpid(), number)
    assert signals.asked() == number.name and (seen.changed, seen.harmless) == ([], [])


@pytest.mark.parametrize("swallowed", [0, 1])
def test_what_does_not_end_by_itself_is_ended(monkeypatch, swallowed):
    monkeypatch.setattr(ending, "GRACE", 0.1)
    monkeypatch.setattr(ending, "AGAIN", 0.1)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt), Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(swallowed):
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(60)
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) == before
    time.sleep(0.3)  # nothing comes any more
