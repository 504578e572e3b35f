"""HEART of the DkGSB paper: four Visium slides of a sinoatrial node in HEST-1k.

The paper gives spot counts and no ids. These four are the only neighbouring heart slides of HEST-1k whose spot counts
exceed those of the paper by a little, in the paper's order, as a spot filter leaves them; confidence about 75 %. Their
scans have 0.60 to 0.76 µm for a pixel, so that HEST's patches at 0.5 µm are enlarged ones. HEST-1k names no patient for
them: the paper's "batch = patient" cannot be verified, donors are unknown here, and slides are left out one by one.
"""

from __future__ import annotations

from agl_bench_plugins.datasets.hest import HestSlides


class Heart(HestSlides):
    """Heart, four sections of HEST-1k (HEART of the paper)."""

    called = "heart"
    ids = ("MISC118", "MISC119", "MISC120", "MISC121")
