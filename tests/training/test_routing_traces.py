import hashlib

import pytest

from hub_moe.errors import DatasetError
from hub_moe.training.routing_traces import read_traces

from .esft_traces import write_traces


def read(folder, *, num_experts=16, top_k=3):
    return read_traces(folder, num_experts=num_experts, top_k=top_k, domain="law", model="alice/moe")


def test_traces_become_a_profile_with_what_was_read(tmp_path):
    folder = write_traces(tmp_path / "routing", 0, layers=(2, 10, *range(3, 10)), lengths=(5, 1, 7))
    profile = read(folder)
    domain = profile.domain("law")
    content = b"".join((folder / f"layer_{layer}.txt").read_bytes() for layer in range(2, 11))

    assert (profile.model, profile.top_k, domain.num_tokens, domain.num_sequences) == ("alice/moe", 3, 13, 3)
    assert list(domain.layers) == list(range(2, 11))
    assert all(sum(layer.tokens) == 3 * 13 and layer.output_norm is None for layer in domain.layers.values())
    assert domain.dataset == {"routing_traces": "routing", "sha256": hashlib.sha256(content).hexdigest()}


def test_gate_weights_are_summed_by_expert(tmp_path):
    (tmp_path / "layer_1.txt").write_text("0\t3\t3\t1\t\t0.5\t0.25\t0.5\t1e-1\n2\t0\t\t0.125\t1\n", "utf-8")
    layer = read(tmp_path, num_experts=4, top_k=2).domain().layers[1]

    assert layer.tokens == (2, 1, 1, 2)
    assert layer.gate_mass == (1.5, 0.1, 0.125, 0.75)


def test_the_names_of_esfts_own_script_and_other_line_ends_are_read_too(tmp_path):
    (tmp_path / "summary.json").write_text("{}", "utf-8")
    (tmp_path / "expert_weights_4.txt").write_bytes(b"0\t1\t\t0.5\t0.5\r\n1\t0\t\t0.5\t0.5")
    assert read(tmp_path, num_experts=2, top_k=2).domain().num_tokens == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0\t1\t0.5\t0.5", "expected expert ids, two tabs and gate weights, found 1 part"),
        ("0\t1\t\t0.5\t\t0.5", r"found 3 part\(s\)"),
        ("", r"found 1 part\(s\)"),
        ("\t\t", "'' is not an expert id"),
        ("0\t1\t\t0.5", "2 expert ids but 1 gate weights"),
        ("0\t\t0.5\t0.5", "1 expert ids but 2 gate weights"),
        ("0\t1\t2\t\t0.5\t0.5\t0.5", "3 expert ids are not 2 for each token"),
        ("0\t4\t\t0.5\t0.5", "expert id 4 is not one of 0 to 3"),
        ("0\t-1\t\t0.5\t0.5", "expert id -1 is not one of 0 to 3"),
        ("0\t1\t2\t2\t\t0.5\t0.5\t0.5\t0.5", r"token 2 goes to one expert twice, \[2, 2\]"),
        ("0\t1.5\t\t0.5\t0.5", "'1.5' is not an expert id"),
        ("0\t1\t\t0.5\t0.5.", "'0.5.' is not a gate weight"),
        ("0\t1\t\t0.5\t", "'' is not a gate weight"),
        ("0\t1\t\t0.5\tnan", "'n' at character 10 belongs to no number"),
        ("0\t1\t\t0.5\t1e999", "gate weight inf is not a finite number of at least 0"),
        ("0\t1\t\t0.5\t-0.5", "gate weight -0.5 is not a finite number of at least 0"),
        ("0\t1_0\t\t0.5\t0.5", "'_' at character 4 belongs to no number"),
        ("0 1\t\t0.5\t0.5", "' ' at character 2 belongs to no number"),
        ("0\té\t\t0.5\t0.5", "at character 3 belongs to no number"),
        ("0\t\x00\t\t0.5\t0.5", "at character 3 belongs to no number"),
    ],
)
def test_a_malformed_line_is_an_error_with_file_and_line(tmp_path, line, sentence):
    good = "0\t1\t\t0.5\t0.5\n"
    (tmp_path / "layer_1.txt").write_text(good, "utf-8")
    (tmp_path / "layer_2.txt").write_text(good + line + "\n" + good, "utf-8")
    with pytest.raises(DatasetError, match=rf"layer_2\.txt, line 2: .*{sentence}") as refused:
        read(tmp_path, num_experts=4, top_k=2)
    assert "\n" not in str(refused.value)


def test_a_missing_layer_is_named(tmp_path):
    folder = write_traces(tmp_path / "routing", 0, layers=(1, 2, 4, 7))
    with pytest.raises(DatasetError, match=r"traces of layers 1 to 7, but none of layer 3, 5, 6\."):
        read(folder)


def test_a_layer_that_is_there_twice_is_an_error(tmp_path):
    folder = write_traces(tmp_path / "routing", 0)
    (folder / "expert_weights_2.txt").write_bytes((folder / "layer_2.txt").read_bytes())
    with pytest.raises(DatasetError, match=r"two traces of layer 2: expert_weights_2\.txt and layer_2\.txt"):
        read(folder)


def test_a_folder_without_traces_an_empty_file_and_no_folder_are_errors(tmp_path):
    with pytest.raises(DatasetError, match=r"holds no routing traces; expected one layer_N\.txt a layer"):
        read(tmp_path)
    (tmp_path / "layer_1.txt").touch()
    with pytest.raises(DatasetError, match=r"layer_1\.txt is empty"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


def test_layers_that_saw_other_text_are_an_error(tmp_path):
    folder = write_traces(tmp_path / "routing", 0, lengths=(4, 5))
    lines = (folder / "layer_3.txt").read_text("utf-8").splitlines(keepends=True)
    (folder / "layer_3.txt").write_text(lines[0], "utf-8")
    with pytest.raises(DatasetError, match=r"layer_3\.txt has 1 sequences, but .*layer_1\.txt has 2"):
        read(folder)
    (folder / "layer_3.txt").write_text(lines[0] + lines[0], "utf-8")
    with pytest.raises(DatasetError, match=r"layer_3\.txt, line 2: 4 tokens, but .*layer_1\.txt has 5"):
        read(folder)
