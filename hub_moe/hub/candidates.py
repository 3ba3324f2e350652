"""The fine-tunes of a base that a Hub knows, each with its files, its weights, its records and who reviewed them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from huggingface_hub import HfApi, ModelInfo

from ..cards.collect import is_of, is_weight
from ..errors import CheckpointError, ConfigError, HubError
from ..evals.records import StoredRecord
from ..patches.metadata import METADATA_FILE, WEIGHTS_FILE
from .contributions import (
    OPEN,
    PATCHES_FOLDER,
    FoundReview,
    Maintainers,
    ProposedPatch,
    list_patches,
    list_pull_requests,
    one_line,
    read_metadata,
    read_proposed_patch,
)
from .found_records import RECORDS_FOLDER, RecordReader
from .lineage import MergedPatch, is_expert_patch, list_children, read_merges
from .proposals import check_name
from .pull_requests import Listed, describing, list_files
from .ranking import FineTune, Kind

MAX_OF_A_KIND = 200
"""Patches, pull requests and models that are looked at, each."""


_KINDS: dict[str, Kind] = {"finetune": "finetune", "adapter": "adapter", "merge": "merge", "quantized": "quantized"}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Candidate:
    """A fine-tune before it is judged.

    Attributes:
        own: The records of these very weights.
        beside: The other records that lie there, the base's among them.
        reviews: Of the pull request that brought it.
        base_commit: Of the base that it was made for, where its own files say it.
    """

    fine_tune: FineTune
    own: tuple[StoredRecord, ...] = ()
    beside: tuple[StoredRecord, ...] = ()
    reviews: tuple[FoundReview, ...] = ()
    base_commit: str | None = None


def weights_of(files: Mapping[str, Listed]) -> dict[str, str]:
    """By name the sha256 of a model's files of weights; none at all where the Hub does not tell that of each."""
    found = {path: file.sha256 for path, file in files.items() if is_weight(path)}
    return {path: sha256 for path, sha256 in found.items() if sha256} if all(found.values()) else {}


