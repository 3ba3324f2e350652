"""Tiny bases, rows and runs for the tests of `hub-moe train`."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hub_moe.training import read_metrics
from hub_moe.training.run import run_training
from hub_moe.training.run_config import parse_run_config

from ..anatomy.families import tiny_config

ROOT = Path(__file__).parents[2]
CHOICE = {"experts": {"1": [1, 5], "2": [0]}, "shared_experts": False, "non_expert_modules": False}

# Argument 1: the tables of the run; 2: the step after which the process kills itself.
KILLED = """
import json, os, signal, sys
from hub_moe.training.progress import TrainingProgress
from hub_moe.training.run import run_training
from hub_moe.training.run_config import parse_run_config
shown = TrainingProgress.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return shown(self, args, state, control, **kwargs)
TrainingProgress.on_step_end = on_step_end
run_training(parse_run_config(json.loads(sys.argv[1])))
"""


def save_base(folder, model_type, tokenizer, **changes):
    """A tiny model of a family with random weights and its tokenizer, as a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, number=48):
    """Sums as prompts and completions of different lengths."""
    rows = [
        {"prompt": f"{i} + {i * j}?", "completion": f"= {i + i * j}" * (1 + i % 3)} for i in range(8) for j in range(7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:number]), "utf-8")
    return path


def make_tables(folder, *, base, rows, method, **training):
    """The tables of a run of 8 steps; keys of `training` override."""
    method = {"name": method} if isinstance(method, str) else method
    return {
        "model": {"name": str(base)},
        "data": {"source": str(rows), "max_length": 64, "chat_template": "plain", "held_out": 0.2},
        "method": method,
        "training": {
            **{
                "steps": 8,
                "batch_size": 4,
                "learning_rate": 1e-2,
                "evaluations": 2,
                "checkpoints": 3,
                "num_threads": 1,
            },
            **training,
        },
        "output": {"folder": str(folder)},
    }


def run(tables, *, fresh=False):
    """The result of the run, which says nothing."""
    return run_training(parse_run_config(tables), fresh=fresh, say=lambda text: None)


def run_killed(tables, *, step):
    """Start the run in a process that is killed (SIGKILL) after `step`."""
    command = [sys.executable, "-c", KILLED, json.dumps(tables), str(step)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == -9, process.stderr[-4000:]


def read_losses(folder):
    """Training and held-out loss of each step, exactly."""
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows]


def read_weights(folder):
    """All tensors of a patch, adapter or model."""
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
