"""Is a contribution what it should be, and nothing else? Found out without loading it or filling the disk.

First names and sizes in the listing, then a few small files and the header of the weights, read up to a limit; only
what passes is fetched whole. Nothing of a pull request is ever run.
"""

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, snapshot_download

from ..errors import CheckpointError, HubMoeError
from ..evals.records import Record, is_record_name, read_record
from ..hub.file_checks import find_scripts
from ..hub.marks import ContributionMark, read_mark
from ..hub.pull_requests import MAX_LISTED, Listed, Proposal, PullRequest, describing, list_history, read_bytes
from ..patches.expert_patch import ExpertPatch, check_places, describe_config
from ..patches.metadata import CONFIG_FILE, METADATA_FILE, TOKENIZER_FILES, WEIGHTS_FILE, PatchMetadata
from ..patches.verification import verify_patch

MAX_FILES = 200
_MAX_HEADER_BYTES = 16_000_000
_MAX_SAMPLES_BYTES = 1_000_000_000  # of a table of answers, unpacked
_MAX_SHOWN = 10
_MB = 1_000_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# what may lie in patches/NAME, and how large it may be; the weights are measured against their own description
_ALLOWED: tuple[tuple[str, int | None], ...] = (
    (r"expert_patch\.json", 20 * _MB),
    (r"expert_patch\.safetensors", None),
    (r"config\.json", _MB),
    (r"(README|model_documentation_form)\.md|LICENSE(\.txt|\.md)?|NOTICE", _MB),
    (r"(model_card|report|what_changed|expert_profile|profile|overlap|energy)\.json|(run|train)\.toml", 10 * _MB),
    (r"evals/[\w.-]+-[0-9a-f]{16}\.json", 10 * _MB),
    (r"evals/[\w.-]+\.parquet", 256 * _MB),
    (r"([\w-]+/)?[\w.-]+\.(png|jpe?g|webp)", 10 * _MB),
    (r"\.eval_results/[\w.-]+\.yaml", _MB),
)
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_PICTURE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
_OF_THE_BASE = {*TOKENIZER_FILES, "generation_config.json"}
_PICKLES = {".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".h5", ".keras"}
_CODE = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".bat", ".ps1", ".js", ".ipynb", ".exe", ".jar", ".rb"}


@dataclass(frozen=True)
class Fault:
    """Why a contribution is refused; `path` is the file at fault, if it is one."""

    reason: str
    path: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason


@dataclass(frozen=True)
class Contribution:
    """A contribution that was found to be safe to load, fetched at the pull request's head.

    Attributes:
        name: In `patches/NAME`.
        folder: Where that folder is on this machine.
        records: The evidence in it.
    """

    name: str
    folder: Path
    patch: ExpertPatch
    records: tuple[Path, ...]
    files: tuple[Listed, ...]

    @property
    def subfolder(self) -> str:
        """Where it lies in the base's repo."""
        return f"patches/{self.name}"


def open_contribution(
    api: HfApi, pull_request: PullRequest, proposal: Proposal
) -> tuple[Contribution | None, tuple[Fault, ...]]:
    """The contribution, or everything that is wrong with it as far as that could be looked at safely.

    Raises:
        HubError: If the Hub refuses or cannot be reached.
    """
    name, faults = check_listing(proposal)
    if name is None or faults:
        return None, tuple(faults)
    inside = {each.path.removeprefix(f"patches/{name}/"): each for each in proposal.added}
    reader = _Reader(api, pull_request, proposal, f"patches/{name}", inside)
    metadata, faults = reader.check_texts()
    if metadata is None or faults:
        return None, tuple(faults)
    faults = list(reader.check_weights(metadata)) or list(reader.check_base(metadata))
    if faults:
        return None, tuple(faults)
    folder = reader.fetch()
    faults = [*_check_content(folder, f"patches/{name}"), *_check_records(folder, f"patches/{name}")]
    if faults:
        return None, tuple(faults)
    records = tuple(sorted(path for path in folder.glob("evals/*.json") if is_record_name(path.name)))
    patch = ExpertPatch.load(pull_request.repo, pull_request.head, f"patches/{name}", token=api.token)
    return Contribution(name, folder, patch, records, tuple(proposal.added)), ()


