"""Planted tissue in which it is known which genes help, harm or do neither; needs no download.

Source: the generator of agl-bench's own planted-data study. Spots lie on a hexagonal grid. Tissue programmes and
artefacts are smooth random fields over it (random Fourier features of a Gaussian process with an RBF kernel, plus a
nugget). The programmes show in the patch as nuclear density, nuclear size, eosin, lumens and fibres, the artefacts as
brightness, tint, blur and grain. The expected count of gene g in spot i is

    mean_g · exp(η_ig − var η_g / 2 + section effect_g) · library size_i,      η = fields · loadings,

drawn from a negative binomial, then thinned by dropout. What a gene loads on is its role: markers and helpful genes
load on programmes, harmful genes on artefacts (they can be predicted, but pull a narrow representation away), useless
genes on nothing. Markers are few and noisy and stand out most, so that they become the primary genes.

How the variability ranking follows the roles: each role has a spread (CV² of the counts beyond Poisson noise), made
up of its signal and of as much negative-binomial noise as is missing; of the auxiliary genes that of helpful genes is
largest and that of useless genes smallest. A share `reliability` of the auxiliary genes keeps the spread of its role;
the others exchange theirs at random. With 1 the ranking is helpful, harmful, useless, and the best cut-off k* is the
number of helpful genes; with 0 the ranking says nothing.

regime      genes                                what a narrow shared representation shows
helpful     harmful ones are helpful instead     PGL < all ≤ helpful genes alone
harmful     as set                               all < PGL < helpful genes alone
null        helpful ones are useless instead     no selector beats PGL
misleading  as set, reliability 0                PGL < helpful genes alone; no prefix of the ranking beats PGL

How it differs from the study: the fields of a section are whitened, so that no artefact gene is related to a programme
gene by chance. Patches of neighbouring spots share their fields but not their pixels, and `donors` is a label:
sections of one donor are no more alike than others.

The truth is kept apart from the sections: `truth` says what each gene is worth, `log_mean` what its counts are noisy
copies of. Names and order of the genes carry nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import pandas as pd
import scipy.fft
from anndata import AnnData
from scipy import sparse

from agl_bench import ArrayPatches, Dataset, LogRange, MissingData, Range, Section

Regime = Literal["helpful", "harmful", "null", "misleading"]
Part = TypeVar("Part")

# ---- Fields -----------------------------------------------------------------------------------------------------
PITCH_UM = 100.0  # between centres of neighbouring spots
LENGTH_UM = 300.0  # of the RBF kernel: three pitches
NUGGET = 0.15  # share of a field's variance that no neighbour knows
WAVES = 256  # random Fourier features of a field
PROGRAMMES = 4
ARTEFACTS = 4

# ---- Genes: (marker, helpful, harmful, useless) --------------------------------------------------------------------
# The seurat score compares a gene with those in its bin of means. Genes of all roles therefore have the same means: in
# a bin of its own an otherwise ordinary gene would stand out.
ROLES = ("marker", "helpful", "harmful", "useless")
UTILITY = (1.0, 1.0, -1.0, -0.25)  # as an auxiliary gene; a useless one dilutes the others
MEAN = (2.0, 8.0)  # UMI, log-uniform between
AMPLITUDE = (0.70, 0.50, 0.50, 0.0)  # sd of η over spots
DROPOUT = (0.15, 0.05, 0.05, 0.05)
SPREAD = (4.0, 1.6, 0.8, 0.40)  # CV² beyond Poisson noise: at least that of the signal of every auxiliary gene
SPREAD_JITTER = 0.05  # sd of ln spread over genes
LIBRARY_SD = 0.25  # of ln library size
SECTION_SD = 0.15  # of a gene's section effect, ln scale
DRAWN_AT_ONCE = 2**21  # counts; bounds memory for large sections

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

RENDERED_AT_ONCE = 2**20  # pixels; bounds memory for large patches

# First word of every seed after `data_seed`: one stream of randomness never shifts another.
_LOADINGS, _FIELDS, _COUNTS, _IMAGES, _BATCH, _ORDER, _SPREADS = range(7)


class Synthetic(Dataset):
    """Generated sections with planted helpful, harmful and useless genes.

    Args:
        regime: which of the roles there are, and whether the variability ranking can be trusted.
        sections: how many; more of them leave the earlier ones unchanged.
        spots: in each section.
        patch_px: side of the rendered patches, which are 112 µm wide.
        markers: genes that stand out and become primary; as many as `protocol.primary_genes`, or some become auxiliary.
        helpful_genes: auxiliary genes that follow the tissue programmes as the markers do.
        harmful_genes: auxiliary genes that follow brightness, tint, blur and grain of the picture.
        useless_genes: auxiliary genes that follow nothing.
        reliability: share of the auxiliary genes whose variability follows their role; regime `misleading` has 0.
        depth: factor on all expected counts; small ones give sparse counts.
        donors: sections are dealt to that many donors in turn; 0 = each section has its own.
        data_seed: everything random follows from it.
    """

    citation = "Generated by agl-bench; no publication."
    licence = "CC0-1.0"
    revision = "2"
    technology = "simulated"
    tissue = "simulated"
    argument = "regime"

    def __init__(
        self,
        *,
        regime: Regime = "harmful",
        sections: Annotated[int, Range(1, 100)] = 3,
        spots: Annotated[int, Range(20, 100_000)] = 150,
        patch_px: Annotated[int, Range(16, 512)] = 48,
        markers: Annotated[int, Range(1, 10_000)] = 50,
        helpful_genes: Annotated[int, Range(0, 50_000)] = 300,
        harmful_genes: Annotated[int, Range(0, 50_000)] = 700,
        useless_genes: Annotated[int, Range(0, 50_000)] = 950,
        reliability: Annotated[float, Range(0, 1)] = 1.0,
        depth: Annotated[float, LogRange(1e-2, 1e2)] = 1.0,
        donors: Annotated[int, Range(0, 100)] = 0,
        data_seed: Annotated[int, Range(0, 1_000_000_000)] = 0,
    ) -> None:
        self.section_count = sections
        self.spots = spots
        self.patch_px = patch_px
        if regime == "helpful":
            helpful_genes, harmful_genes = helpful_genes + harmful_genes, 0
        elif regime == "null":
            helpful_genes, useless_genes = 0, useless_genes + helpful_genes
        self.role_sizes = (markers, helpful_genes, harmful_genes, useless_genes)
        self.reliability = 0.0 if regime == "misleading" else reliability
        self.depth = depth
        self.donors = donors
        self.data_seed = data_seed

    def sections(self, root: Path) -> dict[str, str]:
        """S1, S2, … with donors D1, D2, …; `root` is not looked at."""
        dealt = self.donors or self.section_count
        return {f"S{index + 1}": f"D{index % dealt + 1}" for index in range(self.section_count)}

    def read(self, root: Path, name: str) -> Section:
        """One section, generated afresh; `root` is not looked at."""
        named = self.sections(root)
        if name not in named:
            raise MissingData(f"synthetic tissue has no section '{name}'; there are {', '.join(named)}")
        index = list(named).index(name)
        genes, fields, position_um = self._genes(), self._fields(index), hexagonal_grid(self.spots)
        um_per_px = PATCH_UM / self.patch_px
        table = AnnData(
            X=genes.draw(fields, self._section_effect(index), _rng(self.data_seed, _COUNTS, index)),
            obs=pd.DataFrame(index=[f"{name}-{spot:05d}" for spot in range(self.spots)]),
            var=pd.DataFrame(index=genes.names),
            obsm={"spatial": position_um / um_per_px},
        )
        pixels = render(fields, self.patch_px, _rng(self.data_seed, _IMAGES, index))
        return Section(name, table, um_per_px, patches=ArrayPatches(pixels, PATCH_UM, section=name), donor=named[name])

    def truth(self, root: Path) -> dict[str, float]:
        """What each gene is worth as an auxiliary one: 1 helpful, −1 harmful, −¼ useless."""
        genes = self._genes()
        return dict(zip(genes.names, np.array(UTILITY)[genes.role].tolist(), strict=True))

    def log_mean(self, root: Path, name: str) -> np.ndarray:
        """The noise-free expression of a section, for judging predictions: (spots, genes) float32, dense.

        ln of the expected count before library size and dropout, in the order of the section's spots and genes.
        """
        index = list(self.sections(root)).index(name)
        return self._genes().log_mean(self._fields(index), self._section_effect(index))

    def _genes(self) -> _Genes:
        return _Genes(self.data_seed, self.role_sizes, self.reliability, self.depth)

    def _fields(self, index: int) -> np.ndarray:
        """(spots, programmes + artefacts) of one section."""
        position_um = hexagonal_grid(self.spots)
        return smooth_fields(position_um, PROGRAMMES + ARTEFACTS, _rng(self.data_seed, _FIELDS, index))

    def _section_effect(self, index: int) -> np.ndarray:
        """(genes,) batch effect of one section, ln scale."""
        return SECTION_SD * _rng(self.data_seed, _BATCH, index).standard_normal(sum(self.role_sizes))


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
    """What all sections share: for each gene its role, mean, loadings, noise and dropout.

    Attributes:
        names: (genes,) G00001, G00002, …; roles are in mixed order.
        role: (genes,) index into ROLES.
    """

    def __init__(self, seed: int, sizes: tuple[int, int, int, int], reliability: float, depth: float) -> None:
        role = np.repeat(np.arange(len(ROLES)), sizes)
        drawn = [_draw_role(kind, size, _rng(seed, _LOADINGS, kind)) for kind, size in enumerate(sizes)]
        mean, loadings, spread = (np.concatenate(parts, axis=-1) for parts in zip(*drawn, strict=True))
        _exchange(spread, role, reliability, _rng(seed, _SPREADS))

        order = _rng(seed, _ORDER).permutation(len(role))  # the order must not carry the answer
        self.role = role[order]
        self.names = [f"G{number + 1:05d}" for number in range(len(role))]
        self.centre = np.log(depth * mean[order])  # (genes,) ln UMI
        self.loadings = loadings[:, order]  # (fields, genes)
        self.dropout = np.array(DROPOUT)[self.role].astype(np.float32)
        # (1 + signal) (1 + 1/θ) / (1 − dropout) = 1 + spread, where signal is the CV² of exp(η)
        signal = np.expm1((loadings[:, order] ** 2).sum(0))
        noise = (1 + spread[order]) * (1 - self.dropout) / (1 + signal) - 1
        self.theta = (1 / noise).astype(np.float32)  # size of the negative binomial: variance = mean + mean² / θ

    def log_mean(self, fields: np.ndarray, section_effect: np.ndarray) -> np.ndarray:
        """ln of the expected count before library size and dropout, (spots, genes) float32."""
        constant = self.centre - (self.loadings**2).sum(0) / 2 + section_effect
        log_mean: np.ndarray = fields.astype(np.float32) @ self.loadings.astype(np.float32)
        log_mean += constant.astype(np.float32)
        return log_mean

    def draw(self, fields: np.ndarray, section_effect: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
        """Counts of a section, (spots, genes) float32; never dense but for some spots at a time."""
        library = LIBRARY_SD * rng.standard_normal(len(fields)) - LIBRARY_SD**2 / 2

        def part(rows: slice, own: np.random.Generator) -> sparse.csr_matrix:
            rate = self.log_mean(fields[rows], section_effect)
            rate += library[rows, None].astype(np.float32)
            np.exp(rate, out=rate)
            rate *= own.standard_gamma(self.theta, rate.shape, dtype=np.float32)
            rate /= self.theta
            rate *= own.random(rate.shape, dtype=np.float32) >= self.dropout
            return sparse.csr_matrix(own.poisson(rate), dtype=np.float32)

        counts: sparse.csr_matrix = sparse.vstack(
            _in_parts(part, len(fields), DRAWN_AT_ONCE // len(self.names), rng), format="csr"
        )
        return counts


def _draw_role(kind: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means (size,), loadings (fields, size) and spreads (size,) of the genes of one role."""
    mean = np.exp(rng.uniform(*np.log(MEAN), size))
    on = slice(PROGRAMMES, None) if ROLES[kind] == "harmful" else slice(0, PROGRAMMES)
    loadings = np.zeros((PROGRAMMES + ARTEFACTS, size))
    direction = rng.standard_normal(loadings[on].shape)
    loadings[on] = AMPLITUDE[kind] * direction / np.linalg.norm(direction, axis=0)
    spread = SPREAD[kind] * np.exp(np.clip(SPREAD_JITTER * rng.standard_normal(size), -0.1, 0.1))
    return mean, loadings, spread


