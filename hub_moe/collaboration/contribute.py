"""An expert patch as one pull request on its base: checked against it, described, uploaded, opened, kept up to date."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..errors import CheckpointError, ConfigError, ConflictError, HubError, MissingExtraError, PatchError
from ..evals.compare import RecordComparison
from ..hub.file_checks import Problem
from ..hub.marks import ContributionMark, write_mark
from ..hub.proposals import check_name, find_proposals, finish, open_draft, shorten
from ..hub.pull_requests import Listed, Proposal, PullRequest, describing, list_files, list_history
from ..hub.uploads import Advance, UploadPlan, plan_upload, require_writer, upload
from ..patches.base_files import find_fault, locate_tensors
from ..patches.bases import Place, fetch_base, fetch_places
from ..patches.comparison import ExpertChange, measure_changes
from ..patches.expert_patch import ExpertPatch
from ..patches.folders import is_repo_id
from ..patches.metadata import METADATA_FILE, PatchMetadata
from ..patches.rebasing import rebase_patch
from .checks import check_staged, note_licence
from .description import render_description
from .safety import check_listing
from .staging import Say, Source, Staged, StagingOptions, missing_of_base, open_source, stage

PICTURE = "changes.png"
GENERAL_SUITE = "quick"


@dataclass(frozen=True)
class ContributeOptions:
    """What to propose, and how.

    Attributes:
        name: Of the folder in `patches/`; None for that of the run or patch.
        records: Folders of records beside the patch's `evals/`.
        general: The suite that shows what the patch costs elsewhere; records of others are its claims.
    """

    name: str | None = None
    records: Sequence[Path] = ()
    exclude: Sequence[str] = ()
    license: str | None = None
    general: str = GENERAL_SUITE


@dataclass(frozen=True)
class Contribution:
    """What will be proposed; nothing can be while there are `problems`.

    Attributes:
        description: Without its pictures' address and mark, which need the pull request's number.
        proposal: The pull request to go on with; None where it is to be opened.
        plan: The upload to `proposal`, or as it would be to a new one.
    """

    repo: str
    name: str
    staged: Staged
    metadata: PatchMetadata
    changes: tuple[ExpertChange, ...]
    plan: UploadPlan
    general: str = GENERAL_SUITE
    overlap: Mapping[str, Any] | None = None
    proposal: PullRequest | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def title(self) -> str:
        """Of the pull request."""
        return f"Expert patch {self.name}"

    @property
    def folder(self) -> str:
        """In the base's repo."""
        return f"patches/{self.name}"

    def describe(self, *, picture: str | None) -> str:
        """The whole description, mark included; `picture` is the address of the heat map."""
        parts = split_by_suite(self.staged.comparisons, self.general)
        text = render_description(
            self.metadata,
            changes=self.changes,
            claimed=parts[0],
            general=parts[1],
            facts=self.staged.facts,
            overlap=self.overlap,
            picture=picture,
        )
        mark = ContributionMark(
            self.name,
            str(self.metadata.weights_sha256),
            self.metadata.base.commit,
            [each.record.id for each in self.staged.records],
        )
        return shorten(text, write_mark(mark))

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "repo": self.repo,
            "name": self.name,
            "base_commit": self.metadata.base.commit,
            "pull_request": self.proposal.number if self.proposal else None,
            "size_bytes": self.plan.size_bytes,
            **{kind: list(getattr(self.plan, kind)) for kind in ("new", "changed", "same", "deleted")},
            "comparisons": [each.to_dict() for each in self.staged.comparisons],
            "problems": [vars(each) for each in self.problems],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Contributed:
    """Where it is now; `state` is what happened: opened, resumed, updated or unchanged."""

    repo: str
    number: int
    url: str
    commit: str
    state: str


def open_patch(reference: Path, repo: str) -> tuple[Source, PatchMetadata]:
    """The patch of a folder or run, every hash checked, which must be for `repo`.

    Raises:
        ConfigError: If `repo` is no name.
        CheckpointError: If there is no patch, or it is damaged.
        PatchError: If it is for another base.
    """
    if not is_repo_id(repo) or ".." in repo:
        raise ConfigError(f"{repo!r} is no name of a repo; expected OWNER/NAME.")
    source = open_source(reference)
    if not (source.folder / METADATA_FILE).is_file():
        raise CheckpointError(
            f"{reference} holds no expert patch; models and adapters are published by `hub-moe publish`."
        )
    metadata = ExpertPatch.load(source.folder).metadata
    rebase = f"hub-moe patch rebase {shlex.quote(str(source.folder))} --onto {repo} --out DIR"
    if metadata.base.commit is None:
        name = Path(metadata.base.repo).name
        raise PatchError(f"The patch was made on a folder, {name}; make it one for {repo}: {rebase}.")
    if metadata.base.repo.lower() != repo.lower():
        raise PatchError(f"The patch is for {metadata.base} and not for {repo}; if that is a copy of it: {rebase}.")
    return source, metadata


