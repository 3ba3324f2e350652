"""`hub-moe inspect`: what a Mixture-of-Experts model costs, from its config alone."""

import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, HubMoeError, UnsupportedModelError
from .output import describe_bytes, describe_count, describe_flops, print_json, print_table, print_text

if TYPE_CHECKING:
    from ..anatomy import Footprint

_WIDTHS = (32, 12)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_KINDS = {
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "router": "router",
    "attention": "attention",
    "dense_mlp": "dense MLP",
    "norms": "norms",
    "embeddings": "input embedding",
    "head": "head",
    "other": "other",
    "other_modalities": "vision and audio",
}

_NOTES = """\
active      what a token passes through; the input embedding is only looked up.
operations  2 x active weights + attention to the whole context, no discount for
            the causal mask (arXiv:2204.02311, appendix B); training is 3 x
            forward (arXiv:2001.08361, section 2.1).
fp8, int4   blocks of 128 x 128 with a float32 scale; groups of 128 with a bf16
            scale; embeddings, head, router, norms stay in bf16. MTP included."""
_NOTE_ON_MEMORY = """
fits        weights and one sequence's cache; nothing set aside for activations."""


def parse_size(text: str) -> int:
    """Bytes of `24GB` (powers of ten) or `24GiB` (powers of two)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), flags=re.IGNORECASE)
    if not match:
        raise typer.BadParameter(f"{text!r} is not a size such as 24GB or 80GiB.")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def inspect(
    model: Annotated[str, typer.Argument(metavar="REPO_OR_PATH_OR_PRESET", help="Hub id, folder or preset name.")],
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="State operations and cache at this length.",
            show_default="4096, or the model's limit if lower",
        ),
    ] = None,
    memory: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="Say what fits in SIZE (24GB, 80GiB).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exact numbers as JSON.")] = False,
) -> None:
    """Count a model's parameters, operations, cache and memory.

    Reads config.json only, never weights. Works for every Mixture-of-Experts model of transformers whose experts
    hub_moe finds: HubMoe, DeepSeek, Qwen, OLMoE, Mixtral, GLM, gpt-oss and more. The cache is what transformers
    allocates, seen by running its code on shapes alone.

    \b
    Examples:
      hub-moe inspect deepseek-v3
      hub-moe inspect Qwen/Qwen3-30B-A3B --memory 24GB
      hub-moe inspect runs/demo/base/model --context 2048 --json
    """
    from ..environment import find_commit

    _, footprint = measure_model(model, revision)
    context = context or min(4096, footprint.max_context or 4096)
    facts = {"model": model, "commit": find_commit(model, revision)}
    facts |= footprint.to_dict(context=context, memory_bytes=memory)
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)


def measure_model(name: str, revision: str | None = None) -> tuple[Any, "Footprint"]:
    """The config, as `load_config` gives it, and the footprint of the model that it describes.

    Raises:
        ConfigError, UnsupportedModelError: As `load_config`, and if the config describes no model that can be built.
    """
    try:
        config = load_config(name, revision)
        from ..anatomy import measure_footprint  # after the quick checks of load_config

        return config, measure_footprint(config)
    except HubMoeError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # from the code that builds the described model
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"The config.json of {name} describes no model that can be built ({reason}).") from error


def load_config(name: str, revision: str | None = None) -> Any:
    """The transformers config of a folder, a config.json, a preset or a Hub id. No code from the repo is run.

    Native DeepSeek types keep transformers' own class.

    Raises:
        ConfigError: If nothing has this name, or a folder has no readable config.json.
        UnsupportedModelError: If neither transformers nor hub_moe knows the model type.
    """
    path = Path(name).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        _check_json(file)  # before the imports, which take seconds

    from transformers import AutoConfig, PreTrainedConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    from ..modeling import HubMoeConfig
    from ..modeling.configuration_hub_moe import translate_native_config
    from ..modeling.presets import PRESETS

    logging.set_verbosity_error()
    if not file.is_file():
        if name in PRESETS:
            return HubMoeConfig.from_preset(name)
        _check_hub_id(name, list(PRESETS))
    source = str(path) if file.is_file() else name
    fields, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    model_type = fields.get("model_type")
    if model_type in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    try:
        return HubMoeConfig.from_dict(translate_native_config(fields))
    except UnsupportedModelError:
        raise UnsupportedModelError(
            f"The config.json of {name} has model_type {model_type!r}, which neither transformers {__version__} nor "
            "hub_moe knows."
        ) from None


def _check_hub_id(name: str, presets: list[str]) -> None:
    if Path(name).expanduser().is_dir():
        raise ConfigError(f"The folder {name} has no config.json.")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the presets are {', '.join(presets)}."
        raise ConfigError(f"{name!r} is neither a preset, nor a folder, nor a Hub id (OWNER/NAME); {hint}")


def _check_json(file: Path) -> None:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ConfigError(f"{file} has no model_type, so it is not the config of a model.")


def print_facts(facts: dict[str, Any]) -> None:
    """Write what `Footprint.to_dict` returns, and the model's name, as tables."""
    print_text(_headline(facts))
    for print_part in (_print_parameters, _print_operations, _print_cache, _print_weights):
        print_text()
        print_part(facts)
    print_text()
    print_text(_NOTES + (_NOTE_ON_MEMORY if "memory" in facts else ""))