def check_listing(proposal: Proposal) -> tuple[str | None, list[Fault]]:
    """The contribution's name, None where it has none, and what names and sizes alone show to be wrong."""
    if proposal.is_too_large:
        return None, [Fault(f"it holds more than {MAX_LISTED:,} files, which nobody can review")]
    if len(proposal.added) > MAX_FILES:
        return None, [Fault(f"it changes {len(proposal.added):,} files; a contribution has at most {MAX_FILES}")]
    if not proposal.added and not proposal.deleted:
        return None, [Fault("it changes nothing")]
    names = Counter(path.split("/")[1] for path in (each.path for each in proposal.added) if _is_inside(path))
    name = next(iter(names), None)
    faults = [Fault("takes away a file of the base", path) for path in proposal.deleted]
    if len(names) > 1:
        faults.append(Fault(f"it holds {len(names)} patches, {', '.join(sorted(names))}; propose each on its own"))
    elif name is None:
        faults.append(Fault("it holds no folder patches/NAME with an expert patch"))
    elif any(path.startswith(f"patches/{name}/") for path in proposal.existing):
        faults.append(Fault(f"patches/{shown(name)} is there already; choose another name"))
    elif not _NAME.fullmatch(name):
        faults.append(Fault(f"the name {name!r} is none for a patch; use letters, digits, '.', '_' and '-'"))
    for each in proposal.added:
        reason = _find_path_fault(each.path) or _find_file_fault(each)
        faults += [Fault(reason, shown(each.path))] if reason else []
    lower = Counter(path.lower() for path in {*proposal.existing, *(each.path for each in proposal.added)})
    faults += [Fault("differs from another file by its case only", path) for path, n in lower.items() if n > 1]
    inside = {each.path for each in proposal.added}
    lacking = [each for each in (METADATA_FILE, WEIGHTS_FILE, CONFIG_FILE) if f"patches/{name}/{each}" not in inside]
    faults += [Fault(f"patches/{name} lacks {each}") for each in lacking if name is not None and len(names) == 1]
    return name, faults


def shown(text: str) -> str:
    """A name from a stranger as a message or comment may quote it: one short line of printable letters."""
    plain = text if text.isprintable() else repr(text)[1:-1]
    return plain if len(plain) <= 240 else f"{plain[:237]}..."


def list_faults(faults: Collection[Fault]) -> list[str]:
    """The first few in words."""
    told = [str(each) for each in list(faults)[:_MAX_SHOWN]]
    more = len(faults) - len(told)
    return told + ([f"and {more} more of that kind"] if more > 0 else [])


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    return len(parts) > 2 and parts[0] == "patches"


def _find_path_fault(path: str) -> str | None:
    parts = path.split("/")
    if not path.isprintable() or "\\" in path or len(path) > 255:
        return "has a name with control characters or backslashes, or one that is too long"
    if any(part in ("", ".", "..") or part.lower().startswith(".git") or part != part.strip() for part in parts):
        return "has a name that leads elsewhere on some systems"
    if any(part.startswith("-") for part in parts):
        return "has a name that commands take for an option"
    return None if _is_inside(path) else "lies outside of patches/NAME"


def _find_file_fault(file: Listed) -> str | None:
    relative = file.path.split("/", 2)[2]
    suffix = Path(relative).suffix.lower()
    if suffix in _PICKLES:
        return "may be a pickle, which can run code when it is read; only safetensors are taken"
    if suffix in _CODE:
        return "is code, and a patch needs none"
    if relative in _OF_THE_BASE:
        return None if file.size_bytes <= 100 * _MB else "is larger than any tokenizer"
    for pattern, limit in _ALLOWED:
        if re.fullmatch(pattern, relative):
            is_large = limit is not None and file.size_bytes > limit
            return f"has {file.size_bytes:,} bytes, and {limit:,} are allowed" if is_large else None
    return "is no file that belongs to a contribution"


