import json
import logging
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hub_moe.anatomy import record_routing
from hub_moe.evals.prefix_cache import find_obstacle
from hub_moe.evals.prefix_lm import HubMoeLM, run_lm_eval

from ..anatomy.families import FAMILIES, tiny_config

TINY_LLAMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
}
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
WHOLE_CACHE = sorted(set(FAMILIES) - {"gpt_oss", "qwen3_next"})


@pytest.fixture(autouse=True)
def _lm_eval_says_nothing():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def make_model(family, attention="sdpa", **changes):
    """Larger weights than at the start of training, so that what a token attends to tells."""
    config = LlamaConfig(**TINY_LLAMA, **changes) if family == "llama" else tiny_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return strengthen(model)


def strengthen(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def words(draw, count):
    return " ".join(draw.choice(["token", "expert", "router", "bias", "a", "of", "it"]) for _ in range(count))


def make_requests():
    """A few-shot task and all that may stand between: (context, continuation) pairs."""
    draw = random.Random(0)
    shared = words(draw, 14)
    pairs = []
    for _ in range(4):
        context = f"{shared}\n{words(draw, draw.randint(1, 5))}"
        pairs += [(context, " " + words(draw, draw.randint(1, 3))) for _ in range(4)]
        pairs += [(context, f" {letter}") for letter in "ABCD"]
    pairs += pairs[:3]  # twice the same
    pairs += [("", "expert"), ("", "token of it")]
    pairs += [(shared, " bias"), (f"{shared}\n", "it"), ("it", " " + words(draw, 12))]
    pairs += [(words(draw, 90), " router"), (f"{shared}\n{words(draw, 90)}", " token a")]  # longer than max_length
    pairs += [(words(draw, 4)[::-1], " " + words(draw, 1))]
    draw.shuffle(pairs)
    return pairs


def ask(lm, pairs):
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    return lm.loglikelihood(requests, disable_tqdm=True)


def assert_same_scores(answers, expected):
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in expected], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "batch_size"), [*((family, 5) for family in [*WHOLE_CACHE, "llama"]), ("hub_moe", 1)]
)
def test_scores_are_those_of_hflm_from_fewer_tokens(family, batch_size, tiny_tokenizer):
    model = make_model(family)
    given = {"pretrained": model, "tokenizer": tiny_tokenizer, "batch_size": batch_size, "max_length": 200}
    lm, pairs = HubMoeLM(**given), make_requests()
    greedy = "".join(tiny_tokenizer.decode(_continue(model, tiny_tokenizer(pairs[0][0])["input_ids"], 3)))
    pairs.append((pairs[0][0], greedy))
    assert_same_scores(ask(lm, pairs), ask(HFLM(**given), pairs))
    assert lm.reuse_reason is None
    assert lm.num_computed_tokens < lm.num_prompt_tokens / 2


def _continue(model, tokens, count):
    with torch.no_grad():
        texts = model.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, pad_token_id=1)
    return texts[0, len(tokens) :]


@pytest.mark.parametrize("family", ["hub_moe", "qwen3_moe"])
def test_eager_attention_gives_the_same_scores(family, tiny_tokenizer):
    given = {"pretrained": make_model(family, "eager"), "tokenizer": tiny_tokenizer, "max_length": 200}
    lm, pairs = HubMoeLM(**given), make_requests()
    assert_same_scores(ask(lm, pairs), ask(HFLM(**given), pairs))
    assert lm.reuse_reason is None
    assert lm.num_computed_tokens < lm.num_prompt_tokens / 2


