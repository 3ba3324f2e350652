"""`hub-moe env` says which experts are in use and why."""

import json

from .test_main import run


def test_env_tells_versions_and_the_products_that_were_asked_for():
    done = run("env", "--json", HUB_MOE_CPU_EXPERTS="torch")
    facts = json.loads(done.stdout)

    assert facts["versions"].keys() >= {"python", "hub_moe", "torch", "transformers"}
    assert facts["cpu_experts"] == {"products": "torch", "why": "HUB_MOE_CPU_EXPERTS=torch"}
    assert facts["gpu_experts"].keys() == {"products", "why"}
    assert facts["torch_bfloat16"]["bfloat16_gflops"] > 0


def test_without_a_compiler_env_says_that_torch_is_in_use_and_why(tmp_path):
    done = run("env", CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path), COLUMNS="200")

    assert done.returncode == 0, done.stderr
    assert "CXX names no-such-compiler, which is no program here" in done.stdout


def test_compiled_experts_that_cannot_be_had_are_an_error_when_asked_for(tmp_path):
    wanted = {"HUB_MOE_CPU_EXPERTS": "compiled", "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = run("env", **wanted)

    assert done.returncode == 1
    assert done.stderr.startswith("Error: The compiled experts need a C++ compiler")
    assert not any(tmp_path.glob("hub_moe/*.so"))


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path):
    done = run("env", HUB_MOE_CPU_EXPERTS="compiled", CXX="false", XDG_CACHE_HOME=str(tmp_path))

    assert done.returncode == 1
    assert "could not be built" in done.stderr
    assert list((tmp_path / "hub_moe").iterdir()) == []


def test_another_choice_is_an_error_that_names_the_choices():
    done = run("env", HUB_MOE_CPU_EXPERTS="fast")

    assert done.returncode == 1
    assert "HUB_MOE_CPU_EXPERTS is 'fast'; compiled, torch or nothing was expected." in done.stderr


def test_env_tells_what_was_asked_for_on_a_gpu_and_refuses_what_it_does_not_know():
    done = run("env", "--json", HUB_MOE_CPU_EXPERTS="torch", HUB_MOE_GPU_EXPERTS="grouped_mm")
    expected = {"products": "grouped_mm of transformers", "why": "HUB_MOE_GPU_EXPERTS=grouped_mm"}
    assert json.loads(done.stdout)["gpu_experts"] == expected

    done = run("env", HUB_MOE_CPU_EXPERTS="torch", HUB_MOE_GPU_EXPERTS="fast")
    assert done.returncode == 1
    assert "HUB_MOE_GPU_EXPERTS is 'fast'; triton, grouped_mm or nothing was expected." in done.stderr


def test_a_compiler_may_be_a_command_of_several_words(tmp_path):
    done = run("env", HUB_MOE_CPU_EXPERTS="compiled", CXX="env g++", XDG_CACHE_HOME=str(tmp_path))

    assert done.returncode == 0, done.stderr
    assert any(tmp_path.glob("hub_moe/*.so"))


def test_a_compiler_that_is_no_command_is_told(tmp_path):
    done = run("env", HUB_MOE_CPU_EXPERTS="compiled", CXX="'g++", XDG_CACHE_HOME=str(tmp_path))

    assert done.returncode == 1
    assert "which is no command: No closing quotation." in done.stderr


def test_a_cache_folder_that_cannot_be_made_costs_only_the_compiled_experts(tmp_path):
    (tmp_path / "file").touch()
    done = run("env", "--json", XDG_CACHE_HOME=str(tmp_path / "file"))

    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["cpu_experts"]["products"] == "torch"
    assert "could not be built in" in facts["cpu_experts"]["why"]
