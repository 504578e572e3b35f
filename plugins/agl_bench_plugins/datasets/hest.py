"""Slides of HEST-1k (Jaume et al. 2024), as MahmoodLab/hest on Hugging Face stores them.

<data folder>/hest/st/<id>.h5ad            raw counts, spots × genes; obsm["spatial"] = (x, y) in pixels of the scan
<data folder>/hest/patches/<id>.h5         img (patches, 224, 224, 3) uint8 at 0.5 µm for a pixel, barcode (patches, 1)
<data folder>/hest/metadata/<id>.json      pixel_size_um_estimated, inter_spot_dist, patient, st_technology, organ, …

With the setting `embeddings`, a folder (absolute or relative to the data folder) of <id>.h5 with features of the
patches: `embeddings` and `barcodes` as HEST-bench writes them, or `features` and `coords` as TRIDENT does.

The data are gated: they come with `agl-bench fetch NAME` once their licence is accepted. A copy of that folder made by
other means works as well. Spots without a patch (no tissue, outside the scan) are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from scipy.spatial import KDTree

from agl_bench import (
    ArrayPatches,
    BadSection,
    Dataset,
    FetchFailed,
    MissingData,
    Section,
    is_offline,
    known_names,
    read_embedding,
    read_h5ad,
)
from agl_bench_plugins.datasets.entries import is_data
from agl_bench_plugins.datasets.folder import positions_of, positive_or_0

_REPOSITORY = "MahmoodLab/hest"
_PATCH_UM = 112.0  # 224 px at 0.5 µm, where a file does not say otherwise
_VISIUM_PITCH_UM = 100.0
_BINNED = "visium hd"  # whose metadata state the 2 µm of the chip, while the slides hold bins of 128 µm
_FEW = 4  # spots whose distances say little
_PITCH_FACTOR = 1.25  # estimated sizes of a pixel are good to a few percent; mistaken magnifications are factors
_EVEN = 1.1
_INCOMING = ".incoming"  # downloads stay here until they are verified, so that a file in its place is a good one


class HestSlides(Dataset):
    """Some slides of HEST-1k; a subclass names them.

    Args:
        embeddings: folder of features computed beforehand, absolute or relative to the data folder; "" = none.
        revision: branch, tag or commit of the repository to fetch from.

    Attributes:
        called: name of the plug-in, for messages.
        ids: HEST ids, in order.
        folder: where the files are, absolute or relative to the data folder.
    """

    citation = "Jaume et al. 2024, HEST-1k, NeurIPS Datasets and Benchmarks, arXiv:2406.16192"
    licence = "CC BY-NC-SA 4.0"
    technology = "as the metadata of each slide state it"
    tissue = "as the metadata of each slide state it"
    called: str
    ids: tuple[str, ...] = ()
    folder: str = "hest"

    def __init__(self, *, embeddings: str = "", revision: str = "main") -> None:
        self.embeddings = embeddings
        self.revision = revision

    def sections(self, root: Path) -> dict[str, str]:
        """The ids, each with the patient that its metadata name."""
        self._require(root, self.ids)
        return {slide: _donor(_metadata(self._paths(root, slide)[2], slide)) for slide in self.ids}

    def names(self, root: Path) -> list[str]:
        """The ids."""
        return list(self.ids)

    def read(self, root: Path, name: str) -> Section:
        """A slide with raw counts."""
        self._require(root, (name,))
        section = _read(name, *self._paths(root, name))
        if self.embeddings:
            section.embedding = read_embedding(
                self._embedding(root, name), section.counts.obs_names, positions_of(section.counts), section=name
            )
        return section

    def files(self, root: Path, name: str) -> list[Path]:
        """Counts, patches and, where they are there, metadata and features."""
        self._require(root, (name,))
        features = [self._embedding(root, name)] if self.embeddings else []
        return [path for path in self._paths(root, name) if path.is_file()] + features

    def _paths(self, root: Path, slide: str) -> tuple[Path, Path, Path]:
        """Counts, patches, metadata."""
        folder = root / Path(self.folder).expanduser()
        counts, patches, metadata = (folder / kind / f"{slide}.{ending}" for kind, ending in _KINDS)
        return counts, patches, metadata

    def _embedding(self, root: Path, slide: str) -> Path:
        path = root / Path(self.embeddings).expanduser() / f"{slide}.h5"
        if not path.is_file():
            raise MissingData(
                f"slide '{slide}': {path} is not there; put its features there, or leave {self.called}.embeddings empty"
            )
        return path

    def fetch(self, root: Path) -> None:
        """Download what is absent or differs from the repository; every file is verified before it gets its name."""
        # Metadata first: a slide with counts and patches counts as there, and without them its donor is not known.
        wanted = [f"{kind}/{slide}.{ending}" for slide in self.ids for kind, ending in (_KINDS[2], *_KINDS[:2])]
        folder = root / Path(self.folder).expanduser()
        absent = [name for name in wanted if not (folder / name).is_file()]
        token = os.environ.get("HF_TOKEN", "").strip()
        offline = is_offline("HF_HUB_OFFLINE")
        if not absent and (offline or not token):
            return  # every file was verified when it came
        if offline:
            raise FetchFailed(
                f"{offline} forbids downloads, and {len(absent)} files of '{self.called}' are absent, the first is "
                f"{folder / absent[0]}; unset {offline}, or copy the files there"
            )
        if not token:
            raise FetchFailed(f"HF_TOKEN is not set. {self._steps()}")
        self._download(folder, wanted, token)

    def _download(self, folder: Path, wanted: list[str], token: str) -> None:
        # Imported here: it takes longer than the rest of the plug-in, and only `fetch` needs it.
        import huggingface_hub
        from huggingface_hub import errors

        # The library of the connection differs between versions of huggingface_hub (requests, httpx);
        # its HTTPError is the base of every error of the connection that is no OSError.
        broken = (OSError, ValueError, errors.HTTPError)
        try:
            api = huggingface_hub.HfApi(token=token)
            # One commit for all files, even if the branch moves on meanwhile.
            commit = api.dataset_info(_REPOSITORY, revision=self.revision).sha
            listed = api.get_paths_info(_REPOSITORY, wanted, revision=commit, repo_type="dataset")
            known = {entry.path: entry for entry in listed}
            for name in wanted:
                if name not in known:
                    raise FetchFailed(
                        f"{_REPOSITORY} on Hugging Face has no '{name}' at revision '{self.revision}'; check the id"
                    )
            for name in wanted:
                place = folder / name
                if place.is_file() and _is_same(place, known[name]):
                    continue
                huggingface_hub.hf_hub_download(
                    _REPOSITORY, name, repo_type="dataset", revision=commit, local_dir=folder / _INCOMING, token=token
                )
                arrived = folder / _INCOMING / name
                if not _is_same(arrived, known[name]):
                    arrived.unlink()
                    raise FetchFailed(
                        f"{name} arrived damaged: its size or checksum is not what {_REPOSITORY} on Hugging Face "
                        f"states; it was removed, run `{self._command()}` again"
                    )
                place.parent.mkdir(parents=True, exist_ok=True)
                arrived.replace(place)
        except errors.RevisionNotFoundError:
            raise FetchFailed(
                f"{_REPOSITORY} on Hugging Face has no revision '{self.revision}'; use main, a tag or a commit"
            ) from None
        except errors.RepositoryNotFoundError:  # also GatedRepoError; a token that is not valid reads as "not found"
            raise FetchFailed(f"Hugging Face refused access to {_REPOSITORY}. {self._steps()}") from None
        except errors.HfHubHTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                raise FetchFailed(f"Hugging Face refused access ({status}). {self._steps()}") from None
            raise FetchFailed(
                f"Hugging Face answered with an error ({_first_line(error)}); what has arrived is kept, "
                f"run `{self._command()}` again later"
            ) from None
        except broken as error:
            raise FetchFailed(
                f"the download was interrupted ({_first_line(error)}); check the network and the space on the disk; "
                f"what has arrived is kept, run `{self._command()}` again"
            ) from None

    def _command(self) -> str:
        """What brings the files."""
        return f"agl-bench fetch {self.called}"

    def _steps(self) -> str:
        return (
            f"{_REPOSITORY} is gated: 1. log in to Hugging Face and accept the conditions on the page of the dataset "
            f"{_REPOSITORY}; 2. create a token with read access in the settings of your account; "
            f"3. export HF_TOKEN=...; 4. run `{self._command()}` again"
        )

    def _require(self, root: Path, slides: tuple[str, ...]) -> None:
        for slide in slides:
            for path in self._paths(root, slide)[:2]:  # metadata can be done without
                if not path.is_file():
                    raise MissingData(
                        f"slide '{slide}': {path} is not there; run `{self._command()}`, "
                        f"or set AGL_BENCH_DATA to the folder that holds hest/"
                    )


class Hest(HestSlides):
    """Any sections of HEST-1k: `--datasets hest:TENX65,TENX89`.

    Args:
        ids: HEST ids, in order. They name the sections.
        path: the folder of the files, absolute or relative to the data folder.
        embeddings: folder of features computed beforehand, absolute or relative to the data folder; "" = none.
        revision: branch, tag or commit of the repository to fetch from.
    """

    called = "hest"
    argument = "ids"

    def __init__(
        self, *, ids: tuple[str, ...] = (), path: str = "hest", embeddings: str = "", revision: str = "main"
    ) -> None:
        super().__init__(embeddings=embeddings, revision=revision)
        self.ids = ids
        self.folder = path

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether it is a folder with st/ and patches/ or metadata/."""
        return (path / "st").is_dir() and any((path / kind).is_dir() for kind in ("patches", "metadata"))

    @classmethod
    def settings_at(cls, path: Path) -> dict[str, object]:
        """The folder, and every slide of which there are counts or patches."""
        slides = {
            file.stem for kind, ending in _KINDS[:2] for file in (path / kind).glob(f"*.{ending}") if is_data(file)
        }
        return {"path": str(path), "ids": ",".join(sorted(slides))}

    def names(self, root: Path) -> list[str]:
        """The ids."""
        self._require_ids()
        return super().names(root)

    def _command(self) -> str:
        return f"agl-bench fetch hest --set hest.ids={','.join(self.ids)}"

    def fetch(self, root: Path) -> None:
        """Download what is absent or differs from the repository."""
        self._require_ids()
        super().fetch(root)

    def _require(self, root: Path, slides: tuple[str, ...]) -> None:
        self._require_ids()
        super()._require(root, slides)

    def _require_ids(self) -> None:
        if not self.ids:
            raise MissingData("dataset 'hest' names no slides; give --set hest.ids=TENX65,TENX89 or others of HEST-1k")


