import pytest

from covr_fast.errors import UserError
from covr_fast.schedule import FineTuneSchedule, is_due


@pytest.mark.parametrize(
    "rule, expected",
    [("linear", [5_000, 15_000, 30_000, 50_000, 75_000]), ("recurrence", [5_000, 15_000, 45_000, 165_000])],
)
def test_rounds(rule, expected):
    schedule = FineTuneSchedule(rule=rule)
    fired = []
    for step in range(0, 170_000, 1000):
        if schedule.due(step):
            fired.append(step)
            schedule.advance()
    assert fired[: len(expected)] == expected


def test_never_at_step_zero():
    assert not FineTuneSchedule(psi_0=1).due(0)
    assert FineTuneSchedule(psi_0=1).due(1)


def test_a_late_round_does_not_shift_the_next():
    schedule = FineTuneSchedule(psi_0=100)
    assert schedule.due(150)
    schedule.advance()
    assert schedule.next_round == 300


def test_resuming_after_some_rounds():
    assert FineTuneSchedule(rounds=2).next_round == 30_000
    assert FineTuneSchedule(rule="recurrence", rounds=2).next_round == 45_000


def test_bad_psi():
    with pytest.raises(UserError, match="psi_0=0"):
        FineTuneSchedule(psi_0=0)


def test_what_recurs_is_due_where_a_multiple_is_reached_or_passed():
    assert [now for now in range(9, 42) if is_due(10, now - 1, now)] == [10, 20, 30, 40]
    assert is_due(10, 0, 35)
    assert not is_due(10, 35, 39)
    assert not is_due(10, 40, 44)  # as in a run that is resumed at a multiple
    assert not is_due(0, 0, 9)


def test_it_is_due_once_per_multiple_however_long_the_steps_are():
    for start in (0, 4, 25):
        due = [now for now in range(start + 4, 70, 4) if is_due(10, now - 4, now)]
        assert [now // 10 for now in due] == list(range(start // 10 + 1, 7))
