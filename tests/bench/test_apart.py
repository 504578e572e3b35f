"""A stranger's plug-in harms its own cells only, whatever it does to the process that runs them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pytest

from agl_bench.bench import apart as apart_module
from agl_bench.bench.apart import Apart
from agl_bench.bench.cells import CellStore
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.run import EpochDone, Failed, Finished, Noted, Started, Stopped, preflight, run_cells
from agl_bench.errors import LONGEST, AglBenchError

# What a selector does, in its constructor or in its second epoch, and what is said of it.
HARMS = {
    "exits": ("os._exit(0)", "selector 'exits' of harms.py ended its process with status 0"),
    "exits-badly": ("os._exit(7)", "selector 'exits-badly' of harms.py ended its process with status 7"),
    "crashes": ("ctypes.string_at(0)", "selector 'crashes' of harms.py had its process killed by SIGSEGV"),
    "aborts": ("os.abort()", "had its process killed by SIGABRT"),
    "kills": ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, perhaps for lack of memory"),
    "quits": ("sys.exit(0)", "it called sys.exit(0)"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "raises-base": ("raise Own('mine')", "Own: mine"),
    "closes": ("raise GeneratorExit", "GeneratorExit"),
    "no-text": ("raise ValueError('half a pair: \\ud800')", "ValueError: half a pair: \\ud800"),
    "long": ("raise ValueError('x' * 2**20)", f"ValueError: {'x' * (LONGEST - 12)}…"),
    "mute": ("raise Mute", "Mute: it has no message, because its __str__ raises RuntimeError"),
    "garbles": ("write_into_all_pipes(b'{\\n')", "it must leave open files alone"),
    "garbles-bytes": ("write_into_all_pipes(b'\\xff\\n[1]\\n')", "it must leave open files alone"),
    "garbles-events": ('write_into_all_pipes(b\'{"event": "epoch"}\\n\')', "it must leave open files alone"),
    "closes-files": ("os.closerange(3, 1000)", "ended its process with status 1"),
    "leaves-a-child": ("os.fork() or time.sleep(300); os._exit(3)", "ended its process with status 3"),
}
IN_CONSTRUCTOR = {
    "exits-early": ("os._exit(0)", "selector 'exits-early' of harms.py ended its process with status 0"),
    "crashes-early": ("ctypes.string_at(0)", "killed by SIGSEGV"),
    "interrupts-early": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
}
SPOILS = {  # what it does to its process, and goes on: nobody else may notice
    "coarse": "torch.set_float32_matmul_precision('medium'); torch.set_num_threads(3)",
    "patches-torch": "torch.nn.Linear.forward = lambda self, x: self.weight.sum() * x[:, :1]",
    "deaf": "signal.signal(signal.SIGTERM, signal.SIG_IGN); torch.set_grad_enabled(False)",
    "moves": "os.chdir('/'); os.environ['OMP_NUM_THREADS'] = '3'; sys.stdout.close()",
}
HARMFUL = """
    import ctypes, os, signal, stat, sys, time
    import torch
    from agl_bench import Selector, hookimpl

    class Own(BaseException):
        pass

    def write_into_all_pipes(text):
        for descriptor in range(3, 100):
            try:
                if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    os.write(descriptor, text)
            except OSError:
                continue  # closed, or for reading

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text either")

    class Base(Selector):
        '''Trains primary genes.'''
        reference = "test"
        early = late = ""

        def __init__(self, view):
            super().__init__(view)
            exec(self.early)

        def forward(self, losses, step):
            if step.epoch == 1:
                exec(self.late)
            return losses[self.is_primary].mean()

    @hookimpl
    def register_selectors():
        early = IN_CONSTRUCTOR
        late = AFTERWARDS
        names = [*early, *late, "sound"]
        return {n: type("Harm", (Base,), {"early": early.get(n, ""), "late": late.get(n, "")}) for n in names}
