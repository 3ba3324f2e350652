"""What is imported when: `import hub_moe`, the command line's help and the Hub side stay light."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hub_moe"
HUB_MOE = Path(sysconfig.get_path("scripts")) / "hub-moe"


def modules_after(code):
    """The top-level modules that a fresh interpreter holds after running `code`."""
    report = "; import json, sys; print(json.dumps([n for n in sys.modules if '.' not in n]))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_hub_moe_imports_neither_torch_nor_transformers_nor_huggingface_hub():
    assert modules_after("import hub_moe") & {"torch", "transformers", "huggingface_hub"} == set()


def test_telling_versions_imports_none_of_the_packages():
    code = "from hub_moe.environment import describe_versions; describe_versions()"
    assert modules_after(code) & {"torch", "transformers", "huggingface_hub"} == set()


def test_touching_a_model_name_imports_transformers_and_registers_the_config():
    code = "import hub_moe; hub_moe.HubMoeConfig; from transformers import AutoConfig; "
    code += "AutoConfig.for_model('hub_moe')"
    assert "transformers" in modules_after(code)


def test_an_unknown_name_is_an_attribute_error_that_imports_nothing():
    import hub_moe

    with pytest.raises(AttributeError, match="HubMoeConfg"):
        hub_moe.HubMoeConfg  # noqa: B018


def test_the_hub_side_and_the_command_line_import_no_torch():
    folders = [PACKAGE / layer for layer in ("cards", "hub", "hubserver", "cli")]
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for folder in folders
        for path in folder.rglob("*.py")
    ]
    assert "hub_moe.cli.main" in names
    assert "torch" not in modules_after(f"import {', '.join(names)}")


def test_the_help_of_the_command_line_imports_no_torch():
    command = [sys.executable, "-X", "importtime", HUB_MOE, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert imported & {"torch", "transformers", "datasets"} == set()
