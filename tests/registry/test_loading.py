"""What a plug-in may do while it is loaded: each misdeed is named, undone, and costs nobody else."""

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import agl_bench
from agl_bench.cli import main
from agl_bench.errors import BadPlugin
from agl_bench.interfaces.backbone import Backbone
from agl_bench.interfaces.dataset import Dataset
from agl_bench.interfaces.selector import Selector
from agl_bench.registry import stated, watch
from agl_bench.registry.plugins import STRICT, Plugins

GOOD = """
from agl_bench import Selector, hookimpl

class Mine(Selector):
    '''Mine alone.'''

@hookimpl
def register_selectors():
    return {"mine": Mine}
"""
TEXT = """
from agl_bench import hookimpl

@hookimpl
def register_selectors():
    return {"late": "MODULE:Late"}
"""
LATE = "\n\nclass Late:\n    '''Later.'''\n"
# what a module does at import -> what the remark names
CHANGES = {
    "import torch; torch.set_default_dtype(torch.float64)": "torch's default type",
    "import torch; torch.manual_seed(3)": "torch's random state",
    "import torch; torch.set_float32_matmul_precision('medium')": "torch's precision of matrix products",
    "import torch; torch.use_deterministic_algorithms(True)": "torch's deterministic algorithms",
    "import torch; torch.backends.cudnn.benchmark = True": "torch.backends.cudnn.benchmark",
    "import torch; torch.backends.cudnn.deterministic = True": "torch.backends.cudnn.deterministic",
    "import torch; torch.set_grad_enabled(False)": "torch's gradient mode",
    "import torch; torch.set_num_threads(torch.get_num_threads() + 1)": "torch's number of threads",
    "import numpy; numpy.random.seed(3)": "numpy's random state",
    "import random; random.seed(3)": "Python's random state",
    "import os; os.environ['OMP_NUM_THREADS'] = '77'": "the environment's OMP_NUM_THREADS",
    "import os; os.environ.pop('OMP_NUM_THREADS', None)": "the environment's OMP_NUM_THREADS",
}


