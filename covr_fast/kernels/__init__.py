"""Device kernels written in Python (Triton). Their sources live in `kernels/triton`.

A wheel carries them as `covr_fast.kernels.triton`. An editable install or a plain checkout has them beside
the package instead, so the folder is added to this package's search path there.
"""

from pathlib import Path

_sources = Path(__file__).resolve().parents[2] / "kernels"
if (_sources / "triton").is_dir() and (_sources.parent / "setup.py").is_file():
    __path__.append(str(_sources))
