"""`hub-moe find`: which fine-tune of a base is the best, by what others could reproduce?"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from .output import Row, print_json, print_table, say

if TYPE_CHECKING:
    from ..hub.fine_tunes import FoundFineTunes
    from ..hub.ranking import FineTune, Result

_COLUMNS = ("Fine-tune", "what", "task", "value", "over base ±95 %", "n", "standing")
_MOST_NOTES = 20


def find(
    base: Annotated[str, typer.Option(metavar="REPO", help="The model that was fine-tuned, on the Hub: OWNER/NAME.")],
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Rank by this entry of the suites.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=600, help="Show at most so many fine-tunes.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ranking as JSON.")] = False,
) -> None:
    """Rank the fine-tunes of a base by what others could reproduce of them.

    Looked at are the expert patches in the base's repo and in its open pull requests, and the models whose card names
    it as base_model. With --task they are ranked by that task: first what was reproduced, by somebody who may speak
    for the base, about another's work, at the head that is proposed now; then what is self-reported, as all is in a
    repo of its own; then what claims nothing; last what was rejected. Among equals the larger gain over the base goes
    first, whether the task counts up or down (↓). Without --task each is shown with all its tasks, and those that
    improve most of them go first, in the same order of trust.

    A gain is the difference to the base that was fine-tuned, asked the same questions, with its paired 95 % interval
    where the answers of both can be had. Several gains side by side are not corrected for their number.

    \b
    Examples:
      hub-moe find --base alice/base --task gsm8k
      hub-moe find --base alice/base --json
    """
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    from ..evals.compare import compare_records
    from ..hub.fine_tunes import find_fine_tunes

    with TemporaryDirectory() as scratch:
        found = find_fine_tunes(
            HfApi(),
            base,
            compare=lambda one, other: compare_records(one, other).to_dict(),
            scratch=Path(scratch),
            task=task,
            limit=limit,
            say=say,
        )
    if as_json:
        print_json(found.to_dict())
    elif found.fine_tunes:
        print_table(_COLUMNS, [row for each in found.fine_tunes for row in _rows(each)])
    for note in _notes(found):
        say(note)


def _rows(fine_tune: "FineTune") -> Iterator[Row]:
    number = f" #{fine_tune.pull_request}" if fine_tune.pull_request else ""
    by = f" by {fine_tune.author}" if fine_tune.subfolder else ""  # else its name says it
    shown = (f"{fine_tune.name}{number}", f"{fine_tune.kind}{by}")
    if not fine_tune.results:
        yield (*shown, "", "", "", "", str(fine_tune.standing))
    for result in fine_tune.results:
        yield (*shown, *_cells(result))
        shown = ("", "")


def _cells(result: "Result") -> Row:
    task = f"{result.task} {result.metric}{'' if result.higher_is_better else ' ↓'}"
    difference = "" if result.difference is None else f"{result.difference:+.3f}"
    if result.interval is not None:
        difference += f" ±{(result.interval[1] - result.interval[0]) / 2:.3f}"
    if result.verdict is not None:
        difference += f" {result.verdict}"
    return task, f"{result.value:.3f}", difference, str(result.num_documents), str(result.standing)


def _notes(found: "FoundFineTunes") -> Iterator[str]:
    if not found.fine_tunes:
        yield f"Nobody has made a fine-tune of {found.base} that you may see on this Hub."
    for each in found.fine_tunes:
        if each.standing.reason:
            yield f"{each.name} was {each.standing}: {each.standing.reason}"
    if found.num_found > len(found.fine_tunes):
        yield f"Showing {len(found.fine_tunes)} of {found.num_found} fine-tunes; --limit shows more."
    if found.fine_tunes and found.task is None and found.tasks:
        yield f"--task ranks by one of {', '.join(found.tasks[:10])}{'...' if len(found.tasks) > 10 else ''}"
    yield from found.notes[:_MOST_NOTES]
    if len(found.notes) > _MOST_NOTES:
        yield f"and {len(found.notes) - _MOST_NOTES} more notes; --json has them."
