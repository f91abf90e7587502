"""What the compiler made of the CUDA kernels: registers, shared and local memory, the length of inner loops.

    python benchmarks/cuda_resources.py          # writes benchmarks/results/cuda_resources.md

Reads the sm_90 code in the built extension with cuobjdump, which comes with the CUDA toolkit or with Triton.
It needs no GPU. tests/test_cuda_resources.py fails where a kernel spills.
"""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURE = "sm_90"
SHORT = 8  # instructions of a loop that is not worth a number
TABLE = Path(__file__).with_name("results") / "cuda_resources.md"
HEAD = """# CUDA kernels as compiled

For {architecture} by {compiler}. `python benchmarks/cuda_resources.py` writes this file.

Shared memory is what a kernel declares, with the 1,024 bytes that the system reserves in kernels that use it,
and without what the launch asks for. Loops are the innermost ones that read or write global memory, if longer
than {short} instructions. The second loop of `pixel_kernel` handles twelve pixels a turn: four neighbours in
three planes. Its last template argument says that rows are whole words; the one before, that channels come
last: then the third loop converts and writes vectors of 16 bytes (float: four of them a turn). The second one
says that the picture lies on black (`augment="translate"`).

| kernel | registers | shared bytes | stack bytes | instructions | of its loops |
| --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Kernel:
    name: str
    """File and name, without namespaces and arguments: "filter.cu next_kernel<1>"."""
    registers: int
    shared: int
    """Bytes, without what the launch asks for."""
    stack: int
    """Bytes a thread: spilled registers, and arrays that are not in registers."""
    instructions: int
    loops: tuple[int, ...]
    """Instructions of the innermost loops that read or write global memory, in the order of the code."""


def missing() -> str | None:
    """Why the kernels cannot be read, or None."""
    from covr_fast import _C

    if not _C.with_cuda:
        return "this build has no CUDA kernels: nvcc was not on PATH"
    if _cuobjdump() is None:
        return "cuobjdump is neither on PATH nor beside Triton (pip install triton)"
    if shutil.which("c++filt") is None:
        return "c++filt, of binutils, is not on PATH"
    if not _run("-lelf").count(ARCHITECTURE):
        return f"this build has no {ARCHITECTURE} code: see COVR_CUDA_ARCHITECTURES"
    return None


def kernels() -> list[Kernel]:
    """All of the built extension, by name."""
    code = {name: lines for _, name, lines in _functions(_run("-sass"), r"Function : (\S+)")}
    found = []
    for file, mangled, usage in _functions(_run("-res-usage"), r" Function (\S+):"):
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        stack = number["STACK"] + number["LOCAL"]
        name = f"{file} {_plain_name(mangled)}"
        found.append(Kernel(name, number["REG"], number["SHARED"], stack, *_loops(code[mangled])))
    return sorted(found, key=lambda kernel: kernel.name)


def table() -> str:
    """The committed file."""
    rows = [
        f"| `{k.name}` | {k.registers} | {k.shared} | {k.stack} | {k.instructions} | "
        f"{', '.join(str(loop) for loop in k.loops if loop > SHORT) or '-'} |"
        for k in kernels()
    ]
    return (
        "\n".join([HEAD.format(architecture=ARCHITECTURE, compiler=_compiler(), short=SHORT), *rows]) + "\n"
    )


def _functions(listing: str, header: str) -> Iterator[tuple[str, str, str]]:
    """(source file, mangled name, lines) of every function of a listing."""
    for unit in listing.split("identifier = ")[1:]:
        file = Path(unit.split("\n", 1)[0].strip()).name
        parts = re.split(header, unit)
        for name, lines in zip(parts[1::2], parts[2::2], strict=True):
            yield file, name, lines


def _loops(lines: str) -> tuple[int, tuple[int, ...]]:
    """How many instructions a function has, and its innermost loops that reach global memory."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", lines)
    index = {int(address, 16): i for i, (address, _) in enumerate(code)}
    back = []
    for end, (_, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        begin = index[int(target[1], 16)] if target else end
        if begin < end:
            back.append((begin, end))
    loops = []
    for begin, end in sorted(back):
        inner = any((a, b) != (begin, end) and begin <= a and b <= end for a, b in back)
        if not inner and any(re.search(r"\b(LDG|STG)\b", text) for _, text in code[begin : end + 1]):
            loops.append(end - begin + 1)
    return sum(text != "NOP" for _, text in code), tuple(loops)


def plain_name(demangled: str) -> str:
    """Of a kernel: without namespaces, return type and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|\bcovr::|\bcuda::|^void ", "", demangled)
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def _plain_name(mangled: str) -> str:
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    return plain_name(done.stdout.strip())


def _run(what: str) -> str:
    from covr_fast import _C

    command = [_cuobjdump() or "cuobjdump", "-arch", ARCHITECTURE, what, str(Path(_C.__file__).resolve())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _cuobjdump() -> str | None:
    if path := shutil.which("cuobjdump"):
        return path
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))


def _compiler() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "an nvcc that is not on PATH now"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    return f"nvcc {release[1] if release else 'of an unknown release'}"


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(reason)
    TABLE.write_text(table())
    print(f"wrote {TABLE}")
