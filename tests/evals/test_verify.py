"""Honest records pass, on folders; whatever a cheat changes is found and named, also where every hash fits again."""

import contextlib
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
from hub_moe.evals.models import ModelRequest, load_model
from hub_moe.evals.records import Sample, read_record
from hub_moe.evals.run import RunFacts, evaluate_suite
from hub_moe.evals.suites import load_suite
from hub_moe.evals.tasks import build_suite
from hub_moe.evals.verify import Reviewer, catch_probability, choose_documents, verify_record
from tests.anatomy.families import tiny_config

from .checkpoints import TASKS, evaluate, save_model, save_patch
from .forging import Forger, fabricate, write_json

ALL = 10**6  # more documents than there are


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer):
    """A base and a patch for it, each with its record in `evals`; tests change copies only."""
    root = tmp_path_factory.mktemp("verify")
    base = save_model(root / "base", tiny_config("hub_moe"), tiny_tokenizer)
    patch = save_patch(root / "patch", base, tiny_tokenizer)
    for model in (base, patch):
        evaluate(model, model / "evals", limit=4)
    return root


@pytest.fixture
def forger(world):
    return Forger(record_of(world / "base"))


def record_of(model):
    (path,) = (model / "evals").glob("*.json")
    return path


def verify(path, model, *, documents=0, **reviewer):
    return verify_record(path, Reviewer(model=str(model), num_documents=documents, **reviewer))


def failures(verification):
    """The findings that did not hold, by check."""
    assert (verification.outcome == "failed") == (not all(f.passed for f in verification.findings))
    return {finding.check: finding.detail for finding in verification.findings if not finding.passed}


def evaluate_other(model, folder, **changes):
    """The record of a suite that differs from the honest one."""
    loaded = load_model(ModelRequest(str(model), batch_size=4))
    suite = replace(load_suite("offline", limit=4, tasks=TASKS), **changes)
    return evaluate_suite(loaded, build_suite(suite, tokenizer=loaded.tokenizer), folder, RunFacts(["test"]))


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


