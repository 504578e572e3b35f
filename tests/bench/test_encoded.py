"""Features of frozen encoders on the disk: found again by whatever asks alike, made anew by whatever does not."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from torch import nn

from agl_bench import ArrayPatches, Backbone, Section
from agl_bench.bench import encoded
from agl_bench.bench.encoded import encode_section, encoder_digest
from agl_bench.bench.prepare import Preparation
from agl_bench.bench.result import Result
from agl_bench.bench.run import Bench, choose_device
from agl_bench.bench.spec import Part
from agl_bench.data.prepared import PatchSize, SectionCache
from agl_bench.data.shuffled import shuffle_patches
from agl_bench.digests import FileDigests
from agl_bench.testing import toy_spots

CPU, SIZE = torch.device("cpu"), PatchSize(4, 112.0)
PART = Part("still", {"learning_rate": 1e-2, "depth": 1}, "made 1.0", "0a")


class Still(Backbone):
    """What it makes of a patch depends on its state and on how the patch is turned."""

    frozen, late_prefixes, patch_px, width = True, ("mix.",), 4, 3

    def __init__(self) -> None:
        super().__init__(toy_spots(1, patch_px=4))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.conv = nn.Conv2d(3, 5, 3)
        self.mix = nn.Linear(5, 3)
        self.seen = 0

    def encode(self, spots):
        self.seen += len(spots.patches)
        return self.scale * self.conv(spots.patches).flatten(2)[..., 0]


def still(seed: int = 0) -> Still:
    torch.manual_seed(seed)
    return Still()


def raw(spots: int = 9) -> Section:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (spots, 8, 8, 3), dtype=np.uint8)
    counts = AnnData(rng.poisson(2, (spots, 4)).astype(np.float32), obsm={"spatial": rng.uniform(0, 99, (spots, 2))})
    counts.obs_names, counts.var_names = pd.Index([f"s{i}" for i in range(spots)]), pd.Index(list("ABCD"))
    return Section("S", counts, 1.0, ArrayPatches(pixels, 112.0, section="S"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def section(tmp_path: Path, said: list[str]):
    """Open the section in the cache, as each process does."""

    def section() -> Section:
        return SectionCache(tmp_path / "cache", FileDigests(), said.append).section("key", raw, SIZE)

    return section


def encode(section: Section, backbone: Still, part: Part = PART, size: PatchSize = SIZE, symmetries=8):
    digest = encoder_digest(part, backbone, size, CPU)
    return encode_section(section, backbone, digest, size, symmetries, CPU)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/key").glob("features-*.npy"))


def test_encoded_once_then_found(tmp_path: Path, section) -> None:
    first = encode(section(), maker := still())
    assert not first.was_there and maker.seen == 8 * 9
    found = encode(section(), other := still())
    assert found.was_there and other.seen == 0
    assert first.features.shape == (8, 9, 5) and first.features.dtype == np.float32
    np.testing.assert_array_equal(found.features, first.features)
    assert len(files(tmp_path)) == 1 and not found.features.flags.writeable  # mapped, read-only


def test_the_features_are_those_of_the_patches(section) -> None:
    patches = torch.from_numpy(section().patches.read(np.arange(9), 4, 112.0)) / 255
    with torch.no_grad():
        direct = [still().encode(replace(toy_spots(9, patch_px=4), patches=p)) for p in (patches, patches.flip(-1))]
    features = encode(section(), still()).features
    np.testing.assert_allclose(features[0], direct[0], atol=1e-6)
    np.testing.assert_allclose(features[1], direct[1], atol=1e-6)


class Ending(Still):
    """Ends after so many patches."""

    left = 8 * 64

    def encode(self, spots):
        self.left -= len(spots.patches)
        if self.left < 0:
            raise KeyboardInterrupt
        return super().encode(spots)


def test_encoding_goes_on_where_it_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agl_bench.data.pieces.PIECE", 64)
    cache = SectionCache(tmp_path / "cache", FileDigests(), pytest.fail)
    section = cache.section("key", lambda: raw(150), SIZE)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        encode(section, Ending())
    there = encode(section, rest := still())
    assert rest.seen == 8 * (150 - 64)
    whole = SectionCache(tmp_path / "other", FileDigests(), pytest.fail).section("key", lambda: raw(150), SIZE)
    np.testing.assert_array_equal(there.features, encode(whole, still()).features)
    assert not list((tmp_path / "cache/key").glob("*.pieces"))


def test_unturned_patches_are_the_first_of_eight(tmp_path: Path, section) -> None:
    eight = encode(section(), still())
    one = encode(section(), still(), symmetries=1)
    assert one.was_there and one.features.shape == (1, 9, 5)
    np.testing.assert_array_equal(one.features[0], eight.features[0])


def test_one_does_not_stand_for_eight(tmp_path: Path, section) -> None:
    assert encode(section(), still(), symmetries=1).features.shape == (1, 9, 5)
    assert not encode(section(), still()).was_there


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("nothing", True),
        ("trained part", True),
        ("learning rate", True),
        ("setting", False),
        ("weights", False),
        ("buffer", False),
        ("name", False),
        ("provider", False),
        ("code", False),
        ("library", False),
        ("width on the tissue", False),
        ("file", False),
    ],
)
def test_what_makes_it_encode_anew(change: str, found: bool, tmp_path: Path, section, said, monkeypatch) -> None:
    encode(section(), still())
    backbone, part, size = still(), PART, SIZE
    with torch.no_grad():
        if change == "trained part":
            backbone.mix.weight.add_(1)
        elif change == "weights":
            backbone.conv.weight[0, 0, 0, 0] += 1e-3
        elif change == "buffer":  # though it is in no state
            backbone.scale.fill_(2.1)
    if change == "learning rate":
        part = replace(PART, settings=PART.settings | {"learning_rate": 1e-3})
    elif change == "setting":
        part = replace(PART, settings=PART.settings | {"depth": 2})
    elif change == "name":
        part = replace(PART, name="other")
    elif change == "provider":
        part = replace(PART, provider="made 1.1")
    elif change == "code":
        part = replace(PART, source="0b")
    elif change == "library":
        monkeypatch.setattr(encoded, "version", lambda name: "9.9")
    elif change == "width on the tissue":
        size = PatchSize(4, 56.0)
    elif change == "file":
        (written,) = files(tmp_path)
        written.write_bytes(written.read_bytes()[:-4])
    again = encode(section(), backbone, part, size)
    assert (again.was_there, backbone.seen) == (found, 0 if found else 72)
    if change == "file":
        assert "features-" in said[0] and "is damaged" in said[0] and "made again" in said[0]
        assert encode(section(), still()).was_there


def test_shuffled_patches_use_the_same_file(tmp_path: Path, section) -> None:
    plain = encode(section(), still()).features
    shuffled = shuffle_patches(section(), 3)
    found = encode(shuffled, never := still())
    assert found.was_there and never.seen == 0
    np.testing.assert_array_equal(found.features, plain[:, shuffled.patches.order])
    patches = torch.from_numpy(shuffled.patches.read(np.arange(9), 4, 112.0)) / 255
    with torch.no_grad():
        direct = still().encode(replace(toy_spots(9, patch_px=4), patches=patches))
    np.testing.assert_allclose(found.features[0], direct, atol=1e-6)


PROCESS = """
    import runpy, sys, time, types
    from pathlib import Path

    t = types.SimpleNamespace(**runpy.run_path(sys.argv[3]))

    class Slow(t.Still):
        def encode(self, spots):
            time.sleep(float(sys.argv[2]))
            print("spots", len(spots.patches), flush=True)
            return super().encode(spots)

    t.torch.manual_seed(0)
    section = t.SectionCache(Path(sys.argv[1]) / "cache", t.FileDigests(), print).section("key", t.raw, t.SIZE)
    features = t.encode_section(section, Slow(), "digest", t.SIZE, 8, t.CPU).features
    print("sum", float(features.sum()))
