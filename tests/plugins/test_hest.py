"""The HEST-1k reader on files in its layout that the tests write; the hub's functions are replaced."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from huggingface_hub import errors

from agl_bench import BadSection, FetchFailed, MissingData
from agl_bench.data.check import check_section
from agl_bench.interfaces.tunable import tunables
from agl_bench_plugins.datasets.bowel_a import BowelA
from agl_bench_plugins.datasets.bowel_b import BowelB
from agl_bench_plugins.datasets.heart import Heart
from agl_bench_plugins.datasets.hest import Hest, HestSlides
from agl_bench_plugins.datasets.ovary import Ovary

# The library that huggingface_hub connects with: httpx or its successor, by version.
hub_http = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])

BARCODES = ["AA-1", "BB-1", "CC-1", "DD-1"]


def write_slide(root: Path, slide: str, patches: list[str], metadata: str | None) -> np.ndarray:
    folder = root / "hest"
    for kind in ("st", "patches", "metadata"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    anndata.AnnData(
        scipy.sparse.csr_matrix(np.arange(12, dtype=np.float32).reshape(4, 3)),
        obs=pd.DataFrame(index=BARCODES),
        var=pd.DataFrame(index=["G1", "G2", "G3"]),
        obsm={"spatial": np.array([[100.0, 100], [300, 100], [100, 300], [300, 300]])},
    ).write_h5ad(folder / "st" / f"{slide}.h5ad")
    img = np.random.default_rng(0).integers(0, 256, (len(patches), 224, 224, 3), dtype=np.uint8)
    with h5py.File(folder / "patches" / f"{slide}.h5", "w") as file:
        file["img"] = img
        file["coords"] = np.zeros((len(patches), 2), dtype=np.int64)
        file["barcode"] = np.array(patches, dtype="S")[:, None]
    if metadata is not None:
        (folder / "metadata" / f"{slide}.json").write_text(metadata)
    return img


def test_slide(tmp_path: Path) -> None:
    img = write_slide(
        tmp_path, "TENX65", ["DD-1", "ZZ-1", "AA-1"], '{"pixel_size_um_estimated": 0.4, "patient": "Patient 1"}'
    )
    dataset = Ovary()
    assert dataset.sections(tmp_path) == {"TENX65": "Patient 1"}
    (section,) = dataset.load(tmp_path)
    check_section(section)
    assert (section.name, section.um_per_px, section.donor, section.dropped_spots) == ("TENX65", 0.4, "Patient 1", 2)
    assert list(section.counts.obs_names) == ["AA-1", "DD-1"]
    assert section.counts.X.toarray().tolist() == [[0, 1, 2], [9, 10, 11]]
    assert section.patches is not None
    read = section.patches.read(np.arange(2), 224, 112.0)
    np.testing.assert_array_equal(read, img[[2, 0]].transpose(0, 3, 1, 2))
    assert section.patches.read(np.array([1]), 32, 112.0).shape == (1, 3, 32, 32)
    assert [path.name for path in dataset.files(tmp_path, "TENX65")] == ["TENX65.h5ad", "TENX65.h5", "TENX65.json"]


@pytest.mark.parametrize(
    ("metadata", "um_per_px"),
    [
        (None, 0.5),  # 100 µm for 200 px
        ('{"pixel_size_um_estimated": NaN, "patient": NaN}', 0.5),
        ('{"pixel_size_um_estimated": null, "inter_spot_dist": 200.0}', 1.0),
    ],
)
def test_pixel_size_from_the_pitch(tmp_path: Path, metadata: str | None, um_per_px: float) -> None:
    write_slide(tmp_path, "TENX65", ["AA-1"], metadata)  # one spot is left, all four give the pitch
    (section,) = Ovary().load(tmp_path)
    assert section.um_per_px == um_per_px and section.donor == ""


def test_bins_do_not_tell_the_size_of_a_pixel(tmp_path: Path) -> None:
    write_slide(tmp_path, "TENX65", BARCODES, '{"st_technology": "Visium HD", "inter_spot_dist": 2.0}')
    with pytest.raises(BadSection, match="state no pixel_size_um_estimated, and not how wide its bins are"):
        Ovary().load(tmp_path)


def test_heart_has_four_slides_of_unknown_donors(tmp_path: Path) -> None:
    for slide in Heart.ids:
        write_slide(tmp_path, slide, BARCODES, '{"pixel_size_um_estimated": 0.7, "patient": ""}')
    assert Heart().sections(tmp_path) == dict.fromkeys(("MISC118", "MISC119", "MISC120", "MISC121"), "")
    assert [section.name for section in Heart().load(tmp_path)] == list(Heart.ids)


@pytest.mark.parametrize(
    "metadata",
    [
        '{"pixel_size_um_estimated": 0.5, "st_technology": "Visium"}',
        '{"pixel_size_um_estimated": 0.55, "st_technology": "Visium", "pixel_size_um_embedded": 0.25}',
        '{"pixel_size_um_estimated": 1.0, "st_technology": "Spatial Transcriptomics", "inter_spot_dist": 200}',
        '{"pixel_size_um_estimated": 0.4, "st_technology": "Visium HD"}',
        '{"pixel_size_um_estimated": 0.64, "st_technology": "Visium HD", "inter_spot_dist": 2.0, "spot_diameter": 2.0}',
        '{"pixel_size_um_estimated": 0.08, "st_technology": "Visium HD", "inter_spot_dist": 16}',
        '{"pixel_size_um_estimated": 0.5, "st_technology": "Xenium", "inter_spot_dist": null, "spot_diameter": null}',
        '{"pixel_size_um_estimated": 0.5, "inter_spot_dist": NaN, "fullres_px_width": 350, "fullres_px_height": 350}',
    ],
)
def test_metadata_that_agree_with_the_spots(tmp_path: Path, metadata: str) -> None:
    write_slide(tmp_path, "TENX65", BARCODES, metadata)
    (section,) = Ovary().load(tmp_path)
    check_section(section)
    assert section.um_per_px == json.loads(metadata)["pixel_size_um_estimated"]


def test_patch_is_as_wide_as_its_file_states(tmp_path: Path) -> None:
    img = write_slide(tmp_path, "TENX65", BARCODES, '{"pixel_size_um_estimated": 0.5}')
    with h5py.File(tmp_path / "hest" / "patches" / "TENX65.h5", "r+") as file:
        file["img"].attrs.update(
            {"patch_size_src": 448, "patch_size_target": 224, "pixel_size": 0.5, "downsample": 2.0}
        )
    (section,) = Ovary().load(tmp_path)
    assert section.patches is not None
    np.testing.assert_array_equal(
        section.patches.read(np.arange(4), 112, 112.0), img[:, 56:168, 56:168].transpose(0, 3, 1, 2)
    )


def test_repeated_gene_symbols_are_told_apart(tmp_path: Path) -> None:
    write_slide(tmp_path, "TENX65", BARCODES, "{}")
    path = tmp_path / "hest" / "st" / "TENX65.h5ad"
    counts = anndata.read_h5ad(path)
    counts.var_names = ["G1", "G2", "G1"]
    counts.write_h5ad(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # anndata's advice is taken, and not for the user
        (section,) = Ovary().load(tmp_path)
    assert list(section.counts.var_names) == ["G1", "G2", "G1-1"]


def test_damaged_files(tmp_path: Path) -> None:
    write_slide(tmp_path, "TENX65", ["other"], "{}")
    with pytest.raises(BadSection, match="'other', the counts have 'AA-1'"):
        Ovary().load(tmp_path)
    for kind, name in (("metadata", "TENX65.json"), ("patches", "TENX65.h5"), ("st", "TENX65.h5ad")):
        write_slide(tmp_path, "TENX65", BARCODES, "{}")
        (tmp_path / "hest" / kind / name).write_bytes(b"text")
        with pytest.raises(BadSection, match=f"section 'TENX65': .*{name} cannot be read"):
            Ovary().load(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "command"),
    [
        (Heart(), "agl-bench fetch heart`"),
        (BowelA(), "agl-bench fetch bowel_a`"),
        (BowelB(), "agl-bench fetch bowel_b`"),
        (Ovary(), "agl-bench fetch ovary`"),
        (Hest(ids=("TENX65",)), "agl-bench fetch hest --set hest.ids=TENX65`"),
    ],
)
def test_absent_files_name_the_command(tmp_path: Path, dataset: HestSlides, command: str) -> None:
    for ask in (dataset.sections, dataset.load):
        with pytest.raises(MissingData, match=command):
            ask(tmp_path)


def test_generic_dataset(tmp_path: Path) -> None:
    for ask in (Hest().sections, Hest().load, Hest().fetch):
        with pytest.raises(MissingData, match=r"hest\.ids"):
            ask(tmp_path)
    write_slide(tmp_path, "TENX1", BARCODES, "{}")
    assert list(Hest(ids=("TENX1",)).sections(tmp_path)) == ["TENX1"]
    assert list(tunables(Hest)) == ["ids", "path", "embeddings", "revision"]
    assert list(tunables(Heart)) == ["embeddings", "revision"]


class Hub:
    """Stands in for Hugging Face: some files, and what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = {"st/TENX65.h5ad": b"st", "patches/TENX65.h5": b"patches", "metadata/TENX65.json": b"{}"}
        self.sent: dict[str, bytes] = {}  # what arrives, where it differs
        self.downloads: list[str] = []
        self.before: Callable[[str], None] = lambda name: None
        self.failure: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "HfApi", self._api)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self._download)

    def _api(self, *, token: str) -> SimpleNamespace:
        assert token == "secret"
        return SimpleNamespace(dataset_info=self._info, get_paths_info=self._paths)

    def _info(self, repository: str, *, revision: str) -> SimpleNamespace:
        if self.failure is not None:
            raise self.failure
        assert (repository, revision) == ("MahmoodLab/hest", "main")
        return SimpleNamespace(sha="c0ffee")

    def _paths(self, repository: str, paths: list[str], *, revision: str, repo_type: str) -> list[SimpleNamespace]:
        assert (revision, repo_type) == ("c0ffee", "dataset")
        entries = []
        for path in paths:
            if path in self.content:
                data = self.content[path]
                lfs = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if not path.endswith("json") else None
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                entries.append(SimpleNamespace(path=path, size=len(data), lfs=lfs, blob_id=blob))
        return entries

    def _download(
        self, repository: str, name: str, *, repo_type: str, revision: str, local_dir: Path, token: str
    ) -> str:
        self.before(name)
        self.downloads.append(name)
        path = Path(local_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.sent.get(name, self.content[name]))
        return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    for name in ("AGL_BENCH_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    return Hub(monkeypatch)


def finished(root: Path) -> dict[str, bytes]:
    """What looks finished: files in their place."""
    folder = root / "hest"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for kind in ("st", "patches", "metadata")
        for path in (folder / kind).rglob("*")
        if path.is_file()
    }


