"""A model, wherever it is, as lm_eval asks it questions, with what it is and how it runs written down."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .. import modeling  # noqa: F401  teaches transformers our models and patches
from ..errors import (
    CheckpointError,
    ConfigError,
    EvaluationError,
    HubMoeError,
    MissingExtraError,
    UnsupportedModelError,
)
from .model_source import LocatedModel, locate_model
from .records import Execution, ModelSource
from .task_files import hush_lm_eval

try:
    from .prefix_lm import HubMoeLM
except ImportError as error:
    raise MissingExtraError("Evaluating needs lm_eval: pip install 'hub_moe[eval]'.") from error

Endpoint = Literal["completions", "chat"]

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ModelRequest:
    """Which model to run, and how.

    Attributes:
        reference: A folder or OWNER/NAME; for an endpoint the name it serves the model by.
        dtype: "auto" for that of the stored weights, or torch's name for another floating-point one.
        attention: transformers' `attn_implementation`; None for its choice.
        experts: transformers' `experts_implementation`; None for its choice.
        device: Such as `cpu` or `cuda:0`; None for the GPU if there is one.
        reuse_prefix: Whether beginnings that prompts share are computed once.
        endpoint: URL of an OpenAI-compatible server, up to `/v1`; the model is then not loaded here.
        tokenizer: Of an endpoint, where it is not at `reference`: a folder or OWNER/NAME.
        name: What the record calls the model, such as the repo that a folder will be published as.
    """

    reference: str
    revision: str | None = None
    subfolder: str | None = None
    base: str | None = None
    dtype: str = "auto"
    attention: str | None = None
    experts: str | None = None
    batch_size: int = 16
    max_length: int | None = None
    device: str | None = None
    reuse_prefix: bool = True
    trust_remote_code: bool = False
    endpoint: str | None = None
    endpoint_kind: Endpoint = "completions"
    tokenizer: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"The batch size is {self.batch_size}; it must be at least 1.")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"The dtype {self.dtype!r} is unknown; expected one of {', '.join(_DTYPES)}.")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"The longest sequence is {self.max_length} tokens; it must be at least 1.")
        if self.device is not None:
            check_device(self.device)


@dataclass
class LoadedModel:
    """A model ready for questions.

    Attributes:
        lm: lm_eval's model.
        tokenizer: None for an endpoint that has its own.
        request: What was asked for.
    """

    lm: Any
    tokenizer: Any
    source: ModelSource
    execution: Execution
    request: ModelRequest


def load_tokenizer(located: LocatedModel, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, or of its base where it has none of its own."""
    return AutoTokenizer.from_pretrained(located.tokenizer_folder, trust_remote_code=trust_remote_code)


def load_model(
    request: ModelRequest, located: LocatedModel | None = None, *, say: Callable[[str], None] = lambda text: None
) -> LoadedModel:
    """Load what `request` names; `located` saves looking for its files again.

    `say` is told if prefixes cannot be reused, and why.

    Raises:
        CheckpointError, PatchError: If it is no model, damaged, or a patch for another base.
        ConfigError: If it cannot run as asked for.
        UnsupportedModelError: If the model has no experts whose implementation could be chosen.
    """
    if request.endpoint is not None:
        return _reach_endpoint(request)
    located = located or locate_model(
        request.reference, revision=request.revision, subfolder=request.subfolder, base=request.base
    )
    model = _load_weights(request, located)
    tokenizer = load_tokenizer(located, trust_remote_code=request.trust_remote_code)
    with hush_lm_eval():
        lm = HubMoeLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=request.batch_size,
            max_length=request.max_length,
            reuse_prefix=request.reuse_prefix,
            trust_remote_code=request.trust_remote_code,
            say=say if request.reuse_prefix else None,
        )
    return LoadedModel(lm, tokenizer, located.source, describe_execution(lm, request), request)


def describe_execution(lm: Any, request: ModelRequest) -> Execution:
    """How a model loaded here runs."""
    config = lm.model.config
    device = str(lm.device)
    is_cpu = lm.device.type == "cpu"
    return Execution(
        engine="hub_moe",
        dtype=str(lm.model.dtype).removeprefix("torch."),
        attention=config._attn_implementation,
        experts=config._experts_implementation if _has_experts(lm.model) else None,
        batch_size=request.batch_size,
        max_length=lm.max_length,
        device=device if is_cpu else f"{device} ({torch.cuda.get_device_name(lm.device)})",
        num_threads=torch.get_num_threads() if is_cpu else None,
        reuses_prefix=lm.reuse_reason is None,
    )


def check_endpoint(request: ModelRequest, *, writes_chats: bool) -> None:
    """Raises ConfigError where a chat endpoint is to be asked in plain text, which it does not take."""
    if request.endpoint is not None and request.endpoint_kind == "chat" and not writes_chats:
        raise ConfigError("A chat endpoint takes chats; choose a suite with chat_template = true, or completions.")


