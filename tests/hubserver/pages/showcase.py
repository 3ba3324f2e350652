"""A Hub full of plausible repos to look at its pages: models with lineage, a card with everything, rows, talk."""

import hashlib
import json
import struct
import zlib

from hub_moe.hubserver.store import RepoId, Store
from hub_moe.hubserver.store.commits import AddFile, AddLargeFile, DeleteFile

CARD = """---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
base_model: alice/nano-moe-base
datasets: [alice/kitchen-recipes]
tags: [moe, hub_moe, text-generation-inference]
---

# nano-moe-cook

A small Mixture-of-Experts model, fine-tuned on [kitchen recipes](/datasets/alice/kitchen-recipes). Only **6 of 64
experts** in two layers were trained; everything else is as in the base, bit by bit. See [the notes](docs/notes.md) or
https://arxiv.org/abs/2401.06066.

![Load of the experts by layer](plots/load.png)

## Results

| Suite | Base | This model | Difference |
| :--- | ---: | ---: | ---: |
| recipes, bits per byte | 1.412 | **1.107** | −0.305 |
| general, accuracy | 0.431 | 0.428 | −0.003 |
| code, bits per byte | 0.982 | 0.984 | +0.002 |

Self-reported; the records are in `evals/`.

## How to use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("alice/nano-moe-cook")
model = AutoModelForCausalLM.from_pretrained("alice/nano-moe-cook")
print(tokenizer.decode(model.generate(**tokenizer("Whisk the", return_tensors="pt"), max_new_tokens=40)[0]))
```

## Limits

1. It knows *recipes*, not food safety.
2. English only.
   - and metric units

> Experts were chosen by their gate mass on the training text, which favours busy experts.

<details><summary>Training</summary>

| | |
| --- | --- |
| Steps | 400 |
| Learning rate | 3e-4 |

</details>

<p align="center"><img src="https://elsewhere.example/badge.svg" alt="build: passing"></p>
"""

NOTES = "# Notes\n\nBack to [the card](../README.md), or to [the picture](../plots/load.png).\n"


def safetensors(shapes, dtype="BF16"):
    """A file of zeros with these tensors."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


def moe_shapes(layers=2, experts=8):
    """Names and shapes of a small MoE, by the Hub's naming."""
    shapes = {"model.embed_tokens.weight": [512, 64]}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{part}_proj.weight": [64, 64] for part in "qkvo"}
        shapes[f"{prefix}mlp.gate.weight"] = [experts, 64]
        for expert in range(experts):
            parts = {"gate": [32, 64], "up": [32, 64], "down": [64, 32]}
            shapes |= {f"{prefix}mlp.experts.{expert}.{part}_proj.weight": shape for part, shape in parts.items()}
    return shapes


