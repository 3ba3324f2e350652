"""What a run did, step by step: into `metrics.jsonl`, the progress bar, and whatever `report_to` names."""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..anatomy import MoeLayer, find_moe_layers
from ..energy import EnergyMeter, EnergyReport, combine_reports
from ..energy.meter import require_codecarbon
from ..errors import UnsupportedModelError
from .balancing import gather_bias
from .flops import Peak, TrainingCost, find_peak, measure_training_cost
from .load import LoadCounter, measure_imbalance
from .metrics_file import MetricsFile

logger = logging.get_logger(__name__)

_FROM_TRAINER = ("loss", "learning_rate", "grad_norm", "epoch")


@dataclass
class _Window:
    """What has been counted since the last row."""

    loads: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


class RunMetrics(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Measures a run of transformers' `Trainer`, at each of its logging steps.

    A row of `metrics.jsonl` has `step`, `tokens` (seen so far, padding excluded), `loss`, `learning_rate`, `grad_norm`,
    `epoch` and, over the steps since the last row, `tokens_per_s` (loading data included, evaluation and saving not),
    `utilisation` (operations of active parameters, of what is really trained, against `peak_flops` of all processes'
    devices; `peak_source` says whether that was published or measured), `imbalance` and `dead_experts` (no token) by
    layer; `imbalance_worst`; `max_balancing_bias`, null without one; if asked for, `energy_kwh` so far, null where
    nothing can be metered, with `energy_source`. A held-out loss joins the row of its step as `eval_loss`.

    Only the first process writes. On resume, rows after the checkpoint's step are removed. `add_to(trainer)` rather
    than `callbacks=[...]` puts the figures into what wandb, trackio and tensorboard get.

    Args:
        path: Of `metrics.jsonl`.
        with_energy: Meter the machine's energy; what has no counter by codecarbon: a thread, and 2 s at the start.

    Raises:
        MissingExtraError: If energy is asked for and codecarbon is not installed.
        UnsupportedModelError: On training a model without routed experts.
    """

    def __init__(self, path: str | Path, *, with_energy: bool = False) -> None:
        if with_energy:
            require_codecarbon()  # missing: an error now rather than after the model was loaded
        self.path = Path(path)
        self.with_energy = with_energy
        self.latest: dict[str, Any] = {}
        self.tokens = 0
        self.earlier_energy: EnergyReport | None = None
        self.session_tokens = 0
        self.session_seconds = 0.0
        self._window = _Window()
        self._file = MetricsFile(self.path)
        self._layers: list[MoeLayer] = []
        self._counter: LoadCounter | None = None
        self._cost: TrainingCost | None = None
        self._peak = Peak(0.0, "")
        self._meter: EnergyMeter | None = None
        self._num_machines = self._num_devices = 1
        self._tokens_before_meter = 0
        self._mark_s = 0.0

    def add_to(self, trainer: Trainer) -> None:
        """Register ahead of the trainer's other callbacks, so that those see the figures in `logs`."""
        trainer.callback_handler.callbacks.insert(0, self)

    @property
    def energy(self) -> EnergyReport | None:
        """Energy of the run so far, earlier sessions included; None if it was not asked for."""
        now = self._meter.read() if self._meter is not None else None
        if now is not None:
            hours = self._num_devices * now.window_s / 3600
            tokens = self.tokens - self._tokens_before_meter
            now = replace(now, tokens=tokens, device_hours=hours, num_machines=self._num_machines)
        sessions = [each for each in (self.earlier_energy, now) if each is not None]
        return combine_reports(sessions) if sessions else None

    @property
    def session_tokens_per_s(self) -> float:
        """Speed since training began or went on."""
        return self.session_tokens / self.session_seconds if self.session_seconds else 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {"path": str(self.path), "with_energy": self.with_energy},
            "attributes": {
                "tokens": self.tokens,
                "energy": None if (energy := self.energy) is None else energy.to_dict(),
                "window": vars(self._window),
            },
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hook into the model, and take the file back to the step that training starts from."""
        self.close()
        model = kwargs["model"]
        self._layers = find_moe_layers(model)
        self._counter = LoadCounter(model, self._layers)
        self._window = _Window([[0] * layer.num_experts for layer in self._layers])
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved is not None:
            self.tokens = saved["attributes"]["tokens"]
            earlier = saved["attributes"]["energy"]
            self.earlier_energy = None if earlier is None else EnergyReport.from_dict(earlier)
            self._window = _Window(**saved["attributes"]["window"])
        self._peak, self._cost = find_peak(args.device, model.dtype), _cost(model, self._layers)
        if state.is_world_process_zero:
            self._file.open_after(state.global_step)
        if self.with_energy and state.is_world_process_zero:
            on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
            self._num_machines = max(1, args.world_size // on_this_machine)
            self._num_devices = args.world_size if args.device.type == "cuda" else self._num_machines
            self._tokens_before_meter = self.tokens
            self._meter = EnergyMeter(estimates="required")
        self._mark_s = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step."""
        assert self._counter is not None
        loads = [load_E.tolist() for load_E in self._counter.take()]
        first = next((place for place, layer in enumerate(self._layers) if not layer.is_mtp), 0)
        tokens = sum(loads[first]) // self._layers[first].top_k
        seconds = time.perf_counter() - self._mark_s
        self.tokens += tokens
        self.session_tokens += tokens
        self.session_seconds += seconds
        self._window.tokens += tokens
        self._window.seconds += seconds
        self._window.loads = [
            [before + now for before, now in zip(*pair, strict=True)]
            for pair in zip(self._window.loads, loads, strict=True)
        ]
        self._mark_s = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Write a row, and add its figures to `logs`."""
        row: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            row |= {name: logs[name] for name in _FROM_TRAINER if name in logs} | self._measure(args)
            self.latest = row
            logs |= _flatten(row)
            self._window = _Window([[0] * layer.num_experts for layer in self._layers])
        else:
            row |= {name: value for name, value in logs.items() if name.startswith("eval_") and name.endswith("loss")}
        if len(row) > 1 and state.is_world_process_zero:
            self._file.write(row)
        self._mark_s = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluation is not training time."""
        self._mark_s = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nor is saving."""
        self._mark_s = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unhook, and stop the meter."""
        self.close()

    def close(self) -> None:
        """Leave no hooks and no thread; `on_train_end` does it, and after an error in training the caller may."""
        if self._counter is not None:
            self._counter.close()
            self._counter = None
        if self._meter is not None:
            self._meter.stop()
            self.earlier_energy = self.energy
            self._meter = None

    def _measure(self, args: TrainingArguments) -> dict[str, Any]:
        loads = [torch.tensor(load) for load in self._window.loads]
        names = [str(layer.index) for layer in self._layers]
        imbalances = [round(measure_imbalance(load_E).item(), 4) for load_E in loads]
        tokens_per_s = self._window.tokens / self._window.seconds if self._window.seconds else 0.0
        peak_flops = self._peak.flops * args.world_size
        row = {
            "tokens": self.tokens,
            "tokens_per_s": round(tokens_per_s, 1),
            "utilisation": self._utilisation(tokens_per_s, peak_flops),
            "peak_flops": peak_flops,
            "peak_source": self._peak.source,
            "imbalance_worst": max(imbalances),
            "imbalance": dict(zip(names, imbalances, strict=True)),
            "dead_experts": {name: int((load_E == 0).sum()) for name, load_E in zip(names, loads, strict=True)},
            "max_balancing_bias": self._max_bias(),
        }
        if (energy := self.energy) is not None:
            row |= {"energy_kwh": energy.kwh, "energy_source": energy.label}
        return row

    def _utilisation(self, tokens_per_s: float, peak_flops: float) -> float | None:
        if self._cost is None or self._counter is None:
            return None
        return round(self._cost.flops_per_token(self._counter.mean_length()) * tokens_per_s / peak_flops, 5)

    def _max_bias(self) -> float | None:
        biases: list[Tensor] = [layer.balancing_bias for layer in self._layers if layer.balancing_bias is not None]
        return max((gather_bias(bias).abs().max().item() for bias in biases), default=None)


def _cost(model: Any, layers: list[MoeLayer]) -> TrainingCost | None:
    try:
        return measure_training_cost(model, layers)
    except UnsupportedModelError as error:
        logger.warning(f"Utilisation stays empty in the metrics: {error}")
        return None


def _flatten(row: dict[str, Any]) -> dict[str, float]:
    """The figures that Trainer does not have, as numbers with the names that loggers show."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}/layer_{layer}": number for layer, number in value.items()}
        elif isinstance(value, int | float) and name not in (*_FROM_TRAINER, "step"):
            flat[name] = value
    return flat
