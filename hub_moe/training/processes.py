"""The processes of a run, one or those that torchrun or accelerate started, and the threads of each."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import HubMoeError

_T = TypeVar("_T")


def _state() -> PartialState:
    """As TrainingArguments will find it: without a GPU, processes are only seen by who asks for the CPU."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return bool(_state().is_main_process)


def count() -> int:
    """How many there are."""
    return int(_state().num_processes)


def device() -> torch.device:
    """The one that this process trains on."""
    found: torch.device = _state().device
    return found


def wait_for_all() -> None:
    """Go on when every process is here."""
    _state().wait_for_everyone()


def in_any(flag: bool) -> bool:
    """Whether `flag` is set in at least one process; all of them have to ask."""
    if count() == 1:
        return flag
    found = torch.tensor(int(flag), device=device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def in_first(work: Callable[[], _T]) -> _T:
    """What `work` returns in the first process, in all of them; an error of the first is one of all.

    The result must be picklable.

    Raises:
        HubMoeError: Or what else hub_moe raises on purpose in `work`.
    """
    if count() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = work()
        except HubMoeError as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    result: _T = box[0]
    return result


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
