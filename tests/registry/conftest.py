"""Strangers to install."""

import sys
import textwrap

import pytest


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a module as a distribution of its own, as pip would: a .dist-info folder beside it on sys.path."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def install(source: str, name: str = "stranger", module: str | None = None, version: str = "1.2") -> str:
        module = module or f"{name}_module_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[agl_bench]\n{name} = {module}\n")
        return module

    yield install
    for name in set(sys.modules) - before:
        if "_module_" in name:
            del sys.modules[name]
