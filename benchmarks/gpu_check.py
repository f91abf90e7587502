"""Everything that needs a GPU, in one command and eight minutes: build, tests, benchmarks, sanitizers.

    python benchmarks/gpu_check.py [--wheels DIR] [--out benchmarks/results/gpu.json]

Builds the extension in place for the device at hand, runs every `needs_cuda` test with skipping forbidden,
measures the ceilings (copy bandwidth, bfloat16 matrix products) and the CUDA rows of the benchmarks, and puts
compute-sanitizer's memcheck and racecheck over small tests of every kernel. A JSON file (--out) with device,
versions, outcomes, figures and ceilings is written after every step, whatever fails, and at the end the same
as Markdown beside it, to be committed. Exits with 1 if anything failed. No benchmark runs on red tests.

The machine brings a CUDA build of torch with Triton, nvcc and a C++ compiler. For one without internet,
collect the rest elsewhere (with the machine's Python version) and pass the folder:

    pip download -d DIR --only-binary=:all: --python-version 3.12 setuptools pybind11 cmake ninja numpy \\
        pytest pytest-timeout pytest-benchmark hypothesis

The tests of the VLM's streams and graphs want transformers, tokenizers, peft and safetensors too.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from race import heading, rows_of, steady, table, version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "build" / "gpu-packages"  # what --wheels adds: the machine's own Python stays as it is
BUDGET = 8 * 60.0
NEEDED = [
    *("setuptools", "pybind11", "cmake", "ninja", "numpy"),
    *("pytest", "pytest-timeout", "pytest-benchmark", "hypothesis"),
]
KERNELS = ["tests/ops", "tests/buffer/test_buffer_cuda.py"]
TESTS = [
    *KERNELS,
    "tests/buffer/test_buffer.py",
    "tests/test_cuda_graph.py",
    "tests/agents/test_sac_graph.py",
]
VLM_TESTS = ["tests/test_streams.py", "tests/vlm/test_graphed.py"]
VLM_NEEDS = ["transformers", "tokenizers", "peft", "safetensors"]
# Small inputs that still take every kernel and branch: a sanitizer slows kernels down a hundredfold. Matrix
# products are other people's kernels.
SMALL = " and ".join(
    [
        "cuda",
        "not graph",
        "not error_is_not_larger",
        "(not test_returns or 0.01 or leak)",
        "not 9999-4000",
        "(not 40000 or test_cuda_draws)",
        "(not test_batches_equal or shift-device)",
    ]
)


class Check:
    """Runs steps against the time budget and keeps what they said, in the file, too."""

    def __init__(self, out: Path) -> None:
        self.begin = time.monotonic()
        self.out = out
        self.steps: dict[str, dict[str, object]] = {}
        self.result: dict[str, object] = {"ok": False, "steps": self.steps}

    def write(self) -> None:
        self.out.write_text(json.dumps(self.result, indent=2) + "\n")

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> bool:
        limit = min(limit, BUDGET - (time.monotonic() - self.begin))
        begin = time.monotonic()
        if limit <= 0:
            ok, tail = False, "not run: out of time"
        else:
            ok, tail = execute(command, limit, environment)
        seconds = round(time.monotonic() - begin, 1)
        said = tail.strip().splitlines()[-1:] if ok else tail[-4000:].splitlines()
        self.steps[name] = {"ok": ok, "seconds": seconds, "said": said}
        self.write()
        print(f"{name}: {'ok' if ok else 'FAILED'} ({seconds:.0f} s)", flush=True)
        if not ok:
            print(tail[-4000:], flush=True)
        return ok


def execute(command: list[str], limit: float, environment: dict[str, str]) -> tuple[bool, str]:
    """Whether the command succeeded within `limit` seconds, and what it printed."""
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **search_paths(), "COVR_REQUIRE_CUDA": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return False, str(error)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what a sanitizer has started, or it keeps the device
        output, _ = process.communicate()
        return False, f"{output}\ntimed out after {limit:.0f} s"
    return process.returncode == 0, output


def search_paths() -> dict[str, str]:
    """The checkout before what --wheels installed before what was set; nvcc is often not on PATH."""
    python = [str(ROOT), str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    programs = [str(PACKAGES / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, python)),
        "PATH": os.pathsep.join([*filter(None, programs), "/usr/local/cuda/bin"]),
    }


def device_facts() -> dict[str, object]:
    if not torch.cuda.is_available():
        raise SystemExit("gpu-check: torch sees no CUDA device (a CPU build of torch, or no driver)")
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "versions": {
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            "triton": version("triton"),
            "nvcc": last_line(["nvcc", "--version"]),
            "driver": last_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
            "liger-kernel": version("liger-kernel"),
            "torchrl": version("torchrl"),
            "python": platform.python_version(),
        },
    }


def last_line(command: list[str]) -> str | None:
    ok, output = execute(command, 20, {})
    return output.strip().splitlines()[-1] if ok and output.strip() else None


def ceilings() -> dict[str, float]:
    """What this device can do: bytes per second of a copy, floating-point operations of a bf16 product."""

    def best(function) -> float:
        return min(steady(function, "cuda") for _ in range(5))

    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / best(lambda: a @ b)
    return {"copy_bytes_per_second": copy, "bf16_product_flops": product}


def report(result: dict) -> str:
    """The outcome as Markdown."""
    lines = [heading("cuda"), "| step | outcome | seconds |", "| --- | --- | --- |"]
    for name, step in result["steps"].items():
        lines.append(f"| {name} | {'ok' if step['ok'] else 'FAILED'} | {step['seconds']} |")
    if "ceilings" in result:
        copy, product = (value / 1e12 for value in result["ceilings"].values())
        lines.append(f"\nCeilings: copy {copy:.2f} TB/s, bfloat16 product {product:.0f} TFLOP/s.")
    if "benchmarks" in result:
        lines += ["", table(result["benchmarks"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels for a machine without internet")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = device_facts()
    check = Check(out)
    check.result.update(facts)

    python = sys.executable
    missing = [name for name in NEEDED if version(name) is None]
    if arguments.wheels and missing:
        source = ["--no-index", "--find-links", str(arguments.wheels.resolve()), "--target", str(PACKAGES)]
        check.run("wheels", [python, "-m", "pip", "install", "-q", "--upgrade", *source, *missing], 120)
    built = check.run(
        "build",
        [python, "setup.py", "-q", "build_ext", "--inplace"],
        180,
        COVR_CUDA="ON",
        COVR_CUDA_ARCHITECTURES=str(facts["capability"]).replace(".", "") + "-real",
    )
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "needs_cuda"]
    tested = built and check.run("tests", [*pytest, *TESTS], 180)
    if tested:
        if absent := [name for name in VLM_NEEDS if version(name) is None]:
            said = [f"not run: {', '.join(absent)} missing"]
            check.steps["VLM tests"] = {"ok": False, "seconds": 0.0, "said": said}
        else:
            check.run("VLM tests", [*pytest, *VLM_TESTS], 120)
        check.run("compiled update", [*pytest, "tests/agents/test_sac_compile.py"], 120)
        check.result["ceilings"] = ceilings()
        raw = out.with_name(out.stem + "_benchmarks.json")
        if check.run("benchmarks", [*pytest, "benchmarks/bench_ops.py", f"--benchmark-json={raw}"], 180):
            check.result["benchmarks"] = rows_of(raw)
    if built:
        sanitizer = shutil.which("compute-sanitizer", path=search_paths()["PATH"]) or "compute-sanitizer"
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
            # The caching allocator would hide reads past the end of a tensor.
            check.run(
                tool, [*command, *pytest, "-x", "-k", SMALL, *KERNELS], 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
            )
    check.result["ok"] = tested and all(step["ok"] for step in check.steps.values())
    check.write()
    out.with_suffix(".md").write_text(report(check.result))
    print(f"written to {out} and, as Markdown, beside it")
    return 0 if check.result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
