"""Planted tissue whose helpful, harmful and useless genes are known; needs no download.

Source: the generator of agl-bench's own planted-data study. Spots lie on a hexagonal grid. Tissue programmes and
artefacts are smooth random fields over it (random Fourier features of a Gaussian process with an RBF kernel, plus a
nugget). The programmes show in the patch as nuclear density, nuclear size, eosin, lumens and fibres, the artefacts as
brightness, tint, blur and grain. The expected count of gene g in spot i is

    mean_g · exp(η_ig − var η_g / 2 + section effect_g) · library size_i,      η = fields · loadings,

drawn from a negative binomial, then thinned by dropout. What a gene loads on is its role: "programme" genes are worth
predicting, "artefact" genes can be predicted but pull a narrow representation away, "noise" genes cannot be predicted.

How it differs: the fields of a section are whitened, so that no artefact gene is related to a programme gene by
chance. Programme genes come as a few scarce, noisy markers, most of which become primary genes, and many abundant
helpers, which are ranked next. Patches of neighbouring spots share their fields but not their pixels, and `donors` is
a label: sections of one donor are no more alike than others.

The truth travels with the counts: `counts.var["role"]`, and `counts.layers["log_mean"]` (spots × genes), which is ln
of the expected count before library size and dropout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import scipy.fft
from anndata import AnnData
from scipy import sparse

from agl_bench import ArrayPatches, Dataset, Range, Section

# ---- Fields -----------------------------------------------------------------------------------------------------
PITCH_UM = 100.0  # between centres of neighbouring spots
LENGTH_UM = 300.0  # of the RBF kernel: three pitches
NUGGET = 0.15  # share of a field's variance that no neighbour knows
WAVES = 256  # random Fourier features of a field
PROGRAMMES = 4
ARTEFACTS = 4

# ---- Genes: (markers, helpers, artefact, noise) --------------------------------------------------------------------
# The seurat score compares a gene with genes of similar mean. Artefact and noise genes therefore span all means, and
# the few markers sit where no helpers are: they stand out most, helpers next, then artefact genes, then noise.
# Markers are noisy, which leaves the helpers something to add; artefact genes are clean and thus attractive.
KINDS = ("programme", "programme", "artefact", "noise")  # role of each column below
MARKER_SHARE = 0.2  # of the programme genes
MEAN_LOW = (1.2, 3.0, 0.8, 0.8)  # UMI, log-uniform from here …
MEAN_HIGH = (2.2, 5.0, 6.0, 6.0)  # … to here
AMPLITUDE = (0.75, 0.65, 0.5, 0.0)  # sd of η over spots
AMPLITUDE_JITTER = 0.1  # sd of ln amplitude over genes
THETA = (1.1, 5.0, 25.0, 8.0)  # size of the negative binomial: variance = mean + mean²/θ
DROPOUT = (0.15, 0.05, 0.05, 0.05)
LIBRARY_SD = 0.25  # of ln library size
SECTION_SD = 0.15  # of a gene's section effect, ln scale

# ---- Patches ------------------------------------------------------------------------------------------------------
PATCH_UM = 112.0
MARGIN_UM = 14.0  # rendered around a patch and cut off, so that blur does not wrap around
STAINS = ((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581))  # haematoxylin, eosin (Macenko et al. 2009), OD of R G B
STAIN_SD = 0.10  # of ln strength of each stain, per section
STAIN_TURN = 0.03  # sd added to the entries of the stain vectors, per section
GLASS = 238.0  # grey level without tissue
NUCLEI = 34.0  # expected in a patch
NUCLEI_GAIN = 0.45  # change of ln density for one sd of its programme
RADIUS_UM = 3.3
RADIUS_GAIN = 0.20
NUCLEUS_OD = 1.25
CYTOPLASM_OD = 0.12  # haematoxylin outside nuclei
EOSIN_OD = 0.5
EOSIN_GAIN = 0.28
LUMENS = 3  # candidates in a patch
LUMEN_UM = 8.0  # radius
LUMEN_GAIN = 0.55
RIM_OD = 0.35  # eosin around a lumen
FIBRE_OD = 0.24  # contrast relative to the eosin around
FIBRE_GAIN = 0.45
FIBRE_UM = (12.0, 1.6)  # correlation along and across
CLOUD_UM = 7.0  # correlation of the uneven eosin
CLOUD_OD = 0.18
BRIGHTNESS_GAIN = 0.07
TINT_GAIN = 0.05
BLUR_UM = 1.6
BLUR_GAIN = 0.5
GRAIN = 5.0  # grey levels
GRAIN_GAIN = 0.5

RENDERED_AT_ONCE = 2**22  # pixels; bounds memory for large patches

# First word of every seed after `data_seed`: one stream of randomness never shifts another.
_LOADINGS, _FIELDS, _COUNTS, _IMAGES = range(4)


class Synthetic(Dataset):
    """Generated sections with planted programme, artefact and noise genes.

    Args:
        sections: how many; more of them leave the earlier ones unchanged.
        spots: in each section.
        patch_px: side of the rendered patches, which are 112 µm wide.
        programme_genes: genes worth predicting, a fifth of them scarce markers.
        artefact_genes: genes that follow brightness, tint, blur and grain of the picture.
        noise_genes: genes that follow nothing.
        donors: sections are dealt to that many donors in turn; 0 = each section has its own.
        data_seed: everything random follows from it.
    """

    citation = "Generated by agl-bench; no publication."
    licence = "CC0-1.0"
    revision = "1"

    def __init__(
        self,
        *,
        sections: Annotated[int, Range(1, 100)] = 3,
        spots: Annotated[int, Range(20, 10_000)] = 150,
        patch_px: Annotated[int, Range(16, 512)] = 48,
        programme_genes: Annotated[int, Range(1, 10_000)] = 300,
        artefact_genes: Annotated[int, Range(0, 10_000)] = 700,
        noise_genes: Annotated[int, Range(0, 20_000)] = 1000,
        donors: Annotated[int, Range(0, 100)] = 0,
        data_seed: Annotated[int, Range(0, 1_000_000_000)] = 0,
    ) -> None:
        self.section_count = sections
        self.spots = spots
        self.patch_px = patch_px
        self.gene_counts = (programme_genes, artefact_genes, noise_genes)
        self.donors = donors
        self.data_seed = data_seed

    def sections(self, root: Path) -> dict[str, str]:
        """S1, S2, … with donors D1, D2, …; `root` is not looked at."""
        dealt = self.donors or self.section_count
        return {f"S{index + 1}": f"D{index % dealt + 1}" for index in range(self.section_count)}

    def read(self, root: Path, name: str) -> Section:
        """One section, generated afresh; `root` is not looked at."""
        named = self.sections(root)
        return self._section(list(named).index(name), name, named[name], _Genes(self.data_seed, *self.gene_counts))

    def _section(self, index: int, name: str, donor: str, genes: _Genes) -> Section:
        position_um = hexagonal_grid(self.spots)
        fields = smooth_fields(position_um, PROGRAMMES + ARTEFACTS, _rng(self.data_seed, _FIELDS, index))
        counts, log_mean = genes.draw(fields, _rng(self.data_seed, _COUNTS, index))
        pixels = render(fields, self.patch_px, _rng(self.data_seed, _IMAGES, index))
        um_per_px = PATCH_UM / self.patch_px
        table = AnnData(
            X=sparse.csr_matrix(counts),
            obs=pd.DataFrame(index=[f"{name}-{spot:05d}" for spot in range(self.spots)]),
            var=pd.DataFrame({"role": genes.role}, index=genes.names),
            obsm={"spatial": position_um / um_per_px},
            layers={"log_mean": log_mean},
        )
        return Section(name, table, um_per_px, patches=ArrayPatches(pixels, PATCH_UM, section=name), donor=donor)


def hexagonal_grid(spots: int) -> np.ndarray:
    """Centres of `spots` spots, filled row by row into a nearly square block, (spots, 2) µm."""
    row_um = PITCH_UM * np.sqrt(3) / 2
    columns = int(np.ceil(np.sqrt(spots * row_um / PITCH_UM)))
    row, column = np.divmod(np.arange(spots), columns)
    return PITCH_UM + np.stack([(column + 0.5 * (row % 2)) * PITCH_UM, row * row_um], axis=1)


def smooth_fields(position_um: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random fields with mean 0, sd 1 and no correlation over the spots, (spots, count)."""
    wave = rng.standard_normal((2, WAVES, count)) / LENGTH_UM
    phase = rng.uniform(0, 2 * np.pi, (WAVES, count))
    smooth = np.sqrt(2 / WAVES) * np.cos(np.tensordot(position_um, wave, 1) + phase).sum(1)
    # Whitened before the nugget as well: afterwards alone, it would amplify the nugget at the cost of smoothness.
    nugget = rng.standard_normal(smooth.shape)
    return _whitened(np.sqrt(1 - NUGGET) * _whitened(smooth) + np.sqrt(NUGGET) * nugget)


