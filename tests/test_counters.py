import pytest

from covr_fast.counters import Counters, Every


@pytest.mark.parametrize("start", [0, 4, 25])
def test_an_event_recurs_once_per_multiple_however_long_the_steps_are(start):
    every = Every(10, start)
    steps = range(start + 4, 70, 4)
    assert [s for s in steps if every(s)] == [s for s in steps if s // 10 > (s - 4) // 10]
    assert not every(steps[-1])


def test_multiples_that_were_passed_in_one_step_count_once():
    every = Every(10)
    assert every(35)
    assert not every(39)
    assert every(40)


def test_never():
    assert not any(Every(0)(step) for step in range(10))


def test_counters_go_on_from_their_state():
    counters = Counters()
    counters.load_state_dict({"step": 3, "frames": 12, "updates": 1, "returns": [0.5], "rounds": []})
    assert counters == Counters(3, 12, 1, [0.5])
    assert counters.state_dict() == {"step": 3, "frames": 12, "updates": 1, "returns": [0.5]}
