"""Contributions into the base, or beside it: everything is checked before one commit on main, or nothing happens."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..cards.markdown import code, escape
from ..errors import ConfigError, ConflictError, EvaluationError, HubError
from ..evals.suites import Suite
from ..hub.marks import ReviewMark
from ..hub.merge_commits import MergedPatch, close, commit_files, find_merge, find_owners, tag_merge
from ..hub.pull_requests import (
    PullRequest,
    describing,
    fetch_pull_request,
    parse_reference,
    read_proposal,
)
from ..patches.combining import combine_patches, find_conflicts
from ..patches.conflicts import describe_conflicts
from ..patches.merging import merge_into_base
from ..patches.rebasing import rebase_patch
from .gains import Examiner, Gain
from .merge_plan import Candidate, Merged, MergeOptions, MergePlan
from .merged_files import BaseCard, complete_model, gather_files, open_card
from .review import find_review, require_open, suites_of
from .safety import list_faults, open_contribution

Say = Callable[[str], None]


def finish_merge(api: HfApi, references: Sequence[str], *, dry_run: bool = False, say: Say) -> Merged | None:
    """Tag and close what an interrupted merge of these very pull requests left; None if they are not merged yet.

    Nothing changes where it had come to its end, or with `dry_run`; the tag is then None.

    Raises:
        HubError: If only some of them are merged, or together with others.
    """
    repo, numbers = _parse(references)
    pull_requests = [fetch_pull_request(api, repo, number) for number in numbers]
    found = {number: find_merge(api, repo, number) for number in numbers}
    merges = {each for each in found.values() if each is not None}
    if not merges:
        return None
    open_ones = [each for each in pull_requests if each.status in ("open", "draft")]
    merged = [number for number, each in found.items() if each is not None]
    commit, together = min(merges)
    is_one = len(merges) == 1 and len(merged) == len(numbers)
    if not is_one or (not open_ones and together != set(numbers)):
        names = ", ".join(f"#{number}" for number in merged)
        raise HubError(f"{repo}: {names} was merged already, by commit {', '.join(sorted(m[0] for m in merges))[:90]}.")
    done = f"{repo} has these patches already, by commit {commit[:12]}"
    if dry_run:
        say(f"{done}; without --dry-run this tags it and closes what is open.")
        return Merged(commit, None)
    if not open_ones:
        say(f"{done}.")
        return Merged(commit, tag_merge(api, repo, commit))
    say(f"{done}; tagging it and closing what is open.")
    return _announce(api, open_ones, commit, "Merged")


def prepare_merge(
    api: HfApi, references: Sequence[str], options: MergeOptions, *, work: Path, say: Say, show: Callable[[Any], None]
) -> MergePlan:
    """Everything but the commit: reviews, files, three-way safety, conflicts, the merged model and its evaluation.

    `work` is a folder with room for the model; `show` is given the table of conflicts as soon as it is known.

    Raises:
        HubError: If a pull request is not open, was not reviewed, holds what it may not, or the Hub refuses.
        ConflictError: If main changed what a patch changes, or patches change the same and the method is "refuse".
        PatchError: If a patch is for another base.
        ConfigError: If the base's card, its facts or the records beside it are damaged.
        EvaluationError: If a record was edited, or a suite cannot be asked.
    """
    repo, numbers = _parse(references)
    with describing(api, repo):
        parent = str(api.repo_info(repo, revision="main").sha)
        api.auth_check(repo, write=True)
        me = api.whoami()["name"]
    owners = [] if options.without_review else [me, *find_owners(api, repo)]
    pull_requests = [fetch_pull_request(api, repo, number) for number in numbers]
    reviewers = [_require_ready(each, me=me, owners=owners, options=options) for each in pull_requests]
    candidates = []
    for each, reviewer in zip(pull_requests, reviewers, strict=True):
        say(f"Looking at the files of {each} at {each.head[:12]}")
        contribution, faults = open_contribution(api, each, read_proposal(api, each))
        if contribution is None:
            raise HubError(f"{each} is refused: {'; '.join(list_faults(faults))}.")
        patch = contribution.patch
        if not options.side_by_side:
            patch = rebase_patch(patch, f"{repo}@{parent}", token=api.token)
        candidates.append(Candidate(each, contribution, patch, reviewer))
    _require_different_names(candidates)
    base = open_card(api, repo, parent, work / "card")
    plan = MergePlan(repo, parent, tuple(candidates), "side-by-side", (), tolerance=options.tolerance)
    if not options.side_by_side:
        plan = _merge_models(api, plan, options, work, base=base, say=say, show=show)
        if plan.losses and not options.accept_losses:
            return plan  # whoever shows it refuses it: see `refuse_losses`
    files, deleted = gather_files(base, plan, work, say=say)
    return replace(plan, files=tuple(files), deleted=tuple(deleted))


def refuse_losses(plan: MergePlan) -> None:
    """Refuse a merge that takes away what somebody gained, or makes the base worse than is put up with.

    Raises:
        EvaluationError: Naming each.
    """
    if plan.losses:
        told = ", ".join(dict.fromkeys(each.loss for each in plan.losses))
        raise EvaluationError(f"Merged, {told}; --accept-losses merges all the same.")


def apply_merge(api: HfApi, plan: MergePlan, *, say: Say) -> Merged:
    """Write the one commit, tag it, and close the pull requests.

    Raises:
        HubError: If main or a pull request changed since the plan was made, or the Hub refuses; the message says
            whether main was written, and the same command finishes what is left.
    """
    for each in plan.candidates:
        now = fetch_pull_request(api, plan.repo, each.pull_request.number)
        require_open(now)
        if now.head != each.pull_request.head:
            raise HubError(f"{now} changed while this was prepared; nothing was written. Review it and merge again.")
    names = ", ".join(each.contribution.name for each in plan.candidates)
    numbers = ", ".join(f"#{each.pull_request.number}" for each in plan.candidates)
    commit = commit_files(
        api,
        plan.repo,
        plan.files,
        deleted=plan.deleted,
        message=f"Merge expert patch{'es' * (len(plan.candidates) > 1)} {names} ({numbers})",
        description="\n".join(line for each in plan.candidates for line in _describe(each, plan).to_trailers()),
        parent=plan.parent,
    )
    say(f"Committed {commit[:12]} to {plan.repo}.")
    return _announce(api, [each.pull_request for each in plan.candidates], commit, _describe_outcome(plan))


def _parse(references: Sequence[str]) -> tuple[str, list[int]]:
    parsed = [parse_reference(each) for each in references]
    repos = {repo.lower() for repo, _ in parsed}
    if len(repos) > 1:
        raise ConfigError(f"The pull requests are on different repos: {', '.join(sorted(repos))}.")
    numbers = [number for _, number in parsed]
    if len(set(numbers)) < len(numbers):
        raise ConfigError("A pull request is given twice.")
    return parsed[0][0], numbers


def _require_ready(pull_request: PullRequest, *, me: str, owners: Sequence[str], options: MergeOptions) -> str | None:
    """The reviewer who accepted the head."""
    require_open(pull_request)
    if pull_request.status == "draft":
        raise HubError(f"{pull_request} is a draft; its author must open it first.")
    if options.without_review:
        return None
    trusted = [name for name in owners if name == me or name.lower() != pull_request.author.lower()]
    found = find_review(pull_request, by=trusted)
    if found is None:
        raise HubError(
            f"{pull_request}: nobody who may speak for the repo has reviewed its head {pull_request.head[:12]}; run "
            f"`hub-moe review {pull_request}` first, or merge with --without-review."
        )
    reviewer, mark = found
    _require_accepted(pull_request, reviewer, mark)
    return reviewer


def _require_accepted(pull_request: PullRequest, reviewer: str, mark: ReviewMark) -> None:
    if mark.verdict != "accept":
        why = f": {mark.reasons[0]}" if mark.reasons else ""
        raise HubError(f"{pull_request}: the review by {reviewer} says {mark.verdict}{why}.")


def _require_different_names(candidates: Sequence[Candidate]) -> None:
    names = [each.contribution.name.lower() for each in candidates]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"Two of the patches are called {twice}; one must be renamed.")


def _merge_models(
    api: HfApi,
    plan: MergePlan,
    options: MergeOptions,
    work: Path,
    *,
    base: BaseCard,
    say: Say,
    show: Callable[[Any], None],
) -> MergePlan:
    """The merged model, and what became of everybody's gains."""
    place = f"{plan.repo}@{plan.parent}"
    patches = [each.patch for each in plan.candidates]
    patch, table = patches[0], None
    if len(patches) > 1:
        table = find_conflicts(patches, base=place, method=options.method)
        show(table)
        if table.conflicts and options.method.name == "refuse":
            holders = {each.tensor or "": each.patches for each in table.conflicts}
            raise ConflictError(
                f"The patches change the same tensors: {describe_conflicts(holders)}; choose how to resolve it "
                "(--method mean, ties, dare or slerp), or keep them apart (--side-by-side).",
                tuple(holders),
            )
        patch = combine_patches(patches, base=place, method=options.method).patch
    say("Writing the merged model, and comparing every byte outside of the patch with the base")
    patch.save(work / "combined")
    merge_into_base(work / "combined", work / "model", base=place)
    complete_model(api, base, plan.parent, work / "model")
    plan = replace(plan, table=table, method=options.method.name if table and table.conflicts else "exact")
    return replace(plan, gains=_examine(plan, options, work, own_suites=suites_of(base.records), say=say))