def check_base(api: HfApi, repo: str, metadata: PatchMetadata) -> list[str]:
    """Hold the patch against its base as the Hub has it; what to know beside is returned.

    Raises:
        HubError: If the base is not there or may not be read.
        PatchError: If its history has no such commit, the tensors there are others, or the base has changed since what
            the patch changes.
    """
    with describing(api, f"The base {repo}"):
        api.model_info(repo, expand=["sha"])
    base = metadata.base
    history = list_history(api, repo)
    if base.commit not in history:
        raise PatchError(f"The patch is for the commit {str(base.commit)[:12]}, which is not in the history of {repo}.")
    place = Place(repo, base.commit)
    located = locate_tensors(fetch_places(place, metadata.tensors, token=api.token), metadata)
    for name, record in metadata.tensors.items():
        if fault := find_fault(located.get(name), record):
            raise PatchError(f"The patch is not for {place}: its tensor {name!r} {fault}.")
    if base.commit == history[0]:
        return []
    try:
        rebase_patch(ExpertPatch(metadata, {}), f"{repo}@{history[0]}", token=api.token)
    except ConflictError as error:
        raise PatchError(
            f"{repo} has changed since {str(base.commit)[:12]} what the patch changes, so it cannot be rebased; train "
            f"it again on {history[0][:12]}. {str(error).splitlines()[0]}"
        ) from error
    behind = history.index(base.commit)
    return [
        f"The base is {behind} commit{'s' * (behind > 1)} further, and what the patch changes is as it was; "
        f"to move it: hub-moe patch rebase PATCH --onto {repo} --out DIR, then evaluate it again."
    ]


def plan_contribution(
    api: HfApi, reference: Path, repo: str, *, options: ContributeOptions, work: Path, say: Say
) -> Contribution:
    """Check the patch against its base, put it together in the empty folder `work`, and find what was begun before.

    Raises:
        ConfigError, CheckpointError, PatchError: If it is no patch for this base, or has no good name.
        HubError: If the base cannot be read, nobody is logged in who may write, or the Hub cannot be reached.
    """
    source, metadata = open_patch(reference, repo)
    name = check_name(options.name or reference.expanduser().resolve().name)
    user = require_writer(api)
    say(f"Comparing the patch with {metadata.base}")
    notes = check_base(api, repo, metadata)
    staging = StagingOptions(
        f"{repo}/patches/{name}",
        options.exclude,
        license=options.license,
        takes_licence_of_base=True,
        records=options.records,
    )
    staged = stage(source, work, staging, api=api, say=say)
    changes = measure_changes(
        ExpertPatch.load(source.folder), fetch_base(Place(repo, metadata.base.commit), token=api.token)
    )
    notes += _draw(changes, work, name)
    if (work / PICTURE).is_file():
        staged.files[PICTURE] = work / PICTURE
    problems = check_staged(staged, api=api, tries_load=False)
    proposal, others = _find_proposal(api, repo, name, user)
    notes += [f"{each} of {each.author} brings a patch of this name too; only one can be merged." for each in others]
    files = {f"patches/{name}/{inside}": path for inside, path in staged.files.items() if path.is_file()}
    plan = plan_upload(
        api,
        repo,
        files,
        revision=f"refs/pr/{proposal.number}" if proposal else "main",
        prune=lambda path: proposal is not None and path.startswith(f"patches/{name}/"),
    )
    problems += _check_as_reviewer(api, repo, files)
    notes += [*_missing_evidence(staged, source, repo, options, metadata), *note_licence(staged.facts)]
    return Contribution(
        repo,
        name,
        staged,
        metadata,
        changes,
        plan,
        general=options.general,
        overlap=source.run.data.get("overlap") if source.run else None,
        proposal=proposal,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
    )


