"""The tests of the kernels find faults that are planted into them, though there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS, KERNELS, Fault

ROOT = Path(__file__).resolve().parents[2]
# Where `build.sh FOLDER "" all` has built the extension, and one more with each fault.
EXTENSION = os.environ.get("COVR_CUDA_ON_CPU")
built = pytest.mark.skipif(not EXTENSION, reason="needs tests/cuda_on_cpu/build.sh FOLDER '' all")


def test_every_file_with_a_kernel_has_a_fault():
    with_kernels = {path.name for path in KERNELS.glob("*.cu") if "__global__" in path.read_text()}
    assert with_kernels == {fault.file for fault in FAULTS}, "plant a fault per file, in faults.py"


@built
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(fault: Fault):
    fault.source()  # says so where the kernel has changed
    extension = Path(EXTENSION).parent / "faulty" / fault.name / Path(EXTENSION).name
    assert extension.is_file(), "build the faults too: tests/cuda_on_cpu/build.sh FOLDER '' all"
    found = run(extension, fault)
    assert found.returncode == pytest.ExitCode.TESTS_FAILED, found.stdout[-3000:]


def run(extension: Path, fault: Fault) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "needs_cuda", "-p", "no:cacheprovider"]
    environment = os.environ | {"COVR_CUDA_ON_CPU": str(extension)}
    return subprocess.run(
        [*command, *fault.tests], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
