"""What a run of the demo found."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

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