def test_steps_smaller_than_the_prefix_give_the_same_scores(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("hub_moe.evals.prefix_lm._LEAST_TOKENS", 16)
    monkeypatch.setattr("hub_moe.evals.prefix_lm._MOST_TOKENS", {"cpu": 16})
    monkeypatch.setattr("hub_moe.evals.prefix_reuse.FORWARD_COST", 0)
    given = {"pretrained": make_model("deepseek_v3"), "tokenizer": tiny_tokenizer, "max_length": 200}
    lm, pairs = HubMoeLM(**given), make_requests()
    sizes = []
    lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]) if "input_ids" in kwargs else None,
        with_kwargs=True,
    )
    answers = ask(lm, pairs)
    assert len(sizes) > 10
    assert max(sizes[2:]) <= 16  # after the rehearsal
    assert_same_scores(answers, ask(HFLM(**given), pairs))


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_a_cache_that_forgets_tokens_runs_plain_and_says_so_once(family, tiny_tokenizer):
    model = make_model(family, "eager")
    given = {"pretrained": model, "tokenizer": tiny_tokenizer, "batch_size": 4, "max_length": 200}
    said = []
    lm, pairs = HubMoeLM(**given, say=said.append), make_requests()
    assert_same_scores(ask(lm, pairs), ask(HFLM(**given), pairs))
    ask(lm, pairs[:2])
    assert "does not keep every past token" in lm.reuse_reason
    assert said == [f"Shared prefixes are not reused: {lm.reuse_reason}. Every request runs by itself."]


