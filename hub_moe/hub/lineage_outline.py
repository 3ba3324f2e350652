"""A lineage as an outline of short lines, for terminals and pictures."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .contributions import FoundPatch, FoundReview, ProposedPatch
from .lineage import Lineage, Merge, Relative

Kind = Literal["model", "patch", "merge", "pull request", "group", "absent"]

_STATES = {
    "found": "",
    "gated": "gated",
    "missing": "not on this Hub: deleted, renamed or private",
    "repeated": "shown elsewhere in this tree",
    "unread": "not looked up",
}
_GROUPS = {"finetune": "Fine-tunes", "adapter": "Adapters", "merge": "Merges of models", "quantized": "Quantized"}


@dataclass(frozen=True)
class Branch:
    """A line and those below it; `about` is what stands beside the name, less prominent."""

    name: str
    kind: Kind
    about: str = ""
    branches: tuple["Branch", ...] = ()

    def rows(self, depth: int = 0) -> Iterator[tuple[int, str, str, str]]:
        """Every line from the top: depth, kind, name, about."""
        yield depth, self.kind, self.name, self.about
        for branch in self.branches:
            yield from branch.rows(depth + 1)


def outline_lineage(lineage: Lineage) -> Branch:
    """The model, below it what it was made from, what was merged into it or waits to be, and what was made of it."""
    groups = [
        _group("Made from", [_outline_relative(each, is_base=True) for each in lineage.bases]),
        _group("Merged into it", [_outline_merge(each) for each in lineage.merges]),
        _group("Patches in it", [_outline_patch(each) for each in lineage.patches]),
        _group("Proposed", [_outline_proposed(each) for each in lineage.proposed]),
        *_group_children(lineage.children),
    ]
    about = f"at {lineage.commit[:12]}"
    return Branch(lineage.name, "model", about, tuple(branch for group in groups for branch in group))


def _group(title: str, branches: Sequence[Branch]) -> list[Branch]:
    return [Branch(title, "group", str(len(branches)), tuple(branches))] if branches else []


def _group_children(children: Sequence[Relative]) -> Iterator[list[Branch]]:
    patches = [each for each in children if each.is_expert_patch]
    yield _group("Expert patches in repos of their own", [_outline_relative(each) for each in patches])
    for relation, title in _GROUPS.items():
        found = [each for each in children if each.relation == relation and not each.is_expert_patch]
        yield _group(title, [_outline_relative(each) for each in found])


def _outline_relative(relative: Relative, *, is_base: bool = False) -> Branch:
    words = [
        relative.relation if is_base else "",
        "expert patch" if relative.is_expert_patch else "",
        f"made for its commit {relative.used_commit[:12]}" if relative.used_commit else "",
        f"at {relative.commit[:12]}" if relative.commit else "",
        _STATES[relative.state],
    ]
    kind: Kind = "model" if relative.state in ("found", "repeated") else "absent"
    if is_base:
        below = [_outline_relative(each, is_base=True) for each in relative.relatives]
    else:
        below = [branch for group in _group_children(relative.relatives) for branch in group]
    return Branch(relative.name, kind, _join(words), tuple(below))


def _outline_patch(patch: FoundPatch) -> Branch:
    if patch.fault:
        return Branch(patch.name, "absent", f"unreadable: {patch.fault}")
    words = [
        f"{_count(patch.num_experts, 'expert')} in {_count(patch.num_layers, 'layer')}",
        f"by {patch.method}" if patch.method else "",
        f"made for {patch.base} at {patch.base_commit[:12]}" if patch.base_commit else f"made for {patch.base}",
    ]
    return Branch(patch.name, "patch", _join(words))


def _outline_merge(merge: Merge) -> Branch:
    below = [
        Branch(
            each.name,
            "patch",
            _join(
                [
                    f"by {each.contributor}" if each.contributor else "",
                    f"#{each.pull_request}" if each.pull_request else "",
                    f"weights {each.weights_sha256[:12]}",
                ]
            ),
        )
        for each in merge.patches
    ]
    words = [merge.created[:10], f"method {merge.method}" if merge.method else "", f"by {', '.join(merge.authors)}"]
    return Branch(merge.commit[:12], "merge", _join(words), tuple(below))


def _outline_proposed(proposed: ProposedPatch) -> Branch:
    pull_request = proposed.pull_request
    words = [f"{proposed.mark.name} by {pull_request.author}", pull_request.status, f"at {pull_request.head[:12]}"]
    reviews = [Branch(each.reviewer, "group", describe_review(each)) for each in proposed.reviews]
    return Branch(f"#{pull_request.number}", "pull request", _join(words), tuple(reviews))


def describe_review(review: FoundReview) -> str:
    """A verdict, and what it is worth."""
    doubts = []
    if review.is_author:
        doubts.append("on their own pull request")
    elif not review.is_maintainer:
        doubts.append("does not maintain this repo")
    if not review.is_current:
        doubts.append(f"of {review.mark.commit[:12]}, which is no longer the head")
    return _join([f"says {review.mark.verdict}", *doubts])


def _join(words: Iterable[str]) -> str:
    return ", ".join(word for word in words if word)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