def state():
    return (
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
        torch.get_float32_matmul_precision(),
        torch.get_deterministic_debug_mode(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        str(np.random.get_state()),  # noqa: NPY002  (it is what is checked)
        random.getstate(),
        {name: value for name, value in os.environ.items() if name.endswith("_NUM_THREADS")},
    )


def said(capsys, *words):
    """Status, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    found = capsys.readouterr()
    return ended.value.code or 0, " ".join(found.out.split()), " ".join(found.err.split())


@pytest.mark.parametrize("deed", CHANGES)
def test_settings_of_the_process_are_put_back(deed, install, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = state()
    install(deed + "\n" + GOOD)
    plugins = Plugins.discover(strict=False)
    assert state() == before
    assert [(r.provider, r.is_fault) for r in plugins.remarks] == [("stranger 1.2", True)]
    assert plugins.remarks[0].sentence == (
        f"changes {CHANGES[deed]} at import; the change was undone, because every result depends on it"
    )
    assert plugins.broken == [] and plugins.entry("mine").load().__name__ == "Mine"


def test_a_broken_plugin_leaves_nothing_either(install):
    before = state()
    module = install("import torch; torch.set_default_dtype(torch.float64)\nraise RuntimeError('on purpose')")
    plugins = Plugins.discover(strict=False)
    assert state() == before
    assert plugins.broken[0].reason == f"RuntimeError: on purpose ({module}.py, line 2)" and plugins.remarks == []


def test_faults_are_errors_where_plugins_are_taken_strictly(install, monkeypatch, capsys):
    module = install("import torch; torch.manual_seed(3)\n" + GOOD)
    with pytest.raises(BadPlugin, match=r"plug-in stranger 1\.2 .*changes torch's random state"):
        Plugins.discover(strict=True)
    del sys.modules[module]  # imported anew, as by a new command
    monkeypatch.setenv(STRICT, "1")
    status, _, err = said(capsys, "list")
    assert status == 2 and "changes torch's random state" in err and "Traceback" not in err


def test_a_fresh_torch_tells_as_well(install, tmp_path):
    """In a process that had no torch before, its defaults are known."""
    install("import torch; torch.set_default_dtype(torch.float64)\n" + GOOD)
    found = fresh("plugins = Plugins.discover(strict=False); print(json.dumps([vars(r) for r in plugins.remarks]))")
    (remark,) = (r for r in json.loads(found.stdout) if r["is_fault"])
    assert remark["sentence"].startswith("changes torch's default type at import")


def fresh(code):
    """Run code in a new process, with everything that this one finds."""
    start = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from agl_bench.registry.plugins import Plugins; "
    words = [sys.executable, "-c", start + code, json.dumps(sys.path)]
    return subprocess.run(words, capture_output=True, text=True, check=True)


def test_ours_leave_the_process_as_it_is():
    """Every class that comes with agl-bench, loaded in a new process, in strict mode and without a word."""
    code = "[e.load() for e in Plugins.discover(strict=True).entries() if e.provider.startswith('agl-bench ')]"
    found = fresh(f"import os; os.environ['{STRICT}'] = '1'; {code}")
    assert "agl-bench" not in found.stderr and found.stdout == ""


def test_what_is_printed_does_not_reach_the_results(install, capsys):
    install("print('hello'); print('there')\n" + GOOD)
    with pytest.raises(SystemExit):
        main(["list", "--json"])
    listed = json.loads(capsys.readouterr().out)  # nothing but JSON
    assert [r["sentence"] for r in listed["remarks"]] == ["prints to standard output at import ('hello'); not shown"]
    assert "mine" in [e["name"] for e in listed["entries"]]
    Plugins.discover(strict=True)  # no fault


def test_what_is_imported_already_is_not_slow(install, monkeypatch):
    install(GOOD)
    Plugins.discover(strict=False)
    monkeypatch.setattr(watch, "SLOW", 0.0)
    assert Plugins.discover(strict=False).remarks == []


def test_a_slow_import_is_named(install, monkeypatch, capsys):
    monkeypatch.setattr(watch, "SLOW", 0.1)
    module = install("import time; time.sleep(0.15)\n" + GOOD)
    plugins = Plugins.discover(strict=True)  # no fault
    (remark,) = (r for r in plugins.remarks if r.provider == "stranger 1.2")
    assert "s to import, and every command waits for it" in remark.sentence
    del sys.modules[module]
    _, out, _ = said(capsys, "list", "selectors")
    assert "works, but stranger 1.2 takes 0." in out
    del sys.modules[module]
    _, _, err = said(capsys, "show", "mine")
    assert "agl-bench: plug-in stranger 1.2 takes 0." in err


def test_list_does_not_wait_for_texts(install, tmp_path):
    (tmp_path / "late_module_slow.py").write_text("raise SystemExit('imported')" + LATE)
    install(TEXT.replace("MODULE", "late_module_slow"))
    plugins = Plugins.discover(strict=True)
    assert plugins.entry("late").summary == "Later." and plugins.remarks == []
    with pytest.raises(BadPlugin, match=r"selector 'late' of stranger 1\.2 cannot be loaded: it called sys\.exit"):
        plugins.entry("late").load()


def test_a_text_is_watched_too(install, tmp_path, monkeypatch, capsys):
    late = "import torch; torch.manual_seed(5); print('hello')\nfrom agl_bench import Selector\n"
    (tmp_path / "late_module_watched.py").write_text(late + LATE.replace("Late:", "Late(Selector):"))
    install(TEXT.replace("MODULE", "late_module_watched"))
    before = state()
    entry = Plugins.discover(strict=True).entry("late")
    entry.load()
    assert state() == before
    found = capsys.readouterr()
    assert found.out == ""
    assert "hello" in found.err and "plug-in stranger 1.2 (late_module_watched) changes torch's random" in found.err
    entry.load()
    assert capsys.readouterr().err == ""  # said once
    del sys.modules["late_module_watched"]
    monkeypatch.setenv(STRICT, "1")
    with pytest.raises(BadPlugin, match=r"selector 'late' of stranger 1\.2 cannot be loaded: changes torch's random"):
        entry.load()


def test_a_text_whose_file_is_no_python(install, tmp_path):
    (tmp_path / "late_module_odd.py").write_text("class Late(:")
    install(TEXT.replace("MODULE", "late_module_odd"))
    (broken,) = Plugins.discover(strict=False).broken
    assert broken.reason.startswith("SyntaxError: ") and "late_module_odd.py" in broken.reason


def test_two_versions_of_one_distribution(install, capsys):
    install(GOOD)
    install(GOOD, version="1.3", module="stranger_module_newer")
    plugins = Plugins.discover(strict=False)
    (remark,) = plugins.remarks
    assert "is installed in 2 versions (1." in remark.sentence and remark.is_fault
    assert "pip uninstall stranger" in remark.sentence
    assert len(plugins.names("selector")) == len(set(plugins.names("selector")))
    with pytest.raises(BadPlugin, match="is installed in 2 versions"):
        Plugins.discover(strict=True)


MAJOR, MINOR = map(int, agl_bench.API_VERSION.split("."))
THIS, NEXT = f"this is {MAJOR}.{MINOR}", "upgrade agl-bench or an older version"
API = {  # stated -> broken, remark
    f"{MAJOR}.{MINOR}": ("", ""),
    f"{MAJOR}.{MINOR + 1}": ("", f"is written for agl-bench API {MAJOR}.{MINOR + 1}, {THIS}"),
    f"{MAJOR}.{MINOR + 2}": (f"needs agl-bench API {MAJOR}.{MINOR + 2}, {THIS}; {NEXT}", ""),
    f"{MAJOR + 1}.0": (f"needs agl-bench API {MAJOR + 1}.0, {THIS}; {NEXT}", ""),
    f"{MAJOR - 1}.9": (
        f"needs agl-bench API {MAJOR - 1}.9, {THIS}; install an older agl-bench or a newer version",
        "",
    ),
    "1": ("agl_bench_api = '1' is not a version such as 1.0", ""),
}


@pytest.mark.parametrize("wanted", API)
def test_api_version(wanted, install, capsys, monkeypatch):
    broken, remark = API[wanted]
    # What is for another API fails at import as often as not: it has to be read before.
    fails = "from agl_bench import SomethingElse\n" if broken else ""
    install(f"agl_bench_api = '{wanted}'\n" + fails + GOOD)
    plugins = Plugins.discover(strict=False)
    assert [b.reason[: len(broken)] for b in plugins.broken] == [broken] * bool(broken)
    assert [r.sentence[: len(remark)] for r in plugins.remarks] == [remark] * bool(remark)
    assert ("mine" in plugins.names("selector")) == (not broken)
    monkeypatch.setenv(STRICT, "1")
    status, _, err = said(capsys, "show", "pgl")
    assert status == (2 if broken else 0)
    assert err.count("agl-bench: ") == bool(broken or remark)  # one line


def test_api_version_has_to_be_a_literal(install):
    install("from agl_bench import API_VERSION as agl_bench_api\n" + GOOD, "imported")  # is no statement of its own
    install("agl_bench_api = '1.' + str(0)\n" + GOOD.replace("mine", "yours"))
    plugins = Plugins.discover(strict=False)
    assert [b.reason.partition(",")[0] for b in plugins.broken] == ["agl_bench_api has to be a text in quotes"]
    assert "mine" in plugins.names("selector")


def test_doctor_and_list_mention_both(install, tmp_path, capsys):
    install("raise RuntimeError('on purpose')", "bad")
    module = install("import torch; torch.manual_seed(3)\n" + GOOD)
    _, out, _ = said(capsys, "list")
    del sys.modules[module]  # imported anew, as by a new command
    assert "disabled bad 1.2 (" in out and "RuntimeError: on purpose" in out
    assert "works, but stranger 1.2 changes torch's random state" in out
    status, out, _ = said(capsys, "doctor", "--work", str(tmp_path / "work"), "--data", str(tmp_path / "data"))
    assert status == 1
    assert "is disabled: RuntimeError: on purpose" in out and "stranger 1.2 changes torch's random state" in out


FLAGGED = """
    REFERENCE = "computed"

    class Base:
        '''The base.'''
        reference: str = "A et al., " "2026"
        needs_gpu, max_genes = True, 2_000
        needs_counts = bool(1)

    class Mine(Base):
        '''Mine.

        More.
        '''
        needs_second_order = True
        needs_gpu = False

    class Other(Mine):
        reference = REFERENCE

        @property
        def is_control(self):
            return True
"""


def test_flags_are_read_from_the_source(tmp_path):
    path = tmp_path / "flagged.py"
    path.write_text(textwrap.dedent(FLAGGED))
    summary, says = stated.of_source(path, "Mine", "selector")
    assert summary == "Mine."
    assert says == {
        "reference": "A et al., 2026", "needs_gpu": False, "max_genes": 2000, "needs_second_order": True,
        "is_control": False,
    }  # fmt: skip
    assert stated.words("selector", says) == ["2nd order", "needs_counts?", "≤ 2,000 genes"]
    _, other = stated.of_source(path, "Other", "selector")
    assert "reference" not in other and "is_control" not in other


def test_flags_are_those_of_the_doors():
    for kind, cls in (("selector", Selector), ("backbone", Backbone), ("dataset", Dataset)):
        assert stated.of_class(cls, kind)[1] == {stated.SAYS[kind]: "", **stated.FLAGS[kind]}


def test_the_source_says_what_the_class_says():
    """Of everything that comes with agl-bench, so that `list` and a run never contradict each other."""
    for entry in Plugins.discover(strict=True).entries():
        imported = stated.of_class(entry.load(), entry.kind)[1]
        for name, value in entry.stated.items():
            if name in stated.FLAGS[entry.kind]:
                assert imported[name] == value, (entry.name, name)


def test_list_tells_everything(install, capsys):
    source = GOOD.replace(
        "'''Mine alone.'''", "'''Mine alone.'''\n    reference, max_genes, needs_gpu = 'We', 500, True"
    )
    module = install(source)
    _, out, _ = said(capsys, "list", "selectors")
    assert "Mine alone. GPU, ≤ 500 genes stranger 1.2" in out and "synthetic" not in out
    with pytest.raises(SystemExit):
        main(["list", "selectors", "--json"])
    found = json.loads(capsys.readouterr().out)
    (mine,) = (e for e in found["entries"] if e["name"] == "mine")
    assert Path(mine.pop("file")).stem == module
    assert mine == {
        "kind": "selector", "name": "mine", "provider": "stranger 1.2", "version": "1.2", "summary": "Mine alone.",
        "reference": "We",
        "flags": {
            "needs_gpu": True, "needs_second_order": False, "needs_counts": False, "max_genes": 500,
            "is_control": False,
        },
    }  # fmt: skip
    assert {e["kind"] for e in found["entries"]} == {"selector"}
    _, out, _ = said(capsys, "show", "mine")
    assert "flags: GPU, ≤ 500 genes" in out
