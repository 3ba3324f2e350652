"""Where the records behind a model's numbers are: beside it, in a folder or on the Hub, also in a pull request."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from ..errors import CheckpointError, EvaluationError
from ..patches.folders import is_repo_id
from ..patches.metadata import WEIGHTS_FILE
from .records import is_record_name

FOLDER = "evals"
"""In a model's repo, and in the folder of each of its patches, the folder of the records."""

_PATTERNS = [f"{FOLDER}/*", f"patches/*/{FOLDER}/*"]
_PULL_REQUEST = re.compile(r"(?P<repo>.+)#(?P<number>[1-9]\d*)")


@dataclass(frozen=True)
class Claim:
    """A record and the model that it lies beside; both None for a record alone.

    Attributes:
        path: Of the record.
        model: A folder, or OWNER/NAME.
        subfolder: Where in the model's repo the model lies, such as `patches/law`.
    """

    path: Path
    model: str | None = None
    revision: str | None = None
    subfolder: str | None = None


def parse_reference(reference: str) -> tuple[str, str | None]:
    """`OWNER/NAME#3` as a repo and `refs/pr/3`; anything else as it is, and None."""
    found = _PULL_REQUEST.fullmatch(reference)
    return (found["repo"], f"refs/pr/{found['number']}") if found else (reference, None)


def find_claims(
    reference: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Claim]:
    """The records that `reference` stands for: a record, a folder, OWNER/NAME, or the pull request OWNER/NAME#N.

    Records of a patch whose weights are not there, as after a merge, are left out unless `subfolder` names it, and told
    to `say`.

    Raises:
        CheckpointError: If it is none of these.
        EvaluationError: If there is no record.
        OSError: If the Hub cannot be reached or refuses.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return [Claim(path)]
    if path.is_dir():
        claims = _in_folder(path, str(path), None)
    else:
        repo, of_pull_request = parse_reference(reference)
        if not is_repo_id(repo):
            raise CheckpointError(f"{reference!r} is neither a record, a folder, OWNER/NAME nor OWNER/NAME#NUMBER.")
        snapshot = Path(snapshot_download(repo, revision=of_pull_request or revision, allow_patterns=_PATTERNS))
        claims = _in_folder(snapshot, repo, snapshot.name)
    chosen = [claim for claim in claims if subfolder is None or claim.subfolder == subfolder]
    if subfolder is None and any(claim.subfolder for claim in chosen):
        chosen = _with_weights(chosen, say)
    if not chosen:
        raise EvaluationError(f"{reference} has no record in its folder {FOLDER}; `hub-moe eval` makes them.")
    return chosen


def _in_folder(folder: Path, model: str, commit: str | None) -> list[Claim]:
    claims = [Claim(path, model, commit) for path in _records(folder / FOLDER)]
    for patch in sorted((folder / "patches").glob("*")):
        inside = f"patches/{patch.name}"
        claims += [Claim(path, model, commit, inside) for path in _records(patch / FOLDER)]
    return claims or [Claim(path) for path in _records(folder)]


def _with_weights(claims: Sequence[Claim], say: Callable[[str], None]) -> list[Claim]:
    """Those whose weights lie where the claim says; all of one model."""
    model, commit = claims[0].model, claims[0].revision
    assert model is not None
    if commit is None:
        names = {path.relative_to(model).as_posix() for path in Path(model).glob(f"patches/*/{WEIGHTS_FILE}")}
    else:
        names = set(HfApi().list_repo_files(model, revision=commit))
    is_here = {claim.subfolder: claim.subfolder is None or f"{claim.subfolder}/{WEIGHTS_FILE}" in names
               for claim in claims}  # fmt: skip
    for subfolder, here in is_here.items():
        if not here:
            say(f"{subfolder} has no weights here, as after a merge; its claims are checked by {model}#NUMBER.")
    return [claim for claim in claims if is_here[claim.subfolder]]


def _records(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*-*.json") if is_record_name(path.name) and path.is_file())