def _exchange(spread: np.ndarray, role: np.ndarray, reliability: float, rng: np.random.Generator) -> None:
    """Let auxiliary genes that are not reliable exchange their spreads at random, in place."""
    auxiliary = np.flatnonzero(role != ROLES.index("marker"))
    mixed = auxiliary[rng.random(len(auxiliary)) >= reliability]
    spread[mixed] = spread[rng.permutation(mixed)]


def _in_parts(
    work: Callable[[slice, np.random.Generator], Part], spots: int, at_once: int, rng: np.random.Generator
) -> Sequence[Part]:
    """`work` for some spots at a time on all cores, each part with randomness of its own: threads change no result."""
    at_once = max(1, at_once)
    rows = [slice(start, start + at_once) for start in range(0, spots, at_once)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, rows, rng.spawn(len(rows))))


def render(fields: np.ndarray, side_px: int, rng: np.random.Generator) -> np.ndarray:
    """Patches of a section, uint8 RGB (spots, side_px, side_px, 3)."""
    strength = np.exp(STAIN_SD * rng.standard_normal(2))
    stains = np.array(STAINS) + STAIN_TURN * rng.standard_normal((2, 3))
    stains *= strength[:, None] / np.linalg.norm(stains, axis=1, keepdims=True)  # (2, 3)

    def part(rows: slice, own: np.random.Generator) -> np.ndarray:
        return _render_part(fields[rows], stains.astype(np.float32), side_px, own)

    return np.concatenate(_in_parts(part, len(fields), RENDERED_AT_ONCE // side_px**2, rng))


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
