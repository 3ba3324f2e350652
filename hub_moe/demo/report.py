"""What a run of the demo found."""

import gzip
import json
import lzma
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import modeling  # noqa: F401  (teaches AutoModelForCausalLM our models)
from ..data import Corpus
from ..evals import score_with_compressor, score_with_model, score_with_unigrams

Row = tuple[str, ...]


@dataclass(frozen=True)
class DemoReport:
    """The content of `report.json`.

    Args:
        plan: Every number the run was started with.
        corpus: Hash of the text, and files of each side.
        training: The report of the base's training run.
        bits_per_byte: Of the held-out files, under the base and each baseline.
        model: `repo`, `revision` and `tag` of the merged model.
        pull_requests: Number, author, patch, claim, verdict and its reasons.
        gains: By patch and task: base, patch alone, merged, and what became of the gain; None after a resumed merge.
        conflicts: What both patches change, and what was done about it.
        completion: What the merged model wrote, loaded from the Hub by its name.
        steps: Every command: who gave it, what it printed, seconds.
        versions: Of Python and the libraries.
        seed: Of everything random.
        wall_s: Seconds this call took; less than the whole after a resume.
    """

    plan: dict[str, Any]
    corpus: dict[str, Any]
    training: dict[str, Any]
    bits_per_byte: dict[str, float]
    model: dict[str, str]
    pull_requests: Sequence[dict[str, Any]]
    gains: Sequence[dict[str, Any]] | None
    conflicts: dict[str, Any] | None
    completion: str
    steps: Sequence[dict[str, Any]]
    versions: dict[str, str]
    seed: int
    wall_s: float

    @classmethod
    def read(cls, path: Path) -> Self:
        """The report in a file."""
        return cls(**json.loads(path.read_text("utf-8")))

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def proposal_rows(self) -> list[Row]:
        """Pull request, patch, author, claim, review."""
        return [
            (f"#{each['number']}", each["name"], each["author"], each["claim"], each["verdict"])
            for each in self.pull_requests
        ]

    def gain_rows(self) -> list[Row]:
        """What each merged patch gains where it says so: patch, task, base, patch alone, merged, outcome."""
        return [
            (
                each["patch"],
                f"{each['task']} {each['metric']}",
                f"{each['base']:.3f}",
                f"{each['own']:.3f}",
                f"{each['merged']:.3f}",
                each["outcome"],
            )
            for each in self.gains or ()
            if each["suite"] in {domain["name"] for domain in self.plan["domains"]}
        ]

    def summary_rows(self) -> list[Row]:
        """The main figures as pairs of words for people."""
        rows = [(f"bits per byte of held-out files, {name}", f"{value:.3f}")
                for name, value in self.bits_per_byte.items()]  # fmt: skip
        return [
            *rows,
            ("tokens the base was trained on", f"{self.training['tokens']:,}"),
            ("tokens per second", f"{self.training['tokens_per_s']:,.0f}"),
            ("merged into", f"{self.model['repo']} at {self.model['revision'][:8]}, {self.model['tag']}"),
            ("commands", f"{len(self.steps)}"),
            ("seconds", f"{self.wall_s:.0f}"),
        ]


def score_held_out(folder: Path, corpus: Corpus, *, context_length: int) -> dict[str, float]:
    """Bits per byte of the held-out files under the model in `folder` and under each baseline; lower is better.

    Every token is scored with at least half of `context_length` before it, where its file has that much. gzip and xz
    at level 9 see the files end to end as one, and no training text.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = {
        side: tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
        for side, documents in (("train", corpus.train), ("held_out", corpus.held_out))
    }
    texts = [document.text for document in corpus.held_out]
    size_bytes = sum(document.size_bytes for document in corpus.held_out)
    scores = {
        "model": score_with_model(
            model,
            tokens["held_out"],
            size_bytes=size_bytes,
            separator=tokenizer.bos_token_id,
            context_length=context_length,
            stride=context_length // 2,
        ),
        "xz -9": score_with_compressor(lambda data: lzma.compress(data, preset=9), texts),
        "gzip -9": score_with_compressor(lambda data: gzip.compress(data, 9), texts),
        "unigram": score_with_unigrams(
            tokens["train"], tokens["held_out"], vocab_size=model.config.vocab_size, size_bytes=size_bytes
        ),
    }
    return {name: score.bits_per_byte for name, score in scores.items()}
