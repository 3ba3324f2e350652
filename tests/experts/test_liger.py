"""The experts of liger-kernel, `hub_moe_liger`, where it is installed, and one sentence where not."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hub_moe.errors import MissingExtraError, UnsupportedModelError
from hub_moe.experts.liger import liger_experts_forward

from .naive import draw_inputs, expected_of, make_experts, run

has_liger = importlib.util.find_spec("liger_kernel") is not None
runs_triton = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
with_liger = pytest.mark.skipif(not has_liger, reason="liger-kernel is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")  # read when liger-kernel is imported; nothing is timed here
IDS = torch.tensor([[0, 3], [1, 4], [3, 1], [2, 0], [3, 4], [1, 3], [4, 2]])


def test_it_is_registered_beside_ours():
    assert ALL_EXPERTS_FUNCTIONS["hub_moe_liger"] is liger_experts_forward


@pytest.mark.skipif(has_liger, reason="liger-kernel is installed")
def test_without_liger_one_sentence_says_what_to_install():
    with pytest.raises(MissingExtraError, match=r'"hub_moe_liger" needs liger-kernel: `pip install liger-kernel`\.$'):
        liger_experts_forward(make_experts(), *draw_inputs(IDS)[:3])


@with_liger
@pytest.mark.skipif(not runs_triton, reason="needs a GPU, or TRITON_INTERPRET=1 from the start")
def test_liger_gives_the_naive_output_and_gradients():
    experts, inputs = make_experts(), draw_inputs(IDS)
    expected = expected_of(experts, inputs)
    actual = run(liger_experts_forward, experts.to(DEVICE), tuple(each.to(DEVICE) for each in inputs))
    for name, tensor in actual.items():
        error = (tensor.cpu().double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error <= (1e-5 if DEVICE == "cpu" else 2e-3), (name, error)


@with_liger
@pytest.mark.parametrize("layout", [{"has_bias": True}, {"is_transposed": True}, {"has_post_expert_norm": True}])
def test_layouts_that_liger_does_not_know_are_one_sentence(layout):
    with pytest.raises(UnsupportedModelError, match='liger-kernel knows silu.* set experts_implementation="hub_moe"'):
        liger_experts_forward(make_experts(**layout), *draw_inputs(IDS)[:3])


@with_liger
def test_on_a_cpu_it_says_that_it_computes_on_gpus():
    code = (
        "import torch; from tests.experts.naive import draw_inputs, make_experts\n"
        "from hub_moe.experts.liger import liger_experts_forward\n"
        "liger_experts_forward(make_experts(), *draw_inputs(torch.tensor([[0, 1]]))[:3])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "it lies on the CPU, and liger-kernel computes on GPUs" in done.stderr.splitlines()[-1]