"""


@pytest.fixture(scope="module")
def apart():
    """One place for all tests, since its process imports torch."""
    return Apart()


@pytest.fixture(scope="module")
def harms(tmp_path_factory):
    early = {name: code for name, (code, _) in IN_CONSTRUCTOR.items()} | SPOILS
    late = {name: code for name, (code, _) in HARMS.items()} | {"endless": "while True: time.sleep(0.01)"}
    text = textwrap.dedent(HARMFUL).replace("IN_CONSTRUCTOR", repr(early)).replace("AFTERWARDS", repr(late))
    path = tmp_path_factory.mktemp("plugin") / "harms.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def beside(grid, harms, apart, tmp_path_factory):
    """Every harmful selector with sound ones before and after; the events, and the store."""
    names = [*HARMS, *IN_CONSTRUCTOR, *SPOILS]
    cells, bench = grid("pgl", *names[:9], "dkgsb", *names[9:], "sound", "agl", files=[harms], fold=["D1"])
    store = CellStore(tmp_path_factory.mktemp("work"))
    preflight(cells, bench, store, apart=apart)
    return list(run_cells(cells, bench, store, NoRecorder(), apart=apart)), store


@pytest.mark.parametrize(("name", "said"), [(n, s) for n, (_, s) in (HARMS | IN_CONSTRUCTOR).items()])
def test_a_harmful_selector_fails_with_a_sentence(beside, name, said):
    events, store = beside
    (failed,) = (e for e in events if isinstance(e, Failed) and e.spec.selector.name == name)
    assert failed.sentence.endswith(said) and "\n" not in failed.sentence
    assert store.failure(failed.spec.key).sentence == failed.sentence
    assert store.leases.running() == {} and list(store.partial.iterdir()) == []


def test_where_it_crashed_is_kept(beside):
    (failed,) = (e for e in beside[0] if isinstance(e, Failed) and e.spec.selector.name == "crashes")
    text = failed.details.read_text(encoding="utf-8")
    assert "Segmentation fault" in text and "harms.py" in text


def test_nobody_else_is_harmed(beside, run, harms, tmp_path):
    """Bit for bit: those of agl-bench beside them, and a sound stranger apart and in this process."""
    expected = {}
    for event in run(tmp_path, "pgl", "dkgsb", "agl", "sound", files=[harms], fold=["D1"]):
        if isinstance(event, Finished):
            expected[event.result.spec.selector.name] = event.result
    found = {e.result.spec.selector.name: e.result for e in beside[0] if isinstance(e, Finished)}
    assert expected.keys() <= found.keys() and found.keys() - expected.keys() <= SPOILS.keys()
    for name, one in expected.items():
        other = found[name]
        assert (one.spec, one.scores, one.best_epoch, one.counts) == (
            other.spec,
            other.scores,
            other.best_epoch,
            other.counts,
        )
        pd.testing.assert_frame_equal(one.genes, other.genes, check_exact=True)
        pd.testing.assert_frame_equal(
            one.epochs.drop(columns="seconds"), other.epochs.drop(columns="seconds"), check_exact=True
        )


def test_epochs_are_told_as_they_come(beside):
    for name in ("pgl", "sound"):
        assert len([e for e in beside[0] if isinstance(e, EpochDone) and e.spec.selector.name == name]) == 3


@pytest.mark.parametrize("given", [{"time_limit": 12}, {"stop": lambda: "SIGTERM"}], ids=["time limit", "signal"])
def test_one_that_never_returns_is_ended(given, grid, harms, apart, monkeypatch, tmp_path):
    monkeypatch.setattr(apart_module, "GRACE", 1.0)
    cells, bench = grid("endless", "pgl", files=[harms], fold=["D1"])
    asked = []
    if "stop" in given:  # once it is in its endless epoch
        given = {"stop": lambda: "SIGTERM" if asked else ""}
    store, seen = CellStore(tmp_path), []
    for event in run_cells(cells, bench, store, NoRecorder(), apart=apart, checkpoint_every=0, **given):
        seen.append(event)
        asked += [event] if isinstance(event, EpochDone) else []
    ended = seen[2]
    if "stop" in given:
        assert ended == Stopped(cells[0][0], "SIGTERM") and len(seen) == 3
        assert store.begun(cells[0][0].key).furthest()[0] == 0  # nothing is lost but the epoch that did not end
    else:
        assert isinstance(ended, Failed) and "within the time limit of 12 s plus 1 s" in ended.sentence
        assert isinstance(seen[-1], Finished)
    assert store.leases.running() == {}


def test_a_cell_apart_continues_from_its_checkpoint(grid, harms, apart, tmp_path):
    cells, bench = grid("sound", files=[harms], fold=["D1"])
    store, asked = CellStore(tmp_path / "work"), []
    options = {"apart": apart, "checkpoint_every": 0}
    for event in run_cells(cells, bench, store, NoRecorder(), time_limit=1e-9, **options):
        asked.append(type(event))
    assert asked == [Started, Stopped]
    events = list(run_cells(cells, bench, store, NoRecorder(), **options))
    assert [e.sentence for e in events if isinstance(e, Noted)] == ["continued after epoch 0"]
    (whole,) = (
        e.result
        for e in run_cells(cells, bench, CellStore(tmp_path / "whole"), NoRecorder())
        if isinstance(e, Finished)
    )
    assert events[-1].result.scores == whole.scores


READERS = {
    "leaves": ("os._exit(0)", "dataset 'leaves' of readers.py ended its process with status 0"),
    "quits": ("raise SystemExit(0)", "dataset 'quits' of readers.py: it called sys.exit(0)"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "crashes": ("ctypes.string_at(0)", "dataset 'crashes' of readers.py had its process killed by SIGSEGV"),
}
READER = """
    import ctypes, os
    from agl_bench import Dataset, MissingData, hookimpl

    class Base(Dataset):
        '''Two sections that cannot be read.'''
        citation = licence = "test"
        how = ""

        def sections(self, root):
            return {"A": "one", "B": "two"}

        def files(self, root, section):
            return []

        def read(self, root, section):
            exec(self.how)

    @hookimpl
    def register_datasets():
        return {n: type("Reader", (Base,), {"how": how}) for n, how in HOW.items()}
