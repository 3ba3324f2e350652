"""What is published, in a folder of its own: the files as they are, the card rendered, the evidence beside."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..cards import (
    Evidence,
    Facts,
    ModelFolder,
    TrainingRun,
    collect_facts,
    find_evidence,
    read_eval_results,
    read_facts,
    read_readme,
    render_card,
)
from ..cards.collect import RECORDS_FOLDER, find_base, hash_weights, is_of
from ..cards.lineage import find_lineage
from ..cards.readme import Readme, parse_readme
from ..errors import CheckpointError, ConfigError, HubMoeError
from ..evals.compare import RecordComparison, compare_records
from ..evals.records import StoredRecord
from ..files.json_files import read_json, write_json
from ..hub.file_checks import list_folder
from ..hub.pull_requests import list_files
from ..patches.bases import Place, pin_base
from ..patches.card import render_card as render_patch_card
from ..patches.expert_patch import ExpertPatch, describe_config
from ..patches.folders import is_repo_id
from ..patches.metadata import METADATA_FILE, PatchMetadata
from ..patches.rebasing import rebase_patch

ADAPTER_FILE = "adapter_config.json"
_RESULTS = {"experts": "patch", "lora": "adapter"}
_LINKED_BYTES = 1_000_000  # larger files are not copied, only linked to

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What a person wants to publish: a folder, or the result in the folder of a training run."""

    folder: Path
    run: TrainingRun | None = None


@dataclass(frozen=True)
class StagingOptions:
    """How the files become those of a repo.

    Attributes:
        name: What the card calls the model: a repo's id, or for a patch inside of one OWNER/NAME/patches/NAME.
        exclude: Patterns of files that stay at home.
        base: OWNER/NAME[@REVISION], in place of the folder that patch or adapter were made on.
        license: For the card's front matter, where that has none.
        takes_licence_of_base: Whether a card without a licence gets the base's.
        records: Folders of records beside `evals/`.
    """

    name: str
    exclude: Sequence[str] = ()
    base: str | None = None
    license: str | None = None
    takes_licence_of_base: bool = False
    records: Sequence[Path] = ()


@dataclass(frozen=True)
class Staged:
    """The folder as the repo will hold it; `files` are those to upload, by their names there.

    Attributes:
        records: Of these very weights.
        comparisons: With the records of the base that answered the same questions.
    """

    folder: Path
    kind: str
    files: dict[str, Path]
    facts: Facts | None
    records: tuple[StoredRecord, ...]
    comparisons: tuple[RecordComparison, ...]


def open_source(reference: Path) -> Source:
    """A folder to publish, or the result of a run of `hub-moe train`.

    Raises:
        ConfigError: If there is no such folder, or the run is not finished.
    """
    folder = reference.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{reference} is no folder; give one with a model, patch or adapter, or of a training run.")
    if (folder / "run.toml").is_file():
        run = TrainingRun(folder)
        return Source(folder / _RESULTS.get(str(run.report.get("method")), "model"), run)
    above = folder.resolve().parent
    is_result = (above / "run.toml").is_file() and (above / "report.json").is_file()
    return Source(folder, TrainingRun(above) if is_result else None)


def stage(source: Source, work: Path, options: StagingOptions, *, api: HfApi, say: Say) -> Staged:
    """Put everything into the empty folder `work`; the source is not touched.

    Raises:
        ConfigError: If there is nothing to publish, or card or run are damaged.
        CheckpointError, PatchError, HubError: If another base was given and cannot be put in.
        EvaluationError: If a record was edited.
    """
    links = _put(source.folder, work, options.exclude)
    if options.base is not None:
        _put_base(work, options.base, api=api)
    model = ModelFolder(work, options.name, hash_weights(work))
    records = find_evidence(source.folder, [*options.records])
    own = [each for each in records if is_of(each.record, model.weights)]
    pairs = list(_pair(own, records))
    _put_records([*own, *(base for base, _ in pairs)], work)
    comparisons = [compare_records(base, candidate) for base, candidate in pairs]
    is_new = bool(options.base or options.license or options.records) or read_facts(work) is None
    if is_new:
        compared = (*pairs[0], comparisons[0].to_dict()) if pairs else None
        evidence = Evidence(
            records=own, run=source.run, comparison=compared, footprint=measure_sizes(model, source.run, say)
        )
        _put_card(model, evidence, options, say=say)
    files = {name: (path.resolve() if path.is_symlink() else path) for name, path in list_folder(work).items()}
    files |= links
    return Staged(work, model.kind, files, read_facts(work), tuple(own), tuple(comparisons))


def _put(folder: Path, work: Path, exclude: Sequence[str]) -> dict[str, Path]:
    """Copy or link what is there; returns what is no plain file, and so is only to be complained about."""
    left: dict[str, Path] = {}
    for name, path in list_folder(folder, exclude).items():
        if path.is_symlink() or not path.is_file():
            left[name] = path
            continue
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        if path.stat().st_size > _LINKED_BYTES:
            (work / name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, work / name)
    return left


def _put_base(work: Path, base: str, *, api: HfApi) -> None:
    """Name another base, after it was found to hold what the old one held."""
    if (work / METADATA_FILE).is_file():
        patch = ExpertPatch.load(work)
        moved = rebase_patch(patch, base, token=api.token)
        _rewrite_patch(work, replace(moved.metadata, weights_sha256=patch.metadata.weights_sha256), patch.metadata)
    elif (work / ADAPTER_FILE).is_file():
        _put_base_of_adapter(work / ADAPTER_FILE, base, api=api)
    else:
        raise ConfigError("--base is for an expert patch or an adapter, and this is a whole model.")


