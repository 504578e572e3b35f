"""No broken plug-in costs anything but itself, and nothing heavy loads before a name is used."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import agl_bench_plugins
from agl_bench.errors import BadPlugin, UnknownName
from agl_bench.registry.plugins import KINDS, STRICT, Plugins

EXAMPLE = Path(__file__).parents[2] / "plugins/agl-bench-example/src"
# As its own hooks say, so that a new specimen needs no line here.
FIRST_PARTY = {kind: list(getattr(agl_bench_plugins, hook)()) for kind, hook in KINDS.items()}
GOOD = """
    from agl_bench import Selector, hookimpl

    class Mine(Selector):
        '''Mine alone.'''

    @hookimpl
    def register_selectors():
        return {"mine": Mine}
"""


def hook(value: str, name: str = "register_selectors", arguments: str = "") -> str:
    return f"""
        from agl_bench import Backbone, Selector, hookimpl

        class Some(Backbone): pass

        @hookimpl
        def {name}({arguments}):
            {value}
    """


# what is wrong -> source of the module, a word of the reason
BROKEN = {
    "import error": ("import nowhere_at_all", "nowhere_at_all"),
    "syntax error": ("def broken(:", "SyntaxError"),
    "exit at import": ("import sys; sys.exit(3)", "sys.exit(3)"),
    "exit in a hook": (hook("raise SystemExit(3)"), "3"),
    "signature": (hook("return {}", arguments="extra"), "extra"),
    "misspelt hook": (hook("return {}", name="register_selector"), "register_selector"),
    "raising hook": (hook("raise OSError('no licence file')"), "no licence file"),
    "list": (hook("return ['mine']"), "got list"),
    "not a class": (hook("return {'mine': 3}"), "subclass of agl_bench.Selector, got 3"),
    "other kind": (hook("return {'mine': Some}"), "subclass of agl_bench.Selector"),
    "clash": (hook("return {'mine': Selector, 'pgl': Selector}"), "'pgl' is provided by both agl-bench "),
    "clash across kinds": (hook("return {'synthetic': Selector}"), "'synthetic' is provided by both"),
    "clash within itself": (
        hook("return {'mine': Selector}") + hook("return {'mine': Some}", name="register_backbones"),
        "registers 'mine' twice, as selector and as backbone",
    ),
    "no hook": ("x = 1", "is @hookimpl missing?"),
    "unmarked hook": ("def register_selectors(): return {}", "is @hookimpl missing?"),
    "missing module": (hook("return {'mine': 'nowhere_at_all:Mine'}"), "nowhere_at_all"),
    "missing submodule": (hook("return {'mine': 'agl_bench.nowhere_at_all:Mine'}"), "agl_bench.nowhere_at_all"),
    "missing class": (hook("return {'mine': 'agl_bench.errors:Mine'}"), "there is no class Mine"),
    "bad name": (hook("return {'My Selector': Selector}"), "'My Selector' is not a usable name"),
    "name is no text": (hook("return {3: Selector}"), "3 is not a usable name"),
    "reserved name": (hook("return {'protocol': Selector}"), "protocol"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_disables_itself_alone(case, install):
    source, reason = BROKEN[case]
    module = install(source)
    plugins = Plugins.discover(strict=False)
    assert [b.provider for b in plugins.broken] == [f"stranger 1.2 ({module})"]
    assert reason in plugins.broken[0].reason
    assert "\n" not in plugins.broken[0].reason
    assert {kind: plugins.names(kind) for kind in FIRST_PARTY} == FIRST_PARTY


@pytest.mark.parametrize("case", BROKEN)
def test_strict_makes_it_an_error(case, install, monkeypatch):
    source, reason = BROKEN[case]
    install(source)
    monkeypatch.setenv(STRICT, "1")
    with pytest.raises(BadPlugin, match=r"plug-in stranger 1\.2") as caught:
        Plugins.discover()
    assert reason in str(caught.value)


def test_two_strangers_with_one_name(install):
    install(GOOD, "alpha")
    install(GOOD, "beta")
    plugins = Plugins.discover(strict=False)
    assert plugins.entry("mine").provider == "alpha 1.2"
    assert [b.reason for b in plugins.broken] == [
        "'mine' is provided by both alpha 1.2 and beta 1.2; rename one in its hook, or leave it out"
    ]


def test_good_beside_broken(install):
    install(GOOD, "good")
    install("raise RuntimeError('on purpose')", "bad")
    plugins = Plugins.discover(strict=False)
    assert len(plugins.broken) == 1
    entry = plugins.entry("mine", "selector")
    assert (entry.provider, entry.summary) == ("good 1.2", "Mine alone.")
    assert entry.load().__name__ == "Mine"


def test_heavy_import_fails_only_when_the_name_is_used(install, tmp_path):
    (tmp_path / "late_module_x.py").write_text("import nowhere_at_all\n\nclass Late:\n    '''Later.'''\n")
    install(hook("return {'late': 'late_module_x:Late'}"))
    plugins = Plugins.discover(strict=True)
    assert plugins.entry("late").summary == "Later."
    with pytest.raises(BadPlugin, match=r"selector 'late' of stranger 1\.2 cannot be loaded.*nowhere_at_all"):
        plugins.entry("late").load()


def test_string_to_a_class_of_another_kind(install):
    install(hook("return {'odd': 'agl_bench.bench.cells:CellStore'}"))
    with pytest.raises(BadPlugin, match=r"must be a subclass of agl_bench\.Selector"):
        Plugins.discover(strict=True).entry("odd").load()


def test_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(GOOD))
    plugins = Plugins.discover([path])
    assert plugins.entry("mine").provider == "mine.py"
    assert plugins.entry("mine").source == path
    assert plugins.entry("mine").digest()


def test_the_digest_follows_the_class_into_its_package(install, tmp_path):
    package = tmp_path / "parts_x"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text("def gain():\n    return 1\n")
    (package / "steps.py").write_text("from parts_x import deep\n\n\ndef step():\n    return deep.gain()\n")
    (package / "beside.py").write_text("unused = 1\n")
    source = (
        "from agl_bench import Selector\nfrom parts_x.steps import step\n\n\nclass Mine(Selector):\n    '''Mine.'''\n"
    )
    (package / "mine.py").write_text(source)
    install(hook("return {'mine': 'parts_x.mine:Mine'}"))
    entry = Plugins.discover(strict=True).entry("mine")
    before = entry.digest()
    (package / "beside.py").write_text("unused = 2\n")
    assert entry.digest() == before
    (package / "deep.py").write_text("def gain():\n    return 2\n")
    assert entry.digest() != before


IMPORTS = {  # how the class reaches the module beside it: lines of its module, and of the class
    "a constant": ("from {0}.sizes import SPOTS", "pass"),
    "a relative import": ("from .sizes import SPOTS as n", "pass"),
    "the module": ("from . import sizes", "pass"),
    "an import inside a method": ("", "def f(self):\n        import {0}.sizes"),
    "by way of another module": ("from {0}.between import n", "pass"),
}


@pytest.mark.parametrize("how", IMPORTS)
def test_a_constant_of_a_module_beside_is_part_of_the_identity(how, install, tmp_path):
    name = f"parts_{how.replace(' ', '_')}"
    above, inside = (line.format(name) for line in IMPORTS[how])
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "between.py").write_text(f"from {name}.sizes import SPOTS\n\nn = SPOTS\n")
    (package / "sizes.py").write_text("SPOTS = 50\n")
    (package / "mine.py").write_text(
        f"from agl_bench import Selector\n{above}\n\nclass Mine(Selector):\n    {inside}\n"
    )
    install(hook(f"return {{'mine': '{name}.mine:Mine'}}"))
    entry = Plugins.discover(strict=True).entry("mine")
    before = entry.digest()
    (package / "sizes.py").write_text("SPOTS = 40\n")
    assert entry.digest() != before


def test_a_single_file_brings_the_modules_beside_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "gains_z.py").write_text("GAIN = 1\n")
    path = tmp_path / "mine.py"
    path.write_text("from gains_z import GAIN\n" + textwrap.dedent(GOOD))
    entry = Plugins.discover([path]).entry("mine")
    before = entry.digest()
    (tmp_path / "gains_z.py").write_text("GAIN = 2\n")
    assert entry.digest() != before


def test_the_instrument_is_no_part_of_a_plugin(tmp_path):
    """Wherever it lies: beside a file, or installed with our own plug-ins. Results carry its version."""
    (tmp_path / "agl_bench").mkdir()
    (tmp_path / "agl_bench" / "__init__.py").write_text("a = 1\n")
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(GOOD))
    entry = Plugins.discover([path]).entry("mine")
    before = entry.digest()
    (tmp_path / "agl_bench" / "__init__.py").write_text("a = 2\n")
    assert entry.digest() == before


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_an_error(case, tmp_path):
    source, reason = BROKEN[case]
    path = tmp_path / "stranger.py"
    path.write_text(textwrap.dedent(source))
    with pytest.raises(BadPlugin) as caught:
        Plugins.discover([path], strict=False)
    assert str(caught.value).startswith(f"plug-in {path}: ")
    assert reason in str(caught.value)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(BadPlugin, match="no such file"):
        Plugins.discover([tmp_path / "nothing.py"])


def test_unknown_name_suggests_lists_and_names_providers(install):
    install("raise RuntimeError", "bad")
    plugins = Plugins.discover(strict=False)
    with pytest.raises(UnknownName) as caught:
        plugins.entry("dkgbs", "selector")
    message = str(caught.value)
    assert "unknown selector 'dkgbs'. Did you mean 'dkgsb'?" in message
    assert f"Known: {', '.join(sorted(FIRST_PARTY['selector']))}." in message
    assert "Provided by agl-bench " in message
    assert "Disabled: bad 1.2" in message
    assert "tiny" not in message  # a backbone
    with pytest.raises(UnknownName, match="'tiny' is a backbone"):
        plugins.entry("tiny", "selector")


def test_help_and_list_import_nothing_heavy(install, tmp_path):
    info = tmp_path / "agl_bench_example-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: agl-bench-example\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[agl_bench]\nagl-bench-example = agl_bench_example\n")
    script = textwrap.dedent("""
        import contextlib, io, json, sys
        from agl_bench.cli import main
        out = io.StringIO()
        for words in (["--help"], ["run", "--help"], ["list"], ["list", "--json"]):
            out.seek(0), out.truncate()
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
                main(words)
        heavy = sorted({"torch", "scanpy", "mlflow", "anndata", "timm", "scipy", "pandas"} & set(sys.modules))
        print(json.dumps({"heavy": heavy, "list": json.loads(out.getvalue())}))
    """)
    path = os.pathsep.join([str(tmp_path), str(EXAMPLE)])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["heavy"] == []
    assert "correlated_k" in [e["name"] for e in said["list"]["entries"]]
    assert said["list"]["broken"] == []