_KINDS = (("st", "h5ad"), ("patches", "h5"), ("metadata", "json"))
# What the card of a section shows, by its name in the metadata.
_FACTS = ("st_technology", "species", "organ", "tissue", "disease_state", "oncotree_code", "dataset_title", "license")


def _read(slide: str, counts_path: Path, patches_path: Path, metadata_path: Path) -> Section:
    metadata = _metadata(metadata_path, slide)
    counts = read_h5ad(counts_path, section=slide)
    # A few symbols stand for two Ensembl ids in 10x references. The first keeps its name, the next becomes NAME-1.
    counts.var_names_make_unique()
    positions = positions_of(counts)
    um_per_px = _um_per_px(slide, metadata, positions)  # from all spots, before some are left out
    patches, kept = ArrayPatches.matched(
        patches_path, counts.obs_names, positions=positions, um_per_px=um_per_px, section=slide
    )
    patches.side_um = patches.side_um or _PATCH_UM
    if positions is not None:
        _check_slide(slide, counts, positions[kept], kept, metadata, um_per_px)
    dropped = counts.n_obs - len(kept)
    return Section(
        slide,
        counts[kept].copy() if dropped else counts,
        um_per_px,
        patches=patches,
        donor=_donor(metadata),
        dropped_spots=dropped,
        facts={key: metadata[key].strip() for key in _FACTS if isinstance(metadata.get(key), str)},
    )


