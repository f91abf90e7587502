"""CUDA sources as C++ for the emulator: launches, and shared variables.

    python translate.py OUT SOURCE...

Everything else (`__global__`, `threadIdx`, intrinsics) is C++ by the headers in include/. Lines keep their
numbers, and `#line` names the original, so compilers and sanitizers point into it.
"""

import re
import sys
from pathlib import Path

_OPEN, _CLOSE = "([{", ")]}"
_COMMENT_OR_STRING = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | (?<![\w'])'(?:\\.|[^'\\\n])+'""", re.VERBOSE | re.DOTALL
)
_SHARED = re.compile(
    r"(?P<before>(?:\b(?:static|extern|alignas\s*\([^()]*\))\s+)*)\b__shared__\s+(?P<declaration>[^;]*);"
)
_ALIGNAS = re.compile(r"\balignas\s*\(([^()]*)\)\s*")


def translate(source: str, name: str) -> str:
    """`source` as C++.

    Raises:
        ValueError: something that this does not understand, with its line.
    """
    source = _launches(_shared_variables(_without_comments(source), name), name)
    return f'#line 1 "{name}"\n{source}'


def _without_comments(source: str) -> str:
    """Comments become line breaks; strings stay."""

    def replace(match: re.Match[str]) -> str:
        text = match.group()
        return " " + "\n" * text.count("\n") if text.startswith("/") else text

    return _COMMENT_OR_STRING.sub(replace, source)


# ---- __shared__ T a[n], b;  ->  auto& a = ::emulator::shared<T[n]>([] {}); auto& b = ... ----


def _shared_variables(source: str, name: str) -> str:
    def replace(match: re.Match[str]) -> str:
        before, declaration = match["before"], match["declaration"]
        alignment = ", ".join(_ALIGNAS.findall(before + declaration))
        first, *others = _split(_ALIGNAS.sub("", declaration))
        kind, *found = _declarator(first)
        variables = [found, *(_declarator(other)[1:] for other in others)]
        if not kind or "=" in declaration:
            where = _line(source, match.start(), name)
            raise ValueError(f"{where}: cannot read the declaration of {first!r}")
        text = ""
        for variable, dimensions in variables:
            if "extern" in before:
                text += f"auto* {variable} = ::emulator::dynamic_shared<{kind}>(); "
            else:
                arguments = ", ".join(filter(None, (f"{kind}{dimensions}", alignment)))
                text += f"auto& {variable} = ::emulator::shared<{arguments}>([] {{}}); "
        return text.rstrip() + "\n" * match.group().count("\n")

    return _SHARED.sub(replace, source)


def _declarator(text: str) -> tuple[str, str, str]:
    """("T", "a", "[n]") of "T a[n]"; the type is "" in all but the first declarator of a declaration."""
    text, dimensions = text.strip(), ""
    while text.endswith("]"):
        begin = _matching_open(text, len(text) - 1)
        text, dimensions = text[:begin].rstrip(), text[begin:] + dimensions
    match = re.fullmatch(r"(.*?)\s*(\w+)", text, re.DOTALL)
    return (" ".join(match[1].split()), match[2], dimensions) if match else ("", "", "")


# ---- kernel<<<grid, block>>>(...)  ->  ::emulator::launch("kernel", {grid, block}, kernel)(...) ----


def _launches(source: str, name: str) -> str:
    text, done = "", 0
    while (at := source.find("<<<", done)) >= 0:
        begin = _kernel_begin(source, at)
        end = source.find(">>>", at)
        if begin is None or end < 0:
            raise ValueError(f"{_line(source, at, name)}: cannot read this launch")
        kernel = source[begin:at].strip()
        text += source[done:begin]
        text += f'::emulator::launch("{" ".join(kernel.split())}", {{{source[at + 3 : end]}}}, '
        text += f"[&](const auto&... arguments) {{ {kernel}(arguments...); }})"
        done = end + 3
    return text + source[done:]


def _kernel_begin(source: str, end: int) -> int | None:
    """Where the name of a kernel begins that ends, with its template arguments, at `end`."""
    end = len(source[:end].rstrip())
    depth = 0
    while source[end - 1] == ">" or depth > 0:
        end -= 1
        if source[end] == ")":
            end = _matching_open(source, end)
        depth += {">": 1, "<": -1}.get(source[end], 0)
        if depth == 0:
            break
    match = re.search(r"[\w:]+\s*$", source[:end])
    return match.start() if match else None


# ---- text ----


def _split(text: str) -> list[str]:
    """At commas outside of brackets and template arguments."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in _OPEN + "<") - (character in _CLOSE + ">")
        if character == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [*parts, text[begin:]]


def _matching_open(text: str, close: int) -> int:
    depth = 0
    for i in range(close, -1, -1):
        depth += (text[i] in _CLOSE) - (text[i] in _OPEN)
        if depth == 0:
            return i
    raise ValueError(f"brackets do not match in {text!r}")


def _line(source: str, at: int, name: str) -> str:
    return f"{name}:{source.count(chr(10), 0, at) + 1}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path in map(Path, sys.argv[2:]):
        try:
            text = translate(path.read_text(), str(path))
        except ValueError as error:
            sys.exit(f"translate.py: {error}")
        out = folder / path.name
        if not out.is_file() or out.read_text() != text:  # what did not change is not compiled again
            out.write_text(text)
