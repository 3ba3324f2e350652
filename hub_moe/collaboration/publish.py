"""A model, patch, adapter or training run as a repo of its own: checked, shown, uploaded in one commit, tagged."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..errors import ConfigError, HubError
from ..hub.file_checks import Problem
from ..hub.uploads import (
    Advance,
    UploadPlan,
    choose_tag,
    create_repo,
    create_tag,
    plan_upload,
    require_writer,
    upload,
)
from ..patches.folders import is_repo_id
from .checks import check_staged, note_licence
from .staging import Say, Staged, StagingOptions, open_source, stage


@dataclass(frozen=True)
class PublishOptions:
    """What to publish, and how.

    Attributes:
        private: Whether a new repo is; a repo that is there stays what it is.
        tag: Of the version; None for the next of v1, v2, ...
        base: OWNER/NAME[@REVISION], in place of the folder that a patch or adapter was made on.
        license: For a card that names none.
        prune: Whether files of the repo that are not among those to publish are deleted.
        tries_load: Whether a whole model is loaded by `from_pretrained`; None: below 2 GB.
        records: Folders of records beside the model's `evals/`.
    """

    private: bool = False
    tag: str | None = None
    base: str | None = None
    license: str | None = None
    exclude: Sequence[str] = ()
    prune: bool = False
    tries_load: bool | None = None
    records: Sequence[Path] = ()


@dataclass(frozen=True)
class Publication:
    """What will be done; nothing can be done while there are `problems`."""

    staged: Staged
    plan: UploadPlan
    tag: str
    is_tagged: bool
    is_private: bool
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "repo": self.plan.repo,
            "kind": self.staged.kind,
            "is_new": self.plan.head is None,
            "private": self.is_private,
            "tag": self.tag,
            "size_bytes": self.plan.size_bytes,
            "files": {
                name: {"size_bytes": path.stat().st_size if path.is_file() else None}
                for name, path in sorted(self.plan.files.items())
            },
            **{kind: list(getattr(self.plan, kind)) for kind in ("new", "changed", "same", "others", "deleted")},
            "problems": [vars(each) for each in self.problems],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Published:
    """Where it is now."""

    repo: str
    url: str
    commit: str
    tag: str
    is_changed: bool


def plan_publication(
    api: HfApi, source: Path, repo: str, *, options: PublishOptions, work: Path, say: Say
) -> Publication:
    """Put `source` together in the empty folder `work`, check it and compare it with what is in the repo.

    Raises:
        ConfigError: If there is nothing to publish, or `repo` is no name.
        HubError: If nobody is logged in who may write, or the Hub cannot be reached.
    """
    if not is_repo_id(repo) or ".." in repo:
        raise ConfigError(f"{repo!r} is no name of a repo; expected OWNER/NAME.")
    require_writer(api)
    staging = StagingOptions(repo, options.exclude, options.base, options.license, records=options.records)
    staged = stage(open_source(source), work, staging, api=api, say=say)
    problems = check_staged(staged, api=api, tries_load=options.tries_load)
    sendable = {name: path for name, path in staged.files.items() if path.is_file()}
    plan = plan_upload(api, repo, sendable, prune=lambda name: options.prune)
    tag, is_tagged = choose_tag(api, repo, options.tag, at=plan.head if plan.is_done else None)
    if options.private and plan.is_private is False:
        problems.append(Problem(f"{repo} is public, and --private is only for a new repo", "choose another name"))
    notes = note_licence(staged.facts)
    stale = sorted(set(plan.others) - set(plan.deleted))
    if stale:
        shown = ", ".join(stale[:5]) + (f" and {len(stale) - 5} more" if len(stale) > 5 else "")
        notes.append(f"{repo} also holds {shown}, which stay; --prune deletes them.")
    is_private = options.private if plan.is_private is None else plan.is_private
    return Publication(staged, plan, tag, is_tagged, is_private, tuple(problems), tuple(notes))


def publish(api: HfApi, publication: Publication, *, advance: Advance = lambda done, total: None) -> Published:
    """Do what was planned. Interrupted, the same plan made again goes on: no file twice, one commit, one tag.

    Raises:
        HubError: If there are problems, the Hub refuses, cannot be reached, or somebody changed the repo meanwhile.
    """
    plan = publication.plan
    if publication.problems:
        raise HubError(f"Nothing was published: {publication.problems[0]}.")
    if plan.head is None:
        create_repo(api, plan.repo, private=publication.is_private)
        plan = plan_upload(api, plan.repo, plan.files, prune=lambda name: False)
    what = {"expert_patch": "expert patch"}.get(publication.staged.kind, publication.staged.kind)
    commit = upload(api, plan, message=f"Publish {what} {publication.tag}", advance=advance)
    if not publication.is_tagged:
        create_tag(api, plan.repo, publication.tag, commit)
    return Published(plan.repo, f"{api.endpoint}/{plan.repo}", commit, publication.tag, not plan.is_done)
