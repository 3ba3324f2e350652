"""Honest records pass, in folders; fabricated answers are found by asking again, as often as the verdict says."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import hypergeom
from transformers import AutoModelForCausalLM

from hub_moe.errors import EvaluationError
from hub_moe.evals.claims import find_claims
from hub_moe.evals.records import Sample, read_record
from hub_moe.evals.suites import load_suite
from hub_moe.evals.verify import Reviewer, catch_probability, choose_documents, verify_record
from tests.anatomy.families import tiny_config

from .checkpoints import evaluate, save_model
from .forging import ALL, Forger, evaluate_other, fabricate, failures, record_of, verify


@pytest.mark.parametrize("name", ["base", "patch"])
@pytest.mark.parametrize("documents", [ALL, 7])
def test_an_honest_record_is_bit_equal_where_it_was_made(world, name, documents):
    found = verify(record_of(world / name), world / name, documents=documents)
    assert failures(found) == {}
    # fewer documents make other batches, whose sums may round otherwise
    assert found.outcome in ("bit-equal", "within tolerance")[: 1 if documents == ALL else 2]
    assert found.num_replayed == min(documents, found.num_documents) == min(documents, 16)
    assert found.max_difference < 1e-5
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_an_honest_record_of_an_adapter_is_bit_equal(world, tmp_path, tiny_tokenizer):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    config = peft.LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = str(world / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    stored = evaluate(tmp_path / "adapter", tmp_path / "adapter" / "evals", limit=3)
    assert stored.record.model.kind == "adapter"
    assert verify(stored.path, tmp_path / "adapter", documents=ALL).outcome == "bit-equal"
    weights = next((tmp_path / "adapter").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 64
    weights.write_bytes(data)
    assert (
        "adapter_model.safetensors has another sha256" in failures(verify(stored.path, tmp_path / "adapter"))["model"]
    )


def test_the_record_of_the_base_beside_a_patch_is_checked_against_the_base(world, tmp_path):
    patch = shutil.copytree(world / "patch", tmp_path / "patch")
    for path in (world / "base" / "evals").iterdir():
        shutil.copy(path, patch / "evals") if path.is_file() else None
    outcomes = [verify(claim.path, claim.model, documents=5) for claim in find_claims(str(patch))]
    assert [failures(each) for each in outcomes] == [{}, {}]
    assert sum("of the base base, not of patch" in each for v in outcomes for each in v.reservations) == 1


@pytest.mark.parametrize("nonce", range(4))
def test_one_document_that_shares_nothing_with_others_can_be_asked_again(world, nonce):
    found = verify(record_of(world / "base"), world / "base", documents=1, nonce=str(nonce))
    assert (failures(found), found.num_replayed) == ({}, 1)


def test_a_record_that_was_not_replayed_is_not_called_equal(world):
    found = verify(record_of(world / "base"), world / "base", documents=0)
    assert (found.outcome, found.num_replayed, found.catch_probabilities) == ("not replayed", 0, None)


def flatter(sample):
    """The right answer of a document with choices made the likeliest by far, and every text what was asked for."""
    if not sample.is_greedy:
        return replace(sample, log_likelihoods=tuple(value * 0.8 for value in sample.log_likelihoods))
    return replace(sample, log_likelihoods=tuple(reversed(sample.log_likelihoods)))


@pytest.mark.parametrize("entry", ["cloze", "running_text"])
def test_fabricated_answers_with_fitting_sums_are_found_by_asking_again(world, forger, tmp_path, entry):
    path = forger.change_samples(flatter, where=lambda s: s.entry == entry).settle().write(tmp_path)
    assert verify(path, world / "base").outcome == "not replayed"
    found = verify(path, world / "base", documents=ALL)
    assert failures(found).keys() == {"replay"}
    assert len(found.failed_documents) == 4
    assert all(f"offline_{'text' if entry == 'running_text' else entry} document" in d for d in found.failed_documents)
    assert "was claimed" in found.failed_documents[0]


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("copying", lambda s: replace(s, texts=("abc",))),
        ("copying", lambda s: replace(s, texts=("",))),
        ("copying", lambda s: replace(s, texts=(s.texts[0][: len(s.texts[0]) // 2],))),
        ("cloze", lambda s: replace(s, is_greedy=tuple(not flag for flag in s.is_greedy))),
    ],
    ids=["another text", "no text", "half a text", "greedy or not"],
)
def test_answers_that_have_no_tolerance_are_found(world, forger, tmp_path, entry, change):
    path = forger.change_samples(change, where=lambda s: s.entry == entry).settle().write(tmp_path)
    found = verify(path, world / "base", documents=ALL)
    assert failures(found).keys() == {"replay"}
    assert len(found.failed_documents) == 4
    assert "the answer is" in found.failed_documents[0]


def test_answers_of_the_base_passed_off_as_the_fine_tunes_are_found(world, tmp_path):
    base = Forger(record_of(world / "base"))
    forger = Forger(record_of(world / "patch"))
    forger.samples = base.samples
    path = forger.change(entries=base.record.entries).write(tmp_path)
    found = verify(path, world / "patch", documents=ALL)
    assert failures(found).keys() == {"replay"}
    assert len(found.failed_documents) > 5


def test_weights_exchanged_after_the_evaluation_are_found(world, tmp_path, tiny_tokenizer):
    other = save_model(tmp_path / "base", tiny_config("hub_moe"), tiny_tokenizer, seed=3)
    found = verify(record_of(world / "base"), other, documents=ALL)
    assert "model.safetensors has another sha256" in failures(found)["model"]
    assert found.num_replayed == 0


def test_slightly_other_weights_under_the_honest_names_are_found(world, forger, tmp_path, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data += (
                0.05
                * parameter.data.std()
                * parameter.new_tensor(np.random.default_rng(0).normal(size=parameter.shape))
            )
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    other = Forger(evaluate(tmp_path / "model", tmp_path / "evals", limit=4).path)
    found = verify(other.change(model=forger.record.model).write(tmp_path / "forged"), world / "base", documents=ALL)
    assert failures(found).keys() == {"replay"}
    assert len(found.failed_documents) >= 8


def test_another_base_below_a_patch_is_found(world, tmp_path):
    base = shutil.copytree(world / "base", tmp_path / "base")
    (base / "generation_config.json").write_text('{"max_length": 5}')
    found = verify(record_of(world / "patch"), world / "patch", base=str(base))
    assert "base: generation_config.json has another sha256" in failures(found)["model"]


@pytest.mark.parametrize(
    ("execution", "outcome"),
    [
        ({"experts": "eager"}, ("bit-equal", "within tolerance")),
        ({"batch_size": 1}, ("bit-equal", "within tolerance")),
        ({"dtype": "bfloat16"}, ("bit-equal", "within tolerance")),
    ],
)
def test_a_record_of_another_way_of_running_is_checked_in_that_way(world, tmp_path, execution, outcome):
    path = evaluate(world / "base", tmp_path, limit=4, **execution).path
    assert verify(path, world / "base", documents=ALL).outcome in outcome


def test_rounding_is_within_tolerance(world, forger, tmp_path):
    def _round(sample):
        return replace(sample, log_likelihoods=tuple(float(np.float16(value)) for value in sample.log_likelihoods))

    # float16 keeps 11 bits: far more than rounding of float32, and within that of bfloat16, which keeps 8
    path = forger.change_samples(_round).settle().write(tmp_path / "float32")
    assert verify(path, world / "base", documents=ALL).outcome == "failed"
    bfloat16 = Forger(evaluate(world / "base", tmp_path / "bfloat16", limit=4, dtype="bfloat16").path)
    bfloat16.change_samples(lambda s: replace(s, log_likelihoods=tuple(v * 1.002 for v in s.log_likelihoods)))
    found = verify(bfloat16.settle().write(tmp_path / "forged"), world / "base", documents=ALL)
    assert (found.outcome, failures(found)) == ("within tolerance", {})


def test_near_ties_all_turned_in_favour_of_the_claim_are_found(world, tmp_path):
    """Rounding excuses a wrong choice here and there, but not always to the author's advantage."""
    from hub_moe.evals.replay import _chance_of_sides

    assert _chance_of_sides(10, 0) == 2**-10
    assert _chance_of_sides(0, 0) == _chance_of_sides(0, 10) == 1
    assert _chance_of_sides(6, 4) == pytest.approx(0.377, abs=1e-3)


