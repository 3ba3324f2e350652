"""Records are read back as they were written, named by their hash, and refused once edited."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_moe.errors import ConfigError, EvaluationError
from hub_moe.evals.records import ModelSource, SampleFile, find_records, read_record, write_record

from .examples import make_record, make_samples


def edit(path, change):
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def test_a_record_and_its_samples_are_read_back_as_they_were_written(tmp_path):
    samples = make_samples()
    stored = write_record(tmp_path, make_record(), samples)
    again = read_record(stored.path)
    assert again.record.id == stored.record.id
    assert again.record.to_dict() == stored.record.to_dict()
    assert again.read_samples() == samples
    assert again.record.samples.num_rows == 4


def test_the_same_run_is_the_same_two_files(tmp_path):
    first = write_record(tmp_path, make_record(), make_samples())
    second = write_record(tmp_path, make_record(), make_samples())
    assert (first.path, first.record.id) == (second.path, second.record.id)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_whole_number_for_a_float_has_the_same_id():
    assert make_record(wall_s=3).id == make_record(wall_s=3.0).id


def test_base_and_fine_tune_differ_in_one_hash_of_their_model():
    base = ModelSource("a", "checkpoint", files={"model.safetensors": "0" * 64})
    patched = ModelSource("b", "expert_patch", files={"expert_patch.safetensors": "1" * 64}, base=base)
    assert len({base.sha256, patched.sha256, replace(patched, base=None).sha256}) == 3
    assert replace(base, name="renamed", revision="f" * 40).sha256 == base.sha256
    assert ModelSource("x", "endpoint").sha256 != ModelSource("y", "endpoint").sha256


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["entries"][0]["metrics"][0].update(value=0.75),
        lambda data: data["model"].update(name="better"),
        lambda data: data["execution"].update(dtype="bfloat16"),
        lambda data: data.update(wall_s=1.0),
        lambda data: data.update(id="0" * 64),
    ],
)
def test_an_edited_record_is_refused(tmp_path, change):
    stored = write_record(tmp_path, make_record(), make_samples())
    edit(stored.path, change)
    with pytest.raises(EvaluationError, match="was edited"):
        read_record(stored.path)


def test_edited_or_missing_samples_are_refused(tmp_path):
    stored = write_record(tmp_path, make_record(), make_samples())
    other = write_record(tmp_path / "other", make_record(), make_samples(scores=(1.0, 1.0, 1.0, 1.0)))
    stored.samples_path.write_bytes(other.samples_path.read_bytes())
    with pytest.raises(EvaluationError, match=r"was edited: it has the hash"):
        stored.read_samples()
    stored.samples_path.unlink()
    with pytest.raises(EvaluationError, match="are missing"):
        stored.read_samples()


@pytest.mark.parametrize("name", ["../up.parquet", "a/b", "..", ".hidden", "c:\\x"])
def test_a_record_cannot_name_samples_outside_its_folder(name):
    with pytest.raises(ConfigError, match="no name of a table"):
        SampleFile(name, "0" * 64, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("model"), "lacks the key model"),
        (lambda data: data.update(modle={}), "did you mean model"),
        (lambda data: data.update(wall_s="long"), "must be a number"),
        (lambda data: data.update(format_version=2), "format version 2"),
        (lambda data: data["entries"][0].pop("tasks"), "lacks the key tasks"),
        (lambda data: data["tokens"].update(prompt="many"), "'prompt' must be a whole number"),
    ],
)
def test_a_damaged_record_is_refused_by_name(tmp_path, change, message):
    stored = write_record(tmp_path, make_record(), make_samples())
    edit(stored.path, change)
    with pytest.raises(ConfigError, match=message):
        read_record(stored.path)


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path, make_record(wall_s=float("nan")), make_samples())
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"]


def test_a_folder_stands_for_its_only_record(tmp_path):
    (tmp_path / "notes.json").write_text("{}", "utf-8")
    stored = write_record(tmp_path, make_record(), make_samples())
    assert read_record(tmp_path).record.id == stored.record.id
    write_record(tmp_path, make_record(created="2026-11-23T12:00:00Z"), make_samples())
    assert [each.record.created[:10] for each in find_records(tmp_path)] == ["2026-11-23", "2026-11-24"]
    with pytest.raises(ConfigError, match="holds 2 records"):
        read_record(tmp_path)


def test_another_table_is_no_table_of_samples(tmp_path):
    stored = write_record(tmp_path, make_record(), make_samples())
    pq.write_table(pa.table({"a": [1]}), stored.samples_path)
    with pytest.raises(EvaluationError, match="was edited"):
        stored.read_samples()
