"""The main job: a small Mixture-of-Experts model from nothing, on two cores, without network, in about four minutes."""

from .plan import DemoPlan, plan_demo
from .report import DemoReport
from .run import run_demo

__all__ = ["DemoPlan", "DemoReport", "plan_demo", "run_demo"]
