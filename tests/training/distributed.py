"""Runs a function of a test module in several processes under `torchrun`, on the CPU; gives back what each returned.

A test module's worker is an ordinary function of JSON-like arguments that returns something `torch.save` can store:

    def _train(folder): ...
    rank_0, rank_1 = run_ranks(_train, str(tmp_path))

Every rank has initialised nothing: transformers' and accelerate's own start-up is part of what is tested.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(function, *arguments, num_ranks=2, environment=None, timeout_s=300):
    """`function(*arguments)` in each of `num_ranks` processes; their results in the order of ranks.

    Raises:
        AssertionError: If a process fails; the message ends with what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command += [__file__, function.__module__, function.__qualname__, json.dumps(arguments), folder]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert process.returncode == 0, f"{function.__name__} failed:\n{process.stderr[-6000:]}"
        return [_load(Path(folder, str(rank))) for rank in range(num_ranks)]


def _load(path):
    import torch

    return torch.load(path, weights_only=False)


def _work(module, name, arguments, folder):
    import torch

    torch.manual_seed(0)
    result = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    torch.save(result, Path(folder, os.environ["RANK"]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _work(*sys.argv[1:])
