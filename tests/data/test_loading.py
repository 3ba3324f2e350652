import gc
import hashlib
import json

import pytest

from hub_moe.data import DataSource, load_rows
from hub_moe.errors import DatasetError

ROWS = [{"question": f"what is {n}", "answer": f"it is {n}"} for n in range(12)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of datasets of its own, without progress bars."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_CACHE_HOME", str(folder))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def write_csv(path, separator=","):
    lines = [separator.join(row.values()) for row in ROWS]
    path.write_text("\n".join([separator.join(ROWS[0]), *lines]) + "\n")
    return path


def write_json(path):
    path.write_text(json.dumps(ROWS))
    return path


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets leaves streamed csv files open
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_jsonl),
        ("rows.json", write_json),
        ("rows.parquet", write_parquet),
        ("rows.csv", write_csv),
        ("rows.tsv", lambda path: write_csv(path, "\t")),
    ],
)
def test_files_of_every_kind_give_the_same_rows_and_record_what_was_read(tmp_path, name, write, streaming):
    path = write(tmp_path / name)
    rows = load_rows(DataSource(str(path), streaming=streaming))
    record = rows.provenance.files[0]

    assert list(rows) == ROWS
    assert rows.columns == ("question", "answer")
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record.size_bytes == path.stat().st_size
    assert (rows.provenance.kind, rows.provenance.split, rows.provenance.streaming) == ("files", "train", streaming)
    del rows
    gc.collect()


def test_no_path_of_this_machine_is_recorded(tmp_path, monkeypatch):
    (tmp_path / "sets").mkdir()
    write_jsonl(tmp_path / "sets" / "rows.jsonl")
    monkeypatch.chdir(tmp_path)

    relative = load_rows(DataSource("sets/rows.jsonl")).provenance
    assert (relative.source, relative.files[0].name) == ("sets/rows.jsonl", "sets/rows.jsonl")
    absolute = load_rows(DataSource(str(tmp_path / "sets" / "rows.jsonl"))).provenance
    assert (absolute.source, absolute.files[0].name) == ("rows.jsonl", "rows.jsonl")
    folder = load_rows(DataSource(str(tmp_path / "sets"))).provenance
    assert (folder.source, folder.files[0].name) == ("sets", "sets/rows.jsonl")
    assert str(tmp_path) not in json.dumps([p.to_dict() for p in (relative, absolute, folder)])


def test_a_text_file_is_one_row(tmp_path):
    (tmp_path / "play.txt").write_text("one\n\ntwo\n")
    assert list(load_rows(DataSource(str(tmp_path / "play.txt")))) == [{"text": "one\n\ntwo\n"}]


def test_a_folder_has_the_splits_that_its_files_are_named_after(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "test.jsonl", ROWS[:2])

    assert len(list(load_rows(DataSource(str(tmp_path))))) == 12
    test = load_rows(DataSource(str(tmp_path), split="test"))
    assert len(list(test)) == 2
    assert [file.name for file in test.provenance.files] == [f"{tmp_path.name}/test.jsonl"]
    with pytest.raises(DatasetError, match=r"has no split 'tset'; it has test, train\.|it has train, test\."):
        load_rows(DataSource(str(tmp_path), split="tset"))


