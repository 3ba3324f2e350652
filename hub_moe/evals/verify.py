"""Is a claim true? A stranger's record, checked without trusting its author.

The record and its samples must have the hashes that they claim. The model's files are hashed again. All prompts are
built again from the data and compared with the record's. The numbers are computed again from the samples. Last, the
answers to some documents, chosen by a nonce that the author could not know, are asked for again.
"""

import math
import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, EvaluationError, HubMoeError
from .claim_checks import (
    Finding,
    check_model,
    check_numbers,
    check_samples,
    check_suite,
    check_tasks,
    find_suite_changes,
    in_order,
)
from .model_source import LocatedModel, locate_model
from .models import LoadedModel, ModelRequest, load_model, load_tokenizer
from .records import ModelSource, Record, Sample, StoredRecord, read_record
from .replay import Replay, replay_documents
from .suites import Suite
from .tasks import BuiltSuite, build_suite

Outcome = Literal["bit-equal", "within tolerance", "not replayed", "failed"]

DEFAULT_DOCUMENTS = 59  # finds 5 % of fabricated samples with 95 % probability: 1 - 0.95 ** 59
_SHARES = (0.01, 0.05, 0.1)
_LARGEST_BATCH = 1024  # of a stranger's record; it would only fill the memory


@dataclass(frozen=True)
class Verification:
    """The verdict on a record.

    Attributes:
        outcome: "bit-equal" and "within tolerance" are said of the documents asked again; "not replayed" means that the
            record agrees with itself, the model's files and the questions, and that no answer was asked for again.
        nonce: Chose the documents; given again, it chooses the same.
        num_replayed: Documents whose answers were asked for again, of `num_documents`.
        catch_probabilities: By share of fabricated samples ("5 %"), the chance that the replay would have met one.
        max_difference: Largest difference of a log-likelihood in the replay, in nats.
        failed_documents: Those whose answers are not the model's, as `task document 17: why`.
        reservations: What the verdict does not vouch for, in sentences.
    """

    record: str
    outcome: Outcome
    findings: tuple[Finding, ...]
    nonce: str
    num_documents: int = 0
    num_replayed: int = 0
    catch_probabilities: dict[str, float] | None = None
    max_difference: float | None = None
    failed_documents: tuple[str, ...] = ()
    reservations: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reviewer:
    """What the reviewer brings.

    Attributes:
        model: Where the model is, in place of what the record says; needed for a record of a folder.
        base: Likewise for the base of a patch or adapter.
        data_dir: Local data, as for the evaluation.
        suite_dir: Of a suite with tasks of its author's own, the folder where they lie. They may hold code: read it.
        num_documents: To replay; 0 replays none.
        nonce: None draws one.
        attention, experts: In place of what the record ran with, where that cannot run here.
        run_code: Whether code that the model wrote may run here, for suites that score it so.
    """

    model: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    base: str | None = None
    data_dir: Path | None = None
    suite_dir: Path | None = None
    num_documents: int = DEFAULT_DOCUMENTS
    nonce: str | None = None
    device: str | None = None
    attention: str | None = None
    experts: str | None = None
    trust_remote_code: bool = False
    run_code: bool = False


def verify_record(path: Path, reviewer: Reviewer, *, say: Callable[[str], None] = lambda text: None) -> Verification:
    """Check the record at `path`; what is wrong with it is in the findings and never raised.

    Raises:
        HubMoeError: If the check itself cannot be made: a dataset or the model cannot be fetched, or cannot run here.
        OSError: If the Hub cannot be reached or refuses.
    """
    nonce = reviewer.nonce or secrets.token_hex(8)
    try:
        stored = read_record(path)
        suite = Suite.from_declaration(stored.record.suite.declaration)
        samples = stored.read_samples()
    except HubMoeError as error:
        return Verification("unknown", "failed", (Finding("record", False, str(error)),), nonce)
    return _Verifier(stored, suite, samples, reviewer=reviewer, nonce=nonce, say=say).run()


def catch_probability(num_documents: int, num_replayed: int, share: float) -> float:
    """The chance that `num_replayed` of `num_documents` hold a fabricated one, where at least `share` of them are.

    Hypergeometric: documents are drawn without return.
    """
    bad = min(num_documents, math.ceil(share * num_documents - 1e-9))
    missed = 1.0
    for drawn in range(min(num_replayed, num_documents)):
        missed *= max(0, num_documents - bad - drawn) / (num_documents - drawn)
    return 1 - missed


def choose_documents(num_documents: int, num_wanted: int, *, nonce: str, record_id: str) -> list[int]:
    """Places of the documents to replay: the same for the same nonce and record, else unforeseeable."""
    draw = random.Random(f"{nonce} {record_id}")  # seeded by the text's sha512
    return sorted(draw.sample(range(num_documents), min(num_wanted, num_documents)))


