"""Decoding batches with drafts: the tokens of plain greedy decoding for every row, whatever ends or changes them."""

import copy
import gc

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from hub_moe.errors import GenerationError
from hub_moe.modeling import HubMoeForCausalLM, layers
from hub_moe.modeling.absorbed_attention import attend_to_latents
from tests.modeling.test_mtp import _counting_task

_TRAINED = {}


@pytest.fixture
def counting(tiny_config):
    """Makes a model with so many MTP layers that has learnt to count."""

    def make(depth):
        if depth not in _TRAINED:
            tiny_config.num_mtp_layers = depth
            _TRAINED[depth] = _counting_task(tiny_config)
        return copy.deepcopy(_TRAINED[depth])

    return make


def _prompts():
    """Four prompts of 9, 4, 6 and 1 tokens, the third of which does not count from the start."""
    tokens, mask = torch.full((4, 9), 1), torch.zeros(4, 9, dtype=torch.long)
    for row, (length, first) in enumerate([(9, 5), (4, 30), (6, 18), (1, 40)]):
        tokens[row, 9 - length :] = torch.arange(first, first + length)
        mask[row, 9 - length :] = 1
    tokens[2, -3:] = torch.tensor([99, 3, 70])
    return tokens, mask


def _both(model, tokens, mask, **given):
    """What plain and drafted decoding give, and how often the model ran in each."""
    steps, results = [], []
    hook = model.model.register_forward_hook(lambda *_: steps.append(1))
    for use_mtp in (False, True):
        given = {"max_new_tokens": 30, "do_sample": False, **given}
        steps.clear()
        results.append(model.generate(tokens, attention_mask=mask, use_mtp=use_mtp, **copy.deepcopy(given)))
        results.append(len(steps))
    hook.remove()
    plain, plain_steps, drafted, drafted_steps = results
    return plain, drafted, plain_steps, drafted_steps


class _StopsAt(StoppingCriteria):
    """Ends a row after one of these tokens; says nothing of end-of-sequence tokens."""

    def __init__(self, *tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    "given",
    [
        {"eos_token_id": None},
        {"eos_token_id": [33, 50, 20]},
        {"eos_token_id": [14, 34, 70, 71, 41]},
        {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([_StopsAt(20, 35, 75, 44)])},
        {"eos_token_id": [33], "stopping_criteria": StoppingCriteriaList([_StopsAt(20, 75, 44)])},
        {"eos_token_id": None, "repetition_penalty": 1.3},
        {"eos_token_id": [33], "min_new_tokens": 15, "no_repeat_ngram_size": 3},
        {"eos_token_id": None, "max_new_tokens": 1},
        {"eos_token_id": None, "max_new_tokens": 2},
        {"eos_token_id": None, "prefill_chunk_size": 4},
    ],
    ids=lambda given: "-".join(given) + str(given.get("max_new_tokens", "")),
)
def test_every_row_gets_the_tokens_of_plain_decoding(counting, depth, given):
    plain, drafted, _, _ = _both(counting(depth), *_prompts(), **given)
    assert torch.equal(drafted, plain)


@pytest.mark.parametrize("depth", [1, 2])
def test_no_row_waits_for_another(counting, depth):
    """Rows that take the smallest number of right drafts of all rows would need more steps than the slowest alone."""
    model, (tokens, mask) = counting(depth), _prompts()
    _, _, plain_steps, steps = _both(model, tokens, mask, eos_token_id=None)
    alone = [
        _both(model, tokens[row : row + 1, -length:], None, eos_token_id=None)[3]
        for row, length in enumerate(mask.sum(dim=1).tolist())
    ]
    assert steps == max(alone) < 0.6 * plain_steps


