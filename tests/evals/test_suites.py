import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hub_moe.errors import ConfigError
from hub_moe.evals.suites import DECLARATIONS, list_suites, load_suite

ROOT = Path(__file__).parents[2]
COMMIT = re.compile("[0-9a-f]{40}")


def write_suite(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


ENTRY = '[[entries]]\nname = "a"\ntasks = ["offline_cloze"]\nsource = "hub_moe/offline"\n'


def test_every_suite_is_read_and_described():
    suites = {suite.name: suite for suite in list_suites()}
    assert {"standard", "quick", "code", "language-modelling", "offline", "gsm8k", "text"} <= set(suites)
    assert all(suite.description for suite in suites.values())
    assert {entry.name for entry in suites["standard"].entries} == {
        *("hellaswag", "arc_easy", "arc_challenge", "winogrande", "piqa", "mmlu", "gsm8k", "boolq", "lambada_openai")
    }


def test_every_dataset_of_our_suites_is_pinned_to_a_commit():
    from hub_moe.evals.dataset_access import hub_dataset
    from hub_moe.evals.task_files import find_task_files

    used = [
        (entry, hub_dataset(file.settings))
        for suite in list_suites()
        for entry in suite.entries
        for file in find_task_files(suite, entry)
    ]
    assert len({path for _, path in used if path}) >= 10
    assert [entry.name for entry, path in used if path and not COMMIT.fullmatch(entry.datasets.get(path, ""))] == []
    assert [entry.name for entry, path in used if entry.datasets and set(entry.datasets) != {path}] == []


def test_a_group_of_lm_eval_is_taken_apart_in_its_order():
    from hub_moe.evals.task_files import find_task_files

    suite = load_suite("standard", tasks=["mmlu"])
    names = [file.name for file in find_task_files(suite, suite.entries[0])]
    assert len(names) == len(set(names)) == 57
    assert names[0] == "mmlu_abstract_algebra"  # the first subject of STEM, which lm_eval puts first


def test_the_hash_of_a_suite_is_of_what_it_asks():
    suite = load_suite("offline")
    assert load_suite(str(DECLARATIONS / "suites" / "offline.toml")).source == suite.source
    others = [
        load_suite("offline", limit=10),
        load_suite("offline", num_fewshot=1),
        load_suite("offline", tasks=["cloze"]),
    ]
    assert len({each.source.sha256 for each in [suite, *others]}) == 4
    assert {each.source.name for each in others} == {"offline"}


def test_limits_and_examples_of_the_user_hold_for_every_entry():
    suite = load_suite("quick", limit=7, num_fewshot=3)
    assert {(entry.limit, entry.num_fewshot) for entry in suite.entries} == {(7, 3)}
    assert {entry.limit for entry in load_suite("quick").entries} == {200}


def test_entries_are_chosen_by_their_name_or_that_of_a_task_in_the_order_asked():
    assert [entry.name for entry in load_suite("offline", tasks=["sorting", "cloze"]).entries] == ["sorting", "cloze"]
    assert [entry.tasks for entry in load_suite("offline", tasks=["offline_text"]).entries] == [("offline_text",)]


def test_a_suite_of_ones_own_takes_its_name_from_the_file(tmp_path):
    suite = load_suite(write_suite(tmp_path, f'description = "d"\n{ENTRY}'))
    assert (suite.name, suite.entries[0].num_fewshot, suite.folder) == ("mine", None, str(tmp_path))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name_or_path": "ofline"}, r"There is no suite 'ofline'; did you mean offline\?"),
        ({"name_or_path": "zzz"}, "suites are code, code-running, gsm8k"),
        ({"name_or_path": "missing.toml"}, "There is no suite file missing.toml"),
        ({"name_or_path": "standard", "tasks": ["hellaswg"]}, r"no task 'hellaswg'; did you mean hellaswag\?"),
        ({"name_or_path": "offline", "limit": 0}, "limit=0 asks no documents of cloze"),
        ({"name_or_path": "offline", "limit": -3}, "limit=-3 asks no documents"),
        ({"name_or_path": "offline", "num_fewshot": -1}, "num_fewshot=-1 of cloze must be 0 or more"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_names(asked, message):
    with pytest.raises(ConfigError, match=message):
        load_suite(**asked)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'description = "d"\nchat_tempate = true\n{ENTRY}', r"no key 'chat_tempate'; did you mean chat_template\?"),
        (f'description = "d"\n{ENTRY}num_fewshots = 1\n', r"no key 'num_fewshots'; did you mean num_fewshot\?"),
        (f'description = "d"\nfolder = "x"\n{ENTRY}', "no key 'folder'"),
        (f'description = "d"\n{ENTRY}{ENTRY}', "two entries of the name a"),
        ('description = "d"\nentries = []', "has no entries"),
        (f'description = "d"\n{ENTRY.replace("hub_moe/offline", "somewhere")}', "must be lm_eval/FOLDER"),
        (f'description = "d"\n{ENTRY.replace(chr(34) + "offline_cloze" + chr(34), "")}', "names no tasks"),
        (ENTRY, "lacks the key description"),
        ("entries = [", "not valid TOML"),
    ],
)
def test_a_wrong_declaration_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_suite(write_suite(tmp_path, text))


def test_reading_suites_imports_neither_torch_nor_lm_eval():
    code = (
        "import sys; from hub_moe.evals.suites import list_suites; list_suites()\n"
        "print({'torch', 'transformers', 'lm_eval'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_wheel_carries_the_declarations_to_where_they_are_looked_for_first(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    built = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path)))
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
    for kind, ending in (("suites", "*.toml"), ("tasks", "**/*.yaml")):
        for path in (DECLARATIONS / kind).glob(ending):
            assert f"hub_moe/evals/declarations/{path.relative_to(DECLARATIONS).as_posix()}" in names