class _DeafLlama(LlamaForCausalLM):
    """Takes a mask, and positions, and does not listen."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, logits_to_keep=0, **kwargs
    ):
        return super().forward(input_ids, past_key_values=past_key_values, logits_to_keep=logits_to_keep, **kwargs)


def test_a_model_that_does_not_honour_the_mask_is_found_out_before_it_scores(tiny_tokenizer):
    model = strengthen(_DeafLlama(LlamaConfig(**TINY_LLAMA)).eval())
    given = {"pretrained": model, "tokenizer": tiny_tokenizer, "batch_size": 4, "max_length": 200}
    said = []
    lm, pairs = HubMoeLM(**given, say=said.append), make_requests()
    assert_same_scores(ask(lm, pairs), ask(HFLM(**given), pairs))
    assert "in a test its logits changed" in lm.reuse_reason
    assert len(said) == 1


class _OwnModel(torch.nn.Module):
    def forward(self, input_ids):
        return input_ids


@PEFT_WARNS
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_OwnModel, "_OwnModel is not one of transformers' own models"),
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)),
            "takes no",
        ),
        (
            lambda: make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "dynamic",
        ),
        (lambda: make_model("mixtral", sliding_window=8), "DynamicSlidingWindowLayer"),
        (
            lambda: get_peft_model(
                make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            ),
            "virtual tokens",
        ),
    ],
)
def test_obstacles_are_named(make, reason):
    assert reason in find_obstacle(make())


def test_attention_without_a_mask_of_any_shape_is_an_obstacle():
    model = make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "'flash_attention_2' takes no tree-shaped mask" in find_obstacle(model)


@PEFT_WARNS
def test_an_adapter_does_not_hinder(tiny_tokenizer):
    model = get_peft_model(
        make_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    given = {"pretrained": model, "tokenizer": tiny_tokenizer, "batch_size": 4, "max_length": 200}
    lm, pairs = HubMoeLM(**given), make_requests()
    assert_same_scores(ask(lm, pairs), ask(HFLM(**given), pairs))
    assert lm.reuse_reason is None


@pytest.mark.parametrize(
    ("option", "reason"), [("reuse_prefix", "reuse_prefix is off"), ("logits_cache", "logits_cache is off")]
)
def test_reuse_can_be_turned_off(option, reason, tiny_tokenizer):
    given = {"pretrained": make_model("olmoe"), "tokenizer": tiny_tokenizer, "batch_size": 4, "max_length": 200}
    lm, pairs = HubMoeLM(**given, **{option: False}), make_requests()
    assert_same_scores(ask(lm, pairs), ask(HFLM(**given), pairs))
    assert lm.reuse_reason == reason
    assert lm.num_computed_tokens > lm.num_prompt_tokens / 2


class _Journal:
    """A cache hook that keeps what it is told, and what ran meanwhile."""

    def __init__(self):
        self.events = []

    def add_partial(self, kind, request, answer):
        self.events.append((kind, request, answer))

    def watch(self, model):
        model.register_forward_hook(lambda *_: self.events.append("forward"))


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_every_answer_reaches_the_cache_hook_before_the_next_forward(reuse_prefix, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("hub_moe.evals.prefix_lm._MOST_TOKENS", {"cpu": 64})
    model = make_model("hub_moe")
    lm = HubMoeLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=4, max_length=200, reuse_prefix=reuse_prefix)
    journal, pairs = _Journal(), make_requests()
    lm.set_cache_hook(journal)
    journal.watch(model)
    answers = ask(lm, pairs)
    told = [event for event in journal.events if event != "forward"]
    assert sorted(told) == sorted(("loglikelihood", pair, answer) for pair, answer in zip(pairs, answers, strict=True))
    between = "".join("f" if event == "forward" else "a" for event in journal.events)
    assert between.count("fa") > 3


def test_padding_on_the_plain_path_is_not_counted_as_load(tiny_tokenizer):
    model = make_model("qwen3_moe")
    lm = HubMoeLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=8, max_length=200, reuse_prefix=False)
    pairs = [("it", " a"), ("token expert router", " bias"), ("a", " of it it it it")]
    with record_routing(model) as routing:
        ask(lm, pairs)
    tokens = sum(len(tiny_tokenizer(context + continuation)["input_ids"]) - 1 for context, continuation in pairs)
    assert lm.num_computed_tokens > tokens
    assert {int(layer.tokens_E.sum()) for layer in routing.layers} == {2 * tokens}


def test_rolling_and_generation_are_those_of_hflm_and_their_tokens_are_counted(tiny_tokenizer):
    given = {"pretrained": make_model("hub_moe"), "tokenizer": tiny_tokenizer, "batch_size": 2, "max_length": 64}
    lm, hflm = HubMoeLM(**given), HFLM(**given)
    texts = ["token expert " * 20, "a router of it"]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
    assert lm.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(hflm.loglikelihood_rolling(rolling))
    sizes = [len(tiny_tokenizer(text)["input_ids"]) for text in texts]
    assert lm.num_prompt_tokens >= sum(sizes)
    assert lm.num_computed_tokens >= sum(sizes)
    lm.num_prompt_tokens = lm.num_computed_tokens = 0
    settings = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, settings), index) for index, text in enumerate(("it", "a router"))]
    assert lm.generate_until(asked, disable_tqdm=True) == hflm.generate_until(asked, disable_tqdm=True)
    sizes = [len(tiny_tokenizer(text)["input_ids"]) for text in ("it", "a router")]
    assert lm.num_prompt_tokens == sum(sizes)
    assert 2 <= lm.num_generated_tokens <= 10
    assert lm.num_computed_tokens == 2 * max(sizes) + 2 * 4


def test_tokens_are_counted_as_the_task_needs_them_and_as_they_ran(tiny_tokenizer):
    lm = HubMoeLM(pretrained=make_model("llama"), tokenizer=tiny_tokenizer, batch_size=4, max_length=200)
    pairs = make_requests()
    ask(lm, pairs)
    encoded = [lm._encode_pair(*pair) if pair[0] else ([0], lm.tok_encode(pair[1])) for pair in pairs]
    assert lm.num_prompt_tokens == sum(len(context) + len(continuation) for context, continuation in encoded)
    assert lm.num_generated_tokens == 0


def test_the_entry_point_names_the_class_that_is_registered():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    entry = project["project"]["entry-points"]["lm_eval.models"]["hub_moe"]
    assert entry == f"{HubMoeLM.__module__}:{HubMoeLM.__name__}"
    assert model_registry["hub_moe"] is HubMoeLM


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "hub_moe"])
def test_lm_evals_own_command_line_runs_a_hub_moe_checkpoint(kind, tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": words(random.Random(i), 4), "choices": ["it", "a router", "bias"]} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "made_up",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{0}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "made_up.yaml").write_text(json.dumps(task))
    code = "import sys; from hub_moe.evals.prefix_lm import run_lm_eval; sys.exit(run_lm_eval(sys.argv[1:]))"
    options = ["--model", kind, "--model_args", f"pretrained={tmp_path / 'model'},max_length=100", "--device", "cpu"]
    options += ["--tasks", "made_up", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "made_up" in done.stdout
    assert list((tmp_path / "out").rglob("results_*.json"))


def test_the_exit_code_of_lm_evals_command_line_is_handed_on(capsys):
    before = list(sys.argv)
    assert run_lm_eval(["run", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err
    assert run_lm_eval(["run", "--help"]) == 0
    assert sys.argv == before