class _Reader:
    """The files of a contribution, each read up to a limit."""

    def __init__(
        self, api: HfApi, pull_request: PullRequest, proposal: Proposal, folder: str, files: Mapping[str, Listed]
    ) -> None:
        self._api, self._pull_request, self._proposal = api, pull_request, proposal
        self._folder, self._files = folder, files

    def check_texts(self) -> tuple[PatchMetadata | None, list[Fault]]:
        """Metadata, config, card, description and tokenizer."""
        try:
            metadata = self._read_metadata()
        except CheckpointError as error:
            return None, [Fault(_without_place(error), self._path(METADATA_FILE))]
        faults = []
        if self._read(CONFIG_FILE).strip() != json.dumps(describe_config(metadata), indent=2).encode():
            faults.append(Fault(f"is not the config that {METADATA_FILE} gives", self._path(CONFIG_FILE)))
        for name in (each for each in self._files if each.endswith(".md")):
            faults += self._check_card(name)
        faults += [
            Fault("is no picture, whatever its name says", self._path(name))
            for name in self._files
            if name.lower().endswith(_PICTURES) and not _PICTURE.match(self._read(name, limit=12))
        ]
        mark = read_mark(ContributionMark, self._pull_request.description)
        if mark is not None and (mark.name, mark.weights_sha256) != (
            self._folder.split("/")[1],
            metadata.weights_sha256,
        ):
            faults.append(Fault("the description speaks of another patch than the files hold"))
        faults += [
            Fault("is not the base's, and decides what the model is asked", self._path(name))
            for name in self._files
            if name in _OF_THE_BASE and not self._is_of_base(name)
        ]
        return metadata, faults

    def check_weights(self, metadata: PatchMetadata) -> Iterator[Fault]:
        """Size, sha256 and header of the weights against what the metadata declares; reads the header only."""
        file, path = self._files[WEIGHTS_FILE], self._path(WEIGHTS_FILE)
        header = file.size_bytes - metadata.size_bytes
        of_base = sum(
            each.size_bytes for name, each in self._proposal.existing.items() if name.endswith(".safetensors")
        )
        if metadata.size_bytes > 8 * of_base:
            yield Fault(f"declares {metadata.size_bytes:,} bytes, far more than the base has", path)
        elif not 10 <= header <= 8 + _MAX_HEADER_BYTES:
            declared = f"the tensors that {METADATA_FILE} declares have {metadata.size_bytes:,}"
            yield Fault(f"has {file.size_bytes:,} bytes, and {declared}", path)
        elif file.sha256 is not None and file.sha256 != metadata.weights_sha256:
            yield Fault(f"has another sha256 than {METADATA_FILE} gives", path)
        else:
            yield from self._check_header(file, metadata, path)

    def check_base(self, metadata: PatchMetadata) -> Iterator[Fault]:
        """Whether the patch is for this repo, at a commit that its owners put there."""
        base, repo = metadata.base, self._pull_request.repo
        if base.repo.lower() != repo.lower() or base.commit is None:
            yield Fault(f"the patch is for another base: {shown(str(base))}")
        elif base.commit not in list_history(self._api, repo):
            yield Fault(f"the patch is for the commit {base.commit[:12]}, which is none of main's")

    def fetch(self) -> Path:
        """The folder with all files, whose sizes are known by now."""
        with describing(self._api, str(self._pull_request)):
            snapshot = snapshot_download(
                self._pull_request.repo,
                revision=self._pull_request.head,
                allow_patterns=[self._path(name) for name in self._files],
                endpoint=self._api.endpoint,
                token=self._api.token,
            )
        return Path(snapshot) / self._folder

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _read(self, name: str, *, limit: int | None = None) -> bytes:
        count = limit if limit is not None else self._files[name].size_bytes
        head = self._pull_request.head
        return read_bytes(self._api, self._pull_request.repo, self._path(name), revision=head, count=max(1, count))

    def _read_metadata(self) -> PatchMetadata:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, METADATA_FILE).write_bytes(self._read(METADATA_FILE))
            return PatchMetadata.read(Path(folder))

    def _check_card(self, name: str) -> Iterator[Fault]:
        try:
            found = [shown(each) for each in find_scripts(self._read(name).decode("utf-8"))]
        except UnicodeDecodeError:
            yield Fault("is not UTF-8 text", self._path(name))
            return
        if found:
            yield Fault(f"holds what a page could run or load: {', '.join(found[:5])}", self._path(name))

    def _is_of_base(self, name: str) -> bool:
        ours, theirs = self._files[name], self._proposal.existing.get(name)
        if theirs is None or ours.size_bytes != theirs.size_bytes:
            return False
        if ours.blob == theirs.blob:
            return True
        repo, fork, count = self._pull_request.repo, self._proposal.fork, max(1, theirs.size_bytes)
        return self._read(name) == read_bytes(self._api, repo, name, revision=fork, count=count)

    def _check_header(self, file: Listed, metadata: PatchMetadata, path: str) -> Iterator[Fault]:
        """The header is put before a hole as long as the rest of the file, so that it is read as a whole file's."""
        length = int.from_bytes(self._read(WEIGHTS_FILE, limit=8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file.size_bytes - 8):
            yield Fault(f"claims a header of {length:,} bytes, and at most {_MAX_HEADER_BYTES:,} are read", path)
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, WEIGHTS_FILE)
            copy.write_bytes(self._read(WEIGHTS_FILE, limit=8 + length))
            os.truncate(copy, file.size_bytes)
            try:
                check_places(copy, metadata)
            except CheckpointError as error:
                yield Fault(_without_place(error), path)