def _metadata(path: Path, slide: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadSection(slide, f"{path} cannot be read as JSON ({_first_line(error)}); fetch it again") from None
    if not isinstance(table, dict):
        raise BadSection(slide, f"{path} holds a {type(table).__name__}, not an object with names; fetch it again")
    return table


def _donor(metadata: dict[str, Any]) -> str:
    """The patient; "" where the field is blank (NaN in the file), as for the slides of HEART."""
    try:
        known = known_names(metadata.get("patient"))
    except TypeError:
        known = ()
    return known[0] if len(known) == 1 else ""


def _um_per_px(slide: str, metadata: dict[str, Any], positions: np.ndarray | None) -> float:
    """Pixel size of the scan, µm.

    pixel_size_um_embedded is left alone: it is what the scanner wrote, often of another magnification.
    """
    stated = positive_or_0(metadata.get("pixel_size_um_estimated"))
    known = np.empty((0, 2)) if positions is None else positions[np.isfinite(positions).all(axis=1)]
    if len(known) < 2:
        if stated:
            return stated
        raise BadSection(
            slide,
            "its metadata state no pixel_size_um_estimated, and obsm['spatial'] has no two spots to derive it from; "
            "fetch its metadata",
        )
    distance = KDTree(known).query(known, k=2)[0][:, 1]  # (spots,) px; column 0 is the spot itself
    if stated:
        _check_pitch(slide, metadata, distance * stated)
        return stated
    # Not stated: neighbouring spots of Visium are 100 µm apart, so their distance in pixels gives the size of a pixel.
    pitch_px = float(np.median(distance))
    if not pitch_px > 0:
        raise BadSection(slide, "its metadata state no pixel_size_um_estimated, and its spots lie on top of each other")
    if _technology(metadata) == _BINNED:
        raise BadSection(
            slide, "its metadata state no pixel_size_um_estimated, and not how wide its bins are; fetch its metadata"
        )
    return (positive_or_0(metadata.get("inter_spot_dist")) or _VISIUM_PITCH_UM) / pitch_px


def _technology(metadata: dict[str, Any]) -> str:
    return str(metadata.get("st_technology", "")).strip().lower()


def _check_pitch(slide: str, metadata: dict[str, Any], distance_um: np.ndarray) -> None:
    """Refuse a stated pixel size at which neighbouring spots are not as far apart as the metadata say.

    Spots may be few and have no neighbours; that they are nearer than the pitch, or all the same distance farther, has
    no such reason.
    """
    technology = _technology(metadata)
    pitch_um = positive_or_0(metadata.get("inter_spot_dist")) or (_VISIUM_PITCH_UM if technology == "visium" else 0.0)
    if not pitch_um or technology == _BINNED or len(distance_um) < _FEW:
        return
    low, middle, high = np.quantile(distance_um, (0.1, 0.5, 0.9))
    if low < pitch_um / _PITCH_FACTOR or (low > pitch_um * _PITCH_FACTOR and high < low * _EVEN):
        raise BadSection(
            slide,
            f"according to pixel_size_um_estimated its spots are {middle:.3g} µm apart, but the array named in its "
            f"metadata has spots {pitch_um:g} µm apart; fetch the metadata again, or correct the pixel size",
        )


def _check_slide(
    slide: str,
    counts: anndata.AnnData,
    positions: np.ndarray,
    kept: np.ndarray,
    metadata: dict[str, Any],
    um_per_px: float,
) -> None:
    """Refuse spots whose patches cannot be of a scan of the stated size, and spots of a wrong size."""
    size = [positive_or_0(metadata.get(key)) for key in ("fullres_px_width", "fullres_px_height")]
    if all(size):
        beyond = _PATCH_UM / um_per_px / 2  # a patch may leave the scan by half
        outside = np.flatnonzero(((positions < -beyond) | (positions > np.array(size) + beyond)).any(axis=1))
        if len(outside):
            x, y = positions[outside[0]]
            raise BadSection(
                slide,
                f"spot '{counts.obs_names[kept[outside[0]]]}' at x = {x:g}, y = {y:g} lies outside the scan, which is "
                f"{size[0]:g} × {size[1]:g} px by its metadata ({len(outside)} spots); use counts and metadata of the "
                f"same slide, in pixels of the full scan",
            )


def _is_same(path: Path, entry: Any) -> bool:
    """Whether a file has the size and checksum that the repository states (`huggingface_hub` RepoFile)."""
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        with path.open("rb") as file:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256)
    # Small files are plain git objects: SHA-1 over a header and the content.
    content = path.read_bytes()
    git_object = b"blob %d\0" % len(content) + content
    return bool(hashlib.sha1(git_object, usedforsecurity=False).hexdigest() == entry.blob_id)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