def test_fetch_brings_the_named_files_once(tmp_path: Path, hub: Hub) -> None:
    Ovary().fetch(tmp_path)
    assert finished(tmp_path) == hub.content
    assert hub.downloads == ["metadata/TENX65.json", "st/TENX65.h5ad", "patches/TENX65.h5"]
    Ovary().fetch(tmp_path)
    assert len(hub.downloads) == 3


@pytest.mark.parametrize("name", ["patches/TENX65.h5", "metadata/TENX65.json"])
@pytest.mark.parametrize("damage", [b"x", b"patchez", b"[]"])
def test_damaged_download(tmp_path: Path, hub: Hub, name: str, damage: bytes) -> None:
    hub.sent[name] = damage
    with pytest.raises(FetchFailed, match=f"{name} arrived damaged.*agl-bench fetch ovary"):
        Ovary().fetch(tmp_path)
    assert name not in finished(tmp_path)
    assert not (tmp_path / "hest" / ".incoming" / name).exists()
    hub.sent.clear()
    Ovary().fetch(tmp_path)
    assert finished(tmp_path) == hub.content


def test_damaged_file_on_disk_is_replaced(tmp_path: Path, hub: Hub) -> None:
    Ovary().fetch(tmp_path)
    (tmp_path / "hest" / "st" / "TENX65.h5ad").write_bytes(b"xx")  # the right size
    Ovary().fetch(tmp_path)
    assert finished(tmp_path) == hub.content and hub.downloads[3:] == ["st/TENX65.h5ad"]


