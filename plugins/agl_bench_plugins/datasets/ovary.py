"""OVARY of the DkGSB paper: a Visium slide of a high-grade serous ovarian carcinoma in HEST-1k.

It is the only ovary slide in the authors' preprocessing and has 4,674 spots. The paper says 5,774, more than any Visium
slide of an ovary in HEST-1k has, very probably swapped with BOWEL B's 4,617. Confidence about 95 % for the slide.
"""

from __future__ import annotations

from agl_bench_plugins.datasets.hest import HestSlides


class Ovary(HestSlides):
    """Ovarian carcinoma, one section of HEST-1k (OVARY of the paper)."""

    called = "ovary"
    ids = ("TENX65",)