def _rewrite_patch(work: Path, metadata: PatchMetadata, old: PatchMetadata) -> None:
    (work / METADATA_FILE).write_text(metadata.to_json(), "utf-8")
    (work / "config.json").write_text(json.dumps(describe_config(metadata), indent=2) + "\n", "utf-8")
    readme = work / "README.md"
    if not readme.is_file() or readme.read_text("utf-8") == render_patch_card(old):
        readme.write_text(render_patch_card(metadata), "utf-8")


def _put_base_of_adapter(path: Path, base: str, *, api: HfApi) -> None:
    fields = read_json(path, "the config of an adapter")
    name, _, revision = base.partition("@")
    if not is_repo_id(name):
        raise ConfigError(f"{base!r} is no base; expected OWNER/NAME@COMMIT.")
    place = pin_base(Place(name, revision or None), token=api.token)
    folder = Path(str(fields.get("base_model_name_or_path")))
    if folder.is_dir():
        ours = set(hash_weights(folder).values())
        theirs = {each.sha256 for each in list_files(api, name, str(place.revision)).values()}
        if not ours or not ours <= theirs:
            raise CheckpointError(f"The adapter was made on {folder.name}, whose weights are not those of {place}.")
    elif fields.get("base_model_name_or_path") != name:
        raise CheckpointError(
            f"The adapter's base {fields.get('base_model_name_or_path')!r} is not here, so nothing shows that {place} "
            "is the same."
        )
    write_json(path, {**fields, "base_model_name_or_path": name, "revision": place.revision})


def _pair(own: Sequence[StoredRecord], known: Sequence[StoredRecord]) -> Iterator[tuple[StoredRecord, StoredRecord]]:
    """The newest record of each suite with the newest of the model below it on that suite: (base's, own)."""
    newest = {each.record.suite.sha256: each for each in sorted(own, key=lambda each: each.record.created)}
    for candidate in newest.values():
        below = candidate.record.model.base
        fitting = [
            each
            for each in known
            if below is not None
            and each.record.model.sha256 == below.sha256
            and each.record.suite.sha256 == candidate.record.suite.sha256
        ]
        if fitting:
            yield max(fitting, key=lambda each: each.record.created), candidate


def _put_records(records: Sequence[StoredRecord], work: Path) -> None:
    for each in records:
        each.read_samples()  # refuses edited ones
        for path in (each.path, each.samples_path):
            target = work / RECORDS_FOLDER / path.name
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                shutil.copyfile(path, target)


def _put_card(model: ModelFolder, evidence: Evidence, options: StagingOptions, *, say: Say) -> None:
    previous = read_facts(model.folder)
    readme = _with_license(_open_readme(model), model, evidence, options, say=say)
    (model.folder / "README.md").write_bytes(str(readme).encode())
    facts = collect_facts(model, evidence, say=say, previous=previous)
    pictures = tuple(each for each in facts.pictures if (model.folder / each.file).is_file())
    made = render_card(
        replace(facts, pictures=pictures), readme, previous=previous, eval_results=read_eval_results(model.folder)
    )
    made.write(model.folder / "README.md")


def _open_readme(model: ModelFolder) -> Readme:
    """The README to keep. What `hub_moe` or peft wrote without knowing anything gives way, front matter aside."""
    readme = read_readme(model.folder / "README.md")
    if (model.folder / METADATA_FILE).is_file():
        plain = render_patch_card(PatchMetadata.read(model.folder))
        if str(readme) in ("", plain):
            return replace(parse_readme(plain), parts=())
    is_form_of_peft = model.kind == "adapter" and str(readme).count("[More Information Needed]") > 5
    return Readme("", "", "", ()) if is_form_of_peft else readme


def _with_license(
    readme: Readme, model: ModelFolder, evidence: Evidence, options: StagingOptions, *, say: Say
) -> Readme:
    if readme.metadata.get("license"):
        return readme
    license_id = options.license
    if license_id is None and options.takes_licence_of_base:
        base = find_base(model, evidence.run)
        lineage = find_lineage(base, say=say) if base else ()
        license_id = lineage[0].license if lineage else None
    return readme.with_metadata({"license": license_id}) if license_id else readme


def measure_sizes(model: ModelFolder, run: TrainingRun | None, say: Say) -> dict[str, Any] | None:
    """The footprint of the model, or of the base of a patch or adapter; None where that cannot be had."""
    from transformers import AutoConfig

    from .. import modeling  # noqa: F401 (teaches AutoConfig our models)
    from ..anatomy import measure_footprint

    name, revision = str(model.folder), None
    if model.kind != "checkpoint":
        base = find_base(model, run)
        if base is None:
            return None
        name, revision = base.name, base.revision
    try:
        footprint = measure_footprint(AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False))
    except (HubMoeError, OSError, ValueError, KeyError) as error:
        say(f"Sizes are left out of the card: {str(error).splitlines()[0]}")
        return None
    return footprint.to_dict(context=min(4096, footprint.max_context or 4096))


def missing_of_base(staged: Staged) -> list[StoredRecord]:
    """The records of the model that no record of its base stands beside."""
    compared = {each.candidate for each in staged.comparisons}
    return [each for each in staged.records if each.record.id not in compared]
