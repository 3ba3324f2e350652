import json
import sys

import pytest

from hub_moe.cli.main import main

ROWS = [{"question": f"what is {n}", "answer": f"it is {n}"} for n in range(20)]


@pytest.fixture
def data(capsys, monkeypatch, tmp_path):
    """Run `hub-moe data` in this process, with a cache of its own: `(exit code, stdout, stderr)`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hub-moe", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    yield run
    datasets.enable_progress_bars()


@pytest.fixture
def tokenizer(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_check_tells_what_would_be_trained_on(data, tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, ROWS[3]])
    code, out, err = data("check", path, "-t", tokenizer, "--chat-template", "plain", "--max-length", 100)
    cells = [" ".join(line.split()) for line in out.splitlines()]

    assert (code, err) == (0, "")
    assert cells[0] == "rows.jsonl, split train: 21 rows."
    assert "Format: prompt-completion (prompt = question, completion = answer), told by the columns." in cells
    assert {"documents to train on 20", "duplicates 1", "rows that do not fit 0"} <= set(cells)
    assert any(cell.startswith("up to 64 20 ###") for cell in cells)
    assert str(tmp_path) not in out


def test_check_names_rows_that_do_not_fit_and_ends_with_1(data, tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"question": "why"}, {"question": "so", "answer": "because " * 80}])
    code, out, err = data("check", path, "-t", tokenizer, "--chat-template", "plain", "--max-length", 100)

    assert code == 1
    assert "row 20: answer is missing" in out
    assert "row 21: " in out
    assert err == (
        "2 of 22 rows do not fit; mend them, or train without them by allow_bad_rows = 0.091 in [data] (a share of the "
        "rows).\n"
    )
    write(path, [{"question": "why", "answer": ""}])
    assert data("check", path, "-t", tokenizer, "--chat-template", "plain")[2].startswith("1 of 1 rows do not fit, and")


def test_check_as_json_holds_everything(data, tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"question": "why"}])
    words = " ".join(f"word{n}" for n in range(20))
    train = write(tmp_path / "train.jsonl", [{"text": words}, {"text": "other"}])
    evaluation = write(tmp_path / "eval.jsonl", [{"body": words}, {"body": "nothing like it"}])

    told = json.loads(data("check", path, "-t", tokenizer, "--chat-template", "plain", "--json")[1])
    assert told["bad_rows"] == [{"row": 20, "reason": "answer is missing"}]
    assert (told["rows"], told["overlap"]) == (21, None)
    assert told["provenance"]["files"][0]["size_bytes"] == path.stat().st_size
    told = json.loads(data("check", train, "-t", tokenizer, "--eval", evaluation, "--json")[1])
    assert (told["overlap"]["eval_rows_hit"], told["overlap"]["share_hit"]) == ([0], 0.5)
    code, out, _ = data("check", train, "-t", tokenizer, "--eval", evaluation)
    assert code == 0
    assert "Overlap: 1 of 2 evaluation rows (50.0%) share 13 words in a row with 1 training rows" in out


def test_show_marks_what_is_trained_on(data, tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    code, out, err = data("show", path, "-t", tokenizer, "--row", 7, "--chat-template", "plain")

    assert (code, out) == (0, "<eos>User: what is 7\n\nAssistant:⟦ it is 7<eos>⟧\n")
    assert err.startswith("Row 7: ")


def test_show_uses_green_on_a_terminal(data, tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert (
        "Assistant:\x1b[32m it is 0<eos>\x1b[0m" in data("show", path, "-t", tokenizer, "--chat-template", "plain")[1]
    )


def test_settings_choose_split_limit_and_columns(data, tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"ask": row["question"], "reply": row["answer"]} for row in ROWS])
    arguments = ("check", path, "-t", tokenizer, "--chat-template", "plain", "--json", "--set", "columns.prompt=ask")
    arguments += ("--set", "columns.completion=reply", "--set", "limit=4", "--set", "streaming=true")
    told = json.loads(data(*arguments)[1])
    assert (told["rows"], told["provenance"]["streaming"], told["provenance"]["limit"]) == (4, True, 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "splitt=test"], "'splitt' is no setting of a data source; did you mean split?"),
        (["--set", "split"], "--set takes KEY=VALUE, such as split=test; 'split' is not that."),
        (["--set", "limit=few"], "limit=few is not a number of rows."),
        (["--set", "streaming=yes"], "streaming=yes is neither true nor false."),
        (["--set", "split=tset"], "rows.jsonl has no split 'tset'; it has train."),
        (["--set", "format=text"], "rows.jsonl cannot be read as text: its columns are question, answer"),
        ([], 'has no chat template: set chat_template = "plain"'),
        (["--row", "99", "--chat-template", "plain"], "rows.jsonl has no row 99; rows count from 0."),
    ],
)
def test_what_is_wrong_is_one_sentence(data, tokenizer, tmp_path, arguments, sentence):
    path = write(tmp_path / "rows.jsonl", ROWS)
    code, out, err = data("show", path, "-t", tokenizer, *arguments)

    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert sentence in err
    assert len(err.splitlines()) == 1
