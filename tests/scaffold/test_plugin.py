"""What `agl-bench new-plugin` writes works as it is, and nothing that is there is touched."""

import ast
import os
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from agl_bench.cli import main
from agl_bench.errors import BadPlugin
from agl_bench.registry.plugins import KINDS, Plugins
from agl_bench.scaffold.plugin import LONGEST, Draft, draft

ROOT = Path(__file__).parents[2]
LONG = "the-longest-name_there-can-be0"
NAMES = {"selector": "my-corr", "backbone": "two_maps", "dataset": "own"}
SMALL = {
    "selector": ("--set", "synthetic.sections=2", "--set", "synthetic.spots=40"),
    "backbone": ("--set", "synthetic.sections=2", "--set", "synthetic.spots=40"),
    "dataset": (),
}


@pytest.fixture
def agl(capsys, tmp_path, monkeypatch):
    """Run a command of agl-bench in an empty folder, in this process: its status, and what it said."""
    for name in ("CACHE", "DATA", "STRICT_PLUGINS", "WORK"):
        monkeypatch.delenv(f"AGL_BENCH_{name}", raising=False)
    monkeypatch.setenv("AGL_BENCH_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def agl(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(w) for w in words])
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    yield agl
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def installed(monkeypatch):
    """Make the distribution of a folder importable and found, as an installation would."""

    def install(folder):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        source = folder / "src"
        info = source / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
        points = "".join(f"{k} = {v}\n" for k, v in project["entry-points"]["agl_bench"].items())
        (info / "entry_points.txt").write_text(f"[agl_bench]\n{points}")
        monkeypatch.syspath_prepend(source)

    before = set(sys.modules)
    yield install
    for name in set(sys.modules) - before:
        if name.startswith("agl_bench_") and not name.startswith("agl_bench_plugins"):
            del sys.modules[name]


def is_refused(said, *words):
    """Status 2, and one sentence with these words."""
    status, out, err = said
    assert (status, out) == (2, "")
    (sentence,) = err.splitlines()
    for word in words:
        assert word in sentence


def lint(folder, *words):
    """What ruff has against the files of a folder."""
    ruff = [sys.executable, "-m", "ruff"]
    commands = [[*ruff, "check", *words, "."], [*ruff, "format", "--check", *words, "."]]
    found = [subprocess.run(command, cwd=folder, capture_output=True, text=True) for command in commands]
    return "".join(done.stdout + done.stderr for done in found if done.returncode)


# --- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_is_checked_and_runs(agl, tmp_path, kind):
    status, out, err = agl("new-plugin", kind, NAMES[kind], "--here")
    assert (status, err) == (0, "")
    (path,) = tmp_path.iterdir()
    assert path.name == NAMES[kind].replace("-", "_") + ".py"
    assert lint(tmp_path, "--config", ROOT / "pyproject.toml") == ""
    said = [line.split() for line in out.partition("Next:")[2].splitlines() if line]
    check, run, report = (words[1:] for words in said)
    status, out, _ = agl(*check)
    assert status == 0, out
    assert f"{NAMES[kind]}  {kind} of {path.name}" in out
    status, out, err = agl(*run, *SMALL[kind], "--device", "cpu", "--tracking", "none")
    assert (status, err) == (0, ""), err
    assert NAMES[kind] in out
    status, out, err = agl(*report)
    assert status == 0, err
    assert NAMES[kind] in Path("agl-bench-work/report/report.html").read_text(encoding="utf-8")


# --- a distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_distribution_is_checked_and_tests_itself(agl, installed, tmp_path, kind):
    name = NAMES[kind]
    made = Draft(kind, name)
    status, out, err = agl("new-plugin", kind, name)
    assert (status, err) == (0, "")
    folder = tmp_path / made.distribution
    written = {path.relative_to(tmp_path).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {line.removeprefix("wrote ") for line in out.splitlines() if line.startswith("wrote ")}
    assert lint(folder) == ""
    paths = os.pathsep.join([str(folder / "src"), str(ROOT), str(ROOT / "plugins")])
    tests = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(tests, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    installed(folder)
    status, out, _ = agl("check", name)
    assert status == 0, out
    assert f"{name}  {kind} of {made.distribution} 0.1.0" in out
    is_refused(
        agl("new-plugin", "selector", name, "--here"), f"'{name}' is taken", f"{kind} of {made.distribution} 0.1.0"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_longest_name_is_well_formed(agl, tmp_path, kind):
    assert len(LONG) == LONGEST
    assert agl("new-plugin", kind, LONG)[0] == 0
    assert lint(tmp_path / Draft(kind, LONG).distribution) == ""
    assert agl("new-plugin", kind, LONG, "--here")[0] == 0
    assert lint(tmp_path, "--config", ROOT / "pyproject.toml", "--exclude", "agl-bench-*") == ""


def test_author_and_folder(agl, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (tmp_path / "gitconfig").write_text('[user]\nname = "Ada \\"Countess\\" Lovelace"\n')
    _, out, _ = agl("new-plugin", "selector", "mine", "--into", "some where/new")
    assert "by Ada" in out and "pip install -e './some where/new'" in out
    folder = tmp_path / "some where/new"
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["authors"] == [{"name": 'Ada "Countess" Lovelace'}]
    assert 'Ada "Countess" Lovelace' in (folder / "LICENSE").read_text(encoding="utf-8")
    (tmp_path / "gitconfig").write_text("")
    assert "git knows none" in agl("new-plugin", "selector", "mine")[1]
    licence = (tmp_path / "agl-bench-mine/LICENSE").read_text(encoding="utf-8")
    assert "The agl-bench-mine authors" in licence


def test_names_follow_from_the_name():
    for name, module, class_name, package in (
        ("my-corr", "my_corr", "MyCorr", "agl_bench_my_corr"),
        ("my_corr", "my_corr", "MyCorr", "agl_bench_my_corr"),
        ("k2--x_", "k2__x_", "K2X", "agl_bench_k2_x"),
    ):
        made = Draft("selector", name)
        assert (made.module, made.class_name, made.package) == (module, class_name, package)
        assert made.distribution == package.replace("_", "-")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MyCorr", ["'MyCorr' is not a usable name", "lower-case"]),
        ("2nd", ["'2nd' is not a usable name"]),
        ("my corr", ["'my corr' is not a usable name"]),
        ("../up", ["'../up' is not a usable name"]),
        ("protocol", ["'protocol' is not a usable name", "mean something else"]),
        ("smoke", ["'smoke' is not a usable name"]),
        ("dkgsb", ["'dkgsb' is taken", "selector of agl-bench 0."]),
        ("tiny", ["'tiny' is taken", "backbone of agl-bench 0."]),
        ("class", ["'class' is a word of Python"]),
        ("none", ["the class of 'none' would be None"]),
        ("selector", ["the class of 'selector' would be Selector"]),
        ("training-view", ["would be TrainingView"]),
        ("selector_contract", ["would be SelectorContract"]),
        ("x" * (LONGEST + 1), [f"has {LONGEST + 1} letters", f"at most {LONGEST}"]),
    ],
)
def test_bad_names(agl, tmp_path, name, words):
    for form in ((), ("--here",)):
        is_refused(agl("new-plugin", "selector", name, *form), *words)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_name(agl, tmp_path):
    status, _, err = agl("new-plugin", "selector", "")
    assert status == 2 and err.splitlines()[-1].endswith("it is empty; give it a value, or leave it out")
    assert not list(tmp_path.iterdir())


def test_modules_that_are_there(agl, tmp_path):
    is_refused(agl("new-plugin", "selector", "plugins"), "module 'agl_bench_plugins' already")
    is_refused(agl("new-plugin", "selector", "torch", "--here"), "module 'torch' already")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(agl, tmp_path):
    (tmp_path / "agl-bench-mine").mkdir()
    (tmp_path / "mine.py").write_text("mine")
    is_refused(agl("new-plugin", "selector", "mine"), "agl-bench-mine is there already", "--into")
    is_refused(agl("new-plugin", "selector", "mine", "--into", "mine.py"), "mine.py is there already")
    is_refused(agl("new-plugin", "selector", "mine", "--here"), "mine.py is there already and stays as it is")
    is_refused(agl("new-plugin", "selector", "mine", "--here", "--into", "new"), "leave out --into")
    assert (tmp_path / "mine.py").read_text() == "mine"
    assert list((tmp_path / "agl-bench-mine").iterdir()) == []


def test_a_folder_that_cannot_be_written(agl, tmp_path):
    (tmp_path / "file").write_text("")
    is_refused(agl("new-plugin", "selector", "mine", "--into", "file/new"), "file")


def test_unknown_kind(agl):
    status, _, err = agl("new-plugin", "selektor", "mine")
    assert status == 2 and "'selektor' is not one of" in err


def test_names_of_disabled_plugins_are_no_obstacle():
    with pytest.raises(BadPlugin, match="'pgl' is taken"):
        draft("selector", "pgl", Plugins.discover())
    assert draft("selector", "pgl-too", Plugins.discover()).class_name == "PglToo"


# --- templates -------------------------------------------------------------------------------------------------------


def test_templates_are_in_the_wheel(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    templates = {path.name for path in (ROOT / "agl_bench/scaffold/templates").iterdir()}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("agl_bench/scaffold/templates/")}
    assert packed == {f"agl_bench/scaffold/templates/{name}" for name in templates}


@pytest.mark.parametrize("kind", KINDS)
def test_plugins_import_root_names_only(kind):
    made = Draft(kind, "mine")
    texts = [made.file(), *(t for name, t in made.distribution_files("").items() if name.endswith(".py"))]
    modules = {node.module for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in modules if module and module.startswith("agl_bench")}
    assert ours <= {"agl_bench", "agl_bench.testing", "agl_bench_mine.mine"}
