"""lm_eval's own command and Python API load our models, by the ways that the help names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.anatomy.families import tiny_config
from tests.evals.checkpoints import save_model

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "evals" / "tasks" / "offline"

# Arguments: model, folder of tasks.
IN_PYTHON = """
import sys
import hub_moe.modeling
import lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": sys.argv[1]}, tasks=["offline_cloze"], limit=3, device="cpu",
    bootstrap_iters=0,    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False),
)
print(type(found["results"]["offline_cloze"]["acc,none"]).__name__, found["n-samples"]["offline_cloze"]["effective"])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    return save_model(tmp_path_factory.mktemp("lm-eval") / "model", tiny_config("hub_moe"), tiny_tokenizer)


def _run(*words):
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], env=surroundings, capture_output=True, text=True, timeout=300)


def test_lm_evals_own_command_loads_our_models(model):
    task = ("--tasks", "offline_cloze", "--include_path", str(TASKS), "--limit", "3")
    done = _run("-m", "hub_moe", "lm-eval", "run", "--model", "hf", "--model_args", f"pretrained={model}", *task)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|offline_cloze|" in done.stdout


def test_lm_evals_python_api_loads_our_models_after_the_import(model):
    done = _run("-c", IN_PYTHON, str(model), str(TASKS))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "3"
