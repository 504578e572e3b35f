"""Whatever a plug-in does to the process of a command, the command ends with a sentence, and others with results."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

SILENT = "from agl_bench.cli import main, supervision; supervision.SILENT = 2.0; main()"


@pytest.fixture
def agl(tmp_path):
    """Run agl-bench as a user does, with what is installed in the folder of the test."""

    def agl(*words, **more):
        command = [sys.executable, "-c", SILENT, *words]
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"} | more
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return agl


@pytest.fixture
def install(tmp_path):
    """Put a distribution with one module where Python finds it."""

    def install(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[agl_bench]\n{name} = {name}\n")

    return install


IMPORTS = {
    "exits": ("import os; os._exit(0)", "the process that imported it ended with status 0"),
    "exits_badly": ("import os; os._exit(9)", "the process that imported it ended with status 9"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "the process that imported it was killed by SIGSEGV"),
    "never_returns": ("while True: pass", "its import did not finish within 2 s"),
    "waits": ("import time; time.sleep(300)", "its import did not finish within 2 s"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt (interrupts.py, line 1)"),
    "raises_base": ("raise type('Own', (BaseException,), {})('x')", "Own: x (raises_base.py, line 1)"),
    "quits": ("import sys; sys.exit(0)", "it called sys.exit(0)"),
    "no_text": ("raise ValueError('half: \\ud83d')", "ValueError: half: \\ud83d (no_text.py, line 1)"),
    "mute": (
        "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})",
        "Mute: it has no message, because its __str__ raises ZeroDivisionError (mute.py, line 1)",
    ),
}


def test_an_installed_plugin_that_ends_its_import_is_disabled_and_no_other(agl, install):
    for name, (text, _) in IMPORTS.items():
        install(name, text)
    found = agl("list", "--json")
    assert (found.returncode, found.stderr) == (0, "")
    content = json.loads(found.stdout)
    assert {b["provider"]: b["reason"] for b in content["broken"]} == {
        f"{name} 1.0 ({name})": said for name, (_, said) in IMPORTS.items()
    }
    assert {"pgl", "dkgsb"} <= {e["name"] for e in content["entries"]}


@pytest.mark.parametrize("name", ["exits", "crashes", "interrupts", "quits"])
def test_a_file_that_ends_its_import_is_refused(agl, tmp_path, name):
    text, said = IMPORTS[name]
    (tmp_path / f"{name}.py").write_text(text)
    found = agl("list", "--plugin", f"{name}.py")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"agl-bench: plug-in {name}.py: {said}\n"


DATASET = """
    import os, sys
    from agl_bench import Dataset, hookimpl

    class Ending(Dataset):
        '''Ends where the environment says.'''
        citation = licence = "test"

        def __init__(self):
            self.at("constructor")

        def at(self, place):
            where, how = os.environ["AGL_TEST_END"].split(":")
            if where == place:
                {"exit": lambda: os._exit(0), "quit": lambda: sys.exit(0), "abort": os.abort}[how]()

        def sections(self, root):
            self.at("sections")
            return {"A": "one"}

        def files(self, root, section):
            return []

        def read(self, root, section):
            self.at("read")

    @hookimpl
    def register_datasets():
        return {"ending": Ending}
"""


@pytest.mark.parametrize(
    ("where", "words", "said"),
    [
        ("read:exit", ["describe", "ending"], "the command ended with status 0 before it finished, by a plug-in"),
        ("constructor:abort", ["validate", "ending"], "the command was killed by SIGABRT before it finished, by a"),
        ("sections:quit", ["folds", "ending"], "dataset 'ending' of ending.py: it called sys.exit(0)"),
    ],
)
def test_a_dataset_does_not_end_a_command_in_silence(agl, tmp_path, where, words, said):
    (tmp_path / "ending.py").write_text(textwrap.dedent(DATASET))
    found = agl(*words, "--plugin", "ending.py", AGL_TEST_END=where)
    assert found.returncode == 2
    assert said in found.stderr.splitlines()[-1] and "ending.py" in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_reaches_it_once(tmp_path, number):
    (tmp_path / "slow.py").write_text("import time\nopen('here', 'w').close()\nwhile True: time.sleep(0.1)\n")
    command = [sys.executable, "-m", "agl_bench", "list", "--plugin", "slow.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "here").exists():
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert said.strip() == "agl-bench: interrupted; finished work is kept, and the same command continues"
    assert process.returncode == 75
