"""The stages of the GPU check, in order of worth."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
AGENTS = ["--preset", "cartpole-swingup", "--agents", "rad", "drqv2", "drq", "sac", "deepmdp"]
# Small inputs that still take every kernel and branch: a sanitizer slows kernels down a hundredfold. Matrix
# products are other people's kernels.
SMALL = " and ".join(
    [
        "cuda",
        "not graph",
        "not without_the_garbage_collector",  # it counts in the caching allocator, which is off here
        "not error_is_not_larger",
        "(not test_returns or 0.01 or leak)",
        "not 9999-4000",
        "(not 40000 or test_cuda_draws)",
        "(not test_batches_equal or shift-device)",
    ]
)
SMALL_TESTS = [
    "tests/ops",
    *(f"tests/buffer/test_buffer_{part}.py" for part in ("cuda", "device", "device_add")),
]


@dataclass(frozen=True)
class Stage:
    """One command, whose exit status says whether it succeeded."""

    name: str
    command: Sequence[str]
    usual: float
    """Seconds that it takes on a machine with an H200 and 16 cores; what fits is planned by it."""
    limit: float
    """Seconds after which it is ended."""
    figures: str = ""
    """The option that takes the file for its figures (see `race.rows_of`), if it has any."""
    environment: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    """Stages of one group follow one another and run at once: nothing is timed in them."""


def stages(device: str, capability: str, report: Path) -> list[Stage]:
    """All of them.

    Args:
        device: "cuda", or "cpu" for a rehearsal: the same scripts at sizes that take seconds, and where a
            stage needs a GPU by its nature, the part of it that does not.
        capability: of the GPU, such as "90".
        report: JUnit's file of the tests.
    """
    if device == "cpu":
        return rehearsal(report)
    build = {"COVR_CUDA": "ON", "COVR_CUDA_ARCHITECTURES": f"{capability}-real"}
    qwen = ["--model", "qwen-3b-random"]
    update = ["--device", "cuda", "--augment", "shift", "--repeats", "3"]
    return [
        Stage("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 25, 150, "", build),
        Stage("smoke", script("gpu/smoke.py", "--device", "cuda"), 20, 90),
        gather("needs_cuda", 16, 60),
        Stage(
            "update",
            script("bench_update.py", *update, "--kinds", "eager", "graph", "bfloat16 graph"),
            30, 90, "--json",
        ),
        *operations("needs_cuda"),
        Stage(
            "prior",
            script("bench_prior.py", "--device", "cuda", "--batch", "64", "--rounds", "3", *qwen),
            65, 150, "--json",
        ),
        Stage(
            "overlap",
            script("bench_overlap.py", *qwen, "--repeats=2", "--samples=64", "--epochs=2", "--decisions=800"),
            70, 150, "--json",
        ),
        Stage("train", script("gpu/train.py", "--device", "cuda", "--seconds", "120"), 130, 180, "--json"),
        tests(needing_cuda(), report, 75, 150),
        sanitizer("memcheck", 90, 180),
        sanitizer("racecheck", 110, 180),
        Stage(
            "compiled",
            script("bench_update.py", *update, "--kinds", "eager", "compile", "compile + graph"),
            50, 120, "--json",
        ),
        Stage(
            "agents",
            script(
                "bench_update.py", *AGENTS, "--device", "cuda", "--repeats", "2",
                "--kinds", "eager", "graph", "bfloat16 graph",
            ),
            100, 150, "--json",
        ),
    ]  # fmt: skip


def rehearsal(report: Path) -> list[Stage]:
    """The same names without a GPU. Nothing is timed, so all of it may run at once."""
    tiny = {"COVR_BENCH_TINY": "1", "COVR_REQUIRE_CUDA": "0", "OMP_NUM_THREADS": "1"}
    qwen = ["--model", "qwen-tiny-random"]
    selected = [*PYTEST, "-q", "--collect-only", "-m", "needs_cuda", "-k", SMALL]
    update = ["--device", "cpu", "--augment", "shift", "--repeats", "1", "--kinds", "eager"]
    made = [
        Stage("build", [sys.executable, "-c", "from covr_fast import _C; print(_C.__file__)"], 5, 120),
        Stage("smoke", script("gpu/smoke.py", "--device", "cpu"), 5, 120),
        gather("not needs_cuda", 5, 120),
        Stage("update", script("bench_update.py", *update), 5, 120, "--json"),
        *operations("not needs_cuda"),
        Stage("prior", script("bench_prior.py", "--batch", "2", "--rounds", "1", *qwen), 5, 120, "--json"),
        Stage(
            "overlap",
            script("bench_overlap.py", *qwen, "--repeats=1", "--samples=8", "--epochs=1", "--decisions=112"),
            5, 120, "--json",
        ),
        Stage("train", script("gpu/train.py", "--device", "cpu", "--seconds", "100"), 10, 120, "--json"),
        tests(["tests/test_cuda_graph.py"], report, 5, 120),
        Stage("memcheck", [*selected, SMALL_TESTS[0]], 5, 120),
        Stage("racecheck", [*selected, SMALL_TESTS[1]], 5, 120),
        Stage("compiled", script("bench_update.py", *update), 5, 120, "--json"),
        Stage(
            "agents",
            # The first two: one of each class.
            script("bench_update.py", *AGENTS[:5], "--device", "cpu", "--repeats", "1", "--kinds", "eager"),
            10, 120, "--json",
        ),
    ]  # fmt: skip
    built, *rest = (replace(stage, environment=tiny) for stage in made)
    return [built, *(replace(stage, group="rehearsal") for stage in rest)]


def groups(stages: Iterable[Stage]) -> list[list[Stage]]:
    """What runs at once, in order: the stages of a group, or one stage."""
    keyed = groupby(enumerate(stages), lambda numbered: numbered[1].group or numbered[0])
    return [[stage for _, stage in together] for _, together in keyed]


def seconds(stages: Iterable[Stage]) -> float:
    """What they usually take."""
    return sum(max(stage.usual for stage in together) for together in groups(stages))


def fitting(stages: Sequence[Stage], budget: float) -> list[Stage]:
    """The first stages, as many as usually fit into so many seconds."""
    counts = range(len(stages), 0, -1)
    return next((list(stages[:n]) for n in counts if seconds(stages[:n]) <= budget), [])


# ---- commands ----


def script(name: str, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / name), *options]


def suite(name: str, marked: str, *options: str) -> list[str]:
    return [*PYTEST, "-q", str(ROOT / "benchmarks" / name), "-m", marked, *options]


def gather(marked: str, usual: float, limit: float) -> Stage:
    return Stage("gather", suite("bench_gather.py", marked), usual, limit, "--benchmark-json")


def operations(marked: str) -> list[Stage]:
    """A process each: after an illegal access, a process can use the device no more."""
    chosen = {
        "filter": ("filter", 8.0),
        "returns": ("return_weights or test_returns", 20.0),
        "tree": ("sum_tree", 12.0),
        "frames": ("random_shift", 8.0),
        "linear": ("cross_entropy", 50.0),
    }
    return [
        Stage(name, suite("bench_ops.py", marked, "-k", tests), usual, usual + 50, "--benchmark-json")
        for name, (tests, usual) in chosen.items()
    ]


def needing_cuda() -> list[str]:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "needs_cuda" in file.read_text()]


def tests(files: list[str], report: Path, usual: float, limit: float) -> Stage:
    """Verbosely, so that failures are named as they happen."""
    options = ["-v", "-m", "needs_cuda", f"--junitxml={report}", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        # A test that hangs in a kernel ends its process, and another one takes its place.
        options += ["-n", str(min(8, os.cpu_count() or 1)), "--timeout=90", "--timeout-method=thread"]
    return Stage("tests", [*PYTEST, *options, *files], usual, limit, group="tests")


def sanitizer(tool: str, usual: float, limit: float) -> Stage:
    program = shutil.which("compute-sanitizer") or "compute-sanitizer"
    command = [program, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    selected = [*PYTEST, "-v", "-m", "needs_cuda", "-k", SMALL, *SMALL_TESTS]
    # The caching allocator would hide reads past the end of a tensor.
    plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(tool, [*command, *selected], usual, limit, "", plain, group="tests")
