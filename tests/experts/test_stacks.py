"""Which experts are used on a GPU, and what speaks against Triton's."""

import pytest
import torch
from torch import nn

from hub_moe.errors import ConfigError
from hub_moe.experts import stacks
from hub_moe.experts.stacks import GPU_VARIABLE, uses_triton, why_not_triton_for

from .naive import LAYOUTS, make_experts

META = torch.device("meta")  # a device that Triton cannot use, on every machine


def test_a_device_that_triton_cannot_use_gets_grouped_mm_unless_triton_was_asked_for(monkeypatch):
    assert not uses_triton(make_experts(), META)
    monkeypatch.setenv(GPU_VARIABLE, "triton")
    with pytest.raises(ConfigError, match="triton cannot be had: the kernels are for CUDA devices, not for meta"):
        uses_triton(make_experts(), META)


def test_grouped_mm_that_was_asked_for_is_used_whatever_else_could_be(monkeypatch):
    monkeypatch.setenv(GPU_VARIABLE, "grouped_mm")
    monkeypatch.setattr(stacks, "why_no_triton", lambda device: None)
    assert not uses_triton(make_experts(), META)
    assert stacks.describe_gpu_choice() == ("grouped_mm of transformers", f"{GPU_VARIABLE}=grouped_mm")


def test_another_choice_is_an_error_that_names_the_choices(monkeypatch):
    monkeypatch.setenv(GPU_VARIABLE, "cutlass")
    with pytest.raises(ConfigError, match="is 'cutlass'; triton, grouped_mm or nothing was expected"):
        uses_triton(make_experts(), META)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_but_a_norm_behind_the_experts_can_use_triton(layout):
    reason = why_not_triton_for(make_experts(**layout))
    assert reason == ("the kernels have no norm behind the experts" if layout.get("has_post_expert_norm") else None)


def test_weights_of_other_dtypes_cannot_use_triton(monkeypatch):
    mixed, trained = make_experts(), make_experts()
    mixed.down_proj = nn.Parameter(mixed.down_proj.bfloat16())
    trained.act_fn = nn.PReLU()
    assert "one for all stacks" in why_not_triton_for(mixed)
    assert "torch.float64" in why_not_triton_for(make_experts().double())
    assert "act_fn.weight" in why_not_triton_for(trained)
    monkeypatch.setenv(GPU_VARIABLE, "triton")
    monkeypatch.setattr(stacks, "why_no_triton", lambda device: None)
    assert uses_triton(make_experts(), META)
    with pytest.raises(ConfigError, match="one for all stacks"):
        uses_triton(mixed, META)


def test_while_torch_compiles_grouped_mm_is_used_unless_triton_was_asked_for(monkeypatch):
    monkeypatch.setattr(stacks, "why_no_triton", lambda device: None)
    experts = make_experts()

    @torch.compile(backend="eager", fullgraph=True)
    def answer(x):
        return x + 1 if uses_triton(experts, META) else x - 1

    assert uses_triton(experts, META)
    assert answer(torch.zeros(())) == -1
    monkeypatch.setenv(GPU_VARIABLE, "triton")
    torch.compiler.reset()
    with pytest.raises(Exception, match="torch is compiling the model"):
        answer(torch.zeros(()))