class _Verifier:
    def __init__(
        self,
        stored: StoredRecord,
        suite: Suite,
        samples: Sequence[Sample],
        *,
        reviewer: Reviewer,
        nonce: str,
        say: Callable[[str], None],
    ) -> None:
        self._record, self._suite, self._samples = stored.record, suite, samples
        self._reviewer, self._nonce, self._say = reviewer, nonce, say
        self._findings = [Finding("record", True, f"record and {len(samples):,} samples have the hashes they claim")]
        self._reservations = [*_find_reservations(stored.record, reviewer)]

    def run(self) -> Verification:
        _require_place(self._record, self._reviewer)
        located = self._locate()
        if self._record.model.kind != "endpoint":
            self._findings.append(check_model(self._record.model, located.source))
            self._reservations += _compare_names(self._record.model, located.source)
        self._say("Building every prompt again")
        tokenizer = load_tokenizer(located, trust_remote_code=self._reviewer.trust_remote_code)
        template = getattr(tokenizer, "chat_template", None)
        self._findings.append(check_suite(self._record, self._suite, chat_template=template))
        built = self._rebuild(tokenizer)
        if built is not None:
            self._findings += [check_tasks(self._record, built), check_samples(self._samples, built)]
        if built is None or not self._all_passed():
            return self._conclude("failed")
        self._findings.append(check_numbers(self._record, self._samples, built, tokenizer=tokenizer))
        self._reservations += _compare_task_files(self._record, built)
        if not self._all_passed():
            return self._conclude("failed")
        return self._replay(located, built) if self._reviewer.num_documents else self._conclude("not replayed")

    def _locate(self) -> LocatedModel:
        """The model, or below a patch or adapter its base, where the record is of that: both lie in one folder."""
        request, record = self._request(), self._record.model
        located = locate_model(
            request.reference, revision=request.revision, subfolder=request.subfolder, base=request.base
        )
        below = located.base
        while below is not None:
            if below.source.sha256 == record.sha256:
                self._reservations.append(f"The record is of the base {below.source}, not of {located.source}.")
                return below
            below = below.base
        return located

    def _request(self) -> ModelRequest:
        """Where the model is: as the reviewer says, or the record."""
        source, reviewer = self._record.model, self._reviewer
        return ModelRequest(
            reference=reviewer.model or str(source.repo),
            revision=reviewer.revision if reviewer.model else source.revision,
            subfolder=reviewer.subfolder,
            base=reviewer.base,
        )

    def _rebuild(self, tokenizer: Any) -> BuiltSuite | None:
        """None, with a finding, where the suite that the record declares cannot be."""
        suite = _pin(self._suite, self._record)
        suite = replace(suite, folder="" if self._reviewer.suite_dir is None else str(self._reviewer.suite_dir))
        try:
            if self._reviewer.suite_dir is None and any(entry.source.startswith(".") for entry in suite.entries):
                raise ConfigError(
                    f"the tasks of {suite.name} lie in a folder of its author's; read them, for they may hold code, "
                    "and give the folder (--suite-dir)."
                )
            return build_suite(
                suite, tokenizer=tokenizer, data_dir=self._reviewer.data_dir, run_code=self._reviewer.run_code
            )
        except ConfigError as error:
            self._findings.append(Finding("prompts", False, f"the suite cannot be built again: {error}"))
            return None

    def _replay(self, located: LocatedModel, built: BuiltSuite) -> Verification:
        total = len(self._samples)
        places = choose_documents(total, self._reviewer.num_documents, nonce=self._nonce, record_id=self._record.id)
        self._say(f"Asking {len(places)} of {total:,} documents again")
        samples = in_order(self._samples, built)
        loaded = load_model(_as_it_ran(self._request(), self._record, self._reviewer), located)
        self._reservations += [*_compare_execution(self._record, loaded), *_name_rarely_asked(samples, places)]
        try:
            replay = replay_documents(loaded, built, samples, places)
        except EvaluationError as error:
            self._findings.append(Finding("replay", False, str(error)))
            return self._conclude("failed", num_replayed=len(places))
        self._findings += _judge(replay, len(places), total)
        passed: Outcome = "bit-equal" if replay.is_equal else "within tolerance"
        return self._conclude(passed if self._all_passed() else "failed", replay, num_replayed=len(places))

    def _all_passed(self) -> bool:
        return all(finding.passed for finding in self._findings)

    def _conclude(self, outcome: Outcome, replay: Replay | None = None, *, num_replayed: int = 0) -> Verification:
        total = len(self._samples)
        chances = {f"{share:.0%}": catch_probability(total, num_replayed, share) for share in _SHARES}
        return Verification(
            record=self._record.id,
            outcome=outcome,
            findings=tuple(self._findings),
            nonce=self._nonce,
            num_documents=total,
            num_replayed=num_replayed,
            catch_probabilities=chances if num_replayed else None,
            max_difference=replay.max_difference if replay else None,
            failed_documents=replay.failed if replay else (),
            reservations=tuple(self._reservations),
        )


