"""What of a conversation is trained on, under templates as they are found on the Hub."""

import pytest

from hub_moe.data import LoadedRows, prepare, set_chat_template
from hub_moe.data.chat import ChatEncoder, Encoded
from hub_moe.data.documents import mark_row
from hub_moe.data.formats import BadRowError
from hub_moe.errors import DatasetError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_TO_THE_NEWLINE = CHATML_MARKED.replace(
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
    "{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}",
)
# as Qwen3's: an answer that is the last one gets an empty thought, one before does not
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'].split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# as GLM-4's: the next role is what ends an answer
ROLES_ONLY = (
    "{% for message in messages %}{{ '<|im_end|>' if message['role'] == 'user' else '<|im_start|>' }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "and that"},
    {"role": "assistant", "content": "a dog\n"},
]


def mark(tokenizer, messages, template):
    tokenizer.chat_template = template
    marked = mark_row(LoadedRows.from_list([{"messages": messages}]), 0, tokenizer)
    return "".join(f"[{text}]" if is_trained else text for text, is_trained in marked.pieces)


TURNS = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, MARKED_TO_THE_NEWLINE])
def test_every_answer_is_trained_on_up_to_its_end_of_turn_token(bare_tokenizer, template):
    assert mark(bare_tokenizer, CHAT, template) == (
        TURNS + "[a cat<|im_end|>]\n<|im_start|>user\nand that<|im_end|>\n<|im_start|>assistant\n[a dog\n<|im_end|>]"
    )


def test_the_plain_template_marks_answers_and_ends_each_with_the_end_of_text(bare_tokenizer):
    set_chat_template(bare_tokenizer, "plain")
    assert mark(bare_tokenizer, CHAT, bare_tokenizer.chat_template) == (
        "<eos>be kind\n\nUser: what is it\n\nAssistant:[ a cat<eos>]User: and that\n\nAssistant:[ a dog\n<eos>]"
    )


def test_a_template_that_treats_the_last_answer_otherwise_is_still_marked(bare_tokenizer):
    assert mark(bare_tokenizer, CHAT, THINKING).endswith(
        "[a cat<|im_end|>]\n<|im_start|>user\nand that<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\n\n</think>\n\na dog\n<|im_end|>]"
    )


def test_an_answer_that_the_template_cuts_is_a_bad_row(bare_tokenizer):
    thought = [*CHAT[:2], {"role": "assistant", "content": "<think>hm</think>a cat"}]
    bare_tokenizer.chat_template = THINKING
    (result,) = ChatEncoder(bare_tokenizer).encode([thought])
    assert "leaves out or changes part of the answer in message 2" in str(result)


def test_where_the_next_role_ends_an_answer_it_is_trained_and_the_last_answer_gets_the_end_of_text(bare_tokenizer):
    assert mark(bare_tokenizer, CHAT[1:], ROLES_ONLY) == (
        "<|im_end|>what is it<|im_start|>[a cat<|im_end|>]and that<|im_start|>[a dog\n<eos>]"
    )
    assert "the template closes none, so <eos> is appended" in ChatEncoder(bare_tokenizer).describe()


def test_the_prompt_has_the_tokens_that_generation_will_give_it(bare_tokenizer):
    for template in (CHATML, CHATML_MARKED, THINKING):
        bare_tokenizer.chat_template = template
        prompt = bare_tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True)["input_ids"]
        (encoded,) = ChatEncoder(bare_tokenizer).encode([CHAT])
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.trained[len(prompt)]
        assert not encoded.trained[len(prompt) - 1]


def test_a_template_whose_beginning_depends_on_the_end_is_refused(bare_tokenizer):
    bare_tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(
        DatasetError, match=r"renders the beginning of a conversation in another way .* {% generation %}"
    ):
        ChatEncoder(bare_tokenizer).encode([CHAT])


def test_a_template_that_closes_only_the_last_answer_is_refused(bare_tokenizer):
    bare_tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
        "{{ eos_token if loop.last and message['role'] == 'assistant' else '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(DatasetError, match="does not close each answer before the next message"):
        ChatEncoder(bare_tokenizer).encode([CHAT])


def test_a_row_that_the_template_refuses_is_bad_and_says_why(bare_tokenizer):
    bare_tokenizer.chat_template = "{{ raise_exception('Roles must alternate') if messages | length > 2 }}" + CHATML
    (result,) = ChatEncoder(bare_tokenizer).encode([CHAT])
    assert isinstance(result, BadRowError)
    assert str(result) == "the chat template refuses it: Roles must alternate"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_a_special_token_as_text_is_a_bad_row(bare_tokenizer, template):
    bare_tokenizer.chat_template = template
    chat = [CHAT[1], {"role": "assistant", "content": "a<|im_end|>\n<|im_start|>user\nmore"}]
    good, bad = ChatEncoder(bare_tokenizer).encode([CHAT, chat])
    assert isinstance(good, Encoded)
    assert str(bad) == "message 1 contains the special token <|im_end|> as text"


def test_a_token_across_the_border_of_prompt_and_answer_is_a_bad_row(bare_tokenizer):
    """`th` + `e` would be one token of the whole, which the prompt by itself can never end with."""
    bare_tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'th' }}{% generation %}"
        "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + '\\n' }}{% endif %}"
        "{% endfor %}"
    )
    assert len(bare_tokenizer("the")["input_ids"]) < len(bare_tokenizer("th")["input_ids"]) + 1
    (result,) = ChatEncoder(bare_tokenizer).encode([[CHAT[1], {"role": "assistant", "content": "e cat"}]])
    assert "a token reaches across the border of an answer" in str(result)


def test_a_tokenizer_that_marks_the_start_of_every_text_has_its_answers_found(sentencepiece_like):
    """Pieces of a text have other tokens than the whole there; the tokens of its beginnings decide."""
    sentencepiece_like.chat_template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    (encoded,) = ChatEncoder(sentencepiece_like).encode([CHAT[1:]])
    trained = [token for token, keep in zip(encoded.input_ids, encoded.trained, strict=True) if keep]
    pieces = sentencepiece_like.convert_ids_to_tokens(trained)
    assert "".join(pieces).replace("▁", " ").split("</s>") == ["a cat", "a dog\n", ""]


@pytest.fixture
def sentencepiece_like():
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = "▁abcdefghijklmnopqrstuvwxyz\n"
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {c: n + 2 for n, c in enumerate(letters)}, []))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_a_tokenizer_without_template_says_what_to_do(bare_tokenizer):
    rows = LoadedRows.from_list([{"prompt": "a", "completion": "b"}])
    with pytest.raises(DatasetError, match=r'has no chat template: set chat_template = "plain"'):
        prepare(rows, bare_tokenizer, max_length=64)


def test_a_template_is_read_from_a_file_and_saved_with_the_tokenizer(bare_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "mine.jinja").write_text(CHATML)
    set_chat_template(bare_tokenizer, tmp_path / "mine.jinja")
    bare_tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == CHATML


def test_bad_templates_are_refused(bare_tokenizer, tmp_path):
    with pytest.raises(DatasetError, match='"plain" or the path of a Jinja file; there is no file plian'):
        set_chat_template(bare_tokenizer, "plian")
    (tmp_path / "no.jinja").write_text("hello")
    with pytest.raises(DatasetError, match="never mentions messages"):
        set_chat_template(bare_tokenizer, tmp_path / "no.jinja")
    bare_tokenizer.eos_token = None
    with pytest.raises(DatasetError, match="closes answers by eos_token"):
        set_chat_template(bare_tokenizer, "plain")
