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
    kept |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in"}
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


def test_a_compiler_that_was_missing_is_looked_for_again(small_source, tmp_path):
    for folder in ("nowhere", "installed since"):
        done = run(IN_PLACE, small_source, CUDACXX=str(tmp_path / folder / "nvcc"))
        assert "Looking for a CUDA compiler" in done.stdout
        assert "CUDA kernels OFF" in done.stdout


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"COVR_CUDA": "ON", "CUDACXX": "/nowhere/nvcc"}, "COVR_CUDA=ON but no CUDA compiler was found"),
        ({"COVR_CUDA": "MAYBE"}, "COVR_CUDA='MAYBE' is not one of OFF, ON, AUTO"),
    ],
)
def test_cuda_that_is_not_available_is_a_clear_error(environment, message, source, tmp_path):
    done = wheel(source, tmp_path / "out", **environment)
    assert done.returncode != 0
    assert message in " ".join((done.stdout + done.stderr).split())


def test_auto_builds_without_cuda_quietly(source, tmp_path):
    cmake = shutil.which("cmake", path=PATH)
    assert cmake
    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure = [cmake, "-S", str(source), "-B", str(tmp_path / "build"), "-G", "Ninja", *options]
    done = run([*configure, "-DCOVR_CUDA=AUTO"], tmp_path, CUDACXX="/nowhere/nvcc")
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels OFF" in done.stdout