def test_the_verdict_says_what_it_does_not_vouch_for(world, forger, tmp_path):
    path = forger.change(model=replace(forger.record.model, name="deepseek-ai/DeepSeek-V3")).write(tmp_path)
    found = verify(path, world / "base", documents=2, nonce="1")
    notes = " ".join(found.reservations)
    assert "NOT the suite offline as it stands, but another (without" in notes
    assert "limit, tasks)" in notes
    assert "The nonce was given" in notes
    assert "Time, tokens, energy, versions, device, command and noise floor" in notes
    assert "Too few documents were asked again" in notes
    assert "calls the model deepseek-ai/DeepSeek-V3" in notes


def test_prompts_cut_short_are_told(world, tmp_path):
    path = evaluate(world / "base", tmp_path, limit=2, tasks=["cloze"], max_length=16).path
    found = verify(path, world / "base", documents=ALL)
    assert found.outcome == "bit-equal"
    assert "Prompts were cut to 16 tokens, where the model reads 1024." in found.reservations


def test_the_nonce_chooses_the_documents(world):
    path = record_of(world / "base")
    one, two, other = (choose_documents(1000, 59, nonce=nonce, record_id="id") for nonce in ("a", "a", "b"))
    assert one == two != other
    assert one != choose_documents(1000, 59, nonce="a", record_id="of another record")
    assert len(set(one)) == 59
    assert choose_documents(5, 59, nonce="a", record_id="id") == [0, 1, 2, 3, 4]
    fresh = {verify(path, world / "base").nonce for _ in range(2)}
    assert len(fresh) == 2
    assert verify(path, world / "base", nonce="mine").nonce == "mine"


