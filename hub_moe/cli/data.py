"""`hub-moe data`: look at training data before training on it."""

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .output import print_json, print_table, print_text, say

if TYPE_CHECKING:
    from ..data import DataReport, LoadedRows, OverlapReport

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at training data before training on it.")

_SHOWN = 20
_BAR = 40
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"

Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help="Hub dataset (OWNER/NAME), folder, or json, parquet, csv, txt files."),
]
Tokenizer = Annotated[str, typer.Option("--tokenizer", "-t", metavar="REPO_OR_PATH", help="Of the model to train.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="split, revision, config, format, limit, streaming or columns.PART; may be repeated.",
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(metavar="plain|FILE", help="Use this chat template in place of the tokenizer's own."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


@data.command()
def check(
    source: Sources,
    tokenizer: Tokenizer,
    max_length: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Most tokens of a training row.")] = 2048,
    eval_source: Annotated[
        str | None, typer.Option("--eval", metavar="SOURCE", help="Measure the overlap with this evaluation data.")
    ] = None,
    settings: Settings = None,
    chat_template: ChatTemplate = None,
    as_json: AsJson = False,
) -> None:
    """Say what training on SOURCE would train on, and which rows do not fit.

    Reads and tokenizes everything as a training run does: format, duplicates, rows that do not fit by number (counted
    from 0), lengths, the tokens that are trained on, and how full packed rows are. With --eval, rows that share 13
    words in a row with evaluation data. Exit code 1 if any row does not fit.

    \b
    Examples:
      hub-moe data check train.jsonl --tokenizer my-model
      hub-moe data check openai/gsm8k -t my-model --set config=main --set revision=main
      hub-moe data check train.csv -t my-model --set columns.prompt=ask --set columns.completion=reply
      hub-moe data check train.jsonl -t my-model --chat-template plain --eval test.jsonl --json
    """
    rows = load_source(source, settings)
    from ..data import DataSource, load_rows, measure_overlap
    from ..data.prepare import survey

    report = survey(rows, load_tokenizer(tokenizer, chat_template), max_length=max_length).report
    overlap = measure_overlap(rows, load_rows(DataSource(eval_source))) if eval_source else None
    if as_json:
        print_json(report.to_dict() | {"overlap": overlap and overlap.to_dict()})
    else:
        _print_report(report)
        if overlap is not None:
            _print_overlap(overlap)
    if report.bad_rows:
        say(f"{len(report.bad_rows):,} of {report.rows:,} rows do not fit{_how_to_go_on(report)}")
        raise typer.Exit(1)


@data.command()
def show(
    source: Sources,
    tokenizer: Tokenizer,
    row: Annotated[int, typer.Option(min=0, help="Number of the row, counted from 0.")] = 0,
    settings: Settings = None,
    chat_template: ChatTemplate = None,
) -> None:
    """Print a row as the model sees it, with what is trained on marked.

    Trained tokens are green on a terminal and stand in ⟦ ⟧ elsewhere. The text is decoded from the tokens, so that
    special tokens and the end of the answer are seen.

    \b
    Examples:
      hub-moe data show train.jsonl --row 7 --tokenizer my-model
      hub-moe data show openai/gsm8k -t my-model --set config=main --chat-template plain
    """
    rows = load_source(source, settings)
    from ..data.documents import mark_row

    marked = mark_row(rows, row, load_tokenizer(tokenizer, chat_template), max_tokens=4096)
    before, after = (_GREEN, _PLAIN) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("⟦", "⟧")
    print_text("".join(f"{before}{text}{after}" if is_trained else text for text, is_trained in marked.pieces))
    cut = "; the first 4,096 are shown" if marked.tokens > 4096 else ""
    say(f"Row {row:,}: {marked.tokens:,} tokens, {marked.trained_tokens:,} trained on{cut}.")


def load_source(names: list[str], settings: list[str] | None) -> "LoadedRows":
    """The rows that SOURCE... and --set KEY=VALUE name."""
    pairs = [setting.partition("=") for setting in settings or []]
    wrong = [key for key, equals, value in pairs if not equals or not value]
    if wrong:
        raise ConfigError(f"--set takes KEY=VALUE, such as split=test; {wrong[0]!r} is not that.")

    from ..data import load_rows
    from ..data.source import read_source

    return load_rows(read_source(names, {key: value for key, _, value in pairs}))


def load_tokenizer(name: str, chat_template: str | None, revision: str | None = None) -> Any:
    """The tokenizer of a folder or repo, with a chat template of its own or the one given."""
    from transformers import AutoTokenizer

    from .. import modeling  # noqa: F401  (registers hub_moe, by which tokenizers of its models are found)
    from ..data import set_chat_template

    path = Path(name).expanduser()
    tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name, revision=revision)
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    return tokenizer


def _print_report(report: "DataReport") -> None:
    source, train = report.provenance, report.train
    at = f" at {source.revision[:12]}" if source.revision else ""
    print_text(f"{source.source}{at}, split {source.split}: {report.rows:,} rows.")
    for file in source.files:
        print_text(f"  {file.name}: {file.size_bytes:,} bytes, sha256 {file.sha256[:12]}")
    print_text(f"Format: {report.format}.")
    for note in report.notes:
        print_text(note)
    share = train.trained_tokens / train.tokens if train.tokens else 0.0
    facts = [
        ("documents to train on", f"{train.documents:,}"),
        ("duplicates", f"{len(report.duplicate_rows):,}"),
        ("rows that do not fit", f"{len(report.bad_rows):,}"),
        ("tokens", f"{train.tokens:,}"),
        ("trained on", f"{train.trained_tokens:,} ({share:.1%})"),
        (f"packed rows of {report.settings['max_length']:,}", f"{train.rows:,} ({train.fill:.1%} full)"),
    ]
    print_text()
    print_table(("", "number"), facts)
    _print_lengths(report.length_histogram)
    if report.bad_rows:
        print_text("\nRows that do not fit")
        for bad in report.bad_rows[:_SHOWN]:
            print_text(f"  row {bad.row}: {bad.reason}")
        if len(report.bad_rows) > _SHOWN:
            print_text(f"  and {len(report.bad_rows) - _SHOWN:,} more; --json lists all")


def _how_to_go_on(report: "DataReport") -> str:
    if not report.train.documents:
        return ", and none is left; mend them."
    share = math.ceil(1000 * len(report.bad_rows) / report.rows) / 1000
    return f"; mend them, or train without them by allow_bad_rows = {share:g} in [data] (a share of the rows)."


def _print_lengths(histogram: tuple[tuple[int, int], ...]) -> None:
    most = max((count for _, count in histogram), default=0)
    if not most:
        return
    print_text("\nTokens of a row")
    for limit, count in histogram:
        print_text(f"  up to {limit:>9,} {count:>9,} {'#' * -(-count * _BAR // most)}".rstrip())


def _print_overlap(overlap: "OverlapReport") -> None:
    print_text(
        f"\nOverlap: {len(overlap.eval_rows_hit):,} of {overlap.eval_rows:,} evaluation rows ({overlap.share_hit:.1%}) "
        f"share {overlap.n} words in a row with {len(overlap.train_rows_hit):,} training rows; "
        f"{len(overlap.eval_rows_common):,} more share only set phrases."
    )
    for example in overlap.examples[:5]:
        print_text(f"  evaluation row {example.eval_row:,}, training row {example.train_row:,}: {example.words}")