# What a cheat may do without a model: (what, the check that finds it, a part of its words). Every hash fits again.
CHANGED = {
    "another score": (lambda f: f.change_metric("cloze", "acc", value=0.99), "numbers", "cloze acc: value is"),
    "a smaller standard error": (
        lambda f: f.change_metric("cloze", "acc", standard_error=0.001),
        "numbers",
        "standard_error is",
    ),
    "a bad metric called good": (
        lambda f: f.change_metric("running_text", "bits_per_byte", higher_is_better=True),
        "numbers",
        "higher_is_better is False",
    ),
    "a flattering number before the honest one": (
        lambda f: f.change_entry(
            "cloze", metrics=(replace(f.record.entries[0].main, value=1.0), *f.record.entries[0].metrics)
        ),
        "numbers",
        "cloze has other metrics",
    ),
    "another main metric": (lambda f: f.change_entry("cloze", main_metric="acc_norm"), "numbers", "main_metric is acc"),
    "unparsable answers kept quiet": (
        lambda f: f.change_entry("copying", num_unparsable=3),
        "numbers",
        "num_unparsable is",
    ),
    "an entry of nothing": (
        lambda f: f.change(entries=(*f.record.entries, replace(f.record.entries[0], name="mmlu", tasks=()))),
        "suite",
        "running_text, copying, mmlu",
    ),
    "an entry twice": (lambda f: f.change(entries=(f.record.entries[0], *f.record.entries)), "suite", "cloze, cloze"),
    "an entry less": (lambda f: f.change(entries=f.record.entries[1:]), "suite", "and declares cloze"),
    "a task of another version": (lambda f: f.change_task("cloze", version="9.0"), "prompts", "another version"),
    "a task twice": (
        lambda f: f.change_entry("cloze", tasks=f.record.entries[0].tasks * 2),
        "prompts",
        "more than once",
    ),
    "other prompts": (lambda f: f.change_task("cloze", prompts_sha256="0" * 64), "prompts", "another prompts_sha256"),
    "an edited task": (lambda f: f.change_task("cloze", config_sha256="0" * 64), "prompts", "another config_sha256"),
    "few-shot examples kept quiet": (lambda f: f.change_task("cloze", num_fewshot=5), "prompts", "another num_fewshot"),
    "other rows": (
        lambda f: f.change_task("cloze", dataset=replace(f.record.entries[0].tasks[0].dataset, rows_sha256="0" * 64)),
        "prompts",
        "another dataset",
    ),
    "a system prompt kept quiet": (
        lambda f: f.change(execution=replace(f.record.execution, system_prompt="Think.")),
        "suite",
        "system prompt",
    ),
    "a chat template that was not applied": (
        lambda f: f.change(execution=replace(f.record.execution, chat_template_sha256="0" * 64)),
        "suite",
        "chat template",
    ),
    "another suite's name": (
        lambda f: f.change(suite=replace(f.record.suite, name="standard")),
        "suite",
        "named standard, and declares offline",
    ),
    "another suite's hash without a declaration": (
        lambda f: f.change(suite=replace(load_suite("offline").source, declaration={})),
        "record",
        "lacks the key",
    ),
    "a dropped document": (
        lambda f: f.change_samples(lambda s: None, where=lambda s: (s.entry, s.index) == ("cloze", 3)),
        "samples",
        "1 documents have no answer: offline_cloze document 3",
    ),
    "a document twice": (
        lambda f: f.change_samples(lambda s: [s, s], where=lambda s: (s.entry, s.index) == ("cloze", 3)),
        "samples",
        "1 documents are there more than once",
    ),
    "a document in place of another": (
        lambda f: f.change_samples(lambda s: replace(s, index=99), where=lambda s: (s.entry, s.index) == ("cloze", 3)),
        "samples",
        "offline_cloze document 3",
    ),
    "another document's text": (
        lambda f: f.change_samples(lambda s: replace(s, document_sha256="0" * 64)),
        "samples",
        "16 documents or their prompts differ",
    ),
    "another group": (
        lambda f: f.change_samples(lambda s: replace(s, group="a")),
        "samples",
        "16 documents or their prompts differ",
    ),
    "answers moved to another entry": (
        lambda f: f.change_samples(lambda s: replace(s, entry="brackets"), where=lambda s: s.entry == "cloze"),
        "samples",
        "documents have no answer",
    ),
    "scores": (
        lambda f: f.change_samples(lambda s: replace(s, scores=dict.fromkeys(s.scores, 1.0))),
        "numbers",
        "scores do not follow from their answers",
    ),
    "sizes": (
        lambda f: f.change_samples(lambda s: replace(s, sizes={k: v * 2 for k, v in s.sizes.items()})),
        "numbers",
        "scores do not follow",
    ),
    "an answer less": (
        lambda f: f.change_samples(lambda s: replace(s, log_likelihoods=tuple(s.log_likelihoods)[:-1])),
        "samples",
        "no whole, finite answers",
    ),
    "flags less": (
        lambda f: f.change_samples(lambda s: replace(s, is_greedy=())),
        "samples",
        "no whole, finite answers",
    ),
    "texts where log-likelihoods were asked for": (
        lambda f: f.change_samples(lambda s: replace(s, texts=("A",))),
        "samples",
        "no whole, finite answers",
    ),
    # argmax takes NaN for the largest of all, and no difference from NaN is above a tolerance
    "NaN": (
        lambda f: f.change_samples(lambda s: replace(s, log_likelihoods=tuple(math.nan for _ in s.log_likelihoods))),
        "samples",
        "no whole, finite answers",
    ),
    "a limit that the suite has not": (
        lambda f: f.change_entry("cloze", limit=None),
        "numbers",
        "limit is 4, not None",
    ),
    "a few-shot seed": (lambda f: f.change(seeds={"fewshot": 7}), "suite", "few-shot seed"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_record_with_fitting_hashes_is_found(world, forger, tmp_path, what):
    change, check, words = CHANGED[what]
    change(forger)
    found = verify(forger.write(tmp_path), world / "base")
    assert found.outcome == "failed"
    assert words in failures(found)[check]


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"system_prompt": "You answer well."}, {"prompts"}),
        ({"entries": load_suite("offline", limit=4, tasks=TASKS, num_fewshot=1).entries}, {"prompts", "samples"}),
        ({"entries": load_suite("offline", limit=3, tasks=TASKS).entries}, {"prompts", "samples"}),
        ({"entries": load_suite("offline", limit=4, tasks=TASKS[:3]).entries}, {"suite", "prompts", "samples"}),
    ],
    ids=["system prompt", "few-shot", "limit", "fewer entries"],
)
def test_answers_to_other_questions_under_the_honest_declaration_are_found(world, forger, tmp_path, changes, fields):
    other = Forger(evaluate_other(world / "base", tmp_path / "other", **changes).path)
    other.change(suite=forger.record.suite, execution=replace(other.record.execution, system_prompt=None))
    found = verify(other.write(tmp_path / "forged"), world / "base", documents=ALL)
    assert fields <= failures(found).keys()
    assert found.num_replayed == 0


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


def edit(data, **changes):
    """The JSON with values at dotted paths replaced, and the declaration's hash made to fit."""
    from hub_moe.evals.records.record import hash_json

    data = json.loads(json.dumps(data))
    for path, value in changes.items():
        *folders, last = path.split("__")
        at = data
        for folder in folders:
            at = at[int(folder) if folder.isdigit() else folder]
        at[last] = value
    with contextlib.suppress(ValueError):
        data["suite"]["sha256"] = hash_json(data["suite"]["declaration"])
    return data