def test_interrupted_download_goes_on_where_it_stopped(tmp_path: Path, hub: Hub) -> None:
    def cut(name: str) -> None:
        if name.startswith("patches"):
            raise hub_http.ConnectError("connection lost")

    hub.before = cut
    with pytest.raises(FetchFailed, match=r"interrupted \(connection lost\).*what has arrived is kept"):
        Ovary().fetch(tmp_path)
    # Metadata came first: with counts and patches alone the slide would be there without its donor.
    assert list(finished(tmp_path)) == ["st/TENX65.h5ad", "metadata/TENX65.json"]
    hub.before = lambda name: None
    Ovary().fetch(tmp_path)
    assert hub.downloads == ["metadata/TENX65.json", "st/TENX65.h5ad", "patches/TENX65.h5"]


def answer(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response = hub_http.Response(status, request=hub_http.Request("GET", "https://example.org"))
    return kind("refused", response=response)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (answer(errors.GatedRepoError, 403), "refused access.*accept the conditions.*HF_TOKEN=.*agl-bench fetch ovary"),
        (answer(errors.RepositoryNotFoundError, 401), "refused access.*create a token"),
        (answer(errors.HfHubHTTPError, 401), r"refused access \(401\).*accept the conditions"),
        (answer(errors.HfHubHTTPError, 403), r"refused access \(403\).*accept the conditions"),
        (answer(errors.HfHubHTTPError, 500), "answered with an error.*again later"),
        (answer(errors.RevisionNotFoundError, 404), "no revision 'main'"),
        (hub_http.ConnectError("no route"), r"interrupted \(no route\); check the network"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_refusals_say_what_to_do(tmp_path: Path, hub: Hub, failure: Exception, message: str) -> None:
    hub.failure = failure
    with pytest.raises(FetchFailed, match=message):
        Ovary().fetch(tmp_path)


def test_slide_that_the_repository_lacks(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(FetchFailed, match=r"has no 'metadata/TENX9999\.json' at revision 'main'"):
        Hest(ids=("TENX9999",)).fetch(tmp_path)


def test_no_token(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FetchFailed, match=r"HF_TOKEN is not set\. .*accept.*export HF_TOKEN=.*agl-bench fetch ovary"):
        Ovary().fetch(tmp_path)
    assert hub.downloads == []


@pytest.mark.parametrize("name", ["AGL_BENCH_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(FetchFailed, match=f"{name} forbids downloads, and 3 files of 'ovary' are absent"):
        Ovary().fetch(tmp_path)
    write_slide(tmp_path, "TENX65", BARCODES, json.dumps({}))
    Ovary().fetch(tmp_path)  # nothing is absent: nothing to do
    assert hub.downloads == []