def test_prefix_functions_are_told_the_row(counting):
    def allowed(row, tokens):
        return [10 + row, 60 + row] if len(tokens) % 4 == 0 else list(range(128))

    plain, drafted, _, _ = _both(counting(2), *_prompts(), eos_token_id=None, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(drafted, plain)
    assert all(int(plain[row, 12]) in (10 + row, 60 + row) for row in range(4))


@pytest.mark.parametrize("rows", [1, 5])
def test_untrained_drafts_are_almost_never_right_and_change_nothing(tiny_config, rows):
    tiny_config.num_mtp_layers = 2
    torch.manual_seed(0)
    model = HubMoeForCausalLM(tiny_config).eval()
    tokens, mask = torch.randint(2, 128, (rows, 11)), torch.ones(rows, 11, dtype=torch.long)
    mask[-1, :7] = 0
    plain, drafted, _, _ = _both(model, tokens, mask, eos_token_id=None)
    assert torch.equal(drafted, plain)
    assert model.mtp_acceptance.rate < 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("absorbs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absorbed_and_expanded_attention_verify_alike(counting, monkeypatch, implementation, absorbs, dtype):
    model = counting(2).to(dtype)
    model.config._attn_implementation = implementation
    calls = []

    def attend(query_BHLX, *args, **kwargs):
        calls.append(query_BHLX.shape[2])
        return attend_to_latents(query_BHLX, *args, **kwargs)

    monkeypatch.setattr(layers, "attend_to_latents", attend)
    if not absorbs:
        monkeypatch.setattr(layers, "should_absorb", lambda *_: False)
    tokens = torch.arange(5, 45)[None] + torch.tensor([[0], [3], [9]])
    mask = torch.ones_like(tokens)
    mask[1, :20] = 0
    plain, drafted, plain_steps, steps = _both(model, tokens % 60, mask, eos_token_id=None)
    assert torch.equal(drafted, plain)
    assert steps < 0.75 * plain_steps
    assert (3 in calls) is absorbs


@pytest.mark.usefixtures("_unwritten_memory_is_nan")
def test_places_that_no_row_has_written_yet_are_never_read(counting):
    plain, drafted, _, _ = _both(counting(3), *_prompts(), eos_token_id=[33, 50, 20], max_new_tokens=90)
    assert torch.equal(drafted, plain)


@pytest.fixture
def _unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_scores_logits_and_cache_are_those_of_plain_decoding(counting):
    model, (tokens, mask) = counting(2), _prompts()
    given = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    plain, drafted, _, _ = _both(model, tokens, mask, eos_token_id=[33], **given)
    assert torch.equal(drafted.sequences, plain.sequences)
    ended = (plain.sequences[:, 9:] == 33).int().argmax(dim=1)
    lengths = torch.where((plain.sequences[:, 9:] == 33).any(dim=1), ended + 1, 30).tolist()
    assert len(set(lengths)) > 1
    for name in ("scores", "logits"):
        expected, actual = (torch.stack(result[name], dim=1) for result in (plain, drafted))
        for row, length in enumerate(lengths):
            torch.testing.assert_close(actual[row, :length], expected[row, :length], rtol=1e-4, atol=1e-4)
            assert not actual[row, length:].any()
    for ours, theirs in zip(drafted.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        for row, length in enumerate(lengths):
            seen = mask[row].bool().tolist() + [True] * (length - 1)
            places = torch.tensor([place for place, is_token in enumerate(seen) if is_token])
            torch.testing.assert_close(ours.keys[row][:, places], theirs.keys[row][:, places], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.values[row][:, places], theirs.values[row][:, places], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gives_all", [True, False], ids=["all ids", "only the new ids"])
def test_a_cache_can_be_continued_with_drafts_and_after_them(counting, gives_all):
    model, (tokens, mask) = counting(2), _prompts()
    results = []
    for use_mtp in (False, True):
        sequences, seen, cache = tokens, mask, DynamicCache()
        for turn in (0, 1):
            if turn:
                sequences = torch.cat((sequences, torch.tensor([[50, 51, 52]]).expand(4, -1)), dim=1)
                seen = torch.cat((mask, mask.new_ones(4, sequences.shape[1] - 9)), dim=1)
            given = sequences if gives_all else sequences[:, cache.get_seq_length() :]
            output = model.generate(
                given,
                attention_mask=seen,
                past_key_values=cache,
                max_new_tokens=10,
                eos_token_id=None,
                do_sample=False,
                use_mtp=use_mtp,
            )
            sequences = torch.cat((sequences, output[:, given.shape[1] :]), dim=1)
        results.append(sequences)
    assert torch.equal(*results)


@pytest.mark.parametrize("depth", [1, 2])
def test_acceptance_is_what_counting_the_verified_tokens_gives(counting, depth):
    model, (tokens, mask) = counting(depth), _prompts()
    verified = []

    def record(_, args, kwargs):
        verified.append((kwargs["input_ids"].clone(), kwargs["position_ids"].clone()))

    hook = model.model.register_forward_pre_hook(record, with_kwargs=True)
    given = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    sequences = model.generate(tokens, use_mtp=True, **given)
    hook.remove()
    drafted, accepted, wanted = [0] * depth, [0] * depth, 9 + 30
    for ids, positions in verified[1:]:
        for row in range(4):
            column = int(positions[row, 0]) + 9 - int(mask[row].sum())
            if column == wanted - 1:
                continue  # the row had all its tokens
            is_right = True
            for place in range(1, ids.shape[1]):
                is_right = (
                    is_right and column + place < wanted - 1 and ids[row, place] == sequences[row, column + place]
                )
                drafted[place - 1] += 1
                accepted[place - 1] += bool(is_right)
    assert (model.mtp_acceptance.drafted, model.mtp_acceptance.accepted) == (drafted, accepted)
    assert model.mtp_acceptance.rate == sum(accepted) / sum(drafted) > 0.5


def test_sampling_one_row_goes_on_and_is_counted(counting):
    model = counting(2)
    prompt, passes = torch.arange(10, 16)[None], []
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    sequences = model.generate(prompt, max_new_tokens=24, do_sample=True, eos_token_id=None, use_mtp=True)
    hook.remove()
    acceptance = model.mtp_acceptance
    assert acceptance.drafted == [len(passes) - 1] * 2
    assert sequences.shape[1] - 6 == len(passes) + sum(acceptance.accepted)


@pytest.mark.parametrize("do_sample", [False, True])
def test_heads_stay_in_memory_between_calls_and_none_is_copied(counting, do_sample):
    model, seen = counting(2), []
    own = {layer: [p.data_ptr() for p in layer.parameters()] for layer in model.model.mtp_layers}

    def count_parameters():
        return sum(type(each) is nn.Parameter for each in gc.get_objects())

    def record(layer, *_):
        seen.append((layer, [p.data_ptr() for p in layer.parameters()], count_parameters()))

    for layer in own:
        layer.register_forward_pre_hook(record)
    gc.collect()  # of other tests' models, some may wait for it
    before = count_parameters()
    for _ in range(2):
        model.generate(torch.arange(10, 16)[None], max_new_tokens=9, do_sample=do_sample, use_mtp=True)
    assert {layer for layer, _, _ in seen} == set(own)
    assert all(pointers == own[layer] for layer, pointers, _ in seen)
    assert {parameters for _, _, parameters in seen} == {before}


def test_compiled_models_draft_too(counting):
    model, (tokens, mask) = counting(2), _prompts()
    plain = model.generate(tokens, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=[33])
    torch.compiler.reset()
    model.model.forward = torch.compile(model.model.forward, backend="eager", dynamic=True)
    given = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": [33]}
    assert torch.equal(model.generate(tokens, use_mtp=True, **given), plain)


def test_a_criterion_that_fails_leaves_the_cache_as_any_other(counting):
    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > 15:
                raise RuntimeError("enough")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    cache = DynamicCache()
    with pytest.raises(RuntimeError, match="enough"):
        counting(1).generate(
            torch.arange(10, 16)[None],
            past_key_values=cache,
            max_new_tokens=20,
            do_sample=False,
            use_mtp=True,
            stopping_criteria=StoppingCriteriaList([Fails()]),
        )
    assert all(layer.places is None for layer in cache.layers)


def test_one_row_streams_its_tokens(counting, tiny_tokenizer, capsys):
    prompt = torch.arange(10, 16)[None]
    sequences = counting(2).generate(
        prompt, max_new_tokens=12, do_sample=False, use_mtp=True, streamer=TextStreamer(tiny_tokenizer)
    )
    assert capsys.readouterr().out.strip() == tiny_tokenizer.decode(sequences[0]).strip()


@pytest.mark.parametrize(
    ("given", "need"),
    [
        ({"do_sample": True}, r"greedy decoding \(do_sample=False\)"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=False"),
        ({"use_cache": False}, "use_cache=True"),
    ],
)
def test_what_batches_cannot_have_is_refused_in_one_sentence(counting, given, need):
    model, (tokens, mask) = counting(1), _prompts()
    model.config._attn_implementation = "eager"
    with pytest.raises(GenerationError, match=f"^use_mtp=True with 4 rows needs .*{need}.*; pass one row at a time.$"):
        model.generate(tokens, attention_mask=mask, max_new_tokens=2, use_mtp=True, **{"do_sample": False, **given})