def png(width=480, height=180, columns=16, rows=6):
    """A heat map as a PNG."""
    lines = bytearray()
    for y in range(height):
        lines.append(0)
        for x in range(width):
            column, row = x * columns // width, y * rows // height
            heat = int(hashlib.sha256(f"{column} {row}".encode()).hexdigest()[:2], 16)
            edge = x * columns % width < columns or y * rows % height < rows
            lines += bytes((255, 255, 255)) if edge else bytes((20 + heat // 4, 90 + heat // 2, 130 + heat // 3))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(lines))) + chunk(b"IEND", b"")
    )


class Author:
    """Creates repos, commits and talk as one user of a store."""

    def __init__(self, store, token):
        self.store = store
        self.who = store.accounts.identify(token)

    def create(self, name, kind="model", files=None, **settings):
        owner, _, rest = name.rpartition("/")
        repo = self.store.repos.create(RepoId(kind, owner or self.who.user, rest), self.who, **settings)
        if files:
            self.commit(repo, files, "Upload model" if kind == "model" else "Upload data")
        return repo

    def find(self, name, kind="model"):
        return self.store.repos.find(RepoId(kind, *name.split("/")), self.who)

    def commit(self, repo, files, message="Change files", revision="main"):
        operations = self._operations(repo, files)
        return self.store.commits.commit(repo, operations, revision=revision, who=self.who, message=message)

    def propose(self, repo, files, title, description):
        num = self.store.repos.next_number(repo)
        commit = self.store.commits.propose(
            repo, self._operations(repo, files), ref=f"refs/pr/{num}", revision="main", who=self.who, message=title
        )
        found = self.store.discussions.create(
            repo, self.who, num=num, title=title, description=description, target="refs/heads/main"
        )
        self.store.discussions.add_event(repo, found, self.who, "commit", {"subject": title, "oid": commit})
        return found

    def discuss(self, repo, title, description):
        num = self.store.repos.next_number(repo)
        return self.store.discussions.create(repo, self.who, num=num, title=title, description=description)

    def comment(self, repo, discussion, text):
        return self.store.discussions.comment(repo, discussion, self.who, text)

    def _operations(self, repo, files):
        for path, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            if content is None:
                yield DeleteFile(path)
            elif path.endswith((".safetensors", ".parquet", ".png", ".bin")):
                yield AddLargeFile(path, self._store(repo, content))
            else:
                yield AddFile(path, content)

    def _store(self, repo, content):
        sha256 = hashlib.sha256(content).hexdigest()
        self.store.contents.store([content], sha256=sha256, size_bytes=len(content))
        self.store.commits.register(repo.uid, sha256)
        return sha256


RECIPES = [
    ("Flat bread", "Mix flour, water and salt; rest for an hour; fry in a dry pan.", 4, "bread"),
    ("Lentil soup", "Fry onions, add lentils and stock, and simmer until soft. Finish with vinegar.", 6, "soup"),
    ("Pickled cucumbers", "Slice thinly, salt, wait, pour over hot brine with dill.", 8, "preserve"),
    ("Rice pudding", "Simmer rice in milk with a vanilla pod, stirring; sweeten at the end.", 4, "dessert"),
    ("Baked apples — with nuts", "Core, fill with walnuts and honey, bake for 40 minutes.", 4, "dessert"),
    ("Crème brûlée", "Bake a custard in a water bath, cool, burn sugar on top.", 6, "dessert"),
]
PLAN = """# Plan

Train six experts of layers 1 and 2 on recipes, and nothing else.
"""
CONFIG = {"architectures": ["HubMoeForCausalLM"], "model_type": "hub_moe", "n_routed_experts": 64, "hidden_size": 64}


def fill(hub):
    """Fill a stopped Hub that `create_hub` made; returns the numbers of the talk on `alice/nano-moe-cook`."""
    with Store(hub.root) as store:
        store.accounts.add_user("lab", kind="org", fullname="The Expert Lab")
        for name in ("alice", "bob"):
            store.accounts.add_member("lab", name)
        alice, bob = Author(store, hub.tokens["alice"]), Author(store, hub.tokens["bob"])
        _fill_dataset(alice)
        cook = _fill_models(alice, bob)
        return _fill_talk(store, alice, bob, cook)


def _fill_dataset(alice):
    rows = [dict(zip(("title", "steps", "serves", "kind"), recipe, strict=True)) for recipe in RECIPES * 4]
    lines = "".join(json.dumps(row | {"tags": ["tested", row["kind"]]}, ensure_ascii=False) + "\n" for row in rows)
    table = "title,serves\n" + "".join(f'"{row["title"]}",{row["serves"]}\n' for row in rows[:8])
    card = (
        "---\nlicense: cc-by-4.0\nlanguage: en\ntask_categories: [text-generation]\ntags: [cooking]\n---\n"
        "# Kitchen recipes\n\nShort recipes in plain English, written for this demo.\n\n"
        "| Split | Rows |\n| --- | ---: |\n| train | 24 |\n| test | 8 |\n"
    )
    files = {"README.md": card, "data/train.jsonl": lines, "data/test.csv": table, "data/all.parquet": b"PAR1" * 900}
    alice.create("kitchen-recipes", "dataset", files)
    alice.create("notes-on-gates", "dataset", {"README.md": "# Notes\n"}, private=True)
    space = {"README.md": "---\nsdk: static\n---\n# Router viewer\n", "index.html": "<h1>Router viewer</h1>\n"}
    alice.create("router-viewer", "space", space, sdk="static")


def _fill_models(alice, bob):
    base = "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [moe]\n---\n"
    weights = {"model.safetensors": safetensors(moe_shapes()), "config.json": json.dumps(CONFIG, indent=2)}
    alice.create("nano-moe-base", files={"README.md": f"{base}# nano-moe-base\n\nThe base.\n"} | weights)
    cook = alice.create("nano-moe-cook", files={"README.md": CARD, "plots/load.png": png()} | weights)
    alice.commit(cook, {"docs/notes.md": NOTES, "tokenizer.json": "{}"}, "Add notes and the tokenizer")
    config = json.dumps(CONFIG | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}, indent=2)
    alice.commit(
        cook,
        {"config.json": config, "train.py": "import torch\n\n\ndef main():\n\tprint('π')\n"},
        "Say how tokens are routed",
    )
    record = "- dataset: {id: alice/kitchen-recipes, task_id: bits_per_byte}\n  value: 1.107\n  date: '2026-09-22'\n"
    alice.commit(cook, {".eval_results/recipes.yaml": record}, "Record the score")
    alice.commit(
        cook, {"legacy/pytorch_model.bin": b"\x80\x02pickle" * 40, "docs/plan.md": PLAN}, "Keep the old format too"
    )
    for name, relation in (
        ("nano-moe-bake", "finetune"),
        ("nano-moe-cook-lora", "adapter"),
        ("cook-bake-merge", "merge"),
    ):
        bases = ["alice/nano-moe-cook", "bob/nano-moe-bake"] if relation == "merge" else ["alice/nano-moe-cook"]
        card = base.replace(
            "---\nlicense", f"---\nbase_model: {json.dumps(bases)}\nbase_model_relation: {relation}\nlicense"
        )
        bob.create(name, files={"README.md": f"{card}# {name}\n"} | weights)
    card = base.replace("library_name: transformers", "base_model: deepseek-ai/DeepSeek-V3\nlibrary_name: transformers")
    alice.create("lab/gated-moe", files={"README.md": f"{card}# gated-moe\n\nAsk first.\n"})
    alice.store.repos.update(RepoId("model", "lab", "gated-moe"), alice.who, private=None, gated="manual")
    alice.store.likes.like(cook, bob.who)
    alice.create("secret-moe", files={"README.md": "# Not yet\n"}, private=True)
    return cook


