"""One arm, one seed, one text: train it and write down what came out, unless that is written already."""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from arms import SHARED_FIELDS, Arm, measure_arm
from texts import Text
from training import Course, RunPlan, train

import hub_moe
from hub_moe.errors import ConfigError
from hub_moe.modeling import HubMoeForCausalLM
from hub_moe.training import measure_imbalance

WINDOWS = 20
DEAD_SHARE = 0.01  # of an even load, in the last tenth of training
_DECIMALS = 4


def plan_run(arm: Arm, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> RunPlan:
    """Equal for all arms but for what the arm says; the last evaluation falls on the last step.

    Raises:
        ConfigError: If the steps do not divide into ten equal parts.
    """
    evaluations = min(10, steps)
    if steps % evaluations:
        raise ConfigError(f"--steps {steps} must be a multiple of 10, so that the last loss is taken after the last.")
    return RunPlan(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate * arm.learning_rate_factor,
        balancing_speed=arm.balancing_speed,
        evaluations=evaluations,
        seed=seed,
    )


def run_or_read(arm: Arm, text: Text, plan: RunPlan, path: Path) -> dict[str, Any]:
    """The record at `path`; the run is made only where there is none.

    Raises:
        ConfigError: If the record there is of other settings.
    """
    settings = _settings(arm, text, plan)
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        _refuse_other_settings(record["settings"], settings, path)
        return record
    torch.manual_seed(plan.seed)
    course = train(HubMoeForCausalLM(arm.config()), text, plan)
    record = {
        "arm": arm.name,
        "text": text.name,
        "seed": plan.seed,
        "settings": settings,
        "cost": _cost(arm, context=text.train_blocks.shape[1]),
        "tokens": plan.steps * plan.batch_size * text.train_blocks.shape[1],
        **_outcome(course, tokens_per_step=plan.batch_size * text.train_blocks.shape[1]),
        "versions": _versions(),
    }
    write_json(record, path)
    return record


def write_json(value: Any, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    os.replace(unfinished, path)


def _settings(arm: Arm, text: Text, plan: RunPlan) -> dict[str, Any]:
    """Everything that decides the outcome, as JSON gives it back."""
    settings = {
        "model": {**SHARED_FIELDS, **arm.fields},
        "training": asdict(plan),
        "corpus": text.facts,
        "block_length": text.train_blocks.shape[1],
    }
    loaded: dict[str, Any] = json.loads(json.dumps(settings))
    return loaded


def _refuse_other_settings(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    other = [part for part, value in wanted.items() if found.get(part) != value]
    if other:
        raise ConfigError(f"{path} holds a run with another {' and '.join(other)}; choose another --out or remove it.")


def _cost(arm: Arm, *, context: int) -> dict[str, Any]:
    footprint = measure_arm(arm)
    return {
        "parameters": footprint.num_parameters,
        "active_parameters": footprint.num_active,
        "router_parameters": footprint.by_kind().get("router", (0, 0))[0],
        "training_flops_per_token": footprint.training_flops(context),
    }


def _outcome(course: Course, *, tokens_per_step: int) -> dict[str, Any]:
    history = torch.tensor(course.load_history)
    outcome: dict[str, Any] = {
        "held_out_losses": [
            {"tokens": step * tokens_per_step, "loss": round(loss, _DECIMALS)} for step, loss in course.held_out
        ],
        "layers": course.layer_indices,
        "imbalance_over_time": [],
        "imbalance": [],
        "dead_experts": [],
    }
    if not course.layer_indices:
        return outcome
    edges = torch.linspace(0, len(history), min(WINDOWS, len(history)) + 1).long().tolist()
    for start, end in zip(edges, edges[1:], strict=False):
        outcome["imbalance_over_time"].append(
            {"share_of_training": round(end / len(history), 3), "layers": _imbalance(history[start:end].sum(0))}
        )
    last_NE = history[-max(1, len(history) // 10) :].sum(0)
    outcome["imbalance"] = _imbalance(last_NE)
    outcome["dead_experts"] = (last_NE < DEAD_SHARE * last_NE.float().mean(-1, keepdim=True)).sum(-1).tolist()
    return outcome


def _imbalance(load_NE: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in measure_imbalance(load_NE).tolist()]


def _versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "hub_moe": hub_moe.__version__,
    }
