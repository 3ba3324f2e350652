"""A patch holds its base's tokenizer byte for byte, unless the run changed it."""

from transformers import AutoTokenizer

from hub_moe.patches.metadata import TOKENIZER_FILES
from hub_moe.training.outcome import keep_files_of_base
from hub_moe.training.run_config import ModelConfig


def files(folder):
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def write_base(folder, tokenizer):
    """A tokenizer as another version of transformers might have written it."""
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text("utf-8").replace("\n", "\r\n"), "utf-8", newline="")
    (folder / "special_tokens_map.json").write_text("{}")
    return files(folder)


def test_an_unchanged_tokenizer_is_the_bases_with_every_file_that_it_has(tmp_path, tiny_tokenizer):
    base = write_base(tmp_path / "base", tiny_tokenizer)
    patch = tmp_path / "patch"
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(patch)
    assert files(patch) != base
    keep_files_of_base(patch, ModelConfig(str(tmp_path / "base")))
    assert files(patch) == base


def test_a_tokenizer_that_the_run_changed_or_took_from_elsewhere_stays(tmp_path, tiny_tokenizer):
    write_base(tmp_path / "base", tiny_tokenizer)
    changed = AutoTokenizer.from_pretrained(tmp_path / "base")
    changed.chat_template = "{{ messages }}"
    changed.save_pretrained(tmp_path / "changed")
    before = files(tmp_path / "changed")
    keep_files_of_base(tmp_path / "changed", ModelConfig(str(tmp_path / "base")))
    assert files(tmp_path / "changed") == before
    other = tmp_path / "other"
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(other)
    before = files(other)
    keep_files_of_base(other, ModelConfig(str(tmp_path / "base"), tokenizer=str(other)))
    assert files(other) == before
