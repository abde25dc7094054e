"""DSARA / ARNAS: accurate cells in the first two sections, robust cells in the last, filters 1:2:2.

Ou et al., arXiv 2212.14049 (DSARA) and CVPR 2024, arXiv 2405.05502 (ARNAS); placement, ratio and the seven
candidate operations follow the released ARNAS code.
"""

from search_spaces.cell_space import CellSpace
from search_spaces.layout import Layout

SPACE = CellSpace(
    name="dsara",
    operations=(
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    ),
    layout=Layout(sections=("accurate", "accurate", "robust"), ratio=(1, 2, 2)),
)
