"""DARTS: one normal cell everywhere, filters 1:2:4, and "none" among the candidates.

Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055.
"""

from search_spaces.cell_space import CellSpace
from search_spaces.layout import Layout

SPACE = CellSpace(
    name="darts",
    operations=(
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    ),
    layout=Layout(sections=("normal", "normal", "normal"), ratio=(1, 2, 4)),
)
