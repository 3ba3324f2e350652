"""`hub-moe compare`: is a fine-tune better than its base?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .output import print_json, print_table, print_text

if TYPE_CHECKING:
    from ..evals.compare import RecordComparison
    from ..evals.statistics import TaskComparison


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Record of the base, or the folder that holds just it.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="Record of the fine-tune.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="ENTRY=METRIC", help="Compare by this metric of an entry; may be repeated."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Chance of any wrong verdict where the models are equal.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two records of `hub-moe eval` document by document.

    Both models must have been asked the same: other documents or prompts are refused. The difference has a paired 95 %
    interval, clustered where documents belong together; the test is McNemar's exact one for right and wrong, a
    permutation test otherwise, corrected by Holm over all entries. "Tied" does not show that the models are equal:
    see the smallest difference that the comparison could detect.

    \b
    Examples:
      hub-moe compare evals/offline-0a1b2c3d4e5f6071.json evals/offline-8899aabbccddeeff.json
      hub-moe compare base-evals fine-tune-evals --metric gsm8k=exact_match,flexible-extract --json
    """
    from ..evals.compare import compare_records
    from ..evals.records import read_record

    chosen = _read_metrics(metric or [])
    found = compare_records(read_record(base), read_record(candidate), metrics=chosen, alpha=alpha)
    if as_json:
        print_json(found.to_dict())
    else:
        print_comparison(found)


def print_comparison(found: "RecordComparison") -> None:
    """The table for people, and below it what to bear in mind."""
    columns = ("Entry", "base", "candidate", "difference", "p (Holm)", "detects", "verdict")
    print_table(columns, [_row(task, found.metrics[task.task]) for task in found.comparison.tasks])
    print_text()
    print_text(f"Base: {found.base_model} (record {found.base[:16]})")
    print_text(f"Candidate: {found.candidate_model} (record {found.candidate[:16]})")
    for note in notes(found):
        print_text(note)


def notes(found: "RecordComparison") -> list[str]:
    """What a reader should know beside the figures."""
    lines = [f"Only one of the records has {name}; it was left out." for name in found.left_out]
    for name, (ours, theirs) in (found.execution_differences or {}).items():
        lines.append(f"The base ran with {name} {ours}, the candidate with {theirs}: some answers may differ by that.")
    for role, floor in (found.noise_floors or {}).items():
        if floor is not None:
            flips = max(variation["flips"] for variation in floor.variations.values())
            lines.append(f"Rounding alone changed {flips:.0f} of {floor.num_documents} answers of the {role}.")
    return lines


def _row(task: "TaskComparison", metric: str) -> tuple[str, ...]:
    detects = task.minimum_detectable_effect
    return (
        f"{task.task} {metric}{' ↓' if task.lower_is_better else ''}",
        f"{task.base.value:.3f}",
        f"{task.candidate.value:.3f}",
        f"{task.difference.value:+.3f} ({task.difference.low:+.3f} to {task.difference.high:+.3f})",
        f"{task.adjusted_p_value:.3g}",
        "-" if detects is None else f"{detects:.3f}",
        task.verdict,
    )


def _read_metrics(given: list[str]) -> dict[str, str]:
    found = {}
    for each in given:
        entry, equals, name = each.partition("=")
        if not equals or not entry or not name:
            raise ConfigError(f"--metric {each} is not of the form ENTRY=METRIC, such as arc_easy=acc.")
        found[entry] = name
    return found
