"""Greedy decoding with and without drafts of the model's own MTP layer, at batch 1 and 4.

    python evals/speed/mtp.py [--rounds 9] [--batches 1 4] [--tokens 128] [--training-steps 300]

A model of 12 M parameters (4 M active, both with its one MTP layer) is first trained for a minute or two on the
standard library's source, byte by byte, with 32 files held back. Prompts are pieces of those. In each round both ways
continue the same prompts in random order, and must give the same tokens; ratios are seconds with drafts over seconds
without. The JSON has the acceptance by depth, passes of the model and tokens per second.
"""

import argparse
import statistics
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import Figures, add_options, compare, report, require_quiet, take_turns, time_both

from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "num_mtp_layers": 1,
}
HELD_BACK = 32
TRAINING_BATCH, TRAINING_LENGTH = 8, 96


def read_corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on and bytes held back, int64."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    parts = b"".join(files[HELD_BACK:]), b"".join(files[:HELD_BACK])
    train, held_back = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)
    return train, held_back


def draw_pieces(text: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Random pieces, (count, length)."""
    starts = torch.randint(0, len(text) - length, (count, 1))
    return text[starts + torch.arange(length)]


def train_model(text: torch.Tensor, steps: int) -> tuple[Any, float]:
    """A model that has learnt a little, in eval mode, and its last loss, MTP and balance included."""
    torch.manual_seed(0)
    model = HubMoeForCausalLM(HubMoeConfig(**SHAPE)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    loss = float("nan")
    for step in range(steps):
        tokens = draw_pieces(text, TRAINING_BATCH, TRAINING_LENGTH)
        output = model(tokens, labels=tokens)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = output.loss.item()
        if step % 25 == 0:
            print(f"training step {step}/{steps} loss {loss:.3f}", file=sys.stderr, flush=True)
    return model.eval(), loss


def make_rivals(model: Any, prompts: torch.Tensor, count: int) -> dict[str, Callable[[], Figures]]:
    """Both ways of continuing the prompts by `count` tokens, which must agree; each gives seconds and passes."""
    given = {"max_new_tokens": count, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
    expected = model.generate(prompts, **given)
    model.generate(prompts, use_mtp=True, **given)  # the first time takes longer

    def run(use_mtp: bool) -> Figures:
        passes: list[int] = []
        hook = model.model.register_forward_hook(lambda *_: passes.append(1))
        found: list[torch.Tensor] = []
        times = time_both(lambda: found.append(model.generate(prompts, use_mtp=use_mtp, **given)))
        hook.remove()
        if not torch.equal(found[0], expected):
            raise SystemExit("Drafts changed the tokens; greedy decoding must give the same with and without.")
        return {**times, "passes": float(len(passes))}

    return {"mtp": lambda: run(True), "plain": lambda: run(False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a prompt")
    parser.add_argument("--training-steps", type=int, default=300)
    arguments = parser.parse_args()
    busy = require_quiet(arguments)
    text, held_back = read_corpus()
    model, loss = train_model(text, arguments.training_steps)
    ratios, details = {}, {}
    for batch in arguments.batches:
        name, prompts = f"batch_{batch}", draw_pieces(held_back, batch, 256)
        figures = take_turns(
            make_rivals(model, prompts, arguments.tokens), rounds=arguments.rounds, seed=batch, label=name
        )
        for clock, suffix in (("wall", ""), ("processor", "_processor")):
            ratios[name + suffix] = compare(figures["mtp"], figures["plain"], clock)
        ratios[f"{name}_passes"] = compare(figures["mtp"], figures["plain"], "passes")
        acceptance, tokens = model.mtp_acceptance, batch * arguments.tokens
        print(f"{name}: {acceptance.rate:.0%} of the drafts accepted", file=sys.stderr)
        details[name] = {
            "drafted": acceptance.drafted,
            "accepted": acceptance.accepted,
            "acceptance_rate": acceptance.rate,
            "tokens_per_second": {
                way: tokens / statistics.median(each["wall"] for each in turns) for way, turns in figures.items()
            },
        }
    goals = {f"batch_{batch}": 1.0 for batch in arguments.batches}
    report("mtp", ratios, goals, arguments, headline=list(goals), busy=busy, last_training_loss=loss, runs=details)


if __name__ == "__main__":
    main()
