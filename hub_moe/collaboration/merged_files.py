"""The files of a merge's one commit: weights, the evidence of the new ones, the card that says so, `patches/NAME`."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from ..cards import Evidence, Facts, ModelFolder, collect_facts, read_eval_results, read_facts, render_card
from ..cards.collect import RECORDS_FOLDER, hash_weights, is_of
from ..cards.facts import FACTS_FILE
from ..cards.markdown import code, escape
from ..cards.metadata import RESULTS_FOLDER
from ..cards.readme import parse_readme
from ..evals.records import StoredRecord, find_records
from ..hub.pull_requests import Listed, describing, list_files
from ..patches.metadata import WEIGHTS_FILE
from .merge_plan import MergePlan

_ROWS_END = "<!-- hub_moe:merges -->"
_SECTION = (
    "\n## Merged contributions\n\n"
    "The records in `evals/` are of the weights as they are now; those of earlier weights are in the history.\n\n"
    "| Patch | by | pull request | made for commit | merged into commit | how |\n"
    "| --- | --- | --- | --- | --- | --- |\n"
)
_SMALL_FILES = ["README.md", FACTS_FILE, f"{RECORDS_FOLDER}/*", f"{RESULTS_FOLDER}/*.yaml"]
_README = "README.md"

Say = Callable[[str], None]


def gather_files(api: HfApi, plan: MergePlan, work: Path, *, say: Say) -> tuple[list[tuple[str, Path]], list[str]]:
    """What the commit adds, as `(path in the repo, file)`, and what it deletes.

    `work` holds `model`, the merged one, and `evals/merged`, its records, unless the patches are only put beside.

    Raises:
        ConfigError: If the base's card, facts or records are damaged.
        HubError: If the Hub refuses.
    """
    known = list_files(api, plan.repo, plan.parent)
    with describing(api, plan.repo):
        snapshot = snapshot_download(
            plan.repo, revision=plan.parent, allow_patterns=_SMALL_FILES, endpoint=api.endpoint, token=api.token
        )
    card = work / "card"
    shutil.copytree(snapshot, card)
    readme = card / _README
    readme.write_text(add_to_card(readme.read_text("utf-8") if readme.is_file() else "", plan), "utf-8")
    files = list(_patch_files(plan))
    if plan.method == "side-by-side":
        return [*files, (_README, readme)], []
    weights = hash_weights(work / "model")
    files += [(name, work / "model" / name) for name in weights if _is_new(name, weights, known)]
    merged = sorted((work / "evals" / "merged").glob("*-*.*"))
    files += [(f"{RECORDS_FOLDER}/{path.name}", path) for path in merged]
    deleted = [name for name in _stale_records(card, weights) if name in known]
    _render(ModelFolder(card, plan.repo, weights), find_records(work / "evals" / "merged"), known, say=say)
    written = [_README, FACTS_FILE, *(f"{RESULTS_FOLDER}/{name}" for name in read_eval_results(card))]
    return [*files, *((name, card / name) for name in written)], deleted


def add_to_card(card: str, plan: MergePlan) -> str:
    """The base's card with a row for each merged patch; all else stays as people wrote it."""
    rows = "".join(
        f"| {code(each.contribution.name)} | {escape(each.pull_request.author)} | #{each.pull_request.number} | "
        f"`{each.made_for[:12]}` | `{plan.parent[:12]}` | {plan.method} |\n"
        for each in plan.candidates
    )
    if _ROWS_END in card:
        return card.replace(_ROWS_END, rows + _ROWS_END, 1)
    return f"{card.rstrip()}\n{_SECTION}{rows}{_ROWS_END}\n"


def _patch_files(plan: MergePlan) -> Iterator[tuple[str, Path]]:
    for each in plan.candidates:
        for listed in each.contribution.files:
            name = listed.path.removeprefix(f"{each.contribution.subfolder}/")
            if name != WEIGHTS_FILE or plan.method == "side-by-side":
                yield listed.path, each.contribution.folder / name


def _is_new(name: str, weights: Mapping[str, str], known: Mapping[str, Listed]) -> bool:
    return name not in known or known[name].sha256 != weights[name]


def _stale_records(card: Path, weights: Mapping[str, str]) -> Iterator[str]:
    """Records of other weights than the merged ones, with their tables of answers."""
    folder = card / RECORDS_FOLDER
    for stored in find_records(folder) if folder.is_dir() else ():
        if not is_of(stored.record, weights):
            yield f"{RECORDS_FOLDER}/{stored.path.name}"
            yield f"{RECORDS_FOLDER}/{stored.samples_path.name}"


def _render(model: ModelFolder, records: list[StoredRecord], known: Mapping[str, Listed], *, say: Say) -> None:
    """Write the card of the merged weights in the place of the base's.

    What facts of the base say of its shape and of how it was trained is still so; what was measured on its weights is
    not.
    """
    path = model.folder / _README
    previous = read_facts(model.folder)
    facts = collect_facts(model, Evidence(records=records), say=say, previous=previous)
    if previous is not None and all(
        name in known and known[name].sha256 == sha256 for name, sha256 in previous.weights.items()
    ):
        facts = _carry_over(facts, previous)
    card = render_card(
        facts,
        parse_readme(path.read_text("utf-8")),
        previous=previous,
        eval_results=read_eval_results(model.folder),
    )
    card.write(path)


def _carry_over(facts: Facts, previous: Facts) -> Facts:
    return replace(
        facts,
        architecture=facts.architecture or previous.architecture,
        datasets=facts.datasets or previous.datasets,
        training=facts.training or previous.training,
        lineage=facts.lineage or previous.lineage,
        energy=tuple(each for each in previous.energy if each.activity == "training") + facts.energy,
        pictures=previous.pictures,
    )
