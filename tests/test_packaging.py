"""What pip builds: the wheel's contents, and the answers to COVR_CUDA."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pybind11
import pytest
from lowest import lowest, requirements

ROOT = Path(__file__).resolve().parents[1]
PATH = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # cmake and ninja come from PyPI
IN_PLACE = [sys.executable, "setup.py", "build_ext", "--inplace"]


def copy_sources(to: Path) -> Path:
    """The sources as in a checkout, without history and build products."""
    left_out = (".git", ".venv", "build", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*left_out)))


@pytest.fixture
def source(tmp_path):
    return copy_sources(tmp_path / "source")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source archive, made by the backend as pip and build do, and unpacked."""
    source = copy_sources(tmp_path_factory.mktemp("checkout") / "source")
    out = tmp_path_factory.mktemp("archive")
    (source / "covr_fast/_C.cpython-311-x86_64-linux-gnu.so").touch()  # of an editable installation
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    done = run([sys.executable, "-c", code], source)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("covr_fast-*.tar.gz")
    with tarfile.open(path) as tar:
        tar.extractall(out, filter="data")
    return out / path.name.removesuffix(".tar.gz")


@pytest.fixture
def small_source(source):
    """The same, with an extension that compiles quickly."""
    for path in source.glob("csrc/**/*.cpp"):
        path.unlink()
    (source / "csrc/module.cpp").write_text(
        "#include <Python.h>\n"
        'static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C"};\n'
        "PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }\n"
    )
    return source


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": PATH} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)


def wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", str(out)]
    return run([*pip, str(source)], out.parent, **environment)


def build_wheel(source: Path, out: Path, **environment: str) -> zipfile.ZipFile:
    done = wheel(source, out, COVR_CUDA="OFF", **environment)
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = out.glob("covr_fast-*.whl")
    return zipfile.ZipFile(path)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_source_archive_holds_what_a_build_needs_and_no_tests(source, unpacked):
    folders = ("covr_fast", "csrc", "kernels", "docs", "examples")
    kept = {name for name in files(source) if name.split("/")[0] in folders}
    kept |= {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"}
    kept |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "cmake/cuda.cmake"}
    written = {name for name in files(unpacked) if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert files(unpacked) == kept | written


def test_the_wheel_of_the_archive_holds_the_package_and_nothing_else(source, unpacked, tmp_path):
    names = set(build_wheel(unpacked, tmp_path / "out").namelist())
    (extension,) = (name for name in names if name.startswith("covr_fast/_C.") and name.endswith(".so"))
    triton = {f"covr_fast/kernels/triton/{path.name}" for path in ROOT.glob("kernels/triton/*.py")}
    package = {f"covr_fast/{name}" for name in files(source / "covr_fast")}
    assert {"covr_fast/py.typed", "covr_fast/_C.pyi"} <= package
    assert {name for name in names if ".dist-info/" not in name} == package | triton | {extension}


def test_the_metadata_names_licence_authors_and_the_paper(unpacked):
    metadata = email.message_from_string((unpacked / "PKG-INFO").read_text())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    text = (unpacked / "LICENSE").read_text()
    assert "Apache License\n" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert metadata["Author"]
    assert len(metadata["Keywords"].split(",")) > 3
    assert metadata["Project-URL"] == "Paper, https://arxiv.org/abs/2601.06122"


def test_what_users_install_has_lower_bounds():
    for extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]:
        if extra not in ("bench", "dev"):  # contributors install the versions of constraints.txt
            assert [lowest(requirement) for requirement in requirements(extra)]
    assert [lowest(requirement) for requirement in requirements("--build")]


def test_a_second_build_does_not_look_for_the_tools_of_the_first(small_source, tmp_path):
    """pip builds with tools from an environment that it deletes afterwards, and in the tree itself."""
    for count in ("first", "second"):
        tools = tmp_path / count
        tools.mkdir()
        for name in ("cmake", "ninja"):
            (tools / name).symlink_to(shutil.which(name, path=PATH))
        build_wheel(small_source, tmp_path / f"{count}-out", PATH=f"{tools}{os.pathsep}{PATH}")
        shutil.rmtree(tools)


def test_a_second_build_drops_modules_that_are_gone_and_notices_a_moved_tree(small_source, tmp_path):
    gone = small_source / "covr_fast/gone.py"
    gone.touch()
    assert "covr_fast/gone.py" in build_wheel(small_source, tmp_path / "first").namelist()
    gone.unlink()
    moved = small_source.rename(tmp_path / "moved")
    assert "covr_fast/gone.py" not in build_wheel(moved, tmp_path / "second").namelist()


def test_a_second_build_in_place_compiles_only_what_changed(small_source):
    (small_source / "csrc/other.cpp").write_text("int other() { return 1; }\n")
    first = run(IN_PLACE, small_source, COVR_CUDA="OFF")
    assert first.returncode == 0, first.stderr
    assert "other.cpp.o" in first.stdout
    (small_source / "csrc/module.cpp").touch()
    second = run(IN_PLACE, small_source, COVR_CUDA="OFF")
    assert second.returncode == 0, second.stderr
    assert "module.cpp.o" in second.stdout
    assert "other.cpp.o" not in second.stdout


# ---- CUDA ----

OLD = "sm_50 sm_52 sm_53 sm_60 sm_61 sm_62 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90"
KNOWN = {
    "11.8": f"sm_35 sm_37 {OLD}",
    "12.0": f"{OLD} sm_90a",
    "12.4": f"{OLD} sm_90a",
    "12.8": f"{OLD} sm_100 sm_101 sm_120",
    "13.0": "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_103 sm_110 sm_120 sm_121",
    "99.0": "sm_300 sm_310",
}
"""What `nvcc --list-gpu-code` of a release prints."""
REFUSES = "echo 'host_config.h:143:2: error: #error -- unsupported GNU version!' >&2; exit 1"


