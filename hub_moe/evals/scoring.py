"""From answers to scores: lm_eval's tasks judge each document, our statistics say how sure the sums are."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import EvaluationError
from .records import EntryResult, Metric, Sample
from .request_hashes import hash_request
from .statistics import Estimate, estimate_accuracy, estimate_mean, estimate_ratio
from .statistics.estimates import is_binary
from .task_files import hush_lm_eval
from .tasks import BuiltTask

_DEFAULT_GENERATED_TOKENS = 256  # lm_eval's, where a task sets none
UNPARSABLE = "[invalid]"  # what lm_eval's filters put where a pattern finds nothing


@dataclass
class ScoredTask:
    """A task's documents with their scores.

    Attributes:
        items: By metric, what the task's aggregation takes, in the order of `samples`.
        num_truncated: Documents whose prompts lose their beginning; see `count_truncated`.
    """

    built: BuiltTask
    samples: list[Sample]
    items: Mapping[str, list[Any]] = field(default_factory=dict)
    num_truncated: int = 0


def score_task(built: BuiltTask, *, tokenizer: Any = None, max_length: int | None = None) -> ScoredTask:
    """Let the task judge the answers in its instances' `resps`; with a tokenizer, count what was too long for a model.

    Raises:
        EvaluationError: If the task gives no score for a document.
    """
    with hush_lm_eval():
        built.task.apply_filters()
    items: dict[str, list[Any]] = defaultdict(list)
    samples = []
    for document, instances in zip(built.documents, built.instances_by_document(), strict=True):
        found = _judge(built, instances)
        for name, item in found.items():
            items[name].append(item)
        samples.append(_make_sample(built, document, instances, found))
    num_truncated = count_truncated(built, tokenizer, max_length) if tokenizer and max_length else 0
    return ScoredTask(built, samples, dict(items), num_truncated)


def count_truncated(built: BuiltTask, tokenizer: Any, max_length: int) -> int:
    """Documents of which a prompt has more tokens than a model of `max_length` reads; lm_eval cuts its beginning.

    Running text is read in windows, and nothing of it is lost.
    """
    room = max_length - (
        int(built.source.generation.get("max_gen_toks", _DEFAULT_GENERATED_TOKENS)) if _generates(built) else 0
    )
    return sum(
        any(_is_longer("".join(filter(_is_text, instance.args)), room, tokenizer) for instance in instances)
        for instances in built.instances_by_document()
        if instances[0].request_type != "loglikelihood_rolling"
    )


def _generates(built: BuiltTask) -> bool:
    return built.source.output_type == "generate_until"


def _is_text(argument: Any) -> bool:
    return isinstance(argument, str)


def _is_longer(text: str, num_tokens: int, tokenizer: Any) -> bool:
    """Most texts need no tokenizer: a token is at least a byte."""
    if len(text.encode()) <= num_tokens:
        return False
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) > num_tokens


def summarise(name: str, scored: Sequence[ScoredTask], *, main_metric: str, **facts: Any) -> EntryResult:
    """The result of one entry of a suite: the documents of all its tasks pooled, each weighing the same.

    `facts` are the other fields of `EntryResult`.

    Raises:
        EvaluationError: If the tasks give no such metric.
    """
    metrics = [_measure(metric, scored) for metric in scored[0].items]
    if main_metric not in {metric.name for metric in metrics}:
        known = ", ".join(metric.name for metric in metrics)
        raise EvaluationError(f"The entry {name} has no metric {main_metric!r}; it has {known}.")
    return EntryResult(
        name=name,
        tasks=tuple(each.built.source for each in scored),
        metrics=tuple(metrics),
        main_metric=main_metric,
        num_unparsable=sum(sample.is_unparsable for each in scored for sample in each.samples),
        num_truncated=sum(each.num_truncated for each in scored),
        **facts,
    )


def _judge(built: BuiltTask, instances: Sequence[Any]) -> dict[str, Any]:
    """What lm_eval says of one document, by metric and filter."""
    found: dict[str, Any] = {}
    for filter_name in instances[0].filtered_resps:
        answers = [instance.filtered_resps[filter_name] for instance in instances]
        for metric, item in built.task.process_results(instances[0].doc, answers).items():
            found[metric if filter_name == "none" else f"{metric},{filter_name}"] = item
    if not found:
        raise EvaluationError(f"The task {built.source.name} gives no score; it has no metric that is computed here.")
    return found


def _make_sample(built: BuiltTask, document: Any, instances: Sequence[Any], found: Mapping[str, Any]) -> Sample:
    answers = [answer for instance in instances for answer in instance.resps]
    kind = instances[0].request_type
    scores: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for name, item in found.items():
        score, size = _as_numbers(_aggregation(built, name), item)
        if score is not None:
            scores[name] = score
        if size is not None:
            sizes[name] = size
    is_text = kind == "generate_until"
    log_likelihoods = [] if is_text else [float(a[0] if isinstance(a, tuple | list) else a) for a in answers]
    return Sample(
        entry=built.entry.name,
        task=built.source.name,
        index=document.index,
        document_sha256=document.sha256,
        group=document.group,
        prompt_sha256s=tuple(hash_request(instance) for instance in instances),
        log_likelihoods=tuple(log_likelihoods),
        is_greedy=tuple(bool(a[1]) for a in answers if isinstance(a, tuple | list)) if not is_text else (),
        texts=tuple(map(str, answers)) if is_text else (),
        scores=scores,
        sizes=sizes,
        is_unparsable=is_text and _is_unparsable(instances, built.main_metric),
    )


def _as_numbers(aggregation: str, item: Any) -> tuple[float | None, float | None]:
    """A document's part of a metric as a score and a size; both None where the metric is not a sum over documents."""
    if aggregation in ("bits_per_byte", "weighted_perplexity"):
        nats, size = -float(item[0]), float(item[1])
        return (nats / math.log(2) if aggregation == "bits_per_byte" else nats), size
    if aggregation == "perplexity":
        return -float(item), 1.0
    if aggregation == "mean" and isinstance(item, int | float) or hasattr(item, "dtype") and aggregation == "mean":
        return float(item), None
    return None, None


