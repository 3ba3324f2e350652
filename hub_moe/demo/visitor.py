"""What people run who know only HF_ENDPOINT and names: one step of the demo, as JSON from stdin to stdout.

A script, run in a process of its own: the clients of the Hub read HF_ENDPOINT when they are imported. It uses nothing
but those clients.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[..., dict[str, Any]]


def push_dataset(*, repo: str, splits: str, card: str) -> dict[str, Any]:
    """Push the splits in a JSON file, `{name: rows}`, as a dataset with a card; its `revision`."""
    from datasets import Dataset, DatasetDict
    from huggingface_hub import DatasetCard

    rows = json.loads(Path(splits).read_text("utf-8"))
    DatasetDict({name: Dataset.from_list(some) for name, some in rows.items()}).push_to_hub(repo)
    written = DatasetCard.load(repo)
    written.data.license, written.data.license_name = "other", "psf-2.0"
    written.text = card
    return {"revision": written.push_to_hub(repo).oid}


def load_dataset(*, repo: str, revision: str, splits: str) -> dict[str, Any]:
    """Load a dataset by its name and write its splits to a JSON file; their numbers of `rows`."""
    import datasets

    found = datasets.load_dataset(repo, revision=revision)
    Path(splits).write_text(json.dumps({name: split.to_list() for name, split in found.items()}), "utf-8")
    return {"rows": {name: len(split) for name, split in found.items()}}


def publish_model(*, repo: str, folder: str) -> dict[str, Any]:
    """Put a folder into a model repo, which is made if it does not exist; the `revision`."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    return {"revision": api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Publish").oid}


def try_model(
    *, repo: str, revision: str, num_threads: int, seed: int, prompt: str, completion_tokens: int
) -> dict[str, Any]:
    """Load a model by its name and use it; the hash of its logits on a probe, and a `completion`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hub_moe.modeling  # noqa: F401 (teaches AutoModelForCausalLM our models)

    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(repo, revision=revision).eval()
    tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=completion_tokens, do_sample=True, temperature=0.5)
    completion = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"logits_sha256": hash_logits(model), "completion": completion}


def hash_model(*, repo: str, revision: str, num_threads: int) -> dict[str, Any]:
    """Load a model, or an expert patch and its base, by its name; the hash of its logits on a probe."""
    import torch
    from transformers import AutoModelForCausalLM

    import hub_moe.modeling  # noqa: F401 (teaches AutoModelForCausalLM our models and patches)

    torch.set_num_threads(num_threads)
    return {"logits_sha256": hash_logits(AutoModelForCausalLM.from_pretrained(repo, revision=revision).eval())}


def hash_logits(model: Any) -> str:
    """The sha256 of what a model computes on its first 64 token ids: two that load the same weights agree."""
    import torch

    with torch.no_grad():
        logits = model(torch.arange(model.config.vocab_size)[None, :64]).logits
    return hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()


STEPS: tuple[Step, ...] = (push_dataset, load_dataset, publish_model, try_model, hash_model)

if __name__ == "__main__":
    chosen = next(step for step in STEPS if step.__name__ == sys.argv[1])
    print(json.dumps(chosen(**json.load(sys.stdin))))