"""


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    how = {name: code for name, (code, _) in READERS.items()} | {"absent": "raise MissingData('there is no file')"}
    path = tmp_path_factory.mktemp("plugin") / "readers.py"
    path.write_text(textwrap.dedent(READER).replace("HOW", repr(how)), encoding="utf-8")
    return path


def test_a_dataset_that_ends_its_reader_fails_in_its_own_cells(grid, readers, tmp_path):
    apart = Apart()
    cells, bench = grid("pgl", files=[readers], datasets=[*READERS, "synthetic"], more=["protocol.genes_from=training"])
    store = CellStore(tmp_path)
    preflight(cells, bench, store, apart=apart)
    events = list(run_cells(cells, bench, store, NoRecorder(), apart=apart))
    for name, (_, said) in READERS.items():
        failed = [e for e in events if isinstance(e, Failed) and e.spec.dataset.name == name]
        assert len(failed) == 2 and all(said in e.sentence for e in failed)
    assert len([e for e in events if isinstance(e, Finished)]) == 2


def test_data_that_are_not_there_still_end_the_run_at_once(grid, readers, tmp_path):
    cells, bench = grid("pgl", files=[readers], datasets=["absent"])
    with pytest.raises(AglBenchError, match="there is no file"):
        preflight(cells, bench, CellStore(tmp_path), apart=Apart())


HANGING = """
    import os, time
    from pathlib import Path
    from agl_bench import Selector, hookimpl

    class Hanging(Selector):
        '''Says who it is, and waits for ever.'''
        reference = "test"

        def forward(self, losses, step):
            Path(os.environ["AGL_TEST_HANG"]).write_text(f"{os.getpid()} {os.getppid()}")
            time.sleep(300)

    @hookimpl
    def register_selectors():
        return {"hanging": Hanging}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system cannot end a process with its parent")
def test_a_killed_command_leaves_no_process(tmp_path, words):
    path, said = tmp_path / "hanging.py", tmp_path / "said"
    path.write_text(textwrap.dedent(HANGING), encoding="utf-8")
    command = [sys.executable, "-m", "agl_bench", "run", "--selectors", "hanging", "--plugin", str(path), *words]
    process = subprocess.Popen(
        [*command, "--work", str(tmp_path / "work")], env=os.environ | {"AGL_TEST_HANG": str(said)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (said.exists() and len(said.read_text().split()) == 2) and process.poll() is None:
            time.sleep(0.1)
        pids = [int(pid) for pid in said.read_text().split()]
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    for _ in range(100):
        if not any(Path(f"/proc/{pid}/fd").exists() for pid in pids):
            break
        time.sleep(0.1)
    states = [Path(f"/proc/{pid}/stat").read_text() for pid in pids if Path(f"/proc/{pid}").exists()]
    assert all(state.rpartition(")")[2].split()[0] == "Z" for state in states)
    assert CellStore(tmp_path / "work").leases.running() == {}


OUTLIVING = """
    import ctypes, os, time
    from pathlib import Path
    from agl_bench import Selector, hookimpl

    class Outliving(Selector):
        '''Goes on when its command has gone, as where the system does not end it with that.'''
        reference = "test"

        def forward(self, losses, step):
            said = Path(os.environ["AGL_TEST_HANG"])
            if step.epoch == 1 and not said.exists():
                ctypes.CDLL(None).prctl(1, 0)
                said.write_text(f"{os.getpid()} {os.getppid()}")
                while os.path.exists(f"/proc/{os.getppid()}/fd") and os.getppid() == int(said.read_text().split()[1]):
                    time.sleep(0.05)
                time.sleep(1)  # until all threads of the command have ended, and its files are closed
            return losses.mean()

    @hookimpl
    def register_selectors():
        return {"outliving": Outliving}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to let it live")
def test_a_cell_whose_command_has_gone_is_interrupted_and_not_failed(tmp_path, words):
    path, said, work = tmp_path / "outliving.py", tmp_path / "said", tmp_path / "work"
    path.write_text(textwrap.dedent(OUTLIVING), encoding="utf-8")
    command = [sys.executable, "-m", "agl_bench", "run", "--selectors", "outliving", "--plugin", str(path), *words]
    process = subprocess.Popen(
        [*command, "--work", str(work)], env=os.environ | {"AGL_TEST_HANG": str(said)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (said.exists() and len(said.read_text().split()) == 2) and process.poll() is None:
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    cell = Path(f"/proc/{said.read_text().split()[0]}/fd")
    for _ in range(200):
        if not cell.exists():
            break
        time.sleep(0.1)
    assert not cell.exists()
    assert list((work / "failed").iterdir()) == []
    assert len(list((work / "partial").glob("*/[0-9]*.pt"))) == 1  # of the epoch that it was at