def _examine(
    plan: MergePlan, options: MergeOptions, work: Path, *, own_suites: Sequence[Suite], say: Say
) -> tuple[Gain, ...]:
    alone = {}
    for each in plan.candidates if len(plan.candidates) > 1 else ():
        alone[each.contribution.name] = work / "alone" / each.contribution.name
        each.patch.save(alone[each.contribution.name])
    examiner = Examiner(
        base=plan.repo,
        revision=plan.parent,
        merged=work / "model",
        alone=alone,
        folder=work / "evals",
        data_dir=options.data_dir,
        device=options.device,
        batch_size=options.batch_size,
        tolerance=options.tolerance,
        may_skip=options.accept_losses,
        say=say,
    )
    contributions = [each.contribution for each in plan.candidates]
    if options.accept_losses:
        contributions = [
            each for each in contributions if any("expert_patch" in path.read_text("utf-8") for path in each.records)
        ]
    return tuple(examiner.examine(contributions, own_suites))


def _describe(candidate: Candidate, plan: MergePlan) -> MergedPatch:
    sha256 = candidate.contribution.patch.metadata.weights_sha256
    assert sha256 is not None
    return MergedPatch(
        name=candidate.contribution.name,
        weights_sha256=sha256,
        number=candidate.pull_request.number,
        contributor=candidate.pull_request.author,
        base_commit=candidate.made_for,
        method=plan.method,
    )


def _describe_outcome(plan: MergePlan) -> str:
    how = {"exact": "byte for byte", "side-by-side": "beside the base, as a patch of its own"}
    lines = [f"Merged {how.get(plan.method, f'by {plan.method}')}"]
    if plan.gains:
        lines += ["", "| Patch | task | base | patch | merged | gain |", "| --- | --- | ---: | ---: | ---: | --- |"]
        lines += [
            f"| {code(each.patch)} | {escape(each.task)} | {each.base:.4f} | {each.own:.4f} | {each.merged:.4f} | "
            f"{each.outcome} |"
            for each in plan.gains
        ]
    if plan.notes:
        lines += ["", *(f"- {escape(each)}" for each in plan.notes)]
    return "\n".join(lines)


def _announce(api: HfApi, pull_requests: Sequence[PullRequest], commit: str, outcome: str) -> Merged:
    first, *rest = pull_requests
    tag = tag_merge(api, first.repo, commit)
    head, newline, table = outcome.partition("\n")
    for each in (first, *rest):
        close(api, each, f"{head}, in commit {commit} (tag `{tag}`). Thank you!{newline}{table}")
    return Merged(commit, tag)
