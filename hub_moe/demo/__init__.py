"""The main job: a base, three contributions, reviews and a merge on a Hub of its own, offline, within six minutes."""

from .plan import DemoPlan, plan_demo
from .report import DemoReport
from .run import run_demo

__all__ = ["DemoPlan", "DemoReport", "plan_demo", "run_demo"]
