"""What every picture is drawn with."""

from collections.abc import Sequence

from ..errors import MissingExtraError

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingExtraError("Plots need matplotlib: pip install 'hub_moe[plot]'.") from error

__all__ = ["BLUE", "GREY", "ORANGE", "Axes", "Figure", "Normalize", "PowerNorm", "Rectangle", "smooth"]

BLUE, ORANGE, GREY = "#2a6fbb", "#d9662b", "#6b6b6b"


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of the last fiftieth of the curve at each point."""
    width = max(1, len(values) // 50)
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
