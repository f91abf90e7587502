"""The rooms of docs/architecture.md: who imports whom, and that what the page names exists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "covr_fast"
PAGE = (ROOT / "docs/architecture.md").read_text()
DEFAULT = "loop"
"""The room of modules that no room names."""


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


TABLE = re.findall(r"^\| `(\w+)` \| (.*) \| ?(.*) \|$", PAGE, re.MULTILINE)
ROOM_OF = {module: room for room, modules, _ in TABLE for module in quoted(modules)}
MAY_IMPORT = {room: {room, *quoted(allowed)} for room, _, allowed in TABLE}


def room_of(module: str) -> str:
    """The room of a module such as "vlm/model/nano"."""
    parts = module.split("/")
    prefixes = ("/".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((ROOM_OF[prefix] for prefix in prefixes if prefix in ROOM_OF), DEFAULT)


def is_module(name: str) -> bool:
    path = PACKAGE / name
    files = (path.with_suffix(".py"), path.with_suffix(".pyi"), path / "__init__.py")
    return any(file.exists() for file in files)


def imports(file: Path) -> Iterator[str]:
    """The package's modules that a file imports, in functions and for type checkers too."""
    package = file.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = [*base, *(node.module or "").split(".")]
            targets = [[*filter(None, start), alias.name] for alias in node.names]
        else:
            continue
        for root, *rest in targets:
            name = "/".join(rest)
            while name and not is_module(name):  # its last parts may be names in a module
                name = name.rpartition("/")[0]
            if root == "covr_fast" and name:
                yield name


NAMES_ALL = PACKAGE / "__init__.py"
MODULES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != NAMES_ALL]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_rooms_that_its_own_may_know(file):
    room = room_of(str(file.relative_to(PACKAGE).with_suffix("")))
    found = {name: room_of(name) for name in imports(file)}
    assert {name: other for name, other in found.items() if other not in MAY_IMPORT[room]} == {}


def test_the_table_is_read_whole_and_names_only_rooms():
    assert len(TABLE) == len(re.findall(r"^\| `", PAGE, re.MULTILINE))
    assert set().union(*MAY_IMPORT.values()) == set(MAY_IMPORT)
    assert DEFAULT in MAY_IMPORT


def test_a_room_imports_only_rooms_above_it():
    """So no circle of rooms is possible."""
    rooms = [room for room, *_ in TABLE]
    for room, _, allowed in TABLE:
        assert set(quoted(allowed)) <= set(rooms[: rooms.index(room)])


def test_the_imports_are_found():
    assert {"buffer", "vlm/prior", "errors"} - {name for file in MODULES for name in imports(file)} == set()


def test_what_the_page_names_exists():
    fence = re.compile(r"^```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    words = [*quoted(fence.sub("", PAGE)), *" ".join(fence.findall(PAGE)).split()]
    roots = ("covr_fast/", "csrc/", "kernels/", "tests/", "benchmarks/", "docs/")
    paths = [ROOT / word for word in words if word.startswith(roots)]
    paths += [PACKAGE / word for word in ROOM_OF if not is_module(word)]
    assert [str(path.relative_to(ROOT)) for path in paths if not path.exists()] == []
