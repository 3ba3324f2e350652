"""Until the data part is there: the same names, json lines and text files only."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset


@dataclass(frozen=True)
class DataSource:
    path: str
    revision: str | None = None


@dataclass
class LoadedRows:
    rows: list[dict[str, Any]]
    provenance: dict[str, Any] = field(default_factory=dict)


class Rows(Dataset[dict[str, Any]]):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@dataclass
class PreparedData:
    train: Rows
    held_out: Rows
    pad: int
    report: dict[str, Any]

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        return self._collate

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), length), self.pad)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n] = torch.tensor(row["input_ids"])
            labels[i, :n] = torch.tensor(row["labels"])
            mask[i, :n] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def load_rows(source: DataSource) -> LoadedRows:
    text = Path(source.path).read_text("utf-8")
    if source.path.endswith(".jsonl"):
        return LoadedRows([json.loads(line) for line in text.splitlines()], {"path": source.path})
    return LoadedRows([{"text": part} for part in text.split("\n\n") if part], {"path": source.path})


def prepare(rows: LoadedRows, tokenizer: Any, *, format: str, max_length: int, packing: bool, held_out: float, seed: int) -> PreparedData:
    made = []
    for row in rows.rows:
        if "question" in row:
            prompt, answer = row["question"], row["answer"]
        elif "messages" in row:
            prompt, answer = row["messages"][0]["content"], row["messages"][1]["content"]
        else:
            prompt, answer = "", row["text"]
        p, a = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        ids = ([tokenizer.bos_token_id] + p + a)[:max_length]
        made.append({"input_ids": ids, "labels": ([-100] * (1 + len(p)) + a)[:max_length]})
    n = max(1, round(held_out * len(made)))
    return PreparedData(Rows(made[n:]), Rows(made[:n]), tokenizer.pad_token_id or 0, {"rows": len(made)})
