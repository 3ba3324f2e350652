"""What a card tells machines: front matter, `model-index` and `.eval_results/*.yaml`, by the Hub client's own types."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from ..errors import ConfigError
from .facts import Evaluation, Facts, Result
from .readme import dump_yaml

RESULTS_FOLDER = ".eval_results"
_UNIONS = ("tags", "datasets")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def build_metadata(facts: Facts) -> dict[str, Any]:
    """The front matter that these facts give, `model-index` among it; what is not known is left out."""
    base = facts.base
    results = [_to_eval_result(each, result) for each in facts.evaluations for result in each.results]
    on_hub = [dataset.name for dataset in facts.datasets if dataset.is_on_hub]
    data = ModelCardData(
        license=facts.license.id if facts.license else None,
        license_name=facts.license.name if facts.license else None,
        library_name={"adapter": "peft", "expert_patch": "hub_moe"}.get(facts.model.kind, "transformers"),
        pipeline_tag="text-generation",
        base_model=base.name if base and is_hub_id(base.name) and base.revision else None,
        base_model_relation=base.relation if base and is_hub_id(base.name) and base.revision else None,
        datasets=list(dict.fromkeys(on_hub)) or None,
        tags=["mixture-of-experts", "hub_moe", *(["expert-patch"] if facts.model.kind == "expert_patch" else [])],
        model_name=facts.model.name if results else None,
        eval_results=results or None,
    )
    return {key: value for key, value in data.to_dict().items() if value is not None}


def merge_metadata(
    existing: Mapping[str, Any], generated: Mapping[str, Any], *, previous: Mapping[str, Any]
) -> dict[str, Any]:
    """The values to write into a front matter: `previous` is what an earlier rendering put there.

    What people wrote wins over what is generated. Tags and datasets are united. In `model-index` the results that carry
    the hash of a record are replaced; all others, with whatever token they carry, are left as they are.
    """
    merged: dict[str, Any] = {}
    for key in dict.fromkeys([*generated, *previous]):
        value = generated.get(key)
        if key == "model-index":
            merged[key] = _merge_index(existing.get(key), value)
        elif key in _UNIONS:
            gone = [item for item in previous.get(key, []) if item not in (value or [])]
            ours = [item for item in _listed(existing.get(key)) if item not in gone]
            united = [*ours, *(item for item in value or [] if item not in ours)]
            merged[key] = united or None
        elif key not in existing or existing[key] == previous.get(key):
            merged[key] = value
    return merged


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME."""
    return _HUB_ID.fullmatch(name) is not None


def results_of_records(index: Any) -> list[dict[str, Any]]:
    """The metrics of a `model-index`, each with its dataset's name; hostile shapes give none.

    Raises:
        ConfigError: If it is no `model-index`.
    """
    if index is None:
        return []
    try:
        return [
            {"dataset": result["dataset"]["name"], **metric}
            for model in index
            for result in model["results"]
            for metric in result["metrics"]
        ]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"model-index is not of the Hub's form: {type(error).__name__} {error}.") from error


def build_eval_results(facts: Facts, existing: Mapping[str, str]) -> dict[str, str]:
    """Texts of `.eval_results/*.yaml` by file name: one file for each benchmark on a Hub that was run whole.

    `existing` are the files that are there. An entry that carries somebody's verifyToken is left as it is, and nothing
    is written beside it for the same task.

    Raises:
        ConfigError: If one of them is not of the Hub's form.
    """
    texts: dict[str, str] = {}
    for evaluation in facts.evaluations:
        for result in evaluation.results:
            if not is_hub_id(result.dataset) or result.limit is not None:
                continue
            name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', result.entry).strip('.-') or 'result'}.yaml"
            entry = _to_entry(evaluation, result)
            kept = [item for item in read_entries(existing.get(name, ""), where=name) if not _is_of(item, result)]
            marked = [item for item in read_entries(existing.get(name, ""), where=name) if "verifyToken" in item]
            if any(_is_of(item, result) for item in marked):
                continue
            texts[name] = dump_yaml([*kept, *eval_result_entries_to_yaml([entry])])
    return texts


def read_entries(text: str, *, where: str) -> list[dict[str, Any]]:
    """The entries of a `.eval_results/*.yaml`.

    Raises:
        ConfigError: If it is not YAML, or not of the Hub's form.
    """
    try:
        entries = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error
    entries = [] if entries is None else entries
    for entry in entries if isinstance(entries, list) else [entries]:
        dataset = entry.get("dataset") if isinstance(entry, dict) else None
        if not isinstance(dataset, dict) or not {"id", "task_id"} <= set(dataset) or "value" not in entry:
            raise ConfigError(f"{where} is not a list of results with a dataset (id, task_id) and a value each.")
    return list(entries)


def _to_eval_result(evaluation: Evaluation, result: Result) -> EvalResult:
    arguments: dict[str, Any] = {
        "stderr": result.standard_error,
        "n": result.num_documents,
        "num_fewshot": result.num_fewshot,
        "limit": result.limit,
        "record_sha256": evaluation.record_sha256,
    }
    return EvalResult(
        task_type="text-generation",
        dataset_type=result.dataset if is_hub_id(result.dataset) else result.entry,
        dataset_name=result.entry,
        dataset_config=result.dataset_name,
        dataset_split=result.dataset_split,
        dataset_revision=result.dataset_revision,
        metric_type=result.metric.partition(",")[0],
        metric_name=result.metric,
        metric_value=float(result.value),
        metric_args={name: value for name, value in arguments.items() if value is not None},
    )


def _to_entry(evaluation: Evaluation, result: Result) -> EvalResultEntry:
    error = f", standard error {result.standard_error:.4g}" if result.standard_error is not None else ""
    return EvalResultEntry(
        dataset_id=result.dataset,
        task_id=result.entry,
        dataset_revision=result.dataset_revision,
        value=float(result.value),
        date=evaluation.created,
        notes=(
            f"self-reported; {result.metric}, {result.num_fewshot}-shot, n = {result.num_documents}{error}; "
            f"record {evaluation.record_sha256}"
        ),
    )


def _is_of(item: Mapping[str, Any], result: Result) -> bool:
    return bool(item["dataset"]["id"] == result.dataset and item["dataset"]["task_id"] == result.entry)


def _merge_index(existing: Any, generated: Any) -> Any:
    results_of_records(existing)  # refuses what is no model-index
    models = [{**model, "results": _foreign_results(model["results"])} for model in existing or []]
    ours = generated[0]["results"] if generated else []
    if not models:
        return generated
    models[0] = {**models[0], "results": [*models[0]["results"], *ours]}
    return [model for model in models if model["results"]] or None


def _foreign_results(results: Sequence[Any]) -> list[Any]:
    kept = []
    for result in results:
        metrics = [metric for metric in result["metrics"] if not is_of_record(metric)]
        if metrics:
            kept.append({**result, "metrics": metrics})
    return kept


def is_of_record(metric: Mapping[str, Any]) -> bool:
    """Whether a metric of a `model-index` says which record it is from."""
    return isinstance(metric.get("args"), Mapping) and "record_sha256" in metric["args"]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
