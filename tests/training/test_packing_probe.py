"""Models that do not tell packed documents apart are found out, in every family, and only they."""

import pytest
import torch

from hub_moe.data.token_rows import PackedCollator
from hub_moe.errors import DatasetError
from hub_moe.training.packing_probe import check_documents_apart
from hub_moe.training.preview import preview_run
from hub_moe.training.run_config import parse_run_config

from ..anatomy.families import FAMILIES
from ..patches.patching import build_model
from .runs import make_tables, run, save_base, write_rows

SEE_EACH_OTHER = {"gpt_oss", "qwen3_next"}
REFUSAL = "would see each other in a model of type gpt_oss; set packing = false"


def make_row(*lengths):
    documents = torch.randint(2, 128, (sum(lengths),)).split(lengths)
    return [{"input_ids": ids, "labels": ids, "position_ids": torch.arange(len(ids))} for ids in documents]


@torch.no_grad()
def distance_from_alone(model):
    """How far the logits of documents of 9, 30 and 25 tokens in one row are from those of each alone."""
    documents = make_row(9, 30, 25)
    together = model(**PackedCollator()(documents)).logits[0]
    alone = torch.cat([model(input_ids=document["input_ids"][None]).logits[0] for document in documents])
    return (together - alone).abs().max().item()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_passes_if_and_only_if_packed_logits_are_those_of_the_documents_alone(model_type):
    model = build_model(model_type)
    tokens = torch.arange(2, 50)
    if model_type in SEE_EACH_OTHER:
        with pytest.raises(DatasetError, match=f"see each other in a model of type {model_type}; set packing = false"):
            check_documents_apart(model, tokens)
        assert distance_from_alone(model) > 1e-2
    else:
        check_documents_apart(model, tokens)
        assert distance_from_alone(model) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trained_as_it_is_initialised_or_stored_a_model_is_told_all_the_same(dtype):
    for model_type in ("gpt_oss", "deepseek_v3"):
        model = build_model(model_type, dtype=dtype)
        for parameter in model.parameters():
            parameter.data.mul_(0.05)
        if model_type == "gpt_oss":
            with pytest.raises(DatasetError, match=REFUSAL):
                check_documents_apart(model, torch.tensor([5]))
        else:
            check_documents_apart(model, torch.tensor([5]))


def test_the_probe_leaves_the_model_as_it_was():
    model = build_model("qwen3_moe").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    drawn = torch.get_rng_state()
    check_documents_apart(model, torch.arange(2, 50))

    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_run_and_its_preview_refuse_to_pack_and_run_without(tmp_path, tiny_tokenizer):
    base = save_base(tmp_path / "gpt_oss", "gpt_oss", tiny_tokenizer)
    method = {"name": "experts", "score": "gate", "top_p": 0.3, "sample_rows": 4}
    tables = make_tables(
        tmp_path / "run", base=base, rows=write_rows(tmp_path / "rows.jsonl"), method=method, steps=1, evaluations=0
    )
    for start in (run, lambda tables: preview_run(parse_run_config(tables))):
        with pytest.raises(DatasetError, match=REFUSAL):
            start(tables)
    tables["data"]["packing"] = False
    assert run(tables).report["steps"] == 1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_method_refuses(tmp_path, tiny_tokenizer, method):
    if method == "lora":
        pytest.importorskip("peft")
        method = {"name": "lora", "r": 2, "target_modules": ["o_proj"]}
    base = save_base(tmp_path / "gpt_oss", "gpt_oss", tiny_tokenizer)
    with pytest.raises(DatasetError, match=REFUSAL):
        run(make_tables(tmp_path / "run", base=base, rows=write_rows(tmp_path / "rows.jsonl"), method=method))
