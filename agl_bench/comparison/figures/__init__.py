"""Figures of a comparison. The one home of matplotlib in `comparison`; the canvas is Agg, no window is ever opened.

style      colours, markers, canvas, files
standing   forest plot, critical difference, table as bars, single genes, cost
choice     PCC against k, the course of k, weight against rank
maps       genes and predictions on the tissue
reading    what they need of the tables of cells
draw       all of them, with captions
"""

from agl_bench.comparison.figures.draw import Drawn, draw_all
from agl_bench.comparison.figures.style import colour

__all__ = ["Drawn", "colour", "draw_all"]
