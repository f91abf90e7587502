"""The page in a browser, where there is one: no sideways scrolling from a phone's width on."""

import html
import json
import re
import shutil
import subprocess

import pytest
from written_runs import write_run

from covr_fast.reporting.groups import read_study
from covr_fast.reporting.page import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>
const box = element => element.getBoundingClientRect();
const all = selector => [...document.querySelectorAll(selector)];
const seen = all("section, figure.chart svg, .frames img").map(box).filter(b => b.width);
const outside = all("section, h1, h2, h3, p, figure.chart, dl").filter(e => box(e).right > innerWidth + 1);
parent.document.title = JSON.stringify({window: innerWidth, document: document.documentElement.scrollWidth,
  least: Math.min(...seen.map(b => b.height)), count: seen.length, outside: outside.map(e => e.className)});
</script></body>"""


def measured(page: str, width: int, folder) -> dict:
    """Sizes of the page in a frame of this width, without what is in closed details. (A window of Chromium
    itself is never narrower than 500.)"""
    framed = html.escape(page.replace("</body>", MEASURE))
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{framed}"></iframe>'
    (folder / "frame.html").write_text(f"<!DOCTYPE html><title></title>{frame}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", str(folder / "frame.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout[:20_000])[:1]
    return json.loads(html.unescape(title))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(width, tmp_path):
    long = "a_folder_with_a_name_that_is_longer_than_a_telephone_is_wide" * 2
    other = {"agent__prior_weight": 0.5, "covr__cold_start": 7, "covr__psi_0": 4321}
    for seed in range(2):
        write_run(tmp_path / long / f"a{seed}", 300, seed=seed, preset="cartpole-swingup", samples=True)
        write_run(tmp_path / long / f"b{seed}", 400, seed=seed, preset="cartpole-swingup", **other)
    (write_run(tmp_path / long / "c", 300, seed=5) / "summary.json").unlink()
    found = measured(page(read_study([tmp_path / long])), width, tmp_path)
    assert found["window"] == width
    assert found["document"] <= width
    assert found["outside"] == []
    assert found["count"] > 20
    assert found["least"] > 10
