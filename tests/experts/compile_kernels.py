"""Compile every kernel as a forward and a backward pass, or a step of decoding, would start it on a GPU, without one.

    TRITON_INTERPRET=0 python -m tests.experts.compile_kernels 90

Only the driver, which would say what GPU there is, is stood in for: argument types, alignments and block sizes are
those of real calls, and the code is compiled to the end. Prints one JSON object a kernel.
"""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hub_moe.experts import triton_forward, triton_kernels
from hub_moe.modeling import latent_kernels

from .naive import draw_inputs, make_experts, run


class Driver:
    """Of a GPU that there is not."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class Compiled:
    """A kernel that is compiled where it would be started."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *inputs, **settings):
        compiled = self.kernel.warmup(*inputs, grid=(1,), **settings)
        code = compiled.asm["ptx"]
        facts = {"kernel": self.kernel.__name__, "shared_bytes": compiled.metadata.shared}
        print(json.dumps({**facts, "wgmma": "wgmma.mma_async" in code, "mma": "mma.sync" in code}), flush=True)


def main():
    driver.set_active(Driver(int(sys.argv[1])))
    for name in ("route", "sum_over_experts", "sum_over_pairs"):
        setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name)))
    for name, kernel in list(triton_kernels.KERNELS.items()):
        triton_kernels.KERNELS[name] = Compiled(kernel)
    # nothing has run, so the routing is whatever lay in memory: it is neither checked nor followed
    torch._assert_async = lambda *args: None
    triton_forward._Backward._weight_gradient = lambda self, sums_S: torch.zeros(self.plan.expert_TK.shape)
    for bucket in (1, 2):
        triton_forward._bucket = lambda num_pairs, num_experts, bucket=bucket: bucket
        for layout in ({}, {"has_bias": True, "is_transposed": True}):
            experts = make_experts(sizes={"D": 512, "F": 256, "E": 2}, **layout).bfloat16()
            inputs = draw_inputs(torch.tensor([[0, 1]] * 4), hidden=512, dtype=torch.bfloat16)
            run(triton_forward.triton_experts_forward, experts, inputs)
    compile_attention()


def compile_attention():
    """DeepSeek-V2-Lite's, for one new token without a mask and for four with one."""
    for name, kernel in list(latent_kernels.KERNELS.items()):
        latent_kernels.KERNELS[name] = Compiled(kernel)
    for new, mask in ((1, None), (4, torch.ones(2, 1, 4, 4096, dtype=torch.bool))):
        query = torch.zeros(2, 16, new, 576, dtype=torch.bfloat16).split([512, 64], dim=-1)
        cache = torch.zeros(2, 4096, 576, dtype=torch.bfloat16).split([512, 64], dim=-1)
        latent_kernels.attend_in_splits(*query, cache, mask=mask, scaling=0.1)


if __name__ == "__main__":
    main()