def _measure(name: str, scored: Sequence[ScoredTask]) -> Metric:
    task = scored[0].built.task
    plain = name.partition(",")[0]
    items = [item for each in scored for item in each.items[name]]
    value = float(task.aggregation()[plain](items))
    higher_is_better = bool(task.higher_is_better().get(plain, True))
    samples = [sample for each in scored for sample in each.samples]
    estimate = _estimate(name, samples, _aggregation(scored[0].built, name))
    if estimate is None:
        return Metric(name, value, higher_is_better, len(items))
    if not math.isclose(estimate.value, value, rel_tol=1e-9, abs_tol=1e-12):
        raise EvaluationError(f"{name} is {value} by lm_eval and {estimate.value} by its parts; please report this.")
    return Metric(
        name,
        value,
        higher_is_better,
        len(items),
        estimate.standard_error,
        estimate.low,
        estimate.high,
        estimate.num_clusters,
    )


def _estimate(name: str, samples: Sequence[Sample], aggregation: str) -> Estimate | None:
    """None where fewer than two documents or groups, or a metric that is no sum over documents, cannot tell."""
    if any(name not in sample.scores for sample in samples):
        return None
    scores = [sample.scores[name] for sample in samples]
    groups = None if any(sample.group is None for sample in samples) else [sample.group for sample in samples]
    if len(set(groups or range(len(scores)))) < 2:
        return None
    sizes = [sample.sizes.get(name, 1.0) for sample in samples]
    if aggregation in ("weighted_perplexity", "perplexity"):
        return _exponential(estimate_ratio(scores, sizes, groups=groups))
    if aggregation == "bits_per_byte":
        return estimate_ratio(scores, sizes, groups=groups)
    import numpy as np

    estimate: Callable[..., Estimate] = estimate_accuracy if is_binary(np.asarray(scores)) else estimate_mean
    return estimate(scores, groups=groups)


def _exponential(log: Estimate) -> Estimate:
    value = math.exp(log.value)
    return Estimate(
        value,
        value * log.standard_error,
        math.exp(log.low),
        math.exp(log.high),
        log.num_documents,
        log.num_clusters,
        log.confidence,
    )


def _aggregation(built: BuiltTask, name: str) -> str:
    """lm_eval's name for how documents are put together."""
    function = built.task.aggregation()[name.partition(",")[0]]
    return str(getattr(function, "__name__", "custom"))


def _is_unparsable(instances: Sequence[Any], main_metric: str) -> bool:
    filter_name = main_metric.partition(",")[2] or "none"
    return any(instance.filtered_resps.get(filter_name) in (UNPARSABLE, [UNPARSABLE], "") for instance in instances)
