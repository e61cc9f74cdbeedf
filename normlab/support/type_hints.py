"""Types of packages that are only imported where they are needed: for annotations."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from pandas import DataFrame, Index
    from torch import Tensor, nn
else:
    Axes = Figure = Line2D = DataFrame = Index = Tensor = nn = object
