import io
import re

from rich.console import Console

from covr_fast.logger import Clock, RunLogger


def test_a_narrow_terminal_shows_the_eta_whole(tmp_path):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80, legacy_windows=False)
    with RunLogger(tmp_path, 1000, Clock(), console=console) as log:
        log.progress(500, {"return": "-112", "rounds": "2", "steps/s": "51", "updates": "12345"})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    last = [line for line in re.split(r"[\r\n]", text) if "50%" in line][-1]
    assert len(last.rstrip()) <= 80
    assert re.search(r"50% \d:\d\d:\d\d ETA [-\d]:[-\d]{2}:[-\d]{2} return -112  rounds 2", last)


def test_a_clock_goes_on_from_what_was_counted_before():
    clock = Clock()
    clock.load_state_dict({"seconds": {"prior": 30.0}, "total_seconds": 60.0})
    with clock("prior"):
        pass
    shares = clock.shares()
    assert clock.total >= 60
    assert 0.49 < shares["prior"] < 0.51
    assert 0.49 < shares["other"] < 0.51
