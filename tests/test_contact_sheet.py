"""The script that draws docs/environments.png."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "docs" / "make_contact_sheet.py"


def test_it_draws_presets_and_ids(tmp_path):
    file = tmp_path / "sheet.png"
    names = ["pendulum-swingup", "CarRacing-v3"]
    subprocess.run([sys.executable, SCRIPT, file, *names], check=True, capture_output=True, timeout=300)
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (2 * 104, 170 + 6 * 104, 3)
    for row in range(2):
        tiles = [sheet[row * 104 :][:100, 170 + 104 * k :][:, :100] for k in range(6)]
        assert all(tile.std() > 10 for tile in tiles), "an empty picture"
        assert all((a != b).any() for a, b in pairwise(tiles)), "nothing moves"
