"""Is a claim true? A stranger's record, checked without trusting its author.

The record and its samples must have the hashes that they claim. The model's files are hashed again. All prompts are
built again from the data and compared with the record's. The numbers are computed again from the samples. Last, the
answers to some documents, chosen by a nonce that the author could not know, are asked for again.
"""

import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import EvaluationError, HubMoeError
from .claim_checks import Finding, check_model, check_numbers, check_samples, check_suite, check_tasks
from .model_source import LocatedModel, locate_model
from .models import ModelRequest, load_model, load_tokenizer
from .records import Record, Sample, StoredRecord, read_record
from .replay import Replay, replay_documents
from .suites import Suite
from .tasks import BuiltSuite, build_suite

Outcome = Literal["bit-equal", "within tolerance", "failed"]

DEFAULT_DOCUMENTS = 59  # finds 5 % of fabricated samples with 95 % probability: 1 - 0.95 ** 59
_SHARES = (0.01, 0.05, 0.1)


@dataclass(frozen=True)
class Verification:
    """The verdict on a record.

    Attributes:
        nonce: Chose the documents; given again, it chooses the same.
        num_replayed: Documents whose answers were asked for again, of `num_documents`.
        catch_probabilities: By share of fabricated samples ("5 %"), the chance that the replay would have met one.
        max_difference: Largest difference of a log-likelihood in the replay, in nats.
        failed_documents: Those whose answers are not the model's, as `task: document 17: why`.
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
        num_documents: To replay; 0 replays none.
        nonce: None draws one.
    """

    model: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    base: str | None = None
    data_dir: Path | None = None
    num_documents: int = DEFAULT_DOCUMENTS
    nonce: str | None = None
    device: str | None = None
    trust_remote_code: bool = False


def verify_record(path: Path, reviewer: Reviewer, *, say: Callable[[str], None] = lambda text: None) -> Verification:
    """Check the record at `path`; what is wrong with it is in the findings and never raised.

    Raises:
        HubMoeError: If the check itself cannot be made: a dataset or the model cannot be fetched.
    """
    nonce = reviewer.nonce or secrets.token_hex(8)
    try:
        stored = read_record(path)
        samples = stored.read_samples()
    except HubMoeError as error:
        return Verification("unknown", "failed", (Finding("record", False, str(error)),), nonce)
    return _Verifier(stored, samples, reviewer, nonce, say).run()


def catch_probability(num_documents: int, num_replayed: int, share: float) -> float:
    """The chance that `num_replayed` of `num_documents` hold one of the fabricated ones, drawn without return."""
    bad = round(share * num_documents)
    missed = 1.0
    for drawn in range(num_replayed):
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
        samples: Sequence[Sample],
        reviewer: Reviewer,
        nonce: str,
        say: Callable[[str], None],
    ) -> None:
        self._record, self._samples = stored.record, samples
        self._reviewer, self._nonce, self._say = reviewer, nonce, say
        self._findings = [Finding("record", True, f"record and {len(samples):,} samples have the hashes they claim")]

    def run(self) -> Verification:
        request = _request(self._record, self._reviewer)
        located = _locate(request)
        if located.base is not None and located.base.source.sha256 == self._record.model.sha256:
            # beside a patch lies the record of its base too, to compare with
            located = located.base
            request = replace(request, reference=str(located.folder), revision=None, subfolder=None, base=None)
        if self._record.model.kind != "endpoint":
            self._findings.append(check_model(self._record.model, located.source))
        self._say("Building every prompt again")
        built = self._rebuild(request, located)
        self._findings += [
            check_suite(self._record),
            check_tasks(self._record, built),
            check_samples(self._samples, built),
        ]
        if not self._all_passed():
            return self._conclude("failed")
        self._findings.append(check_numbers(self._record, self._samples, built))
        if not self._all_passed() or not self._reviewer.num_documents:
            return self._conclude("bit-equal" if self._all_passed() else "failed")
        return self._replay(request, located, built)

    def _rebuild(self, request: ModelRequest, located: LocatedModel) -> BuiltSuite:
        suite = Suite.from_declaration(self._record.suite.declaration)
        tokenizer = load_tokenizer(located, trust_remote_code=request.trust_remote_code)
        return build_suite(suite, tokenizer=tokenizer, data_dir=self._reviewer.data_dir)

    def _replay(self, request: ModelRequest, located: LocatedModel, built: BuiltSuite) -> Verification:
        total = len(self._samples)
        places = choose_documents(total, self._reviewer.num_documents, nonce=self._nonce, record_id=self._record.id)
        self._say(f"Asking {len(places)} of {total:,} documents again")
        replay = replay_documents(load_model(request, located), built, _order(self._samples, built), places)
        outcome: Outcome = "failed" if replay.failed else "bit-equal" if replay.is_equal else "within tolerance"
        detail = f"{len(places)} of {total:,} documents asked again: {len(replay.failed)} failed"
        if replay.max_difference is not None:
            detail += f", largest difference {replay.max_difference:.3g} nats"
        self._findings.append(Finding("replay", not replay.failed, detail))
        return self._conclude(outcome, replay, num_replayed=len(places))

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
        )


def _request(record: Record, reviewer: Reviewer) -> ModelRequest:
    """The model as the record says it ran; where it is, the reviewer may say."""
    source, execution = record.model, record.execution
    is_endpoint = source.kind == "endpoint"
    if is_endpoint or (reviewer.model is None and source.repo is None):
        what = "was served by an endpoint" if is_endpoint else "was a folder of its author's"
        if reviewer.model is None:
            raise EvaluationError(f"The model {source.name} {what}; say where the model is (--model).")
    reference = reviewer.model or str(source.repo)
    return ModelRequest(
        reference=reference,
        revision=reviewer.revision if reviewer.model else source.revision,
        subfolder=reviewer.subfolder,
        base=reviewer.base,
        dtype=execution.dtype or "auto",
        attention=execution.attention,
        experts=execution.experts,
        batch_size=execution.batch_size,
        max_length=execution.max_length,
        device=reviewer.device,
        reuse_prefix=execution.reuses_prefix,
        trust_remote_code=reviewer.trust_remote_code,
    )


def _locate(request: ModelRequest) -> LocatedModel:
    return locate_model(request.reference, revision=request.revision, subfolder=request.subfolder, base=request.base)


def _order(samples: Sequence[Sample], built: BuiltSuite) -> list[Sample]:
    """In the order of the suite's documents, whatever the order in the file."""
    by_document = {(sample.task, sample.index): sample for sample in samples}
    return [by_document[each.source.name, document.index] for each in built.tasks for document in each.documents]