def _require_place(record: Record, reviewer: Reviewer) -> None:
    if record.execution.engine == "local-chat-completions":
        raise EvaluationError(
            "The server of a chat endpoint writes its prompts itself, so nobody can check its record."
        )
    is_endpoint = record.model.kind == "endpoint"
    if reviewer.model is None and (is_endpoint or record.model.repo is None):
        what = "was served by an endpoint" if is_endpoint else "was a folder of its author's"
        raise EvaluationError(f"The model {record.model.name} {what}; say where the model is (--model).")


def _as_it_ran(request: ModelRequest, record: Record, reviewer: Reviewer) -> ModelRequest:
    execution = record.execution
    return replace(
        request,
        dtype=execution.dtype or "auto",
        attention=reviewer.attention or execution.attention,
        experts=reviewer.experts or execution.experts,
        batch_size=max(1, min(execution.batch_size, _LARGEST_BATCH)),
        max_length=execution.max_length,
        device=reviewer.device,
        reuse_prefix=execution.reuses_prefix,
        trust_remote_code=reviewer.trust_remote_code,
    )


def _pin(suite: Suite, record: Record) -> Suite:
    """The datasets that the suite leaves open, at the commits that the record read."""
    found = {
        task.dataset.path: task.dataset.revision
        for entry in record.entries
        for task in entry.tasks
        if task.dataset.revision
    }
    return replace(suite, entries=tuple(replace(e, datasets={**found, **e.datasets}) for e in suite.entries))


def _judge(replay: Replay, num_replayed: int, total: int) -> Iterator[Finding]:
    detail = f"{num_replayed} of {total:,} documents asked again: {len(replay.failed)} failed"
    if replay.max_difference is not None:
        detail += f", largest difference {replay.max_difference:.3g} nats"
    if replay.num_near_ties:
        detail += f", {replay.num_near_ties} answered otherwise where two answers are as likely but for rounding"
    yield Finding("replay", not replay.failed, detail)
    if replay.num_lower or replay.num_higher:
        sides = f"rounding makes {replay.num_lower} of them worse than claimed and {replay.num_higher} better"
        yield Finding("fairness", not replay.is_one_sided, sides)


def _find_reservations(record: Record, reviewer: Reviewer) -> Iterator[str]:
    """What no check looks at, and what is right and may still mislead."""
    changes = find_suite_changes(record)
    if changes is None:
        yield f"{record.suite.name} is a suite of the author's own: read its declaration in the record."
    elif changes:
        yield (
            f"This is NOT the suite {record.suite.name} as it stands, but another ({', '.join(changes)}): its "
            "numbers compare with no other record of that name."
        )
    if record.model.kind == "endpoint":
        yield "The record is of an endpoint and names no files; the answers were compared with the model given here."
    unpinned = {
        f"{task.dataset.path} at {task.dataset.revision}"
        for entry, declared in zip(record.entries, record.suite.declaration.get("entries", ()), strict=False)
        for task in entry.tasks
        if task.dataset.revision and task.dataset.path not in declared.get("datasets", {})
    }
    for each in sorted(unpinned):
        yield f"The suite pins no revision of {each}: the author chose it."
    if reviewer.data_dir is not None:
        yield f"The documents were read in {reviewer.data_dir}: whether they are the dataset's is not checked."
    if reviewer.nonce is not None:
        yield "The nonce was given: it shows nothing if the author could foresee it."
    yield "Time, tokens, energy, versions, device, command and noise floor in the record are its author's word."


def _compare_names(claimed: ModelSource, found: ModelSource) -> Iterator[str]:
    if claimed.name != found.name:
        yield f"The record calls the model {claimed.name}; what was checked is {found}."


def _compare_task_files(record: Record, built: BuiltSuite) -> Iterator[str]:
    claimed = [task.file_sha256 for entry in record.entries for task in entry.tasks]
    changed = [
        each.name for each, sha256 in zip(built.tasks, claimed, strict=True) if each.source.file_sha256 != sha256
    ]
    if changed:
        yield f"The task files of {', '.join(changed)} are not the record's, with the same questions and scores."


def _compare_execution(record: Record, loaded: LoadedModel) -> Iterator[str]:
    claimed, found = record.execution, loaded.execution
    names = ("engine", "attention", "experts", "batch_size", "reuses_prefix")
    for name in names:
        if getattr(claimed, name) != getattr(found, name):
            yield f"The record ran with {name} {getattr(claimed, name)}, this check with {getattr(found, name)}."
    stored = getattr(loaded.lm.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if claimed.max_length is not None and stored is not None and claimed.max_length < stored:
        yield f"Prompts were cut to {claimed.max_length} tokens, where the model reads {stored}."


def _name_rarely_asked(samples: Sequence[Sample], places: Sequence[int]) -> Iterator[str]:
    """Entries of which so little was asked again that a fabricated one would pass."""
    total, asked = Counter(s.entry for s in samples), Counter(samples[place].entry for place in places)
    rare = [
        f"{name} ({asked[name]} of {n:,})" for name, n in total.items() if catch_probability(n, asked[name], 0.1) < 0.5
    ]
    if rare:
        yield f"Too few documents were asked again to find a tenth of these entries fabricated: {', '.join(rare)}."