HOSTILE = {
    "a path out of the folder": ({"samples__name": "../other.parquet"}, "no name of a table"),
    "a hidden file": ({"samples__name": ".parquet"}, "no name of a table"),
    "no name": ({"samples__name": ""}, "no name of a table"),
    "a broken name": ({"samples__name": "a\0b"}, "no name of a table"),
    "missing samples": ({"samples__name": "offline-0.parquet"}, "are missing"),
    "another number of samples": ({"samples__num_rows": 15}, "16 rows; 15 were expected"),
    "a number that is none": ({"wall_s": math.nan}, "finite"),
    "infinity": ({"wall_s": math.inf}, "finite"),
    "half a character": ({"created": "\ud800"}, "whole characters"),
    "NaN in the declaration": ({"suite__declaration__fewshot_seed": math.nan}, "finite"),
    "an unknown key": ({"verified": True}, "no key 'verified'"),
    "a declaration that is none": ({"suite__declaration__entries": []}, "no entries"),
    "a huge limit": ({"suite__declaration__entries__0__limit": 10**30}, "more than"),
    "a task that is none": ({"suite__declaration__entries__0__tasks": ["nope"]}, "no task 'nope'"),
    "a folder of the author's": ({"suite__declaration__entries__0__source": "./"}, "--suite-dir"),
    "a folder anywhere": ({"suite__declaration__entries__0__source": "lm_eval//proc/self/cwd"}, "no folder of tasks"),
    "a folder above": ({"suite__declaration__entries__0__source": "hub_moe/../../tests"}, "no folder of tasks"),
    "a metric that is none": ({"suite__declaration__entries__0__main_metric": "best"}, "no metric 'best'"),
    "a column that is none": ({"suite__declaration__entries__0__group_column": "best"}, "no column 'best'"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_record_fails_and_never_crashes(world, tmp_path, what):
    changes, words = HOSTILE[what]
    honest = record_of(world / "base")
    path = write_json(tmp_path, edit(json.loads(honest.read_text("utf-8")), **changes))
    for samples in honest.parent.glob("*.parquet"):
        shutil.copy(samples, tmp_path)
    found = verify(path, world / "base", documents=ALL)
    assert found.outcome == "failed"
    assert any(words in detail for detail in failures(found).values()), found.findings


def test_an_edited_record_fails_at_its_hash(world, tmp_path):
    shutil.copytree(world / "base" / "evals", tmp_path / "evals")
    path = record_of(tmp_path)
    path.write_text(path.read_text("utf-8").replace('"wall_s": ', '"wall_s": 1'), "utf-8")
    assert "was edited" in failures(verify(path, world / "base"))["record"]


def test_samples_of_another_record_fail_at_their_hash(world, tmp_path):
    shutil.copytree(world / "base" / "evals", tmp_path / "evals")
    (ours,) = (tmp_path / "evals").glob("*.parquet")
    (theirs,) = (world / "patch" / "evals").glob("*.parquet")
    shutil.copy(theirs, ours)
    assert "was edited: it has the hash" in failures(verify(record_of(tmp_path), world / "base"))["record"]


def test_a_table_that_would_fill_the_memory_is_not_unpacked(world, forger, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hub_moe.evals.records import samples as module
    from hub_moe.evals.records.samples import read_samples

    row = module._to_row(forger.samples[0])
    long = pa.Table.from_pylist([{**row, "log_likelihoods": [0.0] * 200_000}], schema=module._SCHEMA)
    pq.write_table(long, tmp_path / "long.parquet", compression="zstd")
    assert (tmp_path / "long.parquet").stat().st_size < 20_000
    monkeypatch.setattr(module, "_MAX_VALUES", 100_000)
    with pytest.raises(EvaluationError, match="200,000 values in a column"):
        read_samples(tmp_path / "long.parquet")
    wide = pa.Table.from_pylist([{**row, "texts": ["a" * 10_000]}] * 3000, schema=module._SCHEMA)
    pq.write_table(wide, tmp_path / "wide.parquet", compression="zstd")
    monkeypatch.setattr(module, "_MAX_BYTES", 10_000_000)
    with pytest.raises(EvaluationError, match="unpacks to more than"):
        read_samples(tmp_path / "wide.parquet")
    gaps = pa.Table.from_pylist([{**row, "log_likelihoods": [None]}], schema=module._SCHEMA)
    pq.write_table(gaps, tmp_path / "gaps.parquet")
    with pytest.raises(EvaluationError, match="gap in its column log_likelihoods"):
        read_samples(tmp_path / "gaps.parquet")


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
