"""Everything that speaks against publishing what was staged, found before anything is sent."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..cards import lint_card, open_model
from ..cards.facts import Facts
from ..cards.licences import NOT_LEGAL_ADVICE, find_terms
from ..errors import CheckpointError, HubError, HubMoeError
from ..evals.compare import compare_records
from ..evals.model_source import hash_model_files
from ..evals.records import StoredRecord
from ..files.json_files import read_json
from ..hub.file_checks import Problem, check_files
from ..hub.pull_requests import describing
from ..patches.base_files import INDEX_FILE, read_checkpoint_places
from ..patches.folders import is_repo_id
from ..patches.metadata import PatchMetadata
from ..patches.tensor_file import read_places
from ..patches.verification import verify_patch
from .staging import ADAPTER_FILE, Staged

TRIED_BYTES = 2_000_000_000
"""Models below this size are loaded as a whole unless somebody says otherwise."""

_GIVE_BASE = "say which repo that is by --base OWNER/NAME@COMMIT, whose tensors are then compared"


def check_staged(staged: Staged, *, api: HfApi, tries_load: bool | None = None) -> list[Problem]:
    """Every problem, each once: of files, weights, base, records, card and licence.

    `tries_load` says whether a whole model is loaded by `from_pretrained`; None: below 2 GB.

    Raises:
        HubError: If the Hub cannot be reached.
    """
    problems = [*check_files(staged.files), *_check_weights(staged, tries_load)]
    problems += [*_check_base(staged, api), *_check_records(staged), *_check_card(staged)]
    if staged.facts is not None:
        problems += _check_license(staged.facts)
    return list(dict.fromkeys(problems))


def note_licence(facts: Facts | None) -> list[str]:
    """What is not known of the licence, and so is for the publisher to know."""
    license = facts.license if facts is not None else None
    if license is None:
        return []
    notes = []
    if license.id not in (None, "other") and find_terms(license.id) is None:
        notes.append(
            f"{license.id} is no licence that hub_moe knows, and a Hub may refuse it; one without an id of its own is "
            "called other, with license_name and license_link in the card."
        )
    unknown = [f"{each.source}: {each.reason}" for each in license.checks if each.verdict == "unknown"]
    if unknown:
        notes.append(f"Not known whether the licence fits: {'; '.join(unknown)}. {NOT_LEGAL_ADVICE}")
    return notes


def _check_weights(staged: Staged, tries_load: bool | None) -> Iterator[Problem]:
    folder = staged.folder
    if staged.kind == "expert_patch":
        for check in verify_patch(folder).checks:
            if check.fault:
                what = f"{check.tensor + ': ' if check.tensor else ''}{check.what}: {_without(folder, check.fault)}"
                yield Problem(f"The patch does not load: {what}", "make it again by `hub-moe train`")
        return
    try:
        if staged.kind == "adapter":
            read_places(folder / "adapter_model.safetensors")
            return
        _check_checkpoint(folder)
    except (HubMoeError, OSError) as error:
        yield Problem(f"The {staged.kind} does not load: {_without(folder, str(error))}", "save it again")
        return
    size_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size_bytes < TRIED_BYTES if tries_load is None else tries_load:
        yield from _try_load(folder)


def _check_checkpoint(folder: Path) -> None:
    """The header of every file of weights, each tensor in the file where the index says it is, a config."""
    config = read_json(folder / "config.json", "the config of a model")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError("config.json names no model_type.")
    places = read_checkpoint_places(folder)
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text("utf-8"))["weight_map"]
        wrong = [name for name in index if name not in places or places[name].path.name != index[name]]
        if wrong or set(places) - set(index):
            name = min([*wrong, *(set(places) - set(index))])
            raise CheckpointError(f"{INDEX_FILE} and the files do not agree about the tensor {name!r}.")


def _try_load(folder: Path) -> Iterator[Problem]:
    from transformers import AutoModelForCausalLM

    from .. import modeling  # noqa: F401 (teaches AutoModelForCausalLM our models)

    try:
        _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    except (HubMoeError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = _without(folder, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        yield Problem(f"from_pretrained fails: {reason}", "save it again, or see --no-try-load")
        return
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, found.get(key) or ()))
        if names:
            what = f"from_pretrained finds {key.replace('_', ' ')}: {names[0]!r} and {len(names) - 1} more"
            yield Problem(what, "they would be random numbers, or lost; save the model again")


def _check_base(staged: Staged, api: HfApi) -> Iterator[Problem]:
    """Whether others can get what this was made on."""
    name, commit = _base_of(staged)
    if staged.kind == "checkpoint":
        return
    if not isinstance(name, str) or not is_repo_id(name) or Path(name).is_dir():
        yield Problem(f"The base is a folder, {Path(str(name)).name}, which nobody else has", _GIVE_BASE)
    elif not isinstance(commit, str):
        yield Problem(f"The base {name} is named without its commit", "give --base OWNER/NAME@COMMIT")
    else:
        try:
            with describing(api, f"The base {name} at {commit[:12]}"):
                api.model_info(name, revision=commit, expand=["sha"])
        except HubError as error:
            if "cannot be reached" in str(error):
                raise
            yield Problem(str(error).rstrip("."), "publish the base first, or see whether you may read it")


def _base_of(staged: Staged) -> tuple[Any, Any]:
    try:
        if staged.kind == "expert_patch":
            base = PatchMetadata.read(staged.folder).base
            return base.repo, base.commit
        if staged.kind == "adapter":
            fields = read_json(staged.folder / ADAPTER_FILE, "the config of an adapter")
            return fields.get("base_model_name_or_path"), fields.get("revision")
    except HubMoeError:
        pass  # told where the weights are checked
    return None, None


def _check_records(staged: Staged) -> Iterator[Problem]:
    """Records whose model is not file by file the one that is published: nobody could check them."""
    if not staged.records:
        return
    found = hash_model_files(staged.folder)
    for stored in staged.records:
        claimed = stored.record.model.files
        names = sorted(name for name in {*claimed, *found} if claimed.get(name) != found.get(name))
        if names:
            where = f"evals/{stored.path.name}"
            yield Problem(f"was made with another {', '.join(names[:3])}", "evaluate again what you publish", where)


def _check_card(staged: Staged) -> Iterator[Problem]:
    def compare(base: StoredRecord, candidate: StoredRecord) -> dict[str, Any]:
        return compare_records(base, candidate).to_dict()

    if not (staged.folder / "README.md").is_file():
        yield Problem("There is no card", "`hub-moe card` makes one")
        return
    for finding in lint_card(open_model(str(staged.folder)), compare=compare):
        is_of_license = finding.problem.endswith("no license")
        advice = "give --license ID, such as apache-2.0" if is_of_license else "see `hub-moe card --help`"
        yield Problem(f"{finding.problem}", advice, finding.place)


def _check_license(facts: Facts) -> Iterator[Problem]:
    for each in facts.license.checks if facts.license is not None else ():
        if each.verdict == "conflict":
            shown = facts.license.name or facts.license.id if facts.license is not None else None
            yield Problem(
                f"The licence {shown} does not go with {each.source} ({each.source_license}): {each.reason}",
                "choose a licence that does by --license, or other data",
            )


def _without(folder: Path, text: str) -> str:
    """A message without the place of the scratch folder that it speaks of."""
    return text.replace(f"{folder}/", "").replace(str(folder), "the folder").rstrip(".")
