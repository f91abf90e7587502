"""Everything that needs a GPU, in one command of ten minutes: build, figures, a run, tests, sanitizers.

    python benchmarks/gpu_check.py [--out DIR] [--minutes 9.5] [--stage NAME]... [--wheels DIR]
    python benchmarks/gpu_check.py --device cpu          # rehearses it: does every stage run at all?

The stages (benchmarks/gpu/stages.py; benchmarks/GPU.md says what each shows) go in order of worth, each in
a process of its own with its own limit. None waits for the success of another, except that all need the
build. Stages at the end are left out if they would not fit into --minutes. --out gets, after every stage,
gpu.json with device, versions, outcomes and figures, and gpu.md with the same to be read and committed;
besides log.txt, and tests.xml with the tests' outcomes. Prints the stages and targets at the end; exits
with 1 if a stage failed. A missed target is no failure.

The machine brings a CUDA build of torch with Triton, nvcc and a C++ compiler. For one without internet,
collect the rest elsewhere (for the machine's Python version), without what it has, and pass the folder, all
of which is put before the machine's own packages:

    pip download -d DIR --no-deps --only-binary=:all: --python-version 3.12 tyro typeguard docstring-parser \\
        shtab transformers tokenizers pytest-benchmark hypothesis liger-kernel bitsandbytes num2words

and wheels of docopt, which has none, and of EnvPool with what it needs. Large ones (EnvPool, its assets and
bitsandbytes have 160 MB together) can be packed again without the parts for other environments and devices.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from gpu.execution import Check
from gpu.report import stage_table, target_table
from gpu.stages import ROOT, Stage, fitting, stages

sys.path.insert(0, str(ROOT))  # for covr_fast, which is not installed there
PACKAGES = ROOT / "build" / "gpu-packages"  # what --wheels adds: the machine's own Python stays as it is
SIMULATOR = ROOT / "benchmarks" / "gpu" / "simulator"
SHOWN = ("torch", "triton", "transformers", "liger-kernel", "torchrl", "envpool", "pytest-xdist")


def install(wheels: Path) -> None:
    """Puts all wheels of the folder before the machine's packages."""
    files = sorted(map(str, wheels.resolve().glob("*.whl")))
    if not files:
        raise SystemExit(f"gpu-check: no wheels in --wheels {wheels}")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--upgrade",
    ]
    if subprocess.run([*pip, "--target", str(PACKAGES), *files], check=False).returncode:
        raise SystemExit(f"gpu-check: pip cannot install the wheels in {wheels}")
    sys.path.insert(0, str(PACKAGES))
    importlib.invalidate_caches()


def search_paths() -> dict[str, str]:
    """The checkout before what --wheels installed before what was set; nvcc is often not on PATH."""
    python = [str(ROOT), str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    if importlib.util.find_spec("envpool") is None:
        python.append(str(SIMULATOR))
    programs = [str(PACKAGES / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, python)),
        "PATH": os.pathsep.join([*filter(None, programs), "/usr/local/cuda/bin"]),
    }


def facts(device: str, environment: Mapping[str, str]) -> dict[str, object]:
    """The machine: what a figure means nothing without."""
    from covr_fast.machine import device_name, version

    versions = {name: version(name) for name in SHOWN}
    found: dict[str, object] = {"device": device_name(device), "begun": time.strftime("%Y-%m-%d %H:%M")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
        versions |= {
            "CUDA of torch": torch.version.cuda,
            "nvcc": last_line(["nvcc", "--version"], environment),
            "driver": last_line(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], environment
            ),
        }
    return found | {"versions": {"Python": platform.python_version(), **versions}}


def last_line(command: list[str], environment: Mapping[str, str]) -> str | None:
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()[-1:]), None)


def chosen(every: list[Stage], names: list[str]) -> list[Stage]:
    """The stages of these names, in their order, after the build (a second if nothing changed)."""
    known = [stage.name for stage in every]
    for name in names:
        if name not in known:
            raise SystemExit(f"gpu-check: no stage {name!r}; there are {', '.join(known)}")
    return [stage for stage in every if not names or stage.name in names or stage.name == "build"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder for results")
    parser.add_argument("--minutes", type=float, default=9.5, help="all that may be used")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels for a machine without internet")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu rehearses")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu-check: torch sees no CUDA device (a CPU build of torch, or no driver)")
    if arguments.wheels:
        install(arguments.wheels)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = search_paths()
    os.environ |= paths  # for programs that are looked up here, too
    capability = "{}{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else ""
    wanted = chosen(stages(device, capability, out / "tests.xml"), arguments.stage)
    fit = fitting(wanted, deadline - time.monotonic())
    workers = 4 if device == "cuda" else os.cpu_count() or 1
    check = Check(out, deadline, {"COVR_REQUIRE_CUDA": "1", "PYTHONUNBUFFERED": "1"}, workers)
    check.result |= facts(device, paths)
    check.result["left out"] = [stage.name for stage in wanted if stage not in fit]
    if left := check.result["left out"]:
        print(f"left out, for {arguments.minutes:g} minutes are too few: {', '.join(left)}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: check.stop())
    check.run(fit)
    print("\n".join(["", *stage_table(check.result), "", *target_table(check.result), ""]))
    print(f"written to {out}")
    return 0 if check.result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
