"""The kernels compile for GPUs that this machine need not have, and use what those are fast by."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this system")


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared_bytes"), [("80", 166912), ("90", 232448)])
def test_every_kernel_compiles_fits_and_multiplies_by_the_matrix_units(capability, shared_bytes, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.experts.compile_kernels", capability],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    units = "wgmma" if capability == "90" else "mma"
    products = {each["kernel"] for each in facts if each[units]}
    experts = {"multiply_rows", "multiply_rows_swiglu", "multiply_rows_swiglu_gradient", "stack_gradient"}
    assert products == experts | {"attend_to_split"}
    others = {"route", "sum_over_experts", "sum_over_pairs", "join_splits"}
    assert {each["kernel"] for each in facts} == products | others
    assert all(each["shared_bytes"] <= shared_bytes for each in facts)
