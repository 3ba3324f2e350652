"""Does a card say what its evidence says? Every finding is told, in one sentence with its place."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigError, EvaluationError, HubMoeError
from ..evals.records import StoredRecord, read_record
from .claims import find_claims
from .collect import RECORDS_FOLDER, ModelFolder, describe_comparison, describe_record, is_of, read_facts
from .facts import FACTS_FILE, Facts, ModelFacts
from .metadata import RESULTS_FOLDER, build_eval_results, is_of_record, read_entries, results_of_records
from .readme import Readme, read_readme
from .render import read_eval_results, render_blocks

Compare = Callable[[StoredRecord, StoredRecord], Mapping[str, Any]]
_PLACEHOLDER = re.compile(r"\[?more information needed\]?|\bTODO\b|\bTBD\b|lorem ipsum|\[insert[^\]]*\]", re.IGNORECASE)
LOCAL_PATH = re.compile(
    r"(?<![\w.:/-])(?:file://)?/(?:tmp|root|home|work|Users|mnt|data|workspace|scratch|content|kaggle|private|var)/[\w./-]*\w"
    r"|(?<!\w)[A-Za-z]:\\[\w\\.-]+|(?<!\w)~/[\w.-]+"
)
_IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img[^>]+src=[\"']([^\"']+)", re.IGNORECASE)
_REQUIRED = ("license", "library_name", "pipeline_tag", "tags")


@dataclass(frozen=True)
class Finding:
    """Something wrong with a card. `place` is a file, with a line where there is one."""

    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


def lint_card(
    model: ModelFolder, *, records: Sequence[Path] = (), readme_path: Path | None = None, compare: Compare | None = None
) -> list[Finding]:
    """What is wrong with the card of a model; an empty list if nothing is.

    Args:
        model: Whose card it is.
        records: Folders of records beside the model's own `evals/`.
        readme_path: The card, if it is not the README in the model's folder.
        compare: Computes a paired comparison of base and candidate again; without it only its means are checked.

    Raises:
        ConfigError: If there is no card.
        OSError: If the card cannot be read.
    """
    path = readme_path or model.folder / "README.md"
    if not path.is_file():
        raise ConfigError(f"{path} is no card; hub-moe card {model.name} makes one.")
    return list(_Lint(model, path, records, compare).run())


class _Lint:
    def __init__(self, model: ModelFolder, path: Path, records: Sequence[Path], compare: Compare | None) -> None:
        self.model, self.path, self.compare = model, path, compare
        self.folder = path.parent
        self.places = [self.folder / RECORDS_FOLDER, model.folder / RECORDS_FOLDER, *records]
        self.found: dict[str, StoredRecord] = {}

    def run(self) -> Iterator[Finding]:
        """Every finding, those that make others meaningless first."""
        try:
            readme = read_readme(self.path)
        except ConfigError as error:
            yield Finding(self.path.name, str(error).removeprefix(f"{self.path} "))
            return
        yield from self._check_text(readme)
        try:
            facts = read_facts(self.folder)
        except ConfigError as error:
            yield Finding(FACTS_FILE, str(error))
            return
        if facts is None:
            yield Finding(
                FACTS_FILE, f"is missing: hub-moe card {self.model.name} makes it; no number here has a record."
            )
            facts = Facts(model=ModelFacts(self.model.name, self.model.kind))
        else:
            yield from self._check_blocks(readme, facts)
        yield from self._check_records(facts)
        yield from self._check_weights(facts)
        yield from self._check_metadata(readme, facts)
        yield from self._check_eval_results(facts)
        yield from self._check_prose(readme, facts)

    def _check_text(self, readme: Readme) -> Iterator[Finding]:
        text = str(readme)
        for pattern, problem in ((_PLACEHOLDER, "has the placeholder {!r}"), (LOCAL_PATH, "names a local path, {!r}")):
            for match in pattern.finditer(text):
                yield self._at(text, match.start(), problem.format(match.group()))
        for match in _IMAGE.finditer(text):
            target = match.group(1) or match.group(2)
            if "://" not in target and not target.startswith("data:") and not (self.folder / target).is_file():
                yield self._at(text, match.start(), f"shows the picture {target}, which is missing")

    def _check_blocks(self, readme: Readme, facts: Facts) -> Iterator[Finding]:
        expected = render_blocks(facts, readme.prose)
        why = "it was edited by hand"
        if facts.hub_moe_version not in ("", __version__):
            why += f", or rendered by hub_moe {facts.hub_moe_version} and has to be again"
        for part in readme.parts:
            if part.name is None:
                continue
            if part.name not in expected:
                yield self._at_block(readme, part.name, f"the block {part.name!r} is not one that the facts give")
            elif readme.block(part.name) != expected[part.name]:
                yield self._at_block(
                    readme,
                    part.name,
                    f"the block {part.name!r} differs from what the facts give; {why}",
                )
        for name in expected:
            if readme.block(name) is None:
                yield Finding(self.path.name, f"lacks the block {name!r}; render the card again")

    def _check_records(self, facts: Facts) -> Iterator[Finding]:
        for evaluation in facts.evaluations:
            try:
                stored = self._find_record(evaluation.file, evaluation.record_sha256)
            except (HubMoeError, OSError) as error:
                yield Finding(FACTS_FILE, f"the suite {evaluation.suite}: {error}")
                continue
            if describe_record(stored) != evaluation:
                yield Finding(FACTS_FILE, f"says other numbers of {evaluation.file} than the record itself")
            if not is_of(stored.record, facts.weights):
                yield Finding(FACTS_FILE, f"claims {evaluation.file}, which is a record of other weights")
        if facts.comparison is not None:
            yield from self._check_comparison(facts)

    def _check_comparison(self, facts: Facts) -> Iterator[Finding]:
        comparison = facts.comparison
        assert comparison is not None
        own = next((each for each in facts.evaluations if each.record_sha256 == comparison.record_sha256), None)
        if own is None:
            yield Finding(FACTS_FILE, "compares a record with the base that is not among the evaluations")
            return
        try:
            candidate = self._find_record(own.file, own.record_sha256)
            base = self._find_record(comparison.base_file, comparison.base_record_sha256)
        except (HubMoeError, OSError) as error:
            yield Finding(FACTS_FILE, f"the comparison with the base: {error}")
            return
        source, known = base.record.model, facts.base
        if known and source.repo and (source.repo, source.revision) != (known.name, known.revision or source.revision):
            yield Finding(FACTS_FILE, f"compares with {source}, but the model was made from {known.name}")
        for task in comparison.tasks:
            try:
                values = [stored.record.entry(task.task).main.value for stored in (base, candidate)]
            except EvaluationError as error:
                yield Finding(FACTS_FILE, f"the comparison with the base: {error}")
                continue
            is_told = any(_close(task.base, one) and _close(task.candidate, two) for one, two in _scales(*values))
            if not is_told or not _close(task.difference, task.candidate - task.base):
                yield Finding(FACTS_FILE, f"compares other values of {task.task} than the two records have")
        if (
            self.compare is not None
            and describe_comparison(base, candidate, self.compare(base, candidate)) != comparison
        ):
            yield Finding(FACTS_FILE, "says another comparison with the base than the two records give")

    def _check_weights(self, facts: Facts) -> Iterator[Finding]:
        for name in sorted({*facts.weights, *self.model.weights}):
            stated, found = facts.weights.get(name), self.model.weights.get(name)
            if stated != found:
                problem = (
                    "is not here"
                    if found is None
                    else "is not in the facts"
                    if stated is None
                    else "has another sha256"
                )
                yield Finding(FACTS_FILE, f"the file of weights {name} {problem}; render the card again")

    def _check_metadata(self, readme: Readme, facts: Facts) -> Iterator[Finding]:
        metadata = readme.metadata
        for key in _REQUIRED:
            if not metadata.get(key):
                yield Finding(self.path.name, f"the front matter has no {key}")
        yield from self._check_base(metadata, facts)
        try:
            results = results_of_records(metadata.get("model-index"))
        except ConfigError as error:
            yield Finding(self.path.name, str(error))
            return
        claims = {
            (each.record_sha256, result.entry, result.metric): result
            for each in facts.evaluations
            for result in each.results
        }
        for metric in results:
            if "verifyToken" in metric:
                continue  # the Hub's own evidence
            what = f"model-index says {metric.get('value')!r} for {metric['dataset']}"
            arguments = metric["args"] if is_of_record(metric) else {}
            result = claims.get((str(arguments.get("record_sha256")), metric["dataset"], str(metric.get("name"))))
            if result is None:
                yield Finding(self.path.name, f"{what}, which no record says")
            elif metric.get("value") != result.value or arguments.get("stderr") != result.standard_error:
                yield Finding(self.path.name, f"{what}, but its record says {result.value!r}")

    def _check_base(self, metadata: Mapping[str, Any], facts: Facts) -> Iterator[Finding]:
        names = metadata.get("base_model")
        stated = [names] if isinstance(names, str) else names if isinstance(names, list) else []
        known = {each.name: each.revision for each in facts.lineage}
        for name in stated:
            if not known.get(str(name)):
                yield Finding(self.path.name, f"the base {name} has no commit in {FACTS_FILE}")
        if facts.base is not None and facts.base.revision is None and facts.base.name not in stated:
            yield Finding(FACTS_FILE, f"the base {facts.base.name} has no commit")
        if stated and facts.base is not None and facts.base.revision and facts.base.name not in stated:
            yield Finding(
                self.path.name, f"base_model is {', '.join(map(str, stated))}, but the evidence says {facts.base.name}"
            )

    def _check_eval_results(self, facts: Facts) -> Iterator[Finding]:
        texts = read_eval_results(self.folder)
        expected = [
            entry for name, text in build_eval_results(facts, {}).items() for entry in read_entries(text, where=name)
        ]
        for name, text in texts.items():
            place = f"{RESULTS_FOLDER}/{name}"
            try:
                entries = read_entries(text, where=place)
            except ConfigError as error:
                yield Finding(place, str(error))
                continue
            for entry in entries:
                if "verifyToken" not in entry and entry not in expected:
                    yield Finding(place, f"says {entry['value']!r} for {entry['dataset']['id']}, which no record says")

    def _check_prose(self, readme: Readme, facts: Facts) -> Iterator[Finding]:
        known = list(_known_numbers(facts, [*self.found.values()]))
        names = {result.entry for each in facts.evaluations for result in each.results}
        position = len(readme.opening + readme.front_matter + readme.closing)
        for part in readme.parts:
            for claim in find_claims(part.text, names) if part.name is None else ():
                if not claim.is_backed_by(known):
                    yield self._at(
                        str(readme),
                        position + claim.position,
                        f"{claim.text!r} looks like a result that no record has; link its source if it is not yours",
                    )
            position += len(part.text)

    def _find_record(self, file: str, sha256: str) -> StoredRecord:
        if Path(file).name != file:
            raise EvaluationError(f"{file!r} is no name of a record in {RECORDS_FOLDER}/.")
        for place in self.places:
            if (place / file).is_file():
                stored = read_record(place / file)
                if stored.record.id != sha256:
                    raise EvaluationError(f"{file} is another record than the one that the card was rendered from.")
                stored.read_samples()
                self.found[stored.record.id] = stored
                return stored
        raise EvaluationError(f"the record {file} is missing.")

    def _at(self, text: str, position: int, problem: str) -> Finding:
        return Finding(f"{self.path.name}:{text.count(chr(10), 0, position) + 1}", problem)

    def _at_block(self, readme: Readme, name: str, problem: str) -> Finding:
        return self._at(
            str(readme), str(readme).find(next(part.text for part in readme.parts if part.name == name)), problem
        )


def _known_numbers(facts: Facts, records: Iterable[StoredRecord]) -> Iterator[float]:
    for stored in records:
        for entry in stored.record.entries:
            for metric in entry.metrics:
                yield from (x for x in (metric.value, metric.standard_error, metric.low, metric.high) if x is not None)
    for task in facts.comparison.tasks if facts.comparison else ():
        yield from (task.base, task.candidate, task.difference, task.standard_error, task.low, task.high)
        yield from (x for x in (task.adjusted_p_value, task.minimum_detectable_effect) if x is not None)
    if facts.training is not None:
        yield from (x for x in (facts.training.loss_before, facts.training.loss_after) if x is not None)


def _scales(*values: float) -> Iterator[tuple[float, ...]]:
    """As they are, and as logarithms, by which perplexities are compared."""
    yield values
    if all(value > 0 for value in values):
        yield tuple(math.log(value) for value in values)


def _close(stated: float, found: float) -> bool:
    return math.isclose(stated, found, rel_tol=1e-9, abs_tol=1e-12)
