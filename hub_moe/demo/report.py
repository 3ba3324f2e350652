"""What a run of the demo found."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class DemoReport:
    """The content of `report.json`.

    Args:
        plan: Every number the run was started with.
        config: Of the model.
        parameters: `total` and `active` (what one token passes through).
        corpus: Files, bytes and tokens of each side, and the hash of all.
        training: Steps, tokens, seconds, speed, losses by step.
        bits_per_byte: Of the held-out files, under the model and each baseline.
        held_out: Bytes and tokens scored, and how.
        load_imbalance: Busiest expert over the mean by layer, in the first and the last tenth of training.
        dataset: `repo` and `revision` under which the text was pushed and loaded.
        model: `repo` and `revision` under which the model was published and loaded.
        patch: The contributor's expert patch: `repo` and `revision`, chosen experts, sizes, loss on the prose
            before and after.
        comparison: Base and patch on the suite, as `hub-moe compare` gives it.
        verification: By record, what a stranger found when he checked the patch's claims.
        prompt: What was completed.
        completion: What the model made of it, loaded from the Hub by its name.
        versions: Of Python and the libraries.
        seed: Of everything random.
        wall_s: Seconds this call took; less than the whole after a resume.
    """

    plan: dict[str, Any]
    config: dict[str, Any]
    parameters: dict[str, int]
    corpus: dict[str, Any]
    training: dict[str, Any]
    bits_per_byte: dict[str, float]
    held_out: dict[str, Any]
    load_imbalance: dict[str, dict[str, float]]
    dataset: dict[str, str]
    model: dict[str, str]
    patch: dict[str, Any]
    comparison: dict[str, Any]
    verification: dict[str, Any]
    prompt: str
    completion: str
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

    def _patch_rows(self) -> list[tuple[str, str]]:
        loss = self.patch["held_out_loss"]
        share = self.patch["size_bytes"] / self.patch["checkpoint_bytes"]
        return [
            ("expert patch", f"{self.patch['repo']} at {self.patch['revision'][:8]}"),
            ("- size", f"{self.patch['size_bytes'] / 1e6:.2f} MB, {share:.0%} of the model"),
            ("- loss on prose, before / after", f"{loss['before']:.3f} / {loss['after']:.3f}"),
        ]

    def _comparison_rows(self) -> list[tuple[str, str]]:
        metrics = self.comparison["metrics"]
        return [
            (
                f"- {task['task']} {metrics[task['task']]}, base / patch",
                f"{task['base']['value']:.3f} / {task['candidate']['value']:.3f}, {task['verdict']}",
            )
            for task in self.comparison["comparison"]["tasks"]
        ]

    def _outcome(self) -> str:
        outcomes = sorted({found["outcome"] for found in self.verification.values()})
        return f"{', '.join(outcomes)} ({sum(each['num_replayed'] for each in self.verification.values())} asked again)"

    def summary_rows(self) -> list[tuple[str, str]]:
        """The main figures as pairs of words for people."""
        rows = [(f"bits per byte, {name}", f"{value:.3f}") for name, value in self.bits_per_byte.items()]
        worst = max(self.load_imbalance["last tenth"].values())
        speed = self.training["tokens_per_s"]
        return [
            *rows,
            ("parameters, total / active", f"{self.parameters['total']:,} / {self.parameters['active']:,}"),
            ("tokens trained on", f"{self.training['tokens']:,}"),
            ("tokens per second", f"{speed:,.0f}" if speed else "-"),
            ("busiest expert / mean load", f"{worst:.2f}"),
            ("published as", f"{self.model['repo']} at {self.model['revision'][:8]}"),
            ("trained on", f"{self.dataset['repo']} at {self.dataset['revision'][:8]}"),
            *self._patch_rows(),
            *self._comparison_rows(),
            ("claims of the patch, checked by a stranger", self._outcome()),
            ("seconds", f"{self.wall_s:.0f}"),
        ]
