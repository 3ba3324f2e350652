"""How long a training step of each arm takes here, relative to the dense model's."""

import statistics
import time
from collections.abc import Sequence

import torch
from arms import Arm
from torch import Tensor

from hub_moe.modeling import HubMoeForCausalLM

ROUNDS = 15


def measure_step_times(arms: Sequence[Arm], blocks: Tensor, *, rounds: int = ROUNDS) -> dict[str, float]:
    """Median over rounds of each arm's time for forward and backward over the first arm's.

    The arms take turns within a round, so that what else the machine does hits all of them.
    """
    torch.manual_seed(0)
    models = {arm.name: HubMoeForCausalLM(arm.config()).train() for arm in arms}
    names = list(models)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        order = names if index % 2 else names[::-1]
        seconds = {name: _time_step(models[name], blocks) for name in order}
        if index:  # the first round warms up
            for name in names:
                ratios[name].append(seconds[name] / seconds[names[0]])
    return {name: round(statistics.median(values), 2) for name, values in ratios.items()}


def _time_step(model: HubMoeForCausalLM, blocks: Tensor) -> float:
    start = time.perf_counter()
    model.zero_grad(set_to_none=True)
    model(input_ids=blocks, labels=blocks).loss.backward()
    return time.perf_counter() - start
