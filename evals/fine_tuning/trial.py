"""One fine-tune of the comparison, and what it does to the text that its base was trained on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import hub_moe.modeling  # noqa: F401  (teaches AutoModelForCausalLM our models and patches)
from hub_moe.data import read_stdlib_corpus
from hub_moe.evals import score_with_model
from hub_moe.training.preview import preview_run
from hub_moe.training.run import run_training
from hub_moe.training.run_config import RunConfig, parse_run_config


@dataclass(frozen=True)
class Trial:
    """A method at a learning rate; `rank` is LoRA's."""

    method: str
    learning_rate: float
    seed: int
    rank: int | None = None

    @property
    def name(self) -> str:
        """A word for files."""
        return f"{self.method}-{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Base:
    """A model that is fine-tuned, the context it was trained with, held-out files of its text, and what it is."""

    model: Path
    context_length: int
    texts: list[str]
    facts: dict[str, Any]


def read_base(folder: Path) -> Base:
    """What `hub-moe demo` or `base.py` left in `folder`.

    Raises:
        SystemExit: If it is neither, or this Python's standard library is not the one that it was trained on.
    """
    if (folder / "base.json").exists():
        facts = json.loads((folder / "base.json").read_text("utf-8"))
        model, corpus_of, sha256 = folder / "run" / "model", facts["corpus"], facts["corpus_sha256"]
        context_length, about = facts["block_length"], facts
    elif (folder / "report.json").exists():
        report = json.loads((folder / "report.json").read_text("utf-8"))
        plan, sha256 = report["plan"], report["corpus"]["sha256"]
        corpus_of = {"seed": plan["seed"], "held_out_share": plan["held_out_share"], "max_bytes": plan["corpus_bytes"]}
        model, context_length = folder / "base" / "model", plan["block_length"]
        about = {"model": report["model"], "corpus_sha256": sha256}
    else:
        raise SystemExit(f"{folder} holds neither the base.json of base.py nor the report.json of hub-moe demo.")
    corpus = read_stdlib_corpus(**corpus_of)
    if corpus.sha256 != sha256:
        raise SystemExit(f"{folder} was trained on another Python's standard library than this one's.")
    # the smaller half of the files: many kinds of code in little time
    by_size = sorted(corpus.held_out, key=lambda document: document.size_bytes)
    return Base(model, context_length, [document.text for document in by_size[: len(by_size) // 2]], about)


class Bench:
    """The base, the task and the text that the base comes from: the same for every trial."""

    def __init__(self, base: Base, rows: Path, scratch: Path, *, settings: dict[str, Any]) -> None:
        self.base, self.rows, self.scratch = base, rows, scratch
        self.tokenizer = AutoTokenizer.from_pretrained(base.model)
        self.settings = {**settings, "base": base.facts}
        self.base_bits_per_byte = self.score(AutoModelForCausalLM.from_pretrained(base.model))

    def config(self, trial: Trial) -> RunConfig:
        """The run of a trial."""
        methods: dict[str, dict[str, Any]] = {
            "full": {},
            "experts": {"score": "token", "sample_rows": 64, **self.settings["choice"]},
            "lora": {
                "r": trial.rank,
                "alpha": 2 * (trial.rank or 1),
                "target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
                "routed_experts": True,
            },
        }
        return parse_run_config(
            {
                "model": {"name": str(self.base.model)},
                "data": {
                    "source": str(self.rows),
                    "limit": self.settings["limit"],
                    "max_length": self.settings["max_length"],
                    "chat_template": "plain",
                    "held_out": 0.1,
                },
                "method": {"name": trial.method, **methods[trial.method]},
                "training": {
                    "learning_rate": trial.learning_rate,
                    "steps": self.settings["steps"],
                    "batch_size": self.settings["batch_size"],
                    "evaluations": 1,
                    "checkpoints": 1,
                    "seed": trial.seed,
                    "num_threads": torch.get_num_threads(),
                },
                "output": {"folder": str(self.scratch / trial.name)},
            }
        )

    def run(self, trial: Trial) -> dict[str, Any]:
        """Fine-tune, load what came out as a user would, and score the base's own text with it."""
        result = run_training(self.config(trial), say=lambda _: None)
        if trial.method == "lora":
            base = AutoModelForCausalLM.from_pretrained(self.base.model)
            model = PeftModel.from_pretrained(base, str(result.result))
        else:
            model = AutoModelForCausalLM.from_pretrained(result.result)
        loss = result.report["held_out_loss"]
        return {
            "method": trial.method,
            "learning_rate": trial.learning_rate,
            "seed": trial.seed,
            "rank": trial.rank,
            "settings": self.settings,
            "trained": result.report["numbers"]["trained"],
            "task_loss": {"before": loss["before"], "after": loss["after"]},
            "base_text_bits_per_byte": {"before": self.base_bits_per_byte, "after": self.score(model)},
            "versions": result.report["versions"],
        }

    def score(self, model: Any) -> float:
        """Bits per byte of the base's held-out files."""
        return score_with_model(
            model.eval(),
            self.tokenizer(self.base.texts)["input_ids"],
            size_bytes=sum(len(text.encode()) for text in self.base.texts),
            separator=self.tokenizer.bos_token_id,
            context_length=self.base.context_length,
            stride=self.base.context_length // 2,
        ).bits_per_byte


def find_equal_rank(bench: Bench, trained: int) -> int:
    """The rank at which LoRA trains most nearly as many numbers as `trained`, never fewer than it by rounding down."""
    at_one = preview_run(bench.config(Trial("lora", 1e-3, seed=0, rank=1)))["numbers"]["trained"]
    return max(1, -(-trained // at_one))
