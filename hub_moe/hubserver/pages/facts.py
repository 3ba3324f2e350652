"""What pages say of a repo besides its files: facts from its card, and how its files are loaded."""

from dataclasses import dataclass
from typing import Any

from ..cards import words_of
from ..profiles import Profile

_HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
}


@dataclass(frozen=True)
class Snippet:
    """A few lines to copy."""

    title: str
    text: str


def word_of(data: dict[str, Any], name: str) -> str:
    """The first of `words_of`, else empty."""
    return next(iter(words_of(data, name)), "")


def write_snippets(profile: Profile, base_url: str) -> list[Snippet]:
    """How to get the files: by the library that the card names, by `hf`, by git."""
    repo_id = profile.repo.id
    kind = "" if repo_id.kind == "model" else f" --repo-type {repo_id.kind}"
    prefix = "" if repo_id.kind == "model" else f"{repo_id.kind}s/"
    export = f"export HF_ENDPOINT={base_url}\n"
    loader = {"model": _load_model, "dataset": _load_dataset}.get(repo_id.kind)
    snippets = [Snippet("Python", loader(profile))] if loader else []
    return [
        *snippets,
        Snippet("hf download", f"{export}hf download {repo_id}{kind}"),
        Snippet("git clone", f"git clone {base_url}/{prefix}{repo_id}"),
    ]


def _load_dataset(profile: Profile) -> str:
    return f"from datasets import load_dataset\n\ndataset = {_call('load_dataset', profile)}"


def _load_model(profile: Profile) -> str:
    data, config = profile.card.data, profile.config
    paths = {file.path for file in profile.files}
    if word_of(data, "library_name") == "peft" or "adapter_config.json" in paths:
        auto = "AutoPeftModelForCausalLM"
        return f"from peft import {auto}\n\nmodel = {_call(f'{auto}.from_pretrained', profile)}"
    if "config.json" not in paths:
        return f"from huggingface_hub import snapshot_download\n\nfolder = {_call('snapshot_download', profile)}"
    architecture = word_of(config, "architectures")
    auto = next((auto for ending, auto in _HEADS.items() if architecture.endswith(ending)), "AutoModel")
    is_ours = config.get("model_type") == "hub_moe"
    lines = ["import hub_moe.modeling"] if is_ours else []
    lines.append(f"from transformers import {auto}")
    more = ["trust_remote_code=True"] if "auto_map" in config and not is_ours else []
    calls = [f"model = {_call(f'{auto}.from_pretrained', profile, *more)}"]
    if paths & {"tokenizer.json", "tokenizer_config.json"}:
        lines.append("from transformers import AutoTokenizer")
        calls.insert(0, f"tokenizer = {_call('AutoTokenizer.from_pretrained', profile)}")
    return "\n".join([*lines, "", *calls])


def _call(function: str, profile: Profile, *more: str) -> str:
    arguments = [f'"{profile.repo.id}"', *more]
    return f"{function}(\n    " + ",\n    ".join(arguments) + ",\n)"
