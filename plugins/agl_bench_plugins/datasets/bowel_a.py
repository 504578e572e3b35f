"""BOWEL A of the DkGSB paper: a Visium CytAssist slide of a colon adenocarcinoma (10x sample P2 CRC) in HEST-1k.

The authors' preprocessing lists one ovary and two bowel slides. Of the bowel slides this one has 4,269 spots, a little
above the paper's 4,096 after its filter. Confidence about 90 %.
"""

from __future__ import annotations

from agl_bench_plugins.datasets.hest import HestSlides


class BowelA(HestSlides):
    """Colon adenocarcinoma, one section of HEST-1k (BOWEL A of the paper)."""

    called = "bowel_a"
    ids = ("TENX152",)
