"""A base of 155 M parameters in 768 small experts that knows a bit of several fields, for comparing fine-tunes of it.

    python evals/fine_tuning/base.py OUT --field MATHS.jsonl [--field ...] [--text PLAYS.txt ...] [--steps 1000]

It is trained from random weights on Python's standard library, on the texts, and on the first half of the rows of each
field; the other half is for `compare.py`: as with a published base, the fine-tune's rows are new to it, the field is
not. OUT/rows/NAME.jsonl are those rows, OUT/base.json says what the base was made of. An interrupted run goes on.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hub_moe.data import read_stdlib_corpus
from hub_moe.errors import HubMoeError
from hub_moe.files.json_files import read_json, write_json
from hub_moe.training.run import run_training
from hub_moe.training.run_config import parse_run_config

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 7,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "initializer_range": 0.02,
}
SEED = 0
HELD_OUT_SHARE = 0.02  # of the files of the standard library
BLOCK_LENGTH = 256
VOCAB_SIZE = 6144
_PIECE_CHARS = 4000  # of a long text, which become one row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for rows, run and base.json")
    parser.add_argument(
        "--field", type=Path, action="append", default=[], help="rows: question and answer, or messages"
    )
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text file")
    parser.add_argument("--steps", type=int, default=1000, help=f"of 8 rows of {BLOCK_LENGTH} tokens")
    parser.add_argument("--stdlib-bytes", type=int, default=5_000_000, help="of the standard library")
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args()
    try:
        make_base(arguments)
    except (HubMoeError, OSError) as error:
        sys.exit(str(error))


def make_base(arguments: argparse.Namespace) -> None:
    """Write the rows of both sides, then train."""
    out: Path = arguments.out
    (out / "rows").mkdir(parents=True, exist_ok=True)
    corpus = read_stdlib_corpus(seed=SEED, held_out_share=HELD_OUT_SHARE, max_bytes=arguments.stdlib_bytes)
    texts = [document.text for document in corpus.train]
    for path in arguments.text:
        texts += cut(path.read_text("utf-8"))
    for path in arguments.field:
        seen, new = read_halves(path)
        texts += map(join_row, seen)
        write_rows(out / "rows" / f"{path.resolve().parent.name}.jsonl", new)
    random.Random(SEED).shuffle(texts)
    write_rows(out / "texts.jsonl", ({"text": text} for text in texts))
    run_training(parse_run_config(configure(out, arguments.steps, arguments.threads)))
    about = {
        "corpus": {"seed": SEED, "held_out_share": HELD_OUT_SHARE, "max_bytes": arguments.stdlib_bytes},
        "corpus_sha256": corpus.sha256,
        "block_length": BLOCK_LENGTH,
        "texts": [path.name for path in arguments.text],
        "fields": [path.resolve().parent.name for path in arguments.field],
        "bytes": sum(len(text.encode()) for text in texts),
        "run": read_json(out / "run" / "report.json", "report of the run")["numbers"],
    }
    write_json(out / "base.json", about)


def configure(out: Path, steps: int, threads: int | None) -> dict[str, Any]:
    """The run, as `hub-moe train` takes it."""
    return {
        "model": {"preset": "nano", "learn_vocab_size": VOCAB_SIZE, "overrides": SHAPE},
        "data": {"source": str(out / "texts.jsonl"), "format": "text", "max_length": BLOCK_LENGTH, "held_out": 0.01},
        "method": {"name": "pretrain"},
        "training": {
            "steps": steps,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "weight_decay": 0.1,
            "adam_beta2": 0.99,
            "evaluations": 5,
            "evaluation_rows": 64,
            "checkpoints": 2,
            "seed": SEED,
            **({"num_threads": threads} if threads else {}),
        },
        "balancing": {"speed": 0.001, "stop_at": 0.97},
        "output": {"folder": str(out / "run")},
    }


def read_halves(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for the base, and rows that only a fine-tune sees: halves of the file in random order."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    random.Random(SEED).shuffle(rows)
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def join_row(row: Mapping[str, Any]) -> str:
    """A row as running text, without any chat template."""
    parts = (
        [message["content"] for message in row["messages"]] if "messages" in row else [row["question"], row["answer"]]
    )
    return "\n".join(part.strip() for part in parts)


def cut(text: str) -> list[str]:
    """Pieces of a long text, so that all texts mix."""
    return [text[start : start + _PIECE_CHARS] for start in range(0, len(text), _PIECE_CHARS)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
