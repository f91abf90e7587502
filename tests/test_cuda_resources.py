"""The CUDA kernels as the compiler made them: nothing spills, and the pixel kernels' loops stay short."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import cuda_resources


@pytest.fixture(scope="module")
def kernels():
    if reason := cuda_resources.missing():
        pytest.skip(reason)
    return {kernel.name: kernel for kernel in cuda_resources.kernels()}


def test_no_kernel_uses_local_memory(kernels):
    """A spill costs memory traffic in every thread; an array with run-time indices lies there too."""
    assert {name: kernel.stack for name, kernel in kernels.items() if kernel.stack > 0} == {}


def test_pixel_kernels_are_short_and_leave_room_for_every_thread(kernels):
    """Of a multiprocessor: 2,048, which have 32 registers each."""
    pixels = [kernel for name, kernel in kernels.items() if "pixel_kernel" in name]
    assert len(pixels) == 32  # four dtypes, edges or black, two layouts, words or bytes
    assert max(kernel.registers for kernel in pixels) <= 32
    for kernel in pixels:
        _, black, _, words = kernel.name.removesuffix(">").split("<")[1].split(", ")
        if words == "true":
            assert 30 < kernel.loops[1] <= (103 if black == "true" else 100), kernel.name


def test_the_table_names_every_kernel(kernels):
    listed = re.findall(r"^\| `(.*?)` \|", cuda_resources.TABLE.read_text(), re.MULTILINE)
    assert set(listed) == set(kernels), "run: python benchmarks/cuda_resources.py"


LISTING = """
identifier = /somewhere/kernels/cuda/some.cu
\t\tFunction : _Z4kernILi1EEvPf
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   FADD R2, R2, R3 ;
        /*0050*/              @!P1 BRA 0x40 ;
        /*0060*/                   STG.E desc[UR4][R4.64], R2 ;
        /*0070*/               @P2 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP;
"""
USAGE = """
identifier = /somewhere/kernels/cuda/some.cu
 Function _Z4kernILi1EEvPf:
  REG:40 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_spills_and_loops_are_read_off_the_listing(monkeypatch):
    """One kernel with a spill, an outer loop, and two inner ones, of which one reads global memory."""
    monkeypatch.setattr(cuda_resources, "_run", {"-sass": LISTING, "-res-usage": USAGE}.__getitem__)
    monkeypatch.setattr(cuda_resources, "_plain_name", lambda mangled: mangled)
    (kernel,) = cuda_resources.kernels()
    assert kernel == cuda_resources.Kernel(
        "some.cu _Z4kernILi1EEvPf", registers=40, shared=16, stack=12, instructions=10, loops=(3,)
    )


@pytest.mark.parametrize(
    "arguments, name",
    [("<covr::BFloat16, true>(covr::Job, int*)", "kern<BFloat16, true>"), ("(float const*, int)", "kern")],
)
def test_names_are_those_of_the_source(arguments, name):
    assert cuda_resources.plain_name(f"void covr::cuda::(anonymous namespace)::kern{arguments}") == name
