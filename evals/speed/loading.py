"""Loading a native per-expert bf16 checkpoint of 1.2 GB and 4,600 tensors: hub_moe against transformers' deepseek_v3.

    python evals/speed/loading.py [--rounds 9] [--experts 256] [--fp8]

Each load is a fresh process with a warm page cache. Time is that of `from_pretrained`; memory is the peak resident size
above what the imports took, file pages included. The limit is to map the files and copy them once. What was loaded must
be the same to the bit. `--experts 64` makes a checkpoint of 1,200 larger tensors. With `--fp8` the same model as a
128x128-block FP8 checkpoint in shards: the peak above the finished model may be at most the largest shard.
"""

import argparse
import hashlib
import json
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import add_options, compare, measure_in_turns, report, require_quiet

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_mtp_layers": 0,
}
EXPERT_WIDTHS = 64 * 512  # inner widths of a layer's experts together: with any number of experts 679 M parameters
SHARD_BYTES = 200 * 2**20
GOALS = {"time_s": 1 / 2.2, "load_time_s": 1 / 2.2, "time_to_limit": 1.2, "peak_to_file": 1.1, "load_peak_to_file": 1.1}


def shape_of(num_experts: int) -> dict[str, Any]:
    """Fields of a config: so many experts in each layer, and as many numbers in all whatever their number."""
    return {**SHAPE, "n_routed_experts": num_experts, "moe_intermediate_size": EXPERT_WIDTHS // num_experts}


def make_checkpoint(folder: Path, num_experts: int) -> None:
    """A random native checkpoint; its size depends neither on the values nor on the number of experts."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape_of(num_experts))).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)


def quantize_checkpoint(source: Path, target: Path) -> None:
    """The checkpoint with every projection in FP8 blocks, shard by shard."""
    import torch
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        tensors = {}
        for name, weight in load_file(file).items():
            tensors[name] = weight
            if name.endswith(("_proj.weight", "_with_mqa.weight")):
                blocks = tuple(-(-side // 128) for side in weight.shape)
                tensors[name] = (weight.float() / 0.001).clamp(-448, 448).to(torch.float8_e4m3fn)
                tensors[name + "_scale_inv"] = torch.full(blocks, 0.001)
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    scales = {f"{name}_scale_inv": file for name, file in index["weight_map"].items() if "_proj" in name}
    index["weight_map"].update(scales)
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (target / "config.json").write_text(json.dumps(config))


def resident_bytes(field: str) -> int:
    """`VmRSS` or its high-water mark `VmHWM` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load_once(how: str, folder: str) -> None:
    """Load and print time, peak and final memory, above what the imports took, and a hash of what was loaded."""
    import torch
    import transformers

    import hub_moe.modeling
    from hub_moe.loading import load

    transformers.logging.disable_progress_bar()
    ways: dict[str, Any] = {
        "HubMoeForCausalLM": hub_moe.modeling.HubMoeForCausalLM.from_pretrained,
        "DeepseekV3ForCausalLM": transformers.DeepseekV3ForCausalLM.from_pretrained,
        "load": load,
        "limit": map_and_copy,
    }
    torch.ones(2, 2) @ torch.ones(2, 2)  # starts the thread pool
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    loaded = ways[how](folder)
    figures: dict[str, Any] = {"time_s": time.perf_counter() - start, "peak_bytes": resident_bytes("VmHWM") - before}
    if how != "limit":
        tensors = loaded.state_dict()
        figures["model_bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        digest = hashlib.blake2b()
        for _, tensor in sorted(tensors.items()):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        figures["hash"] = digest.hexdigest()
    print(json.dumps(figures))


def map_and_copy(folder: str) -> list[Any]:
    """Every file mapped, and its bytes copied once to fresh memory."""
    import torch

    copies = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            data = torch.frombuffer(mapped, dtype=torch.uint8)
            copies.append(data.clone())
            del data
    return copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--fp8", action="store_true", help="measure the memory of dequantising while loading instead")
    parser.add_argument("--load", nargs=2, metavar=("HOW", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load_once(*arguments.load)
        return
    require_quiet(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        native = Path(scratch) / "native"
        make_checkpoint(native, arguments.experts)
        if arguments.fp8:
            measure_fp8(native, Path(scratch) / "fp8", arguments)
        else:
            measure_native(native, arguments)


def measure_native(native: Path, arguments: argparse.Namespace) -> None:
    """Time and memory against the stock class, and time against one copy."""
    size = sum(file.stat().st_size for file in native.glob("*.safetensors"))
    ways = ("HubMoeForCausalLM", "load", "DeepseekV3ForCausalLM", "limit")
    programs = {how: [os.path.abspath(__file__), "--load", how, str(native)] for how in ways}
    figures: Any = measure_in_turns(programs, rounds=arguments.rounds)
    hashes = {figure.pop("hash") for how in ways[:3] for figure in figures[how]}
    if len(hashes) > 1:
        raise SystemExit("loading: what was loaded differs")
    ours, load, stock, limit = (figures[how] for how in ways)
    file = [{"peak_bytes": size}] * arguments.rounds
    ratios = {
        "time_s": compare(ours, stock, "time_s"),
        "load_time_s": compare(load, stock, "time_s"),
        "time_to_limit": compare(ours, limit, "time_s"),
        "peak_to_file": compare(ours, file, "peak_bytes"),
        "load_peak_to_file": compare(load, file, "peak_bytes"),
        "peak_bytes": compare(ours, stock, "peak_bytes"),
    }
    report(
        "loading",
        ratios,
        GOALS,
        arguments,
        headline=["time_s", "time_to_limit", "peak_to_file"],
        checkpoint_bytes=size,
        figures=figures,
    )


def measure_fp8(native: Path, quantized: Path, arguments: argparse.Namespace) -> None:
    """Memory above the finished model, in shards."""
    quantize_checkpoint(native, quantized)
    shard = max(file.stat().st_size for file in quantized.glob("*.safetensors"))
    programs = {"fp8": [os.path.abspath(__file__), "--load", "HubMoeForCausalLM", str(quantized)]}
    figures = measure_in_turns(programs, rounds=arguments.rounds)["fp8"]
    above = max(figure["peak_bytes"] - figure["model_bytes"] for figure in figures)
    report("loading-fp8", {"peak_above_model_in_shards": above / shard}, {"peak_above_model_in_shards": 1.0}, arguments,
           shard_bytes=shard, figures=figures)  # fmt: skip


if __name__ == "__main__":
    main()
