"""Everything that needs a GPU, in one command and eight minutes: build, tests, sanitizers, benchmarks.

    python benchmarks/gpu_check.py [--wheels DIR] [--out benchmarks/results/gpu.json]

Builds the extension in place for the device at hand, runs every `needs_cuda` test with skipping forbidden,
compute-sanitizer's memcheck and racecheck over the kernels' small tests, measures the ceilings (copy
bandwidth, bfloat16 matrix products) and runs the CUDA rows of the benchmarks. With --wheels, what is missing
is first installed from that folder, without an index. Writes one JSON file, whatever fails; exits with 1 if
anything did. No benchmark runs on red tests.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 8 * 60.0
NEEDED = ["pybind11", "cmake", "ninja", "pytest", "pytest-timeout", "pytest-benchmark", "hypothesis"]
# Small inputs that still take every kernel and branch: a sanitizer slows kernels down a hundredfold.
SMALL = "cuda and not 151936 and not graph and (not 40000 or test_cuda_draws) and not 9999-4000"


class Check:
    """Runs steps against the time budget and keeps what they said."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.steps: dict[str, dict[str, object]] = {}

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> bool:
        limit = min(limit, BUDGET - (time.monotonic() - self.begin))
        if limit <= 0:
            self.steps[name] = {"ok": False, "why": "not run: out of time"}
            return False
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "COVR_REQUIRE_CUDA": "1", **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
            ok, tail = done.returncode == 0, done.stdout[-4000:]
        except subprocess.TimeoutExpired as expired:
            output = expired.stdout or b""
            ok, tail = False, f"timed out after {limit:.0f} s\n{output[-4000:].decode(errors='replace')}"
        except FileNotFoundError as error:
            ok, tail = False, str(error)
        self.steps[name] = {"ok": ok, "seconds": round(time.monotonic() - begin, 1), "tail": tail}
        print(f"{name}: {'ok' if ok else 'FAILED'} ({time.monotonic() - begin:.0f} s)", flush=True)
        if not ok:
            print(tail, flush=True)
        return ok


def device_facts() -> dict[str, object]:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu-check: torch sees no CUDA device (a CPU build of torch, or no driver)")
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def ceilings() -> dict[str, float]:
    """What this device can do: bytes per second of a copy, floating-point operations of a bf16 product."""
    import torch

    def best(function, repetitions: int = 20) -> float:
        times = []
        for _ in range(repetitions):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return min(times)

    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / best(lambda: a @ b)
    return {"copy_bytes_per_second": copy, "bf16_product_flops": product}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels for a machine without internet")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    facts = device_facts()
    check = Check()
    if arguments.wheels:
        source = ["--no-index", "--find-links", str(arguments.wheels.resolve())]
        check.run("wheels", [python, "-m", "pip", "install", "-q", *source, *NEEDED], 120)
    architecture = str(facts["capability"]).replace(".", "") + "-real"
    built = check.run(
        "build",
        [python, "setup.py", "-q", "build_ext", "--inplace"],
        180,
        COVR_CUDA="ON",
        COVR_CUDA_ARCHITECTURES=architecture,
    )
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tested = built and check.run("tests", [*pytest, "-m", "needs_cuda", "tests"], 180)
    if built:
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        files = [
            f"tests/ops/test_{stem}.py" for stem in ("returns", "filter", "weights", "frames", "sum_tree")
        ]
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
            small = [*pytest, "-x", "-m", "needs_cuda", "-k", SMALL, *files]
            # The caching allocator would hide reads past the end of a tensor.
            check.run(tool, [*command, *small], 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    result: dict[str, object] = {**facts, "steps": check.steps}
    if tested:
        result["ceilings"] = ceilings()
        raw = out.with_name(out.stem + "_benchmarks.json")
        benchmark = ["-m", "needs_cuda", "benchmarks/bench_ops.py", f"--benchmark-json={raw}"]
        if check.run("benchmarks", [*pytest, *benchmark], 180):
            entries = json.loads(raw.read_text())["benchmarks"]
            result["benchmarks"] = {entry["name"]: entry["extra_info"] for entry in entries}
    result["ok"] = tested and all(step["ok"] for step in check.steps.values())
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
