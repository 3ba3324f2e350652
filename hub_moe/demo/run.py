"""The demo from a folder to its report."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..bars import quiet_bars
from ..data import Corpus, read_stdlib_corpus
from ..environment import describe_versions
from ..training.checkpoints import explain_failed_writes
from .folder import RunFolder, open_run_folder
from .local_hub import LocalHub, open_local_hub
from .loop import Loop
from .plan import MODEL, DemoPlan, plan_demo
from .report import DemoReport, score_held_out


def run_demo(
    output_dir: str | Path, *, minutes: float = 2.0, seed: int = 0, fresh: bool = False, plan: DemoPlan | None = None
) -> DemoReport:
    """A base is trained and published; two patches are proposed, reviewed and merged, a forged one is turned down.

    Everything goes through an embedded Hub in `output_dir/hub`, by commands that are printed. An interrupted run goes
    on where it stopped when called again with the same arguments; a finished one is only read.

    Args:
        output_dir: A new or empty folder, or that of an earlier run.
        minutes: Rough length of the base's training on two cores; it fixes the number of steps.
        seed: Of the split, the weights and the order of the rows.
        fresh: Remove an earlier run in `output_dir` first.
        plan: Every number at once, in place of `minutes` and `seed`.

    Raises:
        ConfigError: If `output_dir` holds something else, or a run with other settings.
        CheckpointError: If `output_dir` cannot be written.
        EvaluationError: If a review comes to another verdict than it should.
        HubError: If a command fails.
        MissingExtraError: If the extra `server` is not installed.
        KeyboardInterrupt: After Ctrl-C; the same call goes on.
    """
    with quiet_bars():
        return _run(Path(output_dir), plan or plan_demo(minutes=minutes, seed=seed), fresh=fresh)


def _run(output_dir: Path, plan: DemoPlan, *, fresh: bool) -> DemoReport:
    started_s = time.monotonic()
    corpus = read_stdlib_corpus(seed=plan.seed, held_out_share=plan.held_out_share, max_bytes=plan.corpus_bytes)
    settings = {"plan": plan.to_dict(), "corpus_sha256": corpus.sha256}
    folder = open_run_folder(output_dir, settings, fresh=fresh)
    if folder.is_finished:
        print(f"{folder.path} holds this run, finished; --fresh starts it anew.", file=sys.stderr)
        return DemoReport.read(folder.report)
    with explain_failed_writes(folder.path), open_local_hub(folder) as hub:
        hub.write_people()
        found = _go_through(hub, plan, corpus, folder)
    report = DemoReport(**found, seed=plan.seed, wall_s=round(time.monotonic() - started_s, 1))
    with explain_failed_writes(folder.path):
        folder.write_atomically(folder.report, report.write)
    return report


def _go_through(hub: LocalHub, plan: DemoPlan, corpus: Corpus, folder: RunFolder) -> dict[str, Any]:
    """Every act; what the report says of it."""
    loop = Loop(hub, plan, folder)
    if not folder.reviews.exists():
        loop.write_texts(corpus)
    training = loop.build_base()
    proposals = loop.contribute()
    reviews = loop.review(proposals)
    merged = loop.merge(reviews)
    text = loop.use()
    bits_per_byte = score_held_out(folder.base / "model", corpus, context_length=plan.block_length)
    return {
        "plan": plan.to_dict(),
        "corpus": {"sha256": corpus.sha256, "files": len(corpus.train), "held_out": len(corpus.held_out)},
        "training": training,
        "bits_per_byte": bits_per_byte,
        "model": {"repo": MODEL, "revision": merged["commit"], "tag": merged["tag"]},
        "pull_requests": [{**asdict(each.proposal), "verdict": each.verdict, "reasons": each.reasons,
                           "notes": each.notes} for each in reviews],
        "gains": merged.get("gains"),
        "conflicts": merged.get("conflicts"),
        "completion": text,
        "steps": [asdict(each) for each in loop.steps.done],
        "versions": describe_versions(),
    }  # fmt: skip
