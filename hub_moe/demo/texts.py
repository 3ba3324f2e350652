"""Everything that lies on the contributors' disks before the first command: texts, suites, settings, a script."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data import Corpus, read_language_reference
from ..evals.offline_documents import make_rows
from ..evals.suites import load_suite
from ..files.tables import write_toml
from ..training.run_config import parse_run_config
from .folder import RunFolder
from .plan import DATASET, MODEL, DemoPlan, Domain

GENERAL = "general"
_PIECE_CHARS = 4000
_DATASET_CARD = """---
license: other
license_name: psf-2.0
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
---

# Python's own standard library

The source files of one Python's standard library, one row a file, without tests, generated tables and installed
packages. `test` holds files that no training run of `hub-moe demo` has seen.

```python
from datasets import load_dataset

files = load_dataset("demo/python-stdlib")
```
"""
_SCRIPT = '''"""Anybody's: load the merged model by its name, and let it write."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hub_moe.modeling  # noqa: F401  (teaches AutoModelForCausalLM our models)

torch.manual_seed({seed})
model = AutoModelForCausalLM.from_pretrained({model!r}).eval()
tokenizer = AutoTokenizer.from_pretrained({model!r})
inputs = tokenizer({prompt!r}, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens={tokens}, do_sample=True, temperature=0.5)
print(tokenizer.decode(output[0], skip_special_tokens=True))
'''


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """The dataset's files as they are uploaded."""
    folder.mkdir()
    (folder / "README.md").write_text(_DATASET_CARD, "utf-8")
    for name, documents in (("train", corpus.train), ("test", corpus.held_out)):
        write_rows(folder / f"{name}.jsonl", ({"name": each.name, "text": each.text} for each in documents))


def write_reference(path: Path) -> None:
    """Python's language reference as rows, for the recipes of `make train`."""
    write_rows(path, ({"topic": topic.name, "text": topic.text} for topic in read_language_reference()))


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def make_domain_rows(domain: Domain, plan: DemoPlan, corpus: Corpus) -> Iterator[dict[str, str]]:
    """A domain's own rows, none of which its suite asks about, and some of the base's text."""
    rows = make_rows(domain.entry, plan.rows, seed=plan.seed)
    yield from ({"text": text} for text in rows)
    wanted = sum(map(len, rows)) * domain.rehearsal_share / (1 - domain.rehearsal_share)
    documents = list(corpus.train)
    random.Random(plan.seed).shuffle(documents)
    for document in documents:
        if wanted <= 0:
            return
        text = document.text[:_PIECE_CHARS]
        wanted -= len(text)
        yield {"text": text}


def write_suites(plan: DemoPlan, folder: Path) -> None:
    """One of each domain's task, and a general one of all: what a patch costs elsewhere."""
    folder.mkdir()
    for domain in plan.domains:
        _write_suite(folder, domain.name, [domain.entry], domain.num_documents)
    offline = load_suite("offline")
    _write_suite(folder, GENERAL, [entry.name for entry in offline.entries], plan.general_limit)


def _write_suite(folder: Path, name: str, tasks: list[str], limit: int | None) -> None:
    suite = load_suite("offline", tasks=tasks, limit=limit)
    declaration = {
        "description": f"Of the suite offline: {', '.join(tasks)}.",
        "entries": suite.source.declaration["entries"],
    }
    (folder / f"{name}.toml").write_text(write_toml(declaration), "utf-8")


def configure_base(plan: DemoPlan, folder: RunFolder, *, data_revision: str, num_threads: int) -> dict[str, Any]:
    """The owner's run: a model from random weights on the dataset as the Hub has it."""
    return {
        "model": {"preset": "nano", "learn_vocab_size": plan.vocab_size, "overrides": plan.model_changes},
        "data": {
            "source": DATASET,
            "revision": data_revision,
            "split": "train",
            "format": "text",
            "columns": {"text": "text"},
            "max_length": plan.block_length,
            "held_out": plan.held_out_share,
        },
        "method": {"name": "pretrain"},
        "training": {
            "steps": plan.steps,
            "batch_size": plan.batch_size,
            "learning_rate": plan.learning_rate,
            "weight_decay": 0.1,
            "adam_beta2": 0.99,
            "evaluations": plan.evaluations,
            "evaluation_rows": 160,
            "seed": plan.seed,
            "num_threads": num_threads,
        },
        "balancing": {"speed": 0.001, "stop_at": 0.97},
        "output": {"folder": folder.inside(folder.base)},
    }


def configure_patch(
    plan: DemoPlan, folder: RunFolder, who: str, domain: Domain, *, base_revision: str, steps: int
) -> dict[str, Any]:
    """A contributor's run: the experts that the domain uses most."""
    return {
        "model": {"name": MODEL, "revision": base_revision},
        "data": {
            "source": folder.inside(folder.rows(domain.name)),
            "format": "text",
            "max_length": plan.block_length,
            "held_out": 0.1,
        },
        "method": {"name": "experts", "score": "token", "top_p": plan.top_p},
        "training": {
            "steps": steps,
            "batch_size": plan.batch_size,
            "learning_rate": domain.learning_rate,
            "evaluations": 1,
            "checkpoints": 1,
            "seed": plan.seed,
            "num_threads": 1,
        },
        "output": {"folder": folder.inside(folder.person(who))},
    }


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """As `hub-moe train` takes them.

    Raises:
        ConfigError: If they are none.
    """
    path.write_text(parse_run_config(settings).to_toml(), "utf-8")


def write_script(plan: DemoPlan, path: Path) -> None:
    """What somebody runs who knows the model's name."""
    path.write_text(
        _SCRIPT.format(seed=plan.seed, model=MODEL, prompt=plan.prompt, tokens=plan.completion_tokens), "utf-8"
    )