def _check_content(folder: Path, subfolder: str) -> Iterator[Fault]:
    """Every hash, and no NaN, in what was fetched."""
    for check in verify_patch(folder).checks:
        if check.fault:
            where = f"{subfolder}/{WEIGHTS_FILE}" if check.tensor else subfolder
            yield Fault(f"{check.tensor + ': ' if check.tensor else ''}{check.what} {check.fault}", where)


def _check_records(folder: Path, subfolder: str) -> Iterator[Fault]:
    """Whether records and their tables can be read without harm; whether they are true is for the replay."""
    for path in sorted(folder.glob("evals/*.json")):
        try:
            record = read_record(path).record
        except HubMoeError as error:
            yield Fault(_without_place(error), f"{subfolder}/evals/{path.name}")
            continue
        yield from _check_suite(record, f"{subfolder}/evals/{path.name}")
    for path in sorted(folder.glob("evals/*.parquet")):
        try:
            table = pq.read_metadata(path)
        except (pa.ArrowException, OSError):
            yield Fault("is no table of samples", f"{subfolder}/evals/{path.name}")
            continue
        size_bytes = sum(table.row_group(i).total_byte_size for i in range(table.num_row_groups))
        if size_bytes > _MAX_SAMPLES_BYTES:
            yield Fault(f"unpacks to {size_bytes:,} bytes", f"{subfolder}/evals/{path.name}")


def _check_suite(record: Record, where: str) -> Iterator[Fault]:
    entries = record.suite.declaration.get("entries", ())
    for entry in entries if isinstance(entries, list | tuple) else ():
        source = entry.get("source") if isinstance(entry, Mapping) else None
        is_ours = isinstance(source, str) and source.split("/")[0] in ("lm_eval", "hub_moe")
        if not is_ours or ".." in str(source).split("/"):
            yield Fault(f"its suite takes tasks from {shown(repr(source))}, which does not come with hub_moe", where)
        elif entry.get("runs_code"):
            yield Fault("its suite runs code that the model wrote, or its author did", where)


def _without_place(error: HubMoeError) -> str:
    """What is wrong, without the name of a folder of this machine."""
    text = str(error).splitlines()[0].rstrip(".")
    folder = re.escape(tempfile.gettempdir())
    return shown(re.sub(rf"\S*(?:{folder}|/snapshots/)\S*/(\S+)", r"\1", text))
