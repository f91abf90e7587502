"""The Triton kernels compiled for every architecture that the CUDA kernels are built for, without a GPU."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from covr_fast.kernels.triton import loss  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ROWS = {"labels": "*i64", "scale": "*fp32", "peaks": "*fp32", "log_sums": "*fp32"}
NUMBERS = {"vocabulary": "i32", "smoothing": "fp32"}


def resources(kernel, signature, constants, architecture, folder) -> dict[str, int]:
    """What ptxas gave the kernel."""
    signature = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    out = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
@pytest.mark.parametrize("name", ["_reduce_rows", "_write_gradient"])
def test_kernels_fit_the_registers(name, architecture, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    logits = {"logits": f"*{dtype}"}
    if name == "_reduce_rows":
        signature = {"losses": "*fp32", **ROWS, **logits, **NUMBERS}
        constants = {"SMOOTH": True, "BLOCK": loss._BLOCK}
    else:
        signature = {"out": f"*{dtype}", "upstream": "*fp32", **ROWS, **logits, **NUMBERS}
        constants = {"BLOCK": loss._BLOCK}
    used = resources(getattr(loss, name), signature, constants, architecture, tmp_path)
    # Two programs of 256 threads share a multiprocessor's 65,536 registers, and nothing is spilled.
    assert used["REG"] <= 128
    assert used["STACK"] <= 16
    assert used["LOCAL"] == 0