def _headline(facts: dict[str, Any]) -> str:
    experts = facts["experts"]
    shared = " and the shared ones" if experts["has_shared"] else ""
    commit = f" at {facts['commit'][:12]}" if facts["commit"] else ""
    return (
        f"{facts['model']}{commit}: {facts['class']}, {facts['layers']} layers, {experts['layers']} with experts.\n"
        f"A token passes through {experts['per_token']} of {experts['routed']} experts{shared}."
    )


def _print_parameters(facts: dict[str, Any]) -> None:
    parameters, experts = facts["parameters"], facts["experts"]
    active, with_embedding = parameters["active"], parameters["active_with_embeddings"]
    rows = [
        (_KINDS[kind], describe_count(counts["total"]), describe_count(counts["active"]))
        for kind, counts in parameters["by_kind"].items()
        if kind != "mtp"
    ]
    totals = [("model", describe_count(parameters["total"]), describe_count(active))]
    if with_embedding != active:  # they are equal where the head is tied to the embedding
        totals.append(("- as Qwen, OLMoE, Mixtral count", "", describe_count(with_embedding)))
    totals.append(("one routed expert", describe_count(experts["parameters_each"]), ""))
    if experts["mtp_layers"]:
        mtp_size = parameters["by_kind"]["mtp"]["total"]
        totals.append((f"MTP layers ({experts['mtp_layers']}), on top", describe_count(mtp_size), ""))
    print_table(("Parameters", "all", "active"), rows, totals, min_widths=_WIDTHS)


def _print_operations(facts: dict[str, Any]) -> None:
    flops = facts["flops_per_token"]
    parts = {
        "active weights": flops["forward"] - flops["attention"],
        f"attention to {flops['context']:,} tokens": flops["attention"],
    }
    rows = [(name, describe_flops(part), describe_flops(3 * part)) for name, part in parts.items()]
    total = ("together", describe_flops(flops["forward"]), describe_flops(flops["training"]))
    print_table(("Operations for one token", "forward", "training"), rows, [total], min_widths=_WIDTHS)


def _print_cache(facts: dict[str, Any]) -> None:
    cache = facts["kv_cache"]
    rows = [
        (
            f"{layer['layers']} layers, {_describe_span(layer)}",
            describe_bytes(size),
            describe_bytes(size * layer["layers"]),
        )
        for layer in cache["layers"]
        if (size := layer["bytes_per_token"] or layer["fixed_bytes"])
    ]
    total = (f"a sequence of {cache['context']:,} tokens", "", describe_bytes(cache["bytes"]))
    print_table(("KV cache in bf16", "a layer", "together"), rows, [total], min_widths=_WIDTHS)


def _describe_span(layer: dict[str, Any]) -> str:
    if not layer["bytes_per_token"]:
        return "fixed state"
    span = "each token" if layer["window"] is None else f"last {layer['window']:,} tokens"
    return f"{span} + state" if layer["fixed_bytes"] else span


def _print_weights(facts: dict[str, Any]) -> None:
    sizes, memory = facts["weights_bytes"], facts.get("memory")
    if not memory:
        print_table(
            ("Weights", "size"), [(name, describe_bytes(size)) for name, size in sizes.items()], min_widths=_WIDTHS
        )
        return
    rows = [
        (name, describe_bytes(size), _describe_fit(memory["tokens_that_fit"][name], facts["max_context"]))
        for name, size in sizes.items()
    ]
    print_table(("Weights", "size", f"fits in {describe_bytes(memory['bytes'])}"), rows, min_widths=_WIDTHS)


def _describe_fit(tokens: int | None, max_context: int | None) -> str:
    if tokens is None:
        return "no"
    return f"all {tokens:,} tokens" if tokens == max_context else f"{tokens:,} tokens"