@contextmanager
def running_experts(loaded: LoadedModel, implementation: str) -> Iterator[None]:
    """Run the experts by another implementation for a while.

    Raises:
        ConfigError: If the model has no such implementation.
    """
    model = loaded.lm.model
    before = model.get_experts_implementation()
    _set_experts(model, implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def running_one_at_a_time(loaded: LoadedModel) -> Iterator[None]:
    """Run at batch size 1, without reuse of prefixes, for a while."""
    lm = loaded.lm
    before = lm.batch_size_per_gpu, lm.reuse_reason
    lm.batch_size_per_gpu, lm.reuse_reason = 1, "one request at a time"
    try:
        yield
    finally:
        lm.batch_size_per_gpu, lm.reuse_reason = before


def _load_weights(request: ModelRequest, located: LocatedModel) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": request.dtype, "trust_remote_code": request.trust_remote_code}
    if request.attention is not None:
        options["attn_implementation"] = request.attention
    if request.base is not None and located.source.kind == "expert_patch":
        options["base"] = request.base
    if located.source.kind == "adapter":
        return _place(_load_adapter(located, options), request)
    with _explained(located):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(located.folder), **options)
    return _place(model, request)


@contextmanager
def _explained(located: LocatedModel) -> Iterator[None]:
    """Says in a sentence of ours what transformers says of a model or setting that it does not know."""
    try:
        yield
    except HubMoeError:
        raise
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{located.source} cannot be loaded so: {str(error).strip().splitlines()[0]}") from error


def _load_adapter(located: LocatedModel, options: dict[str, Any]) -> PreTrainedModel:
    """The base with the adapter beside it, unmerged: merging would round its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError("Evaluating an adapter needs peft: pip install 'hub_moe[train]'.") from error
    assert located.base is not None
    options.pop("base", None)
    with _explained(located.base):
        base = AutoModelForCausalLM.from_pretrained(str(located.base.folder), **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(base, str(located.folder))
    missing = [str(each.message) for each in told if "missing adapter keys" in str(each.message)]
    if missing:
        raise CheckpointError(f"{located.source.name} does not hold the whole adapter: {missing[0].splitlines()[0]}")
    model: PreTrainedModel = adapted
    return model


def _place(model: PreTrainedModel, request: ModelRequest) -> PreTrainedModel:
    if request.experts is not None:
        _set_experts(model, request.experts)
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval()


def check_device(device: str) -> None:
    """Refuse a device that cannot be used here.

    Raises:
        ConfigError: Saying why.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"The device {device!r} cannot be used here: {reason}.") from error


def _set_experts(model: PreTrainedModel, implementation: str) -> None:
    if not _has_experts(model):
        raise UnsupportedModelError(
            f"The model type {model.config.model_type} has no experts whose implementation could be chosen."
        )
    try:
        model.set_experts_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"The experts cannot run by {implementation!r}: {str(error).splitlines()[0]}") from error


def _has_experts(model: PreTrainedModel) -> bool:
    return bool(model._can_set_experts_implementation())


def _explaining(ask: Callable[..., Any], url: str) -> Callable[..., Any]:
    """`ask` with a sentence of ours for what goes wrong between here and the server at `url`."""
    import requests

    @functools.wraps(ask)
    def explained(*arguments: Any, **settings: Any) -> Any:
        try:
            return ask(*arguments, **settings)
        except requests.HTTPError as error:
            said = "" if error.response is None else " ".join(error.response.text.split())[:200]
            raise EvaluationError(f"The endpoint {url} refused: {error}. {said}") from error
        except requests.RequestException as error:
            raise EvaluationError(f"The endpoint {url} cannot be reached: {type(error).__name__}.") from error
        except NotImplementedError as error:
            raise EvaluationError(f"The endpoint {url} gives no log-likelihoods, which this suite needs.") from error
        except (KeyError, TypeError, IndexError) as error:
            raise EvaluationError(
                f"The endpoint {url} answers in another form than a server with log-probabilities of the prompt (echo) "
                f"does: {type(error).__name__} {error}."
            ) from error

    return explained


def _reach_endpoint(request: ModelRequest) -> LoadedModel:
    """lm_eval's own adapter for an OpenAI-compatible server, such as vLLM or SGLang."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    tokenizer = load_tokenizer(locate_model(request.tokenizer or request.reference, revision=request.revision))
    url = str(request.endpoint).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"The endpoint {url!r} is no URL; expected one such as http://localhost:8000/v1.")
    is_chat = request.endpoint_kind == "chat"
    options: dict[str, Any] = {
        "model": request.reference,
        "base_url": f"{url}/chat/completions" if is_chat else f"{url}/completions",
        "tokenizer": tokenizer.name_or_path,
        "tokenizer_backend": "huggingface",
        "batch_size": 1 if is_chat else request.batch_size,
        "max_length": request.max_length or 2048,
        "trust_remote_code": request.trust_remote_code,
    }
    if key := os.environ.get("OPENAI_API_KEY"):
        options["auth_token"] = key
    lm = (LocalChatCompletion if is_chat else LocalCompletionsAPI)(**options)
    for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, method, _explaining(getattr(lm, method), url))
    engine = "local-chat-completions" if is_chat else "local-completions"
    execution = Execution(
        engine=engine, batch_size=options["batch_size"], max_length=options["max_length"], device="endpoint"
    )
    return LoadedModel(lm, tokenizer, ModelSource(request.reference, "endpoint"), execution, request)
