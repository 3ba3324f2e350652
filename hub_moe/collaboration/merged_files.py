"""The files of a merge's one commit: weights, the evidence of the new ones, the card that says so, `patches/NAME`."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from ..cards import Evidence, Facts, ModelFolder, collect_facts, read_eval_results, read_facts, read_readme, render_card
from ..cards.collect import RECORDS_FOLDER, hash_weights, is_of, is_weight
from ..cards.facts import FACTS_FILE
from ..cards.markdown import code, escape
from ..cards.metadata import RESULTS_FOLDER, build_eval_results, read_entries
from ..cards.readme import Readme, dump_yaml, parse_readme
from ..errors import ConfigError, EvaluationError, HubError
from ..evals.model_source import decides_answers
from ..evals.records import StoredRecord, find_records
from ..hub.pull_requests import Listed, describing, list_files
from ..patches.metadata import WEIGHTS_FILE
from .merge_plan import MergePlan
from .staging import measure_sizes

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


@dataclass(frozen=True)
class BaseCard:
    """What the base's repo says of itself.

    Attributes:
        folder: A copy of its small files, which the new card is written into.
        listed: Every file of the repo.
        facts: That the card was rendered from, None where it was not.
        records: Those in `evals/`.
    """

    repo: str
    folder: Path
    listed: Mapping[str, Listed]
    readme: Readme
    facts: Facts | None
    records: tuple[StoredRecord, ...] = ()


def open_card(api: HfApi, repo: str, commit: str, folder: Path) -> BaseCard:
    """Fetch the card into the new `folder`, and read all of it.

    Raises:
        ConfigError: If the card, its facts or the records beside it are damaged.
        HubError: If the Hub refuses.
    """
    listed = list_files(api, repo, commit)
    with describing(api, repo):
        snapshot = snapshot_download(
            repo, revision=commit, allow_patterns=_SMALL_FILES, endpoint=api.endpoint, token=api.token
        )
    shutil.copytree(snapshot, folder)
    try:
        return _read_card(repo, folder, listed)
    except (ConfigError, EvaluationError) as error:
        raise ConfigError(f"{repo}: {str(error).replace(f'{folder}/', '')}") from error


def _read_card(repo: str, folder: Path, listed: Mapping[str, Listed]) -> BaseCard:
    for name, text in read_eval_results(folder).items():
        read_entries(text, where=f"{RESULTS_FOLDER}/{name}")
    records = find_records(folder / RECORDS_FOLDER) if (folder / RECORDS_FOLDER).is_dir() else ()
    readme = read_readme(folder / _README)
    return BaseCard(repo, folder, listed, readme, read_facts(folder), tuple(records))


def complete_model(api: HfApi, base: BaseCard, commit: str, folder: Path) -> None:
    """Put beside the merged weights in `folder` what nothing loads and records name, such as `training_args.bin`.

    Raises:
        HubError: If the repo has more weights than those that are merged, which would stay what they were.
    """
    missing = [name for name in base.listed if "/" not in name and not (folder / name).exists()]
    if others := [name for name in missing if is_weight(name)]:
        raise HubError(
            f"{base.repo} also holds {', '.join(others)}, weights that merging would leave as they are; delete them "
            "from main first, or keep base and patches apart (--side-by-side)."
        )
    for name in missing:
        if decides_answers(Path(name)):
            with describing(api, base.repo):
                path = hf_hub_download(base.repo, name, revision=commit, endpoint=api.endpoint, token=api.token)
            shutil.copyfile(path, folder / name)


def gather_files(base: BaseCard, plan: MergePlan, work: Path, *, say: Say) -> tuple[list[tuple[str, Path]], list[str]]:
    """What the commit adds, as `(path in the repo, file)`, and what it deletes.

    `work` holds `model`, the merged one, and `evals/merged`, its records, unless the patches are only put beside.

    Raises:
        ConfigError: If the card's front matter is written in a way that cannot be changed in part.
    """
    files = list(_patch_files(plan))
    readme = base.folder / _README
    if plan.method == "side-by-side":
        readme.write_bytes(str(add_to_card(base.readme, plan)).encode())
        return [*files, (_README, readme)], []
    model = ModelFolder(work / "model", plan.repo, hash_weights(work / "model"))
    files += [(name, model.folder / name) for name in model.weights if _is_new(name, model.weights, base.listed)]
    merged = sorted((work / "evals" / "merged").glob("*-*.*"))
    files += [(f"{RECORDS_FOLDER}/{path.name}", path) for path in merged]
    _render(base, plan, model, Evidence(records=find_records(work / "evals" / "merged")), say=say)
    written = [_README, FACTS_FILE, *(f"{RESULTS_FOLDER}/{name}" for name in read_eval_results(base.folder))]
    files += [(name, base.folder / name) for name in written]
    added = {name for name, _ in files}
    return files, [name for name in _stale_files(base, model.weights) if name in base.listed and name not in added]


def add_to_card(card: Readme, plan: MergePlan) -> Readme:
    """The card with a row for each merged patch; all else stays as people wrote it."""
    gap = card.line_break
    rows = "".join(
        f"| {code(each.contribution.name)} | {escape(each.pull_request.author)} | #{each.pull_request.number} | "
        f"`{each.made_for[:12]}` | `{plan.parent[:12]}` | {plan.method} |{gap}"
        for each in plan.candidates
    )
    text = str(card)
    if _ROWS_END in text:
        return parse_readme(text.replace(_ROWS_END, rows + _ROWS_END, 1))
    above = f"{text.rstrip()}{gap}" if text.strip() else ""
    return parse_readme(f"{above}{_SECTION.replace(chr(10), gap)}{rows}{_ROWS_END}{gap}")


def _patch_files(plan: MergePlan) -> Iterator[tuple[str, Path]]:
    for each in plan.candidates:
        for listed in each.contribution.files:
            name = listed.path.removeprefix(f"{each.contribution.subfolder}/")
            if name != WEIGHTS_FILE or plan.method == "side-by-side":
                yield listed.path, each.contribution.folder / name


def _is_new(name: str, weights: Mapping[str, str], known: Mapping[str, Listed]) -> bool:
    return name not in known or known[name].sha256 != weights[name]


def _stale_files(base: BaseCard, weights: Mapping[str, str]) -> Iterator[str]:
    """What tells of other weights: records with their answers, results and pictures that nothing is left to say of."""
    for stored in base.records:
        if not is_of(stored.record, weights):
            yield f"{RECORDS_FOLDER}/{stored.path.name}"
            yield f"{RECORDS_FOLDER}/{stored.samples_path.name}"
    left = read_eval_results(base.folder)
    yield from (name for name in base.listed if _is_result(name) and Path(name).name not in left)
    pictures = base.facts.pictures if base.facts else ()
    yield from (each.file for each in pictures if each.about != "training" and each.file.startswith("card/"))


def _is_result(name: str) -> bool:
    return Path(name).parent.as_posix() == RESULTS_FOLDER and name.endswith(".yaml")


def _render(base: BaseCard, plan: MergePlan, model: ModelFolder, evidence: Evidence, *, say: Say) -> None:
    """Write the card of the merged weights in the place of the base's.

    What facts of the base say of its shape and of how it was trained is still so; what was measured on its weights is
    not.
    """
    kept = base.facts if base.facts is not None and _is_of_base(base.facts, base) else None
    if kept is None or kept.architecture is None:
        evidence = replace(evidence, footprint=measure_sizes(model, None, say))
    described = ModelFolder(base.folder, plan.repo, model.weights)
    facts = collect_facts(described, evidence, say=say, previous=base.facts)
    _drop_results(base)
    made = render_card(
        _carry_over(facts, kept) if kept is not None else facts,
        base.readme,
        previous=base.facts,
        eval_results=read_eval_results(base.folder),
    )
    replace(made, readme=add_to_card(made.readme, plan)).write(base.folder / _README)


def _is_of_base(facts: Facts, base: BaseCard) -> bool:
    """Whether they are of the very weights that the base's repo holds."""
    return bool(facts.weights) and all(
        name in base.listed and base.listed[name].sha256 == sha256 for name, sha256 in facts.weights.items()
    )


def _carry_over(facts: Facts, previous: Facts) -> Facts:
    return replace(
        facts,
        architecture=facts.architecture or previous.architecture,
        datasets=facts.datasets or previous.datasets,
        training=facts.training or previous.training,
        lineage=facts.lineage or previous.lineage,
        energy=tuple(each for each in previous.energy if each.activity == "training") + facts.energy,
        pictures=tuple(each for each in previous.pictures if each.about == "training"),
    )


def _drop_results(base: BaseCard) -> None:
    """Take out of `.eval_results` what the old facts put there; what people or a Hub wrote stays."""
    old = build_eval_results(base.facts, {}) if base.facts else {}
    ours = [entry for name, text in old.items() for entry in read_entries(text, where=name)]
    for name, text in read_eval_results(base.folder).items():
        path, entries = base.folder / RESULTS_FOLDER / name, read_entries(text, where=name)
        kept = [entry for entry in entries if entry not in ours]
        if kept and len(kept) < len(entries):
            path.write_text(dump_yaml(kept), "utf-8")
        elif entries and not kept:
            path.unlink()
