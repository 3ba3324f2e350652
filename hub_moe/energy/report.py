"""What a run used, component by component, in joules: how each is known, and what follows from it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, TypeVar

from ..errors import ConfigError
from ..files.tables import check_keys, key_names, read_table

Method = Literal["nvml_counter", "rapl", "codecarbon_counter", "codecarbon_model", "none"]
Component = Literal["gpu", "cpu", "ram"]

JOULES_PER_KWH = 3.6e6
_Number = TypeVar("_Number", int, float)
_ORDER: dict[str, int] = {"gpu": 0, "cpu": 1, "ram": 2}
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class ComponentEnergy:
    """Energy of one part of the machine by one method.

    Attributes:
        method: `nvml_counter`, `rapl`: counters of the hardware. `codecarbon_counter`: another counter, named in
            `note`, that codecarbon reads. `codecarbon_model`: an estimate. `none`: not measured.
        joules: None exactly if the method is `none`.
        window_s: Time that the figure covers.
        scope: `board`: a GPU board with its memory. `machine`: whatever ran, other people's programs too.
        note: Anything a reader should know, in words.
    """

    component: Component
    method: Method
    joules: float | None
    window_s: float
    scope: Literal["machine", "board"] = "machine"
    note: str = ""

    def __post_init__(self) -> None:
        if (self.joules is None) != (self.method == "none"):
            raise ConfigError(f"The energy of {self.component} has method {self.method!r} and {self.joules} joules.")
        for value in (self.joules, self.window_s):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"The energy of {self.component} has the figure {value}; expected 0 or more.")

    @property
    def is_measured(self) -> bool:
        """Whether a counter of the hardware gave the figure."""
        return self.method not in ("codecarbon_model", "none")


@dataclass(frozen=True)
class GridFactor:
    """CO2 equivalent of a kWh, and who says so."""

    g_per_kwh: float
    source: str

    def __post_init__(self) -> None:
        _check_not_negative("The grid's g CO2 per kWh", self.g_per_kwh)


@dataclass(frozen=True)
class Rates:
    """What the user says they pay, in US dollars; None is not paid or not known. There are no built-in prices."""

    usd_per_hour: float | None = None
    usd_per_kwh: float | None = None

    def __post_init__(self) -> None:
        _check_not_negative("The rate in USD per device hour", self.usd_per_hour)
        _check_not_negative("The rate in USD per kWh", self.usd_per_kwh)

    def cost(self, *, device_hours: float | None, kwh: float | None) -> float | None:
        """US dollars; None without a rate, and where what a rate is for is not known."""
        paid = [(self.usd_per_hour, device_hours), (self.usd_per_kwh, kwh)]
        amounts = [(rate, amount) for rate, amount in paid if rate is not None]
        if not amounts or any(amount is None for _, amount in amounts):
            return None
        return sum(rate * (amount or 0.0) for rate, amount in amounts)


@dataclass(frozen=True)
class EnergyReport:
    """Energy of a run. What is unmeasured is left out of the sums and named in `label`.

    Attributes:
        components: Those that the machine has; one may be there by several methods, for several times.
        window_s: How long the metering took.
        tokens: What was processed in it.
        device_hours: Of GPUs, or of machines without one: what a rate per hour is paid for.
        num_machines: Machines that took part; the figures are of one of them.
        grid: Only of a country that somebody declared.
    """

    components: tuple[ComponentEnergy, ...]
    window_s: float
    tokens: int | None = None
    device_hours: float | None = None
    num_machines: int = 1
    grid: GridFactor | None = None
    rates: Rates | None = None
    format_version: int = _FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != _FORMAT_VERSION:
            raise ConfigError(f"The energy report has format {self.format_version}; this version reads format 1.")
        _check_not_negative("The energy report's window_s", self.window_s)
        _check_not_negative("The energy report's tokens", self.tokens)
        _check_not_negative("The energy report's device_hours", self.device_hours)
        if self.num_machines < 1:
            raise ConfigError(f"The energy report has num_machines {self.num_machines}; expected 1 or more.")

    @property
    def joules(self) -> float | None:
        """Of all components with a figure; None where there is none at all."""
        known = [each.joules for each in self.components if each.joules is not None]
        return sum(known) if known else None

    @property
    def kwh(self) -> float | None:
        """`joules` in kWh."""
        return None if self.joules is None else self.joules / JOULES_PER_KWH

    @property
    def joules_per_1000_tokens(self) -> float | None:
        """None without joules, or without tokens."""
        return None if self.joules is None or not self.tokens else 1000 * self.joules / self.tokens

    @property
    def co2_g(self) -> float | None:
        """Grams of CO2 equivalent; None without joules, or without a declared grid."""
        return None if self.kwh is None or self.grid is None else self.kwh * self.grid.g_per_kwh

    @property
    def usd(self) -> float | None:
        """By the rates given; None without."""
        if self.rates is None:
            return None
        return self.rates.cost(device_hours=self.device_hours, kwh=self.kwh)

    @property
    def label(self) -> str:
        """How the joules are known: "measured", "estimate for cpu, ram", "estimate for cpu; ram not measured"."""
        return "; ".join(self._words()) + (f", 1 of {self.num_machines} machines" if self.num_machines > 1 else "")

    def _words(self) -> Iterable[str]:
        measured = _names(each for each in self.components if each.is_measured)
        estimated = _names(each for each in self.components if each.method == "codecarbon_model")
        missing = [each for each in self.components if each.joules is None]
        if self.joules is None:
            yield "not measured"
            return
        if not estimated:
            yield f"measured for {measured}" if missing else "measured"
        else:
            yield f"estimate for {estimated}"
        known = {each.component for each in self.components if each.joules is not None}
        if absent := _names(each for each in missing if each.component not in known):
            yield f"{absent} not measured"
        for each in missing:
            if each.component in known:
                yield f"{each.component} not measured for {each.window_s:.0f} s"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every field, and what follows from them."""
        return asdict(self) | self._derived()

    def _derived(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _DERIVED}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "The energy report") -> Self:
        """A report from its JSON.

        Raises:
            ConfigError: On an unknown or missing key, a value of another type, or a total that its parts do not give.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} must be a table, not {data!r}.")
        check_keys(data, known=[*key_names(cls), *_DERIVED], where=where)
        report = read_table(cls, {key: value for key, value in data.items() if key not in _DERIVED}, where=where)
        for name, value in report._derived().items():
            if name in data and not _agree(data[name], value):
                raise ConfigError(f"{where} has {name} {data[name]!r}, but its parts give {value!r}; it was edited.")
        return report


_DERIVED = ("joules", "label", "joules_per_1000_tokens", "co2_g", "usd")


def combine_reports(reports: Sequence[EnergyReport]) -> EnergyReport:
    """One report of sessions that came after each other, or of different machines at a time.

    Joules and seconds of the same component and method add up; different methods stay apart. Two meters of one machine
    at the same time would count it twice: let one process of each machine meter.

    Raises:
        ConfigError: If there are none, or they differ in grid or rates.
    """
    if not reports:
        raise ConfigError("There are no energy reports to combine.")
    first = reports[0]
    for name in ("grid", "rates"):
        if len({getattr(each, name) for each in reports}) > 1:
            raise ConfigError(f"Energy reports with different {name} cannot be combined.")
    groups: dict[tuple[str, ...], list[ComponentEnergy]] = {}
    for each in (component for report in reports for component in report.components):
        groups.setdefault((each.component, each.method, each.scope), []).append(each)
    return replace(
        first,
        components=tuple(sorted(map(_add, groups.values()), key=lambda each: _ORDER[each.component])),
        window_s=sum(report.window_s for report in reports),
        tokens=_sum_of_all(report.tokens for report in reports),
        device_hours=_sum_of_all(report.device_hours for report in reports),
        num_machines=max(report.num_machines for report in reports),
    )


def describe_energy(report: EnergyReport) -> str:
    """In words: "1.2 Wh (estimate for cpu; ram not measured)", "not measured"."""
    if report.joules is None:
        return report.label
    return f"{describe_joules(report.joules)} ({report.label})"


def describe_joules(joules: float) -> str:
    """Energy in watt-hours, three digits: "1.23 Wh", "45.6 kWh", "0.01 Wh"."""
    watt_hours = joules / 3600
    if watt_hours < 0.001:
        return f"{joules:.2g} J"
    for unit, size in (("GWh", 1e9), ("MWh", 1e6), ("kWh", 1e3), ("Wh", 1.0)):
        if watt_hours >= 0.9995 * size:
            return f"{watt_hours / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{watt_hours:.2g} Wh"


def _add(group: Sequence[ComponentEnergy]) -> ComponentEnergy:
    known = [each.joules for each in group if each.joules is not None]
    notes = dict.fromkeys(note for each in group for note in each.note.split("; ") if note)
    return replace(
        group[0],
        joules=sum(known) if known else None,
        window_s=sum(each.window_s for each in group),
        note="; ".join(notes),
    )


def _sum_of_all(values: Iterable[_Number | None]) -> _Number | None:
    """None if any of them is."""
    total: Any = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total  # type: ignore[no-any-return]


def _names(components: Iterable[ComponentEnergy]) -> str:
    return ", ".join(dict.fromkeys(each.component for each in components))


def _agree(stated: Any, computed: Any) -> bool:
    numbers = (int, float)
    if isinstance(stated, numbers) and isinstance(computed, numbers):
        return math.isclose(stated, computed, rel_tol=1e-9)
    return bool(stated == computed)


def _check_not_negative(what: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{what} is {value}; expected 0 or more.")
