"""mamba-ssm's own kernels on the CPU, by Triton's interpreter, in an environment of their own (`make test-slow`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-kernels" / "bin" / "python"
MAX_DIFFERENCE = 5e-7
ACCUMULATED = {"packed gradient of dt", "packed gradient of A"}
"""Sums over all tokens of decays that PyTorch's reference also rounds to fp32."""
MAX_ACCUMULATED_DIFFERENCE = 5e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interpreted_kernels_equal_pytorch_forward_and_in_every_gradient() -> None:
    if not PYTHON.exists():
        pytest.skip("mamba-ssm is not installed for the CPU; `make test-slow` does that")
    program = ROOT / "tests" / "reference" / "interpreted_kernels.py"
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "model"))
    finished = subprocess.run(
        [PYTHON, program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    differences: dict[str, float] = json.loads(finished.stdout)
    assert len(differences) == 13
    too_large = {
        name: difference
        for name, difference in differences.items()
        if not difference <= (MAX_ACCUMULATED_DIFFERENCE if name in ACCUMULATED else MAX_DIFFERENCE)
    }
    assert too_large == {}
