"""Pictures: `plot_x(plain data) -> Figure`. The one layer that imports matplotlib."""

from .comparison import plot_comparison
from .experts import plot_expert_heat_map
from .lineage import plot_lineage
from .training import plot_expert_load, plot_loss_curve, plot_run

__all__ = ["plot_comparison", "plot_expert_heat_map", "plot_expert_load", "plot_lineage", "plot_loss_curve", "plot_run"]
