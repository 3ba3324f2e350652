"""What every picture is drawn with."""

from ..errors import MissingExtraError

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingExtraError("Plots need matplotlib: pip install 'hub_moe[plot]'.") from error

__all__ = ["BLUE", "GREY", "ORANGE", "Axes", "Figure", "Normalize", "PowerNorm", "Rectangle"]

BLUE, ORANGE, GREY = "#2a6fbb", "#d9662b", "#6b6b6b"
