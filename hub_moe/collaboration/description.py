"""The description of a contribution, rendered from patch, records and run; no number is typed by hand."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .. import __version__
from ..cards.facts import Facts
from ..cards.markdown import code, escape
from ..evals.compare import RecordComparison
from ..patches.card import describe_extent
from ..patches.comparison import ExpertChange
from ..patches.metadata import PatchMetadata
from .review_report import draw_heat_map, render_comparison

_MOST_ROWS = 60


def render_description(
    metadata: PatchMetadata,
    *,
    changes: Sequence[ExpertChange],
    claimed: Sequence[RecordComparison],
    general: Sequence[RecordComparison],
    facts: Facts | None,
    overlap: Mapping[str, Any] | None,
    picture: str | None,
) -> str:
    """What it changes, what it gains, what it costs elsewhere, what overlaps, what it took; without its mark."""
    lines = [f"An expert patch that changes {describe_extent(metadata)} of this model at {code(metadata.base.commit)}."]
    lines += ["", "### What it changes", ""]
    if picture is not None:
        lines += [f"![Change of each expert by layer]({picture})", ""]
    lines += ["```", *draw_heat_map(changes), "```", "", *_render_changes(changes)]
    lines += ["", "### What it gains", "", *_render_comparisons(claimed)]
    lines += ["", "### What it costs elsewhere", "", *_render_comparisons(general)]
    lines += ["", "### Training data in the evaluation data", "", _describe_overlap(overlap)]
    lines += ["", "### Energy and cost", "", *_render_energy(facts)]
    lines += ["", *_render_licence(facts)]
    lines += ["", f"All numbers are self-reported, from the records in `evals/`; hub_moe {__version__}."]
    return "\n".join(lines)


def _render_changes(changes: Sequence[ExpertChange]) -> Iterator[str]:
    yield "| Part | layer | expert | change of its norm |"
    yield "| --- | ---: | ---: | ---: |"
    for each in sorted(changes, key=lambda one: -one.change)[:_MOST_ROWS]:
        place = f"{'' if each.layer is None else each.layer} | {'' if each.expert is None else each.expert}"
        yield f"| {each.kind.replace('_', ' ')} | {place} | {each.change:.2%} |"
    if len(changes) > _MOST_ROWS:
        yield ""
        yield f"The {_MOST_ROWS} largest of {len(changes)}."


def _render_comparisons(comparisons: Sequence[RecordComparison]) -> Iterator[str]:
    if not comparisons:
        yield "Not measured."
    for place, comparison in enumerate(comparisons):
        if place:
            yield ""
        yield f"Suite {code(comparison.suite)}, the same documents asked of the base and of the base with the patch:"
        yield ""
        yield from render_comparison(comparison)


def _describe_overlap(overlap: Mapping[str, Any] | None) -> str:
    if overlap is None:
        return "Not measured."
    try:
        hit, rows = len(overlap["eval_rows_hit"]), overlap["eval_rows"]
        common = len(overlap["eval_rows_common"])
        return (
            f"{hit:,} of {rows:,} evaluation rows share {overlap['n']} words in a row with the training data "
            f"({common:,} more share only phrases that many training rows have)."
        )
    except (KeyError, TypeError, ValueError):
        return "Not measured: the run's report of it is not whole."


def _render_energy(facts: Facts | None) -> Iterator[str]:
    if facts is None or not facts.energy:
        yield "Not measured."
        return
    yield "| Activity | energy | how known | CO2 | cost |"
    yield "| --- | ---: | --- | ---: | ---: |"
    for each in facts.energy:
        energy = "" if each.joules is None else f"{each.joules / 3600:.4g} Wh"
        co2, usd = each.details.get("co2_g"), each.details.get("usd")
        costs = f"{'' if co2 is None else f'{co2:.3g} g'} | {'' if usd is None else f'{usd:.3g} USD'}"
        yield f"| {escape(each.activity)} | {energy} | {escape(each.how_known)} | {costs} |"


def _render_licence(facts: Facts | None) -> list[str]:
    if facts is None or facts.license is None:
        return []
    return [f"Licence: {escape(facts.license.name or facts.license.id or 'not declared')}."]
