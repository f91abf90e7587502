"""Pip constraints: the lowest version of every package that an installation with these extras may take.

    python tests/lowest.py EXTRA... > constraints.txt      in the environment that will be installed into
    python tests/lowest.py --build > constraints.txt       of what a build needs instead

What the environment has already stays as it is: torch, and the triton that its CUDA builds bring.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements(*extras: str) -> list[str]:
    """What the metadata asks for with these extras, or what a build needs ("--build"); without markers."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if extras == ("--build",):
        return list(metadata["build-system"]["requires"])
    asked = list(metadata["project"]["dependencies"])
    for extra in extras:
        asked += metadata["project"]["optional-dependencies"][extra]
    return [requirement.split(";")[0].strip() for requirement in asked]


def lowest(requirement: str) -> str:
    """`name==version` of a requirement `name>=version` or `name==version`.

    Raises:
        ValueError: it has no lower bound, so anything would be allowed.
    """
    parts = re.fullmatch(r"([\w.-]+)\s*[>=]=\s*([\w.]+)", requirement)
    if parts is None:
        raise ValueError(
            f"{requirement!r} in pyproject.toml is not of the form name>=version or name==version"
        )
    return f"{parts[1]}=={parts[2]}"


if __name__ == "__main__":
    installed = {found.name.lower() for found in importlib.metadata.distributions()}
    pins = [lowest(requirement) for requirement in requirements(*sys.argv[1:])]
    isolated = sys.argv[1:] == ["--build"]
    print("\n".join(pin for pin in pins if isolated or pin.split("==")[0] not in installed))