"""


def start(tmp_path: Path, pause: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", textwrap.dedent(PROCESS), str(tmp_path), str(pause), __file__]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_encode_once(tmp_path: Path, section) -> None:
    section()
    processes = [start(tmp_path, 0.1) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert sorted(map(len, said)) == [1, 9]  # eight symmetries by one of them, none by the other
    assert said[0][-1] == said[1][-1]


def test_killed_while_encoding(tmp_path: Path, section) -> None:
    section()
    process = start(tmp_path, 0.2)
    assert process.stdout is not None and process.stdout.readline() == "spots 9\n"
    process.kill()
    process.communicate()
    assert files(tmp_path) == []
    said = start(tmp_path, 0).communicate(timeout=120)[0].splitlines()
    assert len(said) == 9 and len(files(tmp_path)) == 1


FROZEN = """
    import torch
    from torch import nn
    from agl_bench import Backbone, hookimpl

    ENCODED = []

    class Still(Backbone):
        '''A trained layer on a frozen random one.'''
        reference = "test"
        frozen, late_prefixes, patch_px, width, learning_rate = True, ("mix.",), 16, 6, 1e-2

        def __init__(self, example):
            super().__init__(example)
            self.register_buffer("layer", torch.linspace(-1, 1, 768 * 5).view(5, 768))
            self.mix = nn.Linear(5, self.width)

        def encode(self, spots):
            ENCODED.append(len(spots.position))
            return torch.tanh(spots.patches.flatten(1) @ self.layer.T)

        def forward(self, spots):
            return torch.tanh(self.mix(spots.embedding))

    @hookimpl
    def register_backbones():
        return {"still": Still}
"""


def test_results_do_not_depend_on_where_features_are_from(tmp_path: Path, grid) -> None:
    """Encoded, found by another process's eyes, and encoded without a folder to keep them: bit for bit."""
    path = tmp_path / "still.py"
    path.write_text(textwrap.dedent(FROZEN))
    results, sentences, counts = [], [], []
    for folder in (tmp_path / "kept", tmp_path / "kept", None):
        cells, bench = grid("pgl", files=[path], backbone=["still"])
        if folder is not None:
            bench = Bench(bench.plugins, bench.root, choose_device("cpu"), Preparation(bench.root, folder))
        module = sys.modules[bench.plugins.entry("still", "backbone").load().__module__]
        module.ENCODED.clear()
        items = [item for spec, plan in cells for item in bench.train(spec, plan)]
        found = [item for item in items if isinstance(item, Result)]
        results.append([(r.scores, r.genes.to_csv(), r.epochs.drop(columns="seconds").to_csv()) for r in found])
        sentences.append([i for i in items if isinstance(i, str)])
        counts.append(sum(module.ENCODED))
    assert results[0] == results[1] == results[2] and len(results[0]) == 2
    assert counts == [640, 0, 640]  # 2 sections × 40 spots × 8 symmetries
    assert "features of 80 of 80 spots encoded in" in sentences[0][0] and len(sentences[0]) == 1
    assert sentences[1][0].startswith("features of 80 spots found beside the prepared sections (")