def test_several_files_are_one_after_the_other(tmp_path):
    paths = [str(write_jsonl(tmp_path / f"{n}.jsonl", ROWS[n : n + 1])) for n in range(2)]
    rows = load_rows(DataSource(paths))

    assert list(rows) == ROWS[:2]
    assert [file.name for file in rows.provenance.files] == ["0.jsonl", "1.jsonl"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_limit_reads_the_first_rows(tmp_path, streaming):
    path = str(write_jsonl(tmp_path / "rows.jsonl"))
    assert list(load_rows(DataSource(path, limit=3, streaming=streaming))) == ROWS[:3]
    assert len(list(load_rows(DataSource(path, limit=99, streaming=streaming)))) == 12


def test_a_slice_of_a_split_is_read_but_not_streamed(tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl"))
    assert list(load_rows(DataSource(path, split="train[2:4]"))) == ROWS[2:4]
    with pytest.raises(DatasetError, match=r"cannot be streamed; use limit"):
        load_rows(DataSource(path, split="train[2:4]", streaming=True))


@pytest.mark.parametrize(
    ("files", "options", "sentence"),
    [
        ({}, {}, r"There is no file or folder .*rows\.jsonl, nor is it a Hub dataset"),
        ({"rows.jsonl": ""}, {}, r"rows\.jsonl is empty\."),
        ({"rows.jsonl": "\n"}, {}, r"rows\.jsonl (cannot be read|holds no rows)"),
        ({"rows.jsonl": '{"text": "a"}\n{"text": \n'}, {}, r"rows\.jsonl cannot be read: .*row 1"),
        ({"rows.jsonl": '{"text": "a"}\n'}, {"split": "test"}, r"has no split 'test'; it has train\."),
        ({"rows.jsonl": '{"text": "a"}\n'}, {"revision": "main"}, r"is on disk and has no revision"),
        ({"rows.jsonl": '{"text": "a"}\n'}, {"config": "main"}, r"is on disk and has no config"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_file_is_one_sentence(tmp_path, files, options, sentence, streaming):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=sentence) as caught:
        list(load_rows(DataSource(str(tmp_path / "rows.jsonl"), streaming=streaming, **options)))
    assert len(str(caught.value).splitlines()) == 1


def test_files_of_unknown_or_different_kinds_are_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(DatasetError, match=r"ends in \.xlsx; rows are read from json, jsonl, parquet"):
        load_rows(DataSource(str(tmp_path / "rows.xlsx")))
    mixed = [str(write_jsonl(tmp_path / "a.jsonl")), str(write_csv(tmp_path / "b.csv"))]
    with pytest.raises(DatasetError, match=r"different kinds \(\.csv, \.jsonl\)"):
        load_rows(DataSource(mixed))


def test_text_that_is_not_utf8_is_one_sentence(tmp_path):
    (tmp_path / "play.txt").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"play\.txt cannot be read: .*utf-8"):
        load_rows(DataSource(str(tmp_path / "play.txt")))


def test_a_file_with_a_header_and_no_rows_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    with pytest.raises(DatasetError, match=r"rows\.csv (holds no rows|cannot be read)"):
        load_rows(DataSource(str(tmp_path / "rows.csv")))


def test_dataset_scripts_are_refused(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DatasetError, match=r"mine is a dataset script, which would run its author's code"):
        load_rows(DataSource(str(folder)))


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="holds no data files"):
        load_rows(DataSource(str(tmp_path)))


@pytest.mark.parametrize(("options", "sentence"), [({"limit": 0}, "limit=0"), ({"source": ()}, "needs a Hub dataset")])
def test_a_source_that_names_nothing_is_refused(options, sentence):
    with pytest.raises(DatasetError, match=sentence):
        DataSource(**{"source": "rows.jsonl", **options})


PUSH = """
import datasets
from huggingface_hub import HfApi
rows = datasets.Dataset.from_list([dict(question=f"what is {n}", answer=f"it is {n}") for n in range(12)])
datasets.DatasetDict(train=rows, test=rows.select(range(2))).push_to_hub("alice/questions")
print(HfApi().dataset_info("alice/questions").sha)
rows.select(range(5)).push_to_hub("alice/questions", split="train")
rows.push_to_hub("alice/two-configs", "one")
rows.push_to_hub("alice/two-configs", "two")
api = HfApi()
api.create_repo("alice/scripted", repo_type="dataset")
api.upload_file(path_or_fileobj=b"raise SystemExit('ran')", path_in_repo="scripted.py", repo_id="alice/scripted",
    repo_type="dataset")
"""

READ = """
import json, datasets
from hub_moe.data import DataSource, load_rows
from hub_moe.errors import DatasetError
first = {first!r}

def read(**options):
    rows = load_rows(DataSource(**options))
    found = list(rows)
    return [len(found), found[0], rows.provenance.to_dict()]

def fail(**options):
    try:
        read(**options)
    except (DatasetError, OSError) as error:
        return f"{{type(error).__name__}}: {{error}}"

name = "alice/questions"
print(json.dumps(dict(
    newest=read(source=name),
    first=read(source=name, revision=first),
    streamed=read(source=name, revision=first, streaming=True, limit=7),
    test=read(source=name, split="test"),
    split=fail(source=name, split="tset"),
    config=fail(source=name, config="main"),
    choose=fail(source="alice/two-configs"),
    two=read(source="alice/two-configs", config="two"),
    script=fail(source="alice/scripted"),
    nothing=fail(source="alice/nothing"),
    revision=fail(source=name, revision="v9"),
)))
"""


def test_a_hub_dataset_is_read_at_a_commit_that_is_recorded(hub):
    first = hub.run_python(PUSH).split()[-1]
    told = json.loads(hub.run_python(READ.format(first=first)).splitlines()[-1])

    assert (told["newest"][0], told["first"][0], told["streamed"][0], told["test"][0]) == (5, 12, 7, 2)
    assert told["first"][1] == ROWS[0] == told["streamed"][1]
    assert told["first"][2]["revision"] == told["streamed"][2]["revision"] == first
    newest = told["newest"][2]
    assert len(newest["revision"]) == 40
    assert newest["revision"] != first
    assert (newest["source"], newest["kind"], newest["config"]) == ("alice/questions", "hub", "default")
    assert told["two"][2]["config"] == "two"
    assert told["split"].startswith("DatasetError: alice/questions has no split 'tset'; it has ")
    assert told["config"] == "DatasetError: alice/questions has no config 'main'; it has default."
    assert told["choose"] == "DatasetError: alice/two-configs has several configs; choose one of one, two."
    assert "is a dataset script, which would run" in told["script"]
    assert told["nothing"].startswith("RepositoryNotFoundError")
    assert told["revision"].startswith("RevisionNotFoundError")