def _fill_talk(store, alice, bob, cook):
    question = bob.discuss(
        cook, "Which experts were chosen?", "The card says *6 of 64*. **Which**, and by what measure?"
    )
    alice.comment(cook, question, "By gate mass on the training split:\n\n```\nlayer 1: 3 17 40\nlayer 2: 5 9 61\n```")
    spam = bob.comment(cook, question, "buy cheap experts")
    store.discussions.hide_comment(cook, question, alice.who, spam.id)
    card = CARD.replace("English only.", "English only, and only British spelling.").replace(
        "| Steps | 400 |", "| Steps | 800 |"
    )
    config = json.dumps(CONFIG | {"scoring_func": "softmax", "n_shared_experts": 1}, indent=2)
    files = {
        "README.md": card,
        "config.json": config,
        "docs/plan.md": None,
        ".eval_results/longer.yaml": "- dataset: {id: alice/kitchen-recipes, task_id: longer}\n  value: 1.081\n",
        "patches/bake/expert_patch.json": json.dumps({"layers": [1, 2], "experts": [3, 17]}, indent=2) + "\n",
        "model.safetensors": safetensors(moe_shapes(experts=9)),
    }
    table = "| Suite | before | after |\n| --- | ---: | ---: |\n| recipes | 1.107 | 1.081 |"
    text = f"Train **longer**, with one shared expert.\n\n{table}"
    patch = bob.propose(cook, files, "Twice the steps, one shared expert", text)
    alice.comment(cook, patch, "Replayed it here: 1.083. Good to merge once the card says which seed.")
    store.discussions.rename(cook, patch, bob.who, "Twice the steps and one shared expert")
    stale = bob.propose(cook, {"docs/notes.md": "# My notes\n"}, "Rewrite the notes", "They were short.")
    alice.commit(cook, {"docs/notes.md": NOTES + "\nSeed 7.\n"}, "Name the seed")
    merged = bob.propose(
        cook,
        {"CITATION.cff": "cff-version: 1.2.0\ntitle: nano-moe-cook\n"},
        "Add a citation",
        "So that it can be cited.",
    )
    store.merges.merge(cook, merged, alice.who)
    closed = bob.discuss(cook, "Is there a GGUF?", "Asking for a friend.")
    store.discussions.change_status(cook, closed, alice.who, "closed")
    return {"question": question.num, "patch": patch.num, "stale": stale.num, "merged": merged.num}
