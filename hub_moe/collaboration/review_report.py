"""A review as the comment that people read; whatever comes from the contribution can say nothing but its letters."""

from collections.abc import Iterator, Sequence

from .. import __version__
from ..cards.markdown import code, escape
from ..evals.compare import RecordComparison
from ..evals.verify import Verification
from ..hub.marks import write_mark
from ..patches.comparison import ExpertChange
from .costs import percent
from .review import Review

_MOST_CHARACTERS = 40_000  # of the text before the mark; a comment may have 65,536
_MOST_ROWS = 24
_SHADES = "░▒▓█"
_VERDICTS = {
    "accept": "**Accept.** Nothing was found against it.",
    "reject": "**Reject.**",
    "incomplete": "**Incomplete.** Nothing was found against it, but not everything could be looked at.",
}


def render_review(review: Review) -> str:
    """The comment, with the mark by which it is found again at its end."""
    lines = [f"### Review of {review.pull_request.head[:12]}", "", _VERDICTS[review.verdict], ""]
    lines += [f"- {escape(each)}" for each in review.reasons]
    lines += ["", *_render_changes(review.changes), *_render_claims(review)]
    for comparison in review.gains:
        lines += ["", "#### What it claims to gain", "", *render_comparison(comparison)]
    for comparison in review.regressions:
        lines += ["", "#### What it costs elsewhere, measured by the reviewer", "", *render_comparison(comparison)]
    lines += ["", *(f"- {escape(each)}" for each in review.notes)]
    allowed = f", tolerance {percent(review.tolerance)}" if review.tolerance else ""
    lines += ["", f"Checked by `hub-moe review` {__version__}, nonce {code(review.nonce)}{allowed}."]
    text = "\n".join(lines)
    if len(text) > _MOST_CHARACTERS:
        text = text[:_MOST_CHARACTERS].rpartition("\n")[0] + "\n\nThe rest is in the JSON report."
    return f"{text}\n\n{write_mark(review.mark)}"


def draw_heat_map(changes: Sequence[ExpertChange]) -> list[str]:
    """Layers down, experts across: darker moved further, a dot did not move."""
    sizes = {(each.layer, each.expert): each.change for each in changes if each.kind == "routed_experts"}
    if not sizes:
        return []
    width = 1 + max(expert for _, expert in sizes if expert is not None)
    most = max(sizes.values()) or 1.0
    layers = sorted({layer for layer, _ in sizes if layer is not None})
    rows = []
    for layer in layers:
        shades = (_shade(sizes.get((layer, expert)), most) for expert in range(width))
        rows.append(f"layer {layer:3} {''.join(shades)}")
    return [*rows, f"          {_SHADES} = up to {most:.2%} of the base's norm"]


def render_comparison(comparison: RecordComparison) -> Iterator[str]:
    """The lines of a table of tasks, with base, candidate, difference and verdict."""
    yield "| Task | base | candidate | difference (95 %) | p (Holm) | verdict |"
    yield "| --- | ---: | ---: | ---: | ---: | --- |"
    for task in comparison.comparison.tasks[:_MOST_ROWS]:
        difference = task.difference
        name = f"{escape(task.task)} {code(comparison.metrics[task.task])}"
        interval = f"{difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"
        values = f"{task.base.value:.4f} | {task.candidate.value:.4f} | {interval} | {task.adjusted_p_value:.3g}"
        yield f"| {name}{' (lower is better)' if task.lower_is_better else ''} | {values} | {task.verdict} |"


def _shade(size: float | None, most: float) -> str:
    return "·" if size is None else _SHADES[min(3, int(4 * size / most))]


def _render_changes(changes: Sequence[ExpertChange]) -> list[str]:
    if not changes:
        return []
    lines = ["#### What it changes", "", "```", *draw_heat_map(changes), "```", ""]
    lines += ["| Part | layer | expert | change |", "| --- | ---: | ---: | ---: |"]
    largest = sorted(changes, key=lambda each: -each.change)
    for each in largest[:_MOST_ROWS]:
        place = f"{'' if each.layer is None else each.layer} | {'' if each.expert is None else each.expert}"
        lines.append(f"| {each.kind.replace('_', ' ')} | {place} | {each.change:.2%} |")
    if len(changes) > _MOST_ROWS:
        lines += ["", f"The {_MOST_ROWS} largest of {len(changes)}."]
    return lines


def _render_claims(review: Review) -> list[str]:
    if not review.verifications:
        return []
    lines = ["", "#### Its claims, asked again", "", "| Record | outcome | asked again | chance to miss 5 % made up |"]
    lines.append("| --- | --- | ---: | ---: |")
    for name, each in review.verifications.items():
        lines.append(f"| {code(name)} | {each.outcome} | {each.num_replayed} of {each.num_documents} | {_miss(each)} |")
    failed = [document for each in review.verifications.values() for document in each.failed_documents[:5]]
    return [*lines, "", *(f"- {escape(document)}" for document in failed)]


def _miss(verification: Verification) -> str:
    chance = (verification.catch_probabilities or {}).get("5%")
    return "" if chance is None else f"{1 - chance:.1%}"
