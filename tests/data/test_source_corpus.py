import pytest

from hub_moe.data import read_stdlib_corpus
from hub_moe.errors import DatasetError


@pytest.fixture(scope="module")
def corpus():
    return read_stdlib_corpus(seed=0, held_out_share=0.05)


def test_the_library_is_megabytes_of_known_files(corpus):
    names = {document.name for document in corpus.train + corpus.held_out}
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= names
    assert sum(document.size_bytes for document in corpus.train) > 3_000_000


def test_no_file_is_on_both_sides_and_about_the_share_is_held_out(corpus):
    train = {document.name for document in corpus.train}
    held_out = {document.name for document in corpus.held_out}
    assert not train & held_out
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.1


def test_tests_and_installed_packages_are_left_out(corpus):
    parts = {part for document in corpus.train + corpus.held_out for part in document.name.split("/")[:-1]}
    assert not parts & {"test", "tests", "site-packages", "encodings", "idlelib"}


def test_the_same_seed_gives_the_same_split_and_another_seed_another(corpus):
    assert read_stdlib_corpus(seed=0, held_out_share=0.05).sha256 == corpus.sha256
    assert read_stdlib_corpus(seed=1, held_out_share=0.05).sha256 != corpus.sha256


def test_a_limit_keeps_the_first_files_on_their_side(corpus):
    small = read_stdlib_corpus(seed=0, held_out_share=0.05, max_bytes=1_000_000)
    assert set(small.train) < set(corpus.train)
    assert set(small.held_out) <= set(corpus.held_out)


def test_an_empty_side_is_an_error():
    with pytest.raises(DatasetError, match="too few"):
        read_stdlib_corpus(seed=0, held_out_share=0.0)
