"""Every block of the documentation is run: Python as it stands, command lines as far as a test can go. Blocks
marked `text` are pictures.

Each block has its own namespace. One that begins with the comment CONTINUES uses the namespace of the block
before it on its page.
"""

import re
import shlex
import signal
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_runs import FLAGS, TINY, call, run_until
from transformers import Qwen2_5_VLConfig

from covr_fast import TrainConfig, Trainer
from covr_fast.sweeps.spec import read_spec

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
CONTINUES = "# with the buffer from above"


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
        assert len(re.findall(r"^\s*(```|~~~)", text, re.MULTILINE)) == 2 * sum(b.page == page for b in found)
    return found


BLOCKS = blocks()
COMMANDS = [
    pytest.param(shlex.split(line, comments=True), id=f"{block}:{line.split('#')[0].strip()}")
    for block in BLOCKS
    if block.language == "sh"
    for line in block.text.splitlines()
    if line.strip()
]


def test_every_block_has_a_language_that_is_tested_here():
    assert {block.language for block in BLOCKS} == {"python", "sh", "text", "toml"}


def tiny(config: TrainConfig, **changes: int) -> TrainConfig:
    """The same settings at a size that takes seconds."""
    settings = config.to_dict()
    for name, value in (TINY | changes).items():
        part, _, leaf = name.replace("-", "_").rpartition(".")
        (settings[part] if part else settings)[leaf] = value
    return TrainConfig.from_dict(settings)


def with_tiny_runs(code: str) -> str:
    """Blocks show the true call; here the runs that they start are tiny."""
    return re.sub(r"Trainer\((\w+),", r"Trainer(tiny(\1),", code)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [block]
    same_page = [b for b in BLOCKS if b.page == block.page and b.language == "python"]
    while parts[0].text.startswith(CONTINUES):
        parts.insert(0, same_page[same_page.index(parts[0]) - 1])
    names: dict[str, object] = {"tiny": tiny}
    for part in parts:
        exec(compile(with_tiny_runs(part.text), str(part), "exec"), names)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=str)
def test_toml(block, tmp_path):
    (tmp_path / "spec.toml").write_text(block.text)
    assert read_spec(str(tmp_path / "spec.toml")).runs


@pytest.fixture(autouse=True)
def _signals():
    """The command line decides what signals do to its process, which here is that of the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as README's reader has it: an interrupted run, a finished one with its replay buffer, and a
    model (no command loads it: its configuration tells what suits it)."""
    folder = tmp_path_factory.mktemp("home")
    preset = TrainConfig.preset("carracing")
    run_until(Trainer(tiny(preset), folder / "runs/carracing-seed0"), 48)
    Trainer(tiny(preset, seed=1, save_replay=True), folder / "runs/carracing-seed1").run()
    Qwen2_5_VLConfig().save_pretrained(folder / "models/Qwen2.5-VL-3B-Instruct")
    return folder


class ParsedError(Exception):
    """The command line was understood; the run that it asks for would begin now."""


def covr_fast_command(monkeypatch, arguments: list[str], home: Path) -> None:
    """Runs it, briefly where it times something; a run that would begin anew is only parsed."""
    arguments = [word.replace("/models/", f"{home}/models/") for word in arguments]
    if arguments[0] == "bench":
        arguments += ["--seconds=0.05", *FLAGS]
    if arguments[0] != "train" or {"--help", "--resume"} & set(arguments):
        assert call(monkeypatch, *arguments) == 0
        return

    def stop(*_, **__):
        raise ParsedError

    monkeypatch.setattr("covr_fast.trainer.Trainer", stop)
    with pytest.raises(ParsedError):
        call(monkeypatch, *arguments)


def make_command(arguments: list[str]) -> None:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def pip_command(arguments: list[str]) -> None:
    """Pins are those that are tested, extras those of the metadata."""
    assert arguments[0] == "install"
    for what in arguments[1:]:
        name, _, extras = what.partition("[")
        if "==" in name:
            assert name in (ROOT / "constraints.txt").read_text().splitlines()
        else:
            assert name == "."
            assert set(filter(None, extras.rstrip("]").split(","))) <= optional_dependencies()


def optional_dependencies() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("words", COMMANDS)
def test_command(words, home, monkeypatch):
    monkeypatch.chdir(home)
    program, *arguments = words
    if program == "covr-fast":
        covr_fast_command(monkeypatch, arguments, home)
    elif program == "make":
        make_command(arguments)
    elif program == "pip":
        pip_command(arguments)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        pytest.fail(f"{program!r} is a command that no test here understands")


def spoken_of(pattern: str) -> set[str]:
    """What the prose has in backticks."""
    spans = [span for page in PAGES for span in re.findall(r"`([^`\n]+)`", page.read_text())]
    return {match for span in spans for match in re.findall(pattern, span)}


def test_options_that_the_prose_names_exist(monkeypatch, capsys):
    assert call(monkeypatch, "train", "carracing", "--help") == 0
    shown = set(re.findall(r"--[\w.-]+", re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)))
    assert spoken_of(r"--[a-z]+\.[\w-]+") <= shown


def test_targets_and_files_that_the_prose_names_exist():
    for target in spoken_of(r"^make ([\w-]+)"):
        make_command([target])
    paths = spoken_of(r"^(?:csrc|kernels|covr_fast|tests|docs|examples|benchmarks)/[\w./-]*$")
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_examples_name_extras_that_exist():
    for example in ROOT.glob("examples/*.py"):
        asked = re.findall(r"covr-fast\[([\w,]+)\]", example.read_text())
        assert {extra for extras in asked for extra in extras.split(",")} <= optional_dependencies()