def _whitened(fields: np.ndarray) -> np.ndarray:
    """The nearest fields with mean 0, sd 1 and no correlation over the spots, (spots, fields).

    A few dozen spots correlate smooth fields by chance, which would make an artefact gene helpful in one section and
    harmful in the next.
    """
    centred = fields - fields.mean(0)
    variance, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    return centred @ (axes / np.sqrt(variance)) @ axes.T


class _Genes:
    """What all sections share: for each gene its role, mean, loadings, dispersion and dropout.

    Attributes:
        names: (genes,) such as PROGRAMME0007, ARTEFACT0012, NOISE0100, in mixed order.
        role: (genes,) "programme", "artefact" or "noise".
    """

    def __init__(self, seed: int, programme: int, artefact: int, noise: int) -> None:
        markers = min(programme, max(1, round(MARKER_SHARE * programme)))
        sizes = (markers, programme - markers, artefact, noise)
        column = np.repeat(np.arange(len(KINDS)), sizes)
        order = _rng(seed, _LOADINGS, len(KINDS)).permutation(len(column))  # the order must not carry the answer
        self.column = column[order]
        self.role = np.array(KINDS, dtype=object)[self.column]
        numbers = np.concatenate([np.arange(programme), np.arange(artefact), np.arange(noise)])
        self.names = [f"{role.upper()}{n:04d}" for role, n in zip(self.role, numbers[order], strict=True)]
        drawn = [self._draw_kind(kind, size, _rng(seed, _LOADINGS, kind)) for kind, size in enumerate(sizes)]
        self.log_mean = np.concatenate([log_mean for log_mean, _ in drawn])[order]  # (genes,) ln UMI
        self.loadings = np.concatenate([loadings for _, loadings in drawn], axis=1)[:, order]  # (fields, genes)

    @staticmethod
    def _draw_kind(kind: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Means (size,) and loadings (fields, size) of the genes of one column of the table."""
        log_mean = rng.uniform(np.log(MEAN_LOW[kind]), np.log(MEAN_HIGH[kind]), size)
        amplitude = AMPLITUDE[kind] * np.exp(AMPLITUDE_JITTER * rng.standard_normal(size))
        on = slice(0, PROGRAMMES) if KINDS[kind] == "programme" else slice(PROGRAMMES, None)
        loadings = np.zeros((PROGRAMMES + ARTEFACTS, size))
        direction = rng.standard_normal(loadings[on].shape)
        loadings[on] = amplitude * direction / np.linalg.norm(direction, axis=0)
        return log_mean, loadings

    def draw(self, fields: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Counts and noise-free ln mean of a section, both (spots, genes) float32."""
        shape = (len(fields), len(self.names))
        section_effect = SECTION_SD * rng.standard_normal(shape[1])
        signal = fields @ self.loadings - (self.loadings**2).sum(0) / 2
        log_mean = self.log_mean + signal + section_effect
        library = np.exp(LIBRARY_SD * rng.standard_normal((shape[0], 1)) - LIBRARY_SD**2 / 2)
        theta = np.array(THETA)[self.column]
        rate = np.exp(log_mean) * library * rng.standard_gamma(theta, shape) / theta
        kept = rng.random(shape) >= np.array(DROPOUT)[self.column]
        return (rng.poisson(rate) * kept).astype(np.float32), log_mean.astype(np.float32)


def render(fields: np.ndarray, side_px: int, rng: np.random.Generator) -> np.ndarray:
    """Patches of a section, uint8 RGB (spots, side_px, side_px, 3)."""
    strength = np.exp(STAIN_SD * rng.standard_normal(2))
    stains = np.array(STAINS) + STAIN_TURN * rng.standard_normal((2, 3))
    stains *= strength[:, None] / np.linalg.norm(stains, axis=1, keepdims=True)  # (2, 3)
    at_once = max(1, RENDERED_AT_ONCE // side_px**2)
    parts = [
        _render_part(fields[start : start + at_once], stains.astype(np.float32), side_px, rng)
        for start in range(0, len(fields), at_once)
    ]
    return np.concatenate(parts)


def _render_part(fields: np.ndarray, stains: np.ndarray, side_px: int, rng: np.random.Generator) -> np.ndarray:
    """Patches of some spots, uint8 RGB (spots, side_px, side_px, 3)."""
    density, size, eosin, lumen = fields[:, :PROGRAMMES].T
    brightness, tint, blur, grain = fields[:, PROGRAMMES:].T
    stroma = (eosin - density) / np.sqrt(2)  # fibres: much eosin, few nuclei
    um = PATCH_UM / side_px
    margin = int(np.ceil(MARGIN_UM / um))
    canvas_px = scipy.fft.next_fast_len(side_px + 2 * margin, real=True)
    canvas = _Canvas(len(fields), canvas_px, um, rng)

    hole, rim = canvas.lumens(LUMEN_UM * np.exp(LUMEN_GAIN * lumen))
    area = (canvas_px * um / PATCH_UM) ** 2
    nuclei = canvas.nuclei(area * NUCLEI * np.exp(NUCLEI_GAIN * density), RADIUS_UM * np.exp(RADIUS_GAIN * size))
    fibre, cloud = canvas.textures()
    contrast = FIBRE_OD * np.exp(FIBRE_GAIN * stroma)
    pink = EOSIN_OD * np.exp(EOSIN_GAIN * eosin[:, None, None] + contrast[:, None, None] * fibre + CLOUD_OD * cloud)
    blue = CYTOPLASM_OD + NUCLEUS_OD * nuclei
    pink = (pink + RIM_OD * rim) * (1 - 0.5 * nuclei)
    depth = canvas.blurred(np.stack([blue, pink], axis=1) * (1 - hole)[:, None], BLUR_UM * np.exp(BLUR_GAIN * blur))
    depth = depth[..., margin : margin + side_px, margin : margin + side_px]

    light = np.log(GLASS) + BRIGHTNESS_GAIN * brightness[:, None] + TINT_GAIN * tint[:, None] * np.array([1, 0, -1])
    image = np.exp(light[:, None, None].astype(np.float32) - np.moveaxis(depth, 1, -1) @ stains)
    speckle = rng.standard_normal((len(fields), side_px, side_px, 1), dtype=np.float32)
    image += (GRAIN * np.exp(GRAIN_GAIN * grain)).astype(np.float32)[:, None, None, None] * speckle
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


class _Canvas:
    """Square drawing areas of `spots` spots, `px` pixels of `um` micrometres wide, which wrap around."""

    def __init__(self, spots: int, px: int, um: float, rng: np.random.Generator) -> None:
        self.spots, self.px, self.um, self.rng = spots, px, um, rng
        self.shape = (spots, px, px)
        self.wave_y = 2 * np.pi * scipy.fft.fftfreq(px, um)[:, None].astype(np.float32)  # rad / µm
        self.wave_x = 2 * np.pi * scipy.fft.rfftfreq(px, um)[None, :].astype(np.float32)

    def nuclei(self, expected: np.ndarray, radius_um: np.ndarray) -> np.ndarray:
        """Soft discs, at most 1 where they overlap, (spots, px, px).

        Args:
            expected: (spots,) number of nuclei.
            radius_um: (spots,) median radius of a spot's nuclei.
        """
        spot = np.repeat(np.arange(self.spots), self.rng.poisson(expected))
        radius = radius_um[spot] * np.exp(0.15 * self.rng.standard_normal(len(spot)))
        stretch = np.exp(0.2 * self.rng.standard_normal(len(spot)))
        angle = self.rng.uniform(0, np.pi, len(spot))
        centre = self.rng.uniform(0, self.px, (2, len(spot)))
        darkness = np.exp(0.2 * self.rng.standard_normal(len(spot)))
        # Every nucleus is stamped through one small window around its centre.
        reach = int(np.ceil((1.6 * radius.max(initial=1.0) + 1) / self.um))
        offset = np.arange(-reach, reach + 1)
        corner = np.floor(centre).astype(np.int64)
        dy, dx = ((corner + 0.5 - centre)[..., None] + offset) * self.um  # (nuclei, window) each
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        along = (cos * dx[:, None, :] + sin * dy[:, :, None]) / stretch[:, None, None]
        across = (cos * dy[:, :, None] - sin * dx[:, None, :]) * stretch[:, None, None]
        stamp = _inside(radius[:, None, None] - np.hypot(along, across), edge_um=0.6) * darkness[:, None, None]
        row = (corner[0][:, None] + offset) % self.px
        column = (corner[1][:, None] + offset) % self.px
        pixel = (spot[:, None, None] * self.px + row[:, :, None]) * self.px + column[:, None, :]
        ink = np.bincount(pixel.ravel(), stamp.ravel(), minlength=int(np.prod(self.shape)))
        return (1 - np.exp(-1.5 * ink)).reshape(self.shape).astype(np.float32)

    def lumens(self, radius_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Holes in the tissue and the rims around them, (spots, px, px) each, in [0, 1]."""
        centre = self.rng.uniform(0, self.px * self.um, (2, self.spots, LUMENS, 1))
        radius = radius_um[:, None] * np.exp(0.35 * self.rng.standard_normal((self.spots, LUMENS)))
        stretch = np.exp(0.25 * self.rng.standard_normal((self.spots, LUMENS, 1)))
        dy, dx = (np.arange(self.px) + 0.5) * self.um - centre
        dy, dx = dy * stretch, dx / stretch
        gap = np.hypot(dy[..., :, None], dx[..., None, :]) - radius[..., None, None]
        gap = gap.min(axis=1).astype(np.float32)  # µm from the nearest wall, negative inside
        return _inside(-gap, edge_um=0.9), np.exp(-(((gap - 3.5) / 3.0) ** 2))

    def textures(self) -> tuple[np.ndarray, np.ndarray]:
        """Fibres along one direction for each spot, and clouds without direction: (spots, px, px) each, sd about 1."""
        angle = self.rng.uniform(0, np.pi, (self.spots, 1, 1)).astype(np.float32)
        along = np.cos(angle) * self.wave_x + np.sin(angle) * self.wave_y
        across = np.cos(angle) * self.wave_y - np.sin(angle) * self.wave_x
        fibre = np.exp(-((FIBRE_UM[0] * along) ** 2 + (FIBRE_UM[1] * across) ** 2) / 2)
        cloud = np.exp(-(CLOUD_UM**2) * (self.wave_x**2 + self.wave_y**2) / 2)[None]
        return self._filtered_noise(fibre), self._filtered_noise(cloud)

    def blurred(self, image: np.ndarray, sigma_um: np.ndarray) -> np.ndarray:
        """`image` (spots, channels, px, px) through a Gaussian of `sigma_um` (spots,)."""
        squared = (self.wave_x**2 + self.wave_y**2)[None, None]
        keep = np.exp(-(sigma_um.astype(np.float32)[:, None, None, None] ** 2) * squared / 2)
        return scipy.fft.irfft2(scipy.fft.rfft2(image.astype(np.float32)) * keep, s=image.shape[-2:])

    def _filtered_noise(self, keep: np.ndarray) -> np.ndarray:
        """White noise through a filter (spots, px, px // 2 + 1), scaled to sd 1."""
        noise = self.rng.standard_normal(self.shape, dtype=np.float32)
        texture = scipy.fft.irfft2(scipy.fft.rfft2(noise) * keep, s=self.shape[-2:])
        return texture / texture.std(axis=(1, 2), keepdims=True)


def _inside(depth_um: np.ndarray, edge_um: float) -> np.ndarray:
    """1 well inside a shape, 0 well outside, ½ on its border."""
    return 0.5 + 0.5 * np.tanh(depth_um / edge_um)


def _rng(*words: int) -> np.random.Generator:
    """A generator that depends on these words and on nothing else."""
    return np.random.default_rng(np.random.SeedSequence(words))