class CandidateReader:
    """Finds the fine-tunes of `base`, whose files at the commit are `files`. `notes` say what was left out and why."""

    def __init__(
        self,
        api: HfApi,
        base: str,
        *,
        commit: str,
        files: Mapping[str, Listed],
        records: RecordReader,
        say: Callable[[str], None],
    ) -> None:
        self._api, self._base, self._commit, self._files = api, base, commit, files
        self._records, self._say = records, say
        self._maintainers = Maintainers(api, base)
        self.notes: list[str] = []

    def read(self) -> Iterator[Candidate]:
        """Patches in the base's repo, those proposed to it, and the models whose card names it.

        Raises:
            HubError: If the Hub refuses or cannot be reached.
        """
        yield from self._read_patches()
        yield from self._read_proposed()
        yield from self._read_models()

    def _read_patches(self) -> Iterator[Candidate]:
        merges, _ = read_merges(self._api, self._base, self._maintainers)
        merged = {patch.name: patch for merge in reversed(merges) for patch in merge.patches}
        for name in self._cut(list_patches(self._api, self._base, self._commit), "patches"):
            if not self._may_read(name):
                continue
            patch = merged.get(name)
            fine_tune = FineTune(
                name=name,
                kind="merged patch" if patch else "patch",
                author=patch.contributor if patch and patch.contributor else self._base.partition("/")[0],
                repo=self._base,
                revision=self._commit,
                subfolder=f"{PATCHES_FOLDER}/{name}",
                pull_request=patch.pull_request if patch else None,
            )
            reviews = self._find_reviews(patch) if patch else ()
            expected = patch.weights_sha256 if patch else None
            yield self._open_patch(Candidate(fine_tune, reviews=reviews), self._files, expected=expected)

    def _find_reviews(self, patch: MergedPatch) -> tuple[FoundReview, ...]:
        """Of the pull request that a merge names, if that is of this patch."""
        if patch.pull_request is None:
            return ()
        proposed = self._try_pull_request(patch.pull_request)
        is_same = proposed is not None and proposed.mark.weights_sha256 == patch.weights_sha256
        return proposed.reviews if proposed is not None and is_same else ()

    def _read_proposed(self) -> Iterator[Candidate]:
        for number in self._cut(list_pull_requests(self._api, self._base, OPEN), "pull requests"):
            proposed = self._try_pull_request(number)
            if proposed is None:
                continue
            pull_request, mark = proposed.pull_request, proposed.mark
            if not self._may_read(mark.name):
                continue
            fine_tune = FineTune(
                name=mark.name,
                kind="proposed patch",
                author=one_line(pull_request.author),
                repo=self._base,
                revision=pull_request.head,
                subfolder=f"{PATCHES_FOLDER}/{mark.name}",
                pull_request=number,
            )
            candidate = Candidate(fine_tune, reviews=proposed.reviews)
            try:
                files = list_files(self._api, self._base, pull_request.head)
            except HubError as error:
                self._note(candidate, str(error))
                continue
            yield self._open_patch(candidate, files, expected=mark.weights_sha256)

    def _try_pull_request(self, number: int) -> ProposedPatch | None:
        try:
            return read_proposed_patch(self._api, self._base, number, self._maintainers)
        except HubError as error:
            self.notes.append(one_line(str(error)))
            return None

    def _read_models(self) -> Iterator[Candidate]:
        with describing(self._api, self._base):
            found = list(islice(list_children(self._api, self._base, limit=MAX_OF_A_KIND + 1), MAX_OF_A_KIND + 1))
        if found:
            self._say(f"Looking at {min(len(found), MAX_OF_A_KIND)} models whose cards name {self._base}")
        seen = {self._base.lower()}
        for info, relation in self._cut(found, "models"):
            if info.id.lower() not in seen:  # a card may name itself
                seen.add(info.id.lower())
                yield self._open_model(info, relation)

    def _open_model(self, info: ModelInfo, relation: str) -> Candidate:
        is_patch = is_expert_patch(info)
        kind = "expert patch" if is_patch else _KINDS.get(relation, "finetune")
        candidate = Candidate(FineTune(info.id, kind, info.id.partition("/")[0], info.id, str(info.sha)))
        try:
            files = list_files(self._api, info.id, str(info.sha))
        except HubError as error:  # such as a gated one
            return self._note(candidate, str(error))
        if is_patch and METADATA_FILE in files:
            return self._open_patch(candidate, files)
        return self._add_records(candidate, files, weights_of(files))

    def _open_patch(
        self, candidate: Candidate, files: Mapping[str, Listed], *, expected: str | None = None
    ) -> Candidate:
        """With what the patch's metadata says; `expected` is what its weights were promised to be."""
        fine_tune = candidate.fine_tune
        folder = f"{fine_tune.subfolder}/" if fine_tune.subfolder else ""
        try:
            metadata = read_metadata(self._api, fine_tune.repo, f"{folder}{METADATA_FILE}", revision=fine_tune.revision)
        except (HubError, CheckpointError) as error:
            return self._note(candidate, str(error))
        weights = files.get(f"{folder}{WEIGHTS_FILE}")
        is_inside = fine_tune.kind == "merged patch"  # by a merge, which leaves the patch's own weights out
        hashes = {metadata.weights_sha256, expected or metadata.weights_sha256}
        if weights is not None or not is_inside:
            hashes.add(weights.sha256 if weights else None)
        if len(hashes) > 1:
            return self._note(candidate, "its weights are not those that it speaks of, so none of its records counts")
        candidate = replace(candidate, base_commit=metadata.base.commit)
        return self._add_records(candidate, files, {WEIGHTS_FILE: str(metadata.weights_sha256)})

    def _add_records(self, candidate: Candidate, files: Mapping[str, Listed], weights: Mapping[str, str]) -> Candidate:
        fine_tune = candidate.fine_tune
        folder = f"{fine_tune.subfolder}/{RECORDS_FOLDER}" if fine_tune.subfolder else RECORDS_FOLDER
        found = self._records.read(fine_tune.repo, files, revision=fine_tune.revision, folder=folder)
        own = tuple(each for each in found if is_of(each.record, weights))
        beside = tuple(each for each in found if not is_of(each.record, weights))
        return replace(candidate, own=own, beside=beside)

    def _may_read(self, name: str) -> bool:
        """Whether it is a name for a patch, which goes into addresses on the Hub."""
        try:
            check_name(name)
        except ConfigError:
            self.notes.append(f"A patch called {one_line(name[:40])!r} was left out: that is no name.")
            return False
        return True

    def _note(self, candidate: Candidate, reason: str) -> Candidate:
        fine_tune = candidate.fine_tune
        number = f" (#{fine_tune.pull_request})" if fine_tune.pull_request else ""
        self.notes.append(one_line(f"{fine_tune.name}{number}: {reason}"))
        return candidate

    def _cut(self, found: Sequence[_T], what: str) -> Sequence[_T]:
        if len(found) > MAX_OF_A_KIND:
            self.notes.append(f"Only {MAX_OF_A_KIND} of the {what} were looked at.")
        return found[:MAX_OF_A_KIND]
