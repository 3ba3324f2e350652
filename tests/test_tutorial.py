"""The tutorial is true: its commands run one after the other, against a real Hub, with a model of seconds."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from subprocess import PIPE

import pytest

pytest.importorskip("dulwich")
pytest.importorskip("starlette")

TUTORIAL = (Path(__file__).parent.parent / ".github" / "FIRST_EXPERT_PATCH.md").read_text("utf-8")


@pytest.mark.slow
def test_the_first_expert_patch_is_made_proposed_reviewed_merged_and_used(tmp_path, tiny_model, tiny_tokenizer):
    demo = tmp_path / "runs" / "demo"
    tiny_model.save_pretrained(demo / "base" / "model")
    tiny_tokenizer.save_pretrained(demo / "base" / "model")
    rows = [json.dumps({"text": f"Topic {number}: " + "one word after the other. " * number}) for number in range(60)]
    (demo / "reference.jsonl").write_text("\n".join(rows))
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
    commands = "\n".join(content for language, content in blocks if language == "bash")
    (serve,) = (content.split() for language, content in blocks if language == "sh")
    (program,) = (content for language, content in blocks if language == "python")
    assert all(f"hub-moe {verb} " in commands for verb in ("publish", "train", "contribute", "review", "merge"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment["PATH"]])
    environment |= {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "COLUMNS": "160"}
    with subprocess.Popen(
        [*serve, "--port", "0"], cwd=tmp_path, env=environment, stdout=PIPE, stderr=PIPE, text=True
    ) as server:
        said = server.stdout.readline() + server.stderr.readline() + server.stderr.readline()
        exports = [line for line in said.splitlines() if line.startswith("export ")]
        script = "\n".join(["set -euo pipefail", *exports, commands, f"{sys.executable} - <<'END'\n{program}END"])
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        server.terminate()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ACCEPT" in done.stdout
    assert "merge-1 " in done.stdout
    assert "The import statement" in done.stdout
