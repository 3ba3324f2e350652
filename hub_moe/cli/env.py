"""`hub-moe env`: what this installation computes with."""

from typing import Annotated, Any

import typer

from .output import print_json, print_table


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Tell versions, processor, and how the experts of a model are computed here, and why so.

    HUB_MOE_CPU_EXPERTS=compiled or =torch chooses how on the CPU, where it also stands for all else that a HubMoe
    computes in compiled code; HUB_MOE_GPU_EXPERTS=triton or =grouped_mm chooses how on a GPU. What was asked for
    and cannot be had is an error. The first run on a machine compiles the experts' code, which takes some seconds, and
    measures the processor's bfloat16.

    \b
    Examples:
      hub-moe env
      HUB_MOE_CPU_EXPERTS=torch hub-moe env --json
    """
    facts = _describe()
    if as_json:
        print_json(facts)
        return
    experts, bfloat16 = facts["cpu_experts"], facts["torch_bfloat16"]
    rows = [*facts["versions"].items(), ("cores", str(facts["cores"])), ("threads of torch", str(facts["threads"]))]
    rows += [("GPUs", ", ".join(facts["gpus"]) or "none")]
    rows += [("experts on the CPU", experts["products"]), ("  because", experts["why"])]
    faster = "faster" if bfloat16["is_fast"] else "slower"
    rows += [
        (
            "bfloat16 in torch",
            f"{bfloat16['bfloat16_gflops']} GFLOP/s, {faster} than by float32 ({bfloat16['cast_gflops']} GFLOP/s)",
        )
    ]
    rows += [("experts on a GPU", facts["gpu_experts"]["products"]), ("  because", facts["gpu_experts"]["why"])]
    rows += [("experts elsewhere", facts["other_experts"])]
    print_table(("What", "here"), rows)


def _describe() -> dict[str, Any]:
    import os

    import torch

    from ..environment import describe_versions
    from ..experts.bfloat16_speed import bfloat16_record
    from ..experts.products import describe_choice
    from ..experts.stacks import describe_gpu_choice

    products, why = describe_choice()
    gpu_products, gpu_why = describe_gpu_choice()
    return {
        "versions": describe_versions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpu_experts": {"products": products, "why": why},
        "torch_bfloat16": bfloat16_record(),
        "gpu_experts": {"products": gpu_products, "why": gpu_why},
        "other_experts": "grouped_mm of transformers",
    }
