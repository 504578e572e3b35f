"""BOWEL B of the DkGSB paper: a Visium slide of a colon adenocarcinoma (10x sample Control, Rep 2) in HEST-1k.

The authors' preprocessing lists one ovary and two bowel slides; this is the bowel slide that is not BOWEL A. It has
6,414 spots. The paper says 4,617, very probably swapped with OVARY's 5,774. Confidence about 85 %.
"""

from __future__ import annotations

from agl_bench_plugins.datasets.hest import HestSlides


class BowelB(HestSlides):
    """Colon adenocarcinoma, one section of HEST-1k (BOWEL B of the paper)."""

    called = "bowel_b"
    ids = ("TENX89",)
