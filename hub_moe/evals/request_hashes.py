"""Hashes of what is asked: requests, documents and the settings of tasks, alike on every machine."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from .records.record import hash_json

# what says where documents lie and not what is asked; `DatasetSource` records that
_NOT_HASHED = {"dataset_path", "dataset_name", "dataset_kwargs", "metadata", "tag", "task_alias"}


def hash_request(instance: Any) -> str:
    """sha256 of the kind and all arguments: context, continuation, generation settings."""
    return hash_json([instance.request_type, plain_json(instance.args)])


def plain_json(value: Any) -> Any:
    """Values that JSON has, for what documents hold: sets sorted, numbers of numpy plain, NaN as text."""
    from lm_eval.utils import handle_non_serializable

    def _plain(item: Any) -> Any:
        if isinstance(item, set | frozenset):
            return sorted(item, key=str)
        if isinstance(item, bytes):
            return {"sha256": hashlib.sha256(item).hexdigest()}
        return handle_non_serializable(item)

    return json.loads(json.dumps(value, default=_plain, ensure_ascii=False), parse_constant=str)


def describe_config(task: Any) -> dict[str, Any]:
    """JSON of a task's resolved settings: templates, filters, metrics, generation, choices, examples, functions."""
    return {
        each.name: _describe_value(value)
        for each in fields(task.config)
        if each.name not in _NOT_HASHED and (value := getattr(task.config, each.name)) is not None
    }


def _describe_value(value: Any) -> Any:
    """JSON of settings; a function is its source, so that a changed function is another setting."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _describe_value(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _describe_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_describe_value(item) for item in value]
    if isinstance(value, partial):
        return [_describe_value(value.func), _describe_value(value.args), _describe_value(value.keywords)]
    if callable(value):
        return inspect.getsource(value)
    return plain_json(value)
