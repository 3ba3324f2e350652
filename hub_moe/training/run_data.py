"""The rows of a run: read, tokenized, split, and held against an evaluation."""

from typing import Any

from ..data import (
    LoadedRows,
    PreparedData,
    check_packing,
    check_tokenizer,
    load_rows,
    measure_overlap,
    prepare,
    set_chat_template,
    train_bpe_tokenizer,
)
from ..errors import DatasetError
from .packing_probe import check_documents_apart
from .run_config import RunConfig
from .run_model import check_marks, load_tokenizer


def find_tokenizer(config: RunConfig, rows: LoadedRows, *, revision: str | None) -> Any:
    """The tokenizer of [model], or one learned from the texts of the rows.

    Raises:
        ConfigError: If there is none, or it is not the model's.
        DatasetError: If one is to be learned and the rows hold no column `text`.
    """
    size = config.model.learn_vocab_size
    tokenizer = load_tokenizer(config.model, revision=revision) if size is None else _learn_tokenizer(rows, size)
    if config.data.chat_template is not None:
        set_chat_template(tokenizer, config.data.chat_template)
    return tokenizer


def _learn_tokenizer(rows: LoadedRows, size: int) -> Any:
    column = rows.column_map.get("text", "text")
    if column not in rows.columns:
        raise DatasetError(
            f"[model] learn_vocab_size needs a column {column!r}; the rows have {', '.join(rows.columns)}."
        )
    return train_bpe_tokenizer((str(row[column]) for row in rows), vocab_size=size)


def check_fit(config: RunConfig, tokenizer: Any, model_config: Any) -> None:
    """Whether tokenizer, model and packing belong together.

    Raises:
        DatasetError: If not.
    """
    check_tokenizer(tokenizer, model_config)
    check_marks(tokenizer, model_config)
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.data.max_length > longest:
        raise DatasetError(
            f"[data] max_length is {config.data.max_length:,}, and the model knows positions up to {longest:,} "
            "(max_position_embeddings); give no more."
        )
    if config.data.packing:
        check_packing(model_config)


def check_packed_model(config: RunConfig, model: Any, prepared: PreparedData) -> None:
    """Whether the model keeps the documents of packed rows apart, if rows are packed.

    Raises:
        DatasetError: If not.
    """
    if config.data.packing:
        check_documents_apart(model, prepared.train[0]["input_ids"])


def prepare_rows(config: RunConfig, rows: LoadedRows, tokenizer: Any) -> PreparedData:
    """The rows as the trainer takes them.

    Raises:
        DatasetError: If rows do not fit, or none is left.
    """
    data = config.data
    return prepare(
        rows,
        tokenizer,
        max_length=data.max_length,
        packing=data.packing,
        held_out=data.held_out,
        seed=config.training.seed,
        allow_bad_rows=data.allow_bad_rows,
    )


def report_data(config: RunConfig, rows: LoadedRows, prepared: PreparedData) -> dict[str, Any]:
    """What was read and left out, and what it shares with the evaluation in [data.evaluation]."""
    report = prepared.report.to_dict()
    if config.data.evaluation is not None:
        report["overlap"] = measure_overlap(rows, load_rows(config.data.evaluation)).to_dict()
    return report
