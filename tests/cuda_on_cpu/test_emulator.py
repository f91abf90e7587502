"""The emulated device by itself."""

import os
import subprocess
from pathlib import Path

import pytest

EXTENSION = os.environ.get("COVR_CUDA_ON_CPU")
pytestmark = pytest.mark.skipif(not EXTENSION, reason="needs tests/cuda_on_cpu/build.sh FOLDER '' all")


@pytest.mark.parametrize("seed", ["0", "1", "2", "3"])
def test_small_kernels(seed):
    program = Path(EXTENSION).parent / "emulator_test"
    done = run(program, seed)
    assert done.returncode == 0, done.stdout + done.stderr


def run(program: Path, seed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(
        [str(program), *arguments],
        env=environment | {"COVR_CUDA_ON_CPU_SEED": seed},
        capture_output=True,
        text=True,
        check=False,
    )