def contribute(api: HfApi, contribution: Contribution, *, advance: Advance = lambda done, total: None) -> Contributed:
    """Do what was planned: one pull request, a draft until it is whole. Interrupted, the same plan made again goes on.

    Raises:
        HubError: If there are problems, the Hub refuses or cannot be reached.
    """
    if contribution.problems:
        raise HubError(f"Nothing was proposed: {contribution.problems[0]}.")
    repo, proposal, plan = contribution.repo, contribution.proposal, contribution.plan
    state = "unchanged"
    if proposal is None:
        proposal = open_draft(api, repo, title=contribution.title, description=contribution.describe(picture=None))
        plan = plan_upload(api, repo, plan.files, revision=f"refs/pr/{proposal.number}", prune=lambda path: False)
        state = "opened"
    elif proposal.status == "draft":
        state = "resumed"
    elif not plan.is_done:
        state = "updated"
    commit = upload(api, plan, message=f"Expert patch {contribution.name}", advance=advance)
    address = None
    if PICTURE in contribution.staged.files:
        address = f"{api.endpoint}/{repo}/resolve/refs%2Fpr%2F{proposal.number}/{contribution.folder}/{PICTURE}"
    description = contribution.describe(picture=address)
    if state == "unchanged" and proposal.description.strip() != description.strip():
        state = "updated"
    finish(api, proposal, title=contribution.title, description=description)
    url = f"{api.endpoint}/{repo}/discussions/{proposal.number}"
    return Contributed(repo, proposal.number, url, commit, state)


def split_by_suite(
    comparisons: Sequence[RecordComparison], general: str
) -> tuple[list[RecordComparison], list[RecordComparison]]:
    """Those of the claimed suites, and those of the general one."""
    return (
        [each for each in comparisons if each.suite != general],
        [each for each in comparisons if each.suite == general],
    )


def _find_proposal(api: HfApi, repo: str, name: str, user: str) -> tuple[PullRequest | None, list[PullRequest]]:
    """The first of `user`'s, and those of others."""
    found = find_proposals(api, repo, name, user=user)
    own = [each for each in found if each.author == user]
    return (own[0] if own else None), [each for each in found if each.author != user]


def _check_as_reviewer(api: HfApi, repo: str, files: Mapping[str, Path]) -> list[Problem]:
    """What a reviewer would refuse by names and sizes alone."""
    added = tuple(Listed(name, path.stat().st_size, "") for name, path in files.items())
    existing = list_files(api, repo, "main")
    _, faults = check_listing(Proposal("", added, (), existing, len(added)))
    return [
        Problem(each.reason, "leave it out by --exclude" if each.path else "choose another by --as", each.path)
        for each in faults
    ]


def _draw(changes: Sequence[ExpertChange], work: Path, name: str) -> list[str]:
    """The heat map of layers and experts, as a file; what hindered it otherwise."""
    experts = [each for each in changes if each.layer is not None and each.expert is not None]
    if not experts:
        return []
    try:
        from ..plots import plot_expert_heat_map
    except MissingExtraError as error:
        return [f"No heat map: {error}"]
    width = 1 + max(int(each.expert or 0) for each in experts)
    scores = {int(each.layer or 0): [0.0] * width for each in experts}
    for each in experts:
        scores[int(each.layer or 0)][int(each.expert or 0)] = each.change
    figure = plot_expert_heat_map(scores, title=f"What {name} changes", label="change relative to the norm")
    figure.savefig(work / PICTURE, format="png")
    return []


def _missing_evidence(
    staged: Staged, source: Source, repo: str, options: ContributeOptions, metadata: PatchMetadata
) -> list[str]:
    """What the description cannot say, and which command makes the records that would."""
    out = shlex.quote(str(options.records[0] if options.records else source.folder / "evals"))
    patch, base = shlex.quote(str(source.folder)), f"{repo}@{metadata.base.commit}"

    def command(suite: str) -> str:
        return f"hub-moe eval {patch} --suite {suite} --base {base} --out {out} (or --evaluate {suite})"

    notes = [
        f"The base has no record of the suite {each.record.suite.name}; run {command(each.record.suite.name)}."
        for each in missing_of_base(staged)
    ]
    claimed, general = split_by_suite(staged.comparisons, options.general)
    if not claimed:
        notes.append(f"Nothing shows what the patch gains; run {command('SUITE')}.")
    if not general:
        notes.append(f"Nothing shows what the patch costs elsewhere; run {command(options.general)}.")
    return notes
