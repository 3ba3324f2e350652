"""How many of torch's threads to train a small model with: all of them, unless the machine is busy."""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel


def choose_num_threads(model: PreTrainedModel, tokens_BL: Tensor, *, steps: int = 4) -> int:
    """1 or all of torch's threads, whichever makes the faster training step now; leaves that number set.

    Threads wait for each other by spinning. On an idle machine all of them are faster; beside another busy program, and
    with operations as small as a small model's, they can be a hundred times slower than one.
    """
    most = torch.get_num_threads()
    seconds = {count: _time_steps(model, tokens_BL, count, steps=steps) for count in {1, most}}
    best = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(best)
    return best


def _time_steps(model: PreTrainedModel, tokens_BL: Tensor, num_threads: int, *, steps: int) -> float:
    """Seconds for `steps` forward and backward passes after one to warm up; gradients are gone afterwards."""
    torch.set_num_threads(num_threads)
    was_training = model.training
    model.train()
    start = 0.0
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        model(input_ids=tokens_BL, labels=tokens_BL).loss.backward()
        model.zero_grad(set_to_none=True)
    model.train(was_training)
    return time.perf_counter() - start
