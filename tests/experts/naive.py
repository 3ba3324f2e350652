"""The definition of correct: one token and one expert at a time, in float64, differentiated by autograd.

Shape letters: T tokens, K experts per token, D hidden, F expert inner, E routed experts.
"""

import copy

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

SIZES = {"D": 24, "F": 8, "E": 5}
LAYOUTS = {
    "plain": {},
    "with biases": {"has_bias": True},
    "transposed": {"is_transposed": True},
    "as gpt-oss": {"is_transposed": True, "has_bias": True, "is_concatenated": False, "is_clamped": True},
    "clamped": {"is_clamped": True},
    "without a gate": {"has_gate": False},
    "without a gate, with biases": {"has_gate": False, "has_bias": True},
    "with a norm behind the experts": {"has_post_expert_norm": True},
}


class Config:
    def __init__(self, implementation):
        self._experts_implementation = implementation


def clamp_interleaved(self, gate_up):
    gate, up = gate_up[..., ::2].clamp(max=0.7), gate_up[..., 1::2].clamp(-0.7, 0.7)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def clamp_halves(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate.clamp(max=0.7)) * up.clamp(-0.7, 0.7)


def make_experts(*, sizes=SIZES, is_clamped=False, implementation="hub_moe", **layout):
    """An experts module of any layout that transformers' decorator knows, in float32."""
    has_gate, is_transposed = layout.get("has_gate", True), layout.get("is_transposed", False)

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            hidden, inner, self.num_experts = sizes["D"], sizes["F"], sizes["E"]
            self.act_fn = nn.functional.silu
            up, up_width = ("gate_up_proj", 2 * inner) if has_gate else ("up_proj", inner)
            for name, rows, columns in ((up, up_width, hidden), ("down_proj", hidden, inner)):
                shape = (columns, rows) if is_transposed else (rows, columns)
                weights = torch.randn(self.num_experts, *shape) / columns**0.5
                self.register_parameter(name, nn.Parameter(weights))
                if layout.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(self.num_experts, rows)))
            if layout.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(hidden)

        def forward(self, *inputs):
            raise NotImplementedError

    if is_clamped:
        Experts._apply_gate = clamp_interleaved if layout.get("is_concatenated") is False else clamp_halves
    torch.manual_seed(1)
    return use_experts_implementation(**layout)(Experts)(Config(implementation))


def naive_forward(experts, x_TD, expert_TK, weight_TK):
    """Each token's own experts, in a loop; ids from `num_experts` on belong to another process."""
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    out = []
    for x_D, expert_K, weight_K in zip(x_TD, expert_TK.tolist(), weight_TK, strict=True):
        out_D = torch.zeros_like(x_D)
        for expert, weight in zip(expert_K, weight_K, strict=True):
            if expert < experts.num_experts:
                h = _linear(experts, up_name, expert, x_D)
                a = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
                y_D = _linear(experts, "down_proj", expert, a)
                y_D = experts.post_expert_norm(y_D) if experts.has_post_expert_norm else y_D
                out_D = out_D + weight * y_D
        out.append(out_D)
    if not out:  # an empty sum, but of everything that has a gradient
        return x_TD * (weight_TK.sum() + sum(each.sum() for each in experts.parameters()))
    return torch.stack(out)


def _linear(experts, name, expert, x):
    matrix = getattr(experts, name)[expert]
    y = x @ matrix if experts.is_transposed else matrix @ x
    return y + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else y


def draw_inputs(expert_TK, *, hidden=SIZES["D"], dtype=torch.float32):
    """Tokens, expert ids, weights in float32 as routers give them, and a gradient of the output."""
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(expert_TK.shape[0], hidden, generator=generator).to(dtype)
    weight_TK = torch.rand(expert_TK.shape, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return x_TD, expert_TK, weight_TK, torch.randn(x_TD.shape, generator=generator).to(dtype)


def run(forward, experts, inputs):
    """Output, gradients of tokens and weights, and gradients of the parameters, by name."""
    x_TD, expert_TK, weight_TK, dout_TD = inputs
    x_TD, weight_TK = (each.detach().clone().requires_grad_() for each in (x_TD, weight_TK))
    experts.zero_grad()
    out_TD = forward(experts, x_TD, expert_TK, weight_TK)
    out_TD.backward(dout_TD)
    named = {f"d{name}": each.grad for name, each in experts.named_parameters()}
    return {"out": out_TD.detach(), "dx": x_TD.grad, "dweight": weight_TK.grad, **named}


def expected_of(experts, inputs):
    """The same by the naive forward in float64, from the very same weights and inputs."""
    double = make_double(experts)
    x_TD, expert_TK, weight_TK, dout_TD = inputs
    return run(naive_forward, double, (x_TD.double(), expert_TK, weight_TK.double(), dout_TD.double()))


def make_double(experts):
    return copy.deepcopy(experts).double().requires_grad_(True)