@pytest.mark.parametrize(("num_documents", "num_replayed"), [(1000, 59), (200, 59), (24, 24), (24, 8), (7, 0), (10, 3)])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 1.0])
def test_the_catch_probability_is_hypergeometric(num_documents, num_replayed, share):
    bad = max(1, math.ceil(round(share * num_documents, 9)))
    expected = 1 - hypergeom(num_documents, bad, num_replayed).pmf(0)
    assert catch_probability(num_documents, num_replayed, share) == pytest.approx(expected, abs=1e-12)


def test_59_documents_find_5_percent_with_95_percent():
    assert catch_probability(10**6, 59, 0.05) == pytest.approx(0.9515, abs=1e-4)
    assert catch_probability(10, 99, 0.0) == 0


def test_the_draw_finds_fabrication_as_often_as_it_says():
    samples = [Sample("cloze", "t", index, "", ()) for index in range(200)]
    fabricated = fabricate(samples, 0.05)
    caught = [not fabricated.isdisjoint(choose_documents(200, 20, nonce=str(n), record_id="id")) for n in range(4000)]
    assert np.mean(caught) == pytest.approx(catch_probability(200, 20, 0.05), abs=0.03)


def test_a_replay_finds_what_it_draws_and_nothing_else(world, forger, tmp_path):
    where = lambda s: s.entry == "cloze" and s.index < 2  # noqa: E731
    path = forger.change_samples(flatter, where=where).settle().write(tmp_path)
    record_id = read_record(path).record.id
    drawn = {str(n): choose_documents(16, 4, nonce=str(n), record_id=record_id) for n in range(30)}
    with_one = next(nonce for nonce, places in drawn.items() if {0, 1} & set(places))
    without = next(nonce for nonce, places in drawn.items() if not {0, 1} & set(places))
    assert verify(path, world / "base", documents=4, nonce=with_one).outcome == "failed"
    assert failures(verify(path, world / "base", documents=4, nonce=without)) == {}


def test_a_record_of_a_folder_needs_to_be_told_where_the_model_is(world):
    with pytest.raises(EvaluationError, match="The model base was a folder of its author's; say where"):
        verify_record(record_of(world / "base"), Reviewer())


def test_a_record_is_no_longer_of_the_suite_of_its_name_when_the_declaration_was_edited(world, tmp_path):
    entries = load_suite("offline").entries
    easier = tuple(replace(entry, limit=2) for entry in entries if entry.name in ("cloze", "brackets"))
    path = evaluate_other(world / "base", tmp_path, entries=easier).path
    found = verify(path, world / "base", documents=ALL)
    assert found.outcome == "bit-equal"
    assert any(note.startswith("This is NOT the suite offline as it stands") for note in found.reservations)
    assert "NOT the suite offline" in next(f.detail for f in found.findings if f.check == "suite")


def test_the_claims_of_a_folder_are_its_records_and_those_of_its_patches(world, tmp_path):
    repo = shutil.copytree(world / "base", tmp_path / "repo")
    shutil.copytree(world / "patch", repo / "patches" / "law")
    claims = find_claims(str(repo))
    assert [(Path(claim.model).name, claim.subfolder) for claim in claims] == [("repo", None), ("repo", "patches/law")]
    assert [claim.subfolder for claim in find_claims(str(repo), subfolder="patches/law")] == ["patches/law"]
    law = claims[1]
    found = verify_record(law.path, Reviewer(model=law.model, subfolder=law.subfolder, num_documents=4))
    assert failures(found) == {}
    with pytest.raises(EvaluationError, match="has no record in its folder evals"):
        find_claims(str(tmp_path))
