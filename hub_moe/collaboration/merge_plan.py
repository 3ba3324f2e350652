"""What a merge is told, and what it is going to write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evals.models import check_device
from ..hub.pull_requests import PullRequest
from ..patches.combination_methods import CombinationMethod
from ..patches.conflicts import ConflictTable
from ..patches.expert_patch import ExpertPatch
from .costs import check_tolerance
from .gains import Gain
from .safety import Contribution


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        side_by_side: Add the patches as they are, and leave the base alone.
        accept_losses: Merge although a gain is lost, or nothing says what a patch gains.
        without_review: Merge although nobody who may speak for the repo accepted this head.
        tolerance: By what share of the base's value a task may get worse.
    """

    method: CombinationMethod = CombinationMethod()
    side_by_side: bool = False
    accept_losses: bool = False
    without_review: bool = False
    data_dir: Path | None = None
    device: str | None = None
    batch_size: int = 16
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        if self.device is not None:
            check_device(self.device)


@dataclass(frozen=True)
class Candidate:
    """A pull request that is to be merged: `patch` is for the commit that it is merged into."""

    pull_request: PullRequest
    contribution: Contribution
    patch: ExpertPatch
    reviewer: str | None

    @property
    def made_for(self) -> str:
        """The commit that its author made it for."""
        return str(self.contribution.patch.metadata.base.commit)

    @property
    def was_stale(self) -> bool:
        """Whether main went on since the patch was made."""
        return self.patch is not self.contribution.patch


@dataclass(frozen=True)
class MergePlan:
    """All that will be written, to main at `parent` and nowhere else.

    Attributes:
        method: As the trailers say it.
        deleted: Records, and what belongs to them, of the weights that the merge replaces.
        tolerance: By what share of the base's value a task may get worse.
    """

    repo: str
    parent: str
    candidates: tuple[Candidate, ...]
    method: str
    files: tuple[tuple[str, Path], ...]
    table: ConflictTable | None = None
    gains: tuple[Gain, ...] = ()
    deleted: tuple[str, ...] = ()
    tolerance: float = 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What merging costs and the tolerance allows, each once."""
        return tuple(dict.fromkeys(each.note for each in self.gains if each.note is not None))

    @property
    def losses(self) -> tuple[Gain, ...]:
        """The gains that merging takes away, and the tasks that it makes worse than the tolerance allows."""
        return tuple(each for each in self.gains if each.is_lost)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "repo": self.repo,
            "parent": self.parent,
            "method": self.method,
            "patches": [
                {
                    "name": each.contribution.name,
                    "pull_request": each.pull_request.number,
                    "contributor": each.pull_request.author,
                    "reviewed_by": each.reviewer,
                    "was_stale": each.was_stale,
                }
                for each in self.candidates
            ],
            "conflicts": self.table.to_dict() if self.table else None,
            "gains": [each.to_dict() for each in self.gains],
            "tolerance": self.tolerance,
            "notes": list(self.notes),
            "files": [path for path, _ in self.files],
            "deleted": list(self.deleted),
        }


@dataclass(frozen=True)
class Merged:
    """What a merge made; no tag where only that was to be told."""

    commit: str
    tag: str | None
