"""Packed documents do not see each other: shown on real models, whose cache is on by default."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hub_moe.modeling  # noqa: F401  (registers hub_moe)
from hub_moe.data import LoadedRows, check_packing, prepare
from hub_moe.data.token_rows import PackedCollator
from hub_moe.errors import DatasetError

from ..anatomy.families import tiny_config

TEXTS = [
    {"prompt": "the cat", "completion": "sat on the mat"},
    {"prompt": "a dog ran", "completion": "far"},
    {"prompt": "why", "completion": "because it was late and the road was long"},
    {"prompt": "how many", "completion": "two"},
    {"prompt": "say it again", "completion": "it again"},
]
ATTENTIONS = ("eager", "sdpa")


def build(model_type, attention="sdpa"):
    torch.manual_seed(0)
    config = tiny_config(model_type, max_position_embeddings=512)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prepared(chat_tokenizer):
    """The same documents packed, several to a row and two rows to a batch, and one to a row."""
    rows = LoadedRows.from_list(TEXTS)
    return {packing: prepare(rows, chat_tokenizer, max_length=100, packing=packing) for packing in (True, False)}


def documents_of(row):
    """The documents in a packed row, each with its labels."""
    starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(row["input_ids"])]
    return [
        (row["input_ids"][start:end], row["labels"][start:end]) for start, end in zip(starts, starts[1:], strict=False)
    ]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("model_type", ["hub_moe", "deepseek_v3", "qwen3_moe"])
@torch.no_grad()
def test_the_logits_of_a_packed_batch_are_those_of_its_documents_alone(prepared, model_type, attention):
    model, packed = build(model_type, attention), prepared[True]
    rows = [packed.train[0], packed.train[1]]
    documents = [document for row in rows for document in documents_of(row)]
    assert len(documents) == len(TEXTS)
    assert len(documents_of(rows[0])) > 1
    assert model.config.use_cache

    together = model(**packed.collator()(rows)).logits[0]
    alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids, _ in documents])

    assert together.shape == alone.shape
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["hub_moe", "deepseek_v3", "qwen3_moe"])
@torch.no_grad()
def test_packed_and_padded_batches_have_the_loss_of_the_documents_alone(prepared, model_type):
    model = build(model_type)
    packed = prepared[True].collator()([prepared[True].train[0], prepared[True].train[1]])
    padded = prepared[False].collator()(list(prepared[False].train))
    assert (
        (packed["labels"] != -100).sum()
        == (padded["labels"] != -100).sum()
        == prepared[True].report.train.trained_tokens
    )
    losses, counts = [], []
    for number in range(len(TEXTS)):
        row = prepared[False].train[number]
        losses.append(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss)
        counts.append((row["labels"] != -100).sum())
    mean = (torch.stack(losses) * torch.stack(counts)).sum() / torch.stack(counts).sum()

    assert abs(model(**packed).loss - mean) < 1e-5
    assert abs(model(**padded).loss - mean) < 1e-5


@torch.no_grad()
def test_without_the_collators_switch_the_cache_would_let_documents_see_each_other(prepared):
    """Why the collator says use_cache=False; if this fails, transformers has changed and the switch may go."""
    model, packed = build("qwen3_moe"), prepared[True]
    batch = packed.collator()([packed.train[0], packed.train[1]])
    apart = model(**batch).logits
    del batch["use_cache"]

    assert (model(**batch).logits - apart).abs().max() > 1e-3


@torch.no_grad()
def test_rows_of_text_keep_documents_apart_alone_and_in_a_batch_of_several(chat_tokenizer):
    texts = [{"text": text["completion"] * 3} for text in TEXTS]
    packed = prepare(LoadedRows.from_list(texts), chat_tokenizer, max_length=40)
    rows = list(packed.train)
    model = build("deepseek_v3")
    pieces = [piece for row in rows for piece in documents_of(row)]
    alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids, _ in pieces])

    assert len(pieces) > len(rows) > 2
    assert (model(**packed.collator()(rows)).logits[0] - alone).abs().max() < 1e-5
    full = rows[:2]
    stacked = {name: torch.stack([row[name] for row in full]) for name in full[0]}
    logits = model(**stacked, use_cache=False).logits.flatten(0, 1)
    assert (logits - alone[: len(logits)]).abs().max() < 1e-5


def test_the_stock_trainer_keeps_documents_apart(prepared, tmp_path):
    model, packed = build("deepseek_v3"), prepared[True]
    arguments = TrainingArguments(
        tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True, dataloader_pin_memory=False
    )
    trainer = Trainer(model, arguments, data_collator=packed.collator(), eval_dataset=packed.train)
    batch = packed.collator()(list(packed.train))
    with torch.no_grad():
        expected = model(**batch).loss.item()

    assert abs(trainer.evaluate()["eval_loss"] - expected) < 1e-5


def test_models_that_carry_a_state_are_not_packed():
    with pytest.raises(DatasetError, match=r"qwen3_next has linear_attention layers, .* packing = false"):
        check_packing(tiny_config("qwen3_next"))
    for model_type in ("hub_moe", "deepseek_v3", "qwen3_moe"):
        check_packing(tiny_config(model_type))


def test_rows_of_one_length_side_by_side_give_the_logits_and_gradients_that_they_give_end_to_end(tiny_model):
    torch.manual_seed(0)
    rows = []
    for lengths in ((9, 7), (16,), (1, 15)):
        ids = torch.randint(2, 128, (sum(lengths),))
        positions = torch.cat([torch.arange(length) for length in lengths])
        rows.append({"input_ids": ids, "labels": ids, "position_ids": positions})
    beside = PackedCollator()(rows)
    behind = {name: value.view(1, -1) if torch.is_tensor(value) else value for name, value in beside.items()}
    assert beside["input_ids"].shape == (3, 16)
    assert PackedCollator()([*rows, {name: value[:5] for name, value in rows[0].items()}])["labels"].shape == (1, 53)
    results = []
    for batch in (beside, behind):
        model = copy.deepcopy(tiny_model)
        output = model(**{**batch, "labels": None})
        output.logits.square().mean().backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        results.append((output.logits.view(-1, output.logits.shape[-1]), gradients))
    torch.testing.assert_close(*[logits for logits, _ in results], rtol=1e-5, atol=1e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=1e-7, msg=name)
