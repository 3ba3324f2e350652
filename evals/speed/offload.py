"""Decoding a model in half its memory: HubMoe with an `expert_budget` against accelerate's disk offload.

    python evals/speed/offload.py [--rounds 9] [--tokens 32] [--prompt 64] [--experts 64] [--warm]

A random float32 model of 1.2 GB; both get half of its size. Ours spends on experts what the rest leaves of it; the
peer is the stock class with a `device_map` that keeps as many layers as fit and puts the others on the disk, which
accelerate maps anew for every token. Each run is a fresh process, and before each token the files leave the page cache,
as where there is no memory for them; with `--warm` they stay, and then the rest of the model is most of the time.
Figures are seconds per token; the tokens are given, each another one, since a random model left to itself repeats one
token and its experts. Both must find the same next ones. The limit is the time to copy the experts that ours had to
read, in the same process. A random router chooses evenly, which no cache can foresee: trained ones repeat themselves.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from loading import SHAPE as LOADED_SHAPE
from rounds import add_options, compare, measure_in_turns, report, require_quiet

SHAPE = {**LOADED_SHAPE, "moe_intermediate_size": 256, "tie_word_embeddings": True, "eos_token_id": None}
EXPERT_BYTES = 3 * SHAPE["hidden_size"] * SHAPE["moe_intermediate_size"] * 4
GOALS = {"time_s": 0.1}


def make_checkpoint(folder: Path, num_experts: int) -> None:
    """A random native checkpoint in float32."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE, n_routed_experts=num_experts)).save_pretrained(folder)


def load_ours(folder: Path, size: int) -> Any:
    """Half of the model's size, of which experts get what the rest leaves."""
    import hub_moe

    num_experts = json.loads((folder / "config.json").read_text())["n_routed_experts"]
    experts = (SHAPE["num_hidden_layers"] - SHAPE["first_k_dense_replace"]) * num_experts * EXPERT_BYTES
    return hub_moe.HubMoeForCausalLM.from_pretrained(folder, expert_budget=size // 2 - (size - experts))


def load_peer(folder: Path, size: int, scratch: str) -> Any:
    """The last layers on the disk, so that half of the model's size is in memory."""
    from transformers import DeepseekV3ForCausalLM

    layers = SHAPE["num_hidden_layers"]
    in_memory = round(layers * 0.5)
    device_map = {f"model.layers.{index}": "cpu" if index < in_memory else "disk" for index in range(layers)}
    device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return DeepseekV3ForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=scratch)


def forget_files(*folders: Path) -> None:
    """Take what is not mapped out of the page cache, as on a machine whose memory the model fills."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def decode_once(which: str, folder: Path, num_prompt: int, num_tokens: int, *, is_cold: bool) -> dict[str, Any]:
    """Seconds per token behind the prompt, and the tokens."""
    import torch
    import transformers

    from hub_moe.experts.offload import count_reads

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        model = load_ours(folder, size) if which == "ours" else load_peer(folder, size, scratch)
        tokens = (torch.arange(num_prompt) * 7919 % SHAPE["vocab_size"])[None]
        output = model(tokens, use_cache=True)
        chosen: list[int] = []
        seconds = 0.0
        before = count_reads(model)
        for index in range(num_tokens):
            given = torch.tensor([[(num_prompt + index) * 7919 % SHAPE["vocab_size"]]])
            if is_cold:
                forget_files(folder, Path(scratch))
            start = time.perf_counter()
            output = model(given, past_key_values=output.past_key_values, use_cache=True)
            seconds += (time.perf_counter() - start) / num_tokens
            chosen.append(int(output.logits[0, -1].argmax()))
        uses, reads = ((b - a) / num_tokens for a, b in zip(before, count_reads(model), strict=True))
        figures = {"time_s": seconds, "tokens": chosen, "experts_used": uses, "experts_read": reads}
        return figures | {"limit_s": _copy_seconds(reads * EXPERT_BYTES)}


def _copy_seconds(size: float) -> float:
    import torch

    source, target = torch.ones(2**28, dtype=torch.uint8), torch.ones(2**28, dtype=torch.uint8)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return min(times) * size / source.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--decode", nargs=2, metavar=("WHICH", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.decode:
        which, folder = arguments.decode
        lengths = (arguments.prompt, arguments.tokens)
        print(json.dumps(decode_once(which, Path(folder), *lengths, is_cold=not arguments.warm)))
        return
    busy = require_quiet(arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), arguments.experts)
        options = ["--prompt", str(arguments.prompt), "--tokens", str(arguments.tokens)]
        options += ["--warm"] if arguments.warm else []
        programs = {
            which: [os.path.abspath(__file__), "--decode", which, folder, *options] for which in ("ours", "peer")
        }
        figures: Any = measure_in_turns(programs, rounds=arguments.rounds)
    answers = {tuple(figure.pop("tokens")) for runs in figures.values() for figure in runs}
    if len(answers) > 1:
        raise SystemExit("offload: ours and the peer found different tokens")
    ours = figures["ours"]
    ratios = {
        "time_s": compare(ours, figures["peer"], "time_s"),
        "time_to_limit": compare(ours, [{"time_s": figure["limit_s"]} for figure in ours], "time_s"),
    }
    report("offload", ratios, GOALS, arguments, headline=["time_s"], busy_share_before=busy, figures=figures)


if __name__ == "__main__":
    main()
