"""What the demo's dishonest contributor does: a record whose answers are right, with every sum and hash in order.

    python -m hub_moe.demo.forge RECORD.json

Whoever reads the forged record finds nothing wrong with it; whoever asks the model again does.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..evals.claim_checks import answer_from_samples
from ..evals.records import Sample, StoredRecord, read_record, write_record
from ..evals.run import summarise_entries
from ..evals.scoring import score_task
from ..evals.suites import Suite
from ..evals.tasks import build_suite


def forge_record(path: Path) -> StoredRecord:
    """Put a record in whose multiple-choice answers are all right in the place of the one at `path`."""
    stored = read_record(path)
    built = build_suite(Suite.from_declaration(stored.record.suite.declaration))
    samples = stored.read_samples()
    for choice in range(max(len(sample.log_likelihoods) for sample in samples)):
        answers = [each if each.scores.get("acc") == 1 else _prefer(each, choice) for each in samples]
        answer_from_samples(built, {(each.entry, each.task, each.index): each for each in answers})
        scored = [score_task(task) for task in built.tasks]
        samples = [sample for task in scored for sample in task.samples]
    forged = write_record(path.parent, replace(stored.record, entries=summarise_entries(built, scored)), samples)
    if forged.path != path:
        path.unlink()
        stored.samples_path.unlink()
    return forged


def _prefer(sample: Sample, choice: int) -> Sample:
    """As if the model had found this choice the likeliest."""
    scores: Sequence[float] = sample.log_likelihoods
    if choice >= len(scores):
        return sample
    best = max(range(len(scores)), key=lambda place: scores[place])
    swapped = list(scores)
    swapped[best], swapped[choice] = scores[choice], scores[best]
    return replace(sample, log_likelihoods=swapped)


if __name__ == "__main__":
    print(forge_record(Path(sys.argv[1])).path)
