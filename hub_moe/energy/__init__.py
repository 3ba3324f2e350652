"""Energy, CO2 and cost of a run, each figure with how it is known; what nobody measured is never a 0."""

from .devices import DEVICES, Device, find_device
from .meter import EnergyMeter, prepare_metering
from .plan import CostPlan, Workload, implied_utilisation, plan_cost
from .report import ComponentEnergy, EnergyReport, GridFactor, Rates, combine_reports, describe_energy

__all__ = [
    "DEVICES",
    "ComponentEnergy",
    "Device",
    "EnergyMeter",
    "EnergyReport",
    "GridFactor",
    "Rates",
    "CostPlan",
    "Workload",
    "combine_reports",
    "describe_energy",
    "find_device",
    "implied_utilisation",
    "plan_cost",
    "prepare_metering",
]