def stand_in(path: Path, release: str, otherwise: str = REFUSES) -> str:
    """An nvcc that says of itself what this release says, and does `otherwise` when it is to compile."""
    path.write_text(
        "#!/bin/sh\n"
        'case " $* " in\n'
        f"*' --version '*) echo 'Cuda compilation tools, release {release}, V{release}.99' ;;\n"
        f"*' --list-gpu-code '*) printf '%s\\n' {KNOWN[release]} ;;\n"
        f"*) {otherwise} ;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return str(path)


def configure(build: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """CMake as setup.py calls it; messages are on one line."""
    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    options.append(f"-DCOVR_CUDA={environment.pop('COVR_CUDA', 'AUTO')}")
    done = run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], ROOT, **environment)
    done.stdout = " ".join((done.stdout + done.stderr).split())
    return done


@pytest.mark.parametrize(
    "release, expected",
    [
        ("11.8", "is of CUDA 11.8, and 12.0 is the oldest supported: set CUDACXX to a newer nvcc"),
        ("12.0", "architectures: 80-real;90"),
        ("12.4", "architectures: 80-real;90"),
        ("12.8", "architectures: 80-real;90-real;100-real;120"),
        ("13.0", "architectures: 80-real;90-real;100-real;120"),
        ("99.0", "compiles for none of 80, 90, 100, 120: name others with COVR_CUDA_ARCHITECTURES"),
    ],
)
def test_an_nvcc_compiles_for_the_architectures_it_knows(release, expected, tmp_path):
    (tmp_path / "choose.cmake").write_text(f"""
        cmake_minimum_required(VERSION 3.26)
        include({ROOT}/cmake/cuda.cmake)
        covr_find_nvcc(nvcc obstacle)
        if(NOT obstacle)
          covr_check_release("${{nvcc}}" obstacle)
        endif()
        if(NOT obstacle)
          covr_choose_architectures("${{nvcc}}" architectures obstacle)
        endif()
        message("architectures: ${{architectures}} ${{obstacle}}")
    """)
    nvcc = stand_in(tmp_path / "nvcc", release)
    for environment in ({"CUDACXX": nvcc}, {"CUDACXX": "", "PATH": f"{tmp_path}{os.pathsep}{PATH}"}):
        done = run(["cmake", "-P", "choose.cmake"], tmp_path, **environment)
        assert done.returncode == 0
        assert expected in done.stderr


NOWHERE = "/nowhere/nvcc"


@pytest.mark.parametrize(
    "release, reason",
    [
        (None, "no CUDA compiler was found: put nvcc on PATH (or set CUDACXX)"),
        ("11.8", "nvcc is of CUDA 11.8, and 12.0 is the oldest supported"),
        ("12.4", "cannot compile here (host_config.h:143:2: error: #error -- unsupported GNU version!)"),
    ],
)
def test_an_nvcc_that_cannot_be_used_is_left_out_with_the_reason(release, reason, tmp_path):
    nvcc = NOWHERE if release is None else stand_in(tmp_path / "nvcc", release)
    done = configure(tmp_path / "auto", CUDACXX=nvcc)
    assert done.returncode == 0, done.stdout
    assert reason in done.stdout
    assert "CUDA kernels OFF" in done.stdout
    done = configure(tmp_path / "on", CUDACXX=nvcc, COVR_CUDA="ON")
    assert done.returncode != 0
    assert f"COVR_CUDA=ON but {'' if release is None else nvcc}" in done.stdout
    assert reason in done.stdout
    assert "build the CPU library with COVR_CUDA=OFF" in done.stdout


def test_a_compiler_that_was_missing_is_looked_for_again(small_source, tmp_path):
    for nvcc, reason in (
        (NOWHERE, "no CUDA compiler was found"),
        (stand_in(tmp_path / "nvcc", "11.8"), "is of CUDA 11.8"),
    ):
        done = run(IN_PLACE, small_source, CUDACXX=nvcc)
        assert reason in done.stdout
        assert "CUDA kernels OFF" in done.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.slow
def test_a_compiler_that_refused_is_tried_again_and_takes_what_the_user_names(tmp_path):
    refusing = stand_in(tmp_path / "nvcc", "12.4")
    assert "CUDA kernels OFF" in configure(tmp_path / "build", CUDACXX=refusing).stdout
    mended = stand_in(tmp_path / "nvcc", "12.4", otherwise=f'exec {shutil.which("nvcc")} "$@"')
    assert "for CUDA architectures 80-real;90 " in configure(tmp_path / "build", CUDACXX=mended).stdout
    rules = (tmp_path / "build/build.ninja").read_text()
    assert r"COVR_CUDA_ARCHITECTURES=\"80-real,90\"" in rules
    assert "code=[compute_90,sm_90]" in rules
    named = configure(tmp_path / "named", CUDACXX=mended, CUDAARCHS="75")
    assert "for CUDA architectures 75 " in named.stdout


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"COVR_CUDA": "ON", "CUDACXX": NOWHERE}, "COVR_CUDA=ON but no CUDA compiler was found"),
        ({"COVR_CUDA": "MAYBE"}, "COVR_CUDA='MAYBE' is not one of OFF, ON, AUTO"),
    ],
)
def test_cuda_that_is_not_available_is_a_clear_error(environment, message, source, tmp_path):
    done = wheel(source, tmp_path / "out", **environment)
    assert done.returncode != 0
    assert message in " ".join((done.stdout + done.stderr).split())
