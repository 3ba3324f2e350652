"""Energy from now until stop: each component by the best method that the machine allows."""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from ..errors import HubMoeError
from .counters import DEVICE_FILES, POWERCAP, Counter, find_gpus, find_rapl
from .report import Component, ComponentEnergy, EnergyReport

if TYPE_CHECKING:
    from .codecarbon_model import CodecarbonReader

Estimates = Literal["if installed", "required", "never"]


class EnergyMeter:
    """Energy of the machine from now until `stop`: NVML and RAPL counters, and codecarbon for what has none.

    Counters cost nothing; codecarbon takes a thread, and 2 s at the start (see `prepare_metering`). Nothing goes over
    the network or into files. A component that nothing can meter is in the report with the method `none`; a GPU only
    where there is one.

    Args:
        estimates: Whether codecarbon may fill gaps; "required" makes its absence an error.
        powercap: Where the kernel shows RAPL.
        device_files: Where the kernel shows GPUs.
        environment: For CUDA_VISIBLE_DEVICES.

    Raises:
        MissingExtraError: If codecarbon is required and not installed.
        HubMoeError: If codecarbon is required and cannot start.
    """

    def __init__(
        self,
        *,
        estimates: Estimates = "if installed",
        powercap: Path = POWERCAP,
        device_files: Path = DEVICE_FILES,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        if estimates == "required":
            require_codecarbon()
        found = (find_gpus(environment, device_files), find_rapl("cpu", powercap), find_rapl("ram", powercap))
        self._counters: list[Counter] = [each for each in found if each and not isinstance(each, ComponentEnergy)]
        self._notes = {each.component: each.note for each in found if isinstance(each, ComponentEnergy)}
        metered = [counter.read().component for counter in self._counters]
        self._gaps: list[Component] = [each for each in ("cpu", "ram") if each not in metered]
        if (device_files / "kfd").exists() and "gpu" not in metered:
            self._gaps.insert(0, "gpu")  # of AMD
        elif "gpu" in self._notes:
            self._gaps.insert(0, "gpu")
        self._reader = self._start_codecarbon(estimates) if self._gaps and estimates != "never" else None
        self._started_s = time.monotonic()
        self._final: EnergyReport | None = None

    def _start_codecarbon(self, estimates: Estimates) -> "CodecarbonReader | None":
        try:
            from .codecarbon_model import CodecarbonReader

            return CodecarbonReader()
        except HubMoeError as error:
            if estimates == "required":
                for counter in self._counters:
                    counter.stop()
                raise
            for component in self._gaps:
                note = self._notes.get(component)
                self._notes[component] = f"{note}; {error}" if note else str(error)
            return None

    def read(self) -> EnergyReport:
        """Energy so far; what codecarbon gives is at most a few seconds old."""
        return self._final or self._report(
            [each.read() for each in self._counters], self._reader.read() if self._reader else []
        )

    def stop(self) -> EnergyReport:
        """End metering; the final report."""
        if self._final is None:
            counted = [each.stop() for each in self._counters]
            self._final = self._report(counted, self._reader.stop() if self._reader else [])
        return self._final

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _report(self, counted: list[ComponentEnergy], estimated: list[ComponentEnergy]) -> EnergyReport:
        window_s = time.monotonic() - self._started_s
        filling = {each.component: each for each in estimated}
        gaps = [filling.get(gap) or self._none(gap, window_s) for gap in self._gaps]
        components = sorted([*counted, *gaps], key=lambda each: ("gpu", "cpu", "ram").index(each.component))
        return EnergyReport(tuple(components), window_s)

    def _none(self, component: Component, window_s: float) -> ComponentEnergy:
        scope: Literal["machine", "board"] = "board" if component == "gpu" else "machine"
        note = self._notes.get(component) or "this machine has no counter for it that hub_moe can read"
        return ComponentEnergy(component, "none", None, window_s, scope, note)


def prepare_metering() -> None:
    """Start what an `EnergyMeter` of this process will need, in a thread, so that the meter itself starts at once.

    codecarbon looks at a machine once a process, for one to two seconds. Where it cannot, the meter tells.
    """
    threading.Thread(target=_try_a_meter, name="prepare metering", daemon=True).start()


def _try_a_meter() -> None:
    try:
        EnergyMeter().stop()
    except RuntimeError:
        if threading.main_thread().is_alive():  # else the process is ending, and codecarbon gets no threads any more
            raise


def require_codecarbon() -> None:
    """Whether gaps can be filled.

    Raises:
        MissingExtraError: If codecarbon is not installed.
    """
    from . import codecarbon_model  # noqa: F401
