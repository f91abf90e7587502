"""What is in a frame of the video, and where."""

from itertools import combinations

import numpy as np
import pytest

from covr_fast.gauges import AGENT, LINE, TEXT, VLM, fitted, font
from covr_fast.panel import Decision, Panel


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def decision(picture=(480, 480), agent=(76, 76), vlm=(84, 84), numbers=2, **changes) -> Decision:
    whole = Decision(
        picture=noise(*picture, seed=1),
        agent_sees=noise(*agent, seed=2),
        vlm_sees=noise(*vlm, seed=3),
        action=np.full(numbers, 0.5),
        prior=np.full(numbers, -0.25),
        value=3.25,
        total=12.0,
        step=40,
    )
    return whole._replace(**changes)


WITHOUT_VLM = {"vlm_sees": None, "prior": None}
WITHOUT_AGENT = {"agent_sees": None, "action": None, "value": None}


def names(count: int) -> list[str]:
    return [f"left/right {i}" for i in range(count)]


def drawn(shown: Decision) -> tuple[Panel, np.ndarray]:
    count = len(shown.prior if shown.action is None else shown.action)
    panel = Panel(names(count), shown)
    return panel, np.asarray(panel.draw(shown))


def cut(image: np.ndarray, box) -> np.ndarray:
    return image[box.y : box.y + box.height, box.x : box.x + box.width]


@pytest.mark.parametrize(
    "size, factor", [((480, 480), 1), ((252, 756), 1), ((96, 96), 5), ((84, 252), 3), ((48, 48), 10)]
)
def test_the_simulator_s_pixels_are_all_there_enlarged_by_a_whole_number(size, factor):
    shown = decision(size)
    panel, image = drawn(shown)
    where = cut(image, panel.picture)
    top = (where.shape[0] - size[0] * factor) // 2
    left = (where.shape[1] - size[1] * factor) // 2
    pixels = where[top : top + size[0] * factor, left : left + size[1] * factor]
    assert (pixels == shown.picture.repeat(factor, 0).repeat(factor, 1)).all()


def test_a_picture_that_is_too_large_is_reduced():
    panel, image = drawn(decision(picture=(1440, 2560)))
    assert panel.picture[2:] == (840, 473)
    assert abs(int(cut(image, panel.picture).mean()) - 127) < 3


def test_insets_show_what_is_seen_at_one_scale():
    shown = decision(agent=(76, 76), vlm=(84, 84))
    panel, image = drawn(shown)
    assert (cut(image, panel.agent_sees) == shown.agent_sees.repeat(2, 0).repeat(2, 1)).all()
    assert (cut(image, panel.vlm_sees) == shown.vlm_sees.repeat(2, 0).repeat(2, 1)).all()
    for box, colour in ((panel.agent_sees, AGENT), (panel.vlm_sees, VLM)):
        title = image[box.y - LINE : box.y - 1, box.x : box.x + 5 * TEXT]
        assert (title == colour).all(-1).any(), "the title"


@pytest.mark.parametrize("wide", [False, True])
def test_square_pictures_have_the_panel_beside_them_and_wide_ones_below(wide):
    panel, _ = drawn(decision((252, 756), (42, 126), (42, 126)) if wide else decision())
    for box in (panel.numbers, panel.gauges, panel.agent_sees, panel.vlm_sees):
        assert (box.y >= 252) if wide else (box.x >= 480)
    one, other = panel.agent_sees, panel.vlm_sees
    assert (one.x == other.x and one.y < other.y) if wide else (one.y == other.y and one.x < other.x)


@pytest.mark.parametrize("picture", [(480, 480), (252, 756), (96, 84), (400, 600), (720, 1280), (300, 100)])
@pytest.mark.parametrize("seen", [(84, 84), (42, 126), (400, 300), (60, 20)])
@pytest.mark.parametrize("numbers", [1, 12, 56])
@pytest.mark.parametrize("without", [{}, WITHOUT_VLM, WITHOUT_AGENT])
def test_nothing_overlaps_or_is_cut_off(picture, seen, numbers, without):
    panel, image = drawn(decision(picture, seen, seen, numbers, **without))
    width, height = panel.size
    assert image.shape == (height, width, 3)
    assert width % 2 == height % 2 == 0
    boxes = [panel.picture, panel.numbers, panel.gauges]
    # With the title above.
    boxes += [
        box._replace(y=box.y - LINE, height=box.height + LINE, width=max(box.width, 5 * TEXT))
        for box in (panel.agent_sees, panel.vlm_sees)
        if box
    ]
    for x, y, w, h in boxes:
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
    for one, other in combinations(boxes, 2):
        apart = (
            one.x + one.width <= other.x
            or other.x + other.width <= one.x
            or one.y + one.height <= other.y
            or other.y + other.height <= one.y
        )
        assert apart, (one, other)


def bars(image: np.ndarray, panel: Panel, colour: tuple[int, int, int]) -> np.ndarray:
    """[A], the bars' numbers as drawn, from the pixels of a colour below the legend."""
    box = panel.gauges
    found = (cut(image, box)[LINE:] == colour).all(-1)
    rows = np.flatnonzero(found.any(1))
    middle = cut(image, box).shape[1] // 2
    starts = rows[np.flatnonzero(np.diff(rows, prepend=-9) > 1)]
    ends = []
    for row in starts:
        columns = np.flatnonzero(found[row])
        ends.append(columns.max() if columns.min() >= middle else columns.min())
    return (np.array(ends) - middle) / (box.width // 2 - 1)


@pytest.mark.parametrize("action, prior", [((0.5, -1.0), (-0.25, 0.75)), ((-0.9, 0.1), (1.0, -0.4))])
def test_gauges_follow_the_numbers(action, prior):
    panel, image = drawn(decision(action=np.array(action), prior=np.array(prior)))
    assert bars(image, panel, AGENT) == pytest.approx(action, abs=0.01)
    assert bars(image, panel, VLM) == pytest.approx(prior, abs=0.01)


def test_return_q_and_step_are_said():
    first = decision()
    panel = Panel(names(2), first)
    changes: list[dict[str, float]] = [{}, {"total": 13.0}, {"value": -1.0}, {"step": 44}]
    images = [np.asarray(panel.draw(first._replace(**change))) for change in changes]
    third = panel.numbers.width // 3
    places = [panel.numbers._replace(x=panel.numbers.x + i * third, width=third) for i in range(3)]
    thirds = [[cut(image, place) for place in places] for image in images]
    changed = [[not (a == b).all() for a, b in zip(thirds[0], other, strict=True)] for other in thirds[1:]]
    assert changed == np.eye(3, dtype=bool).tolist()


def test_a_run_without_a_vlm_shows_none():
    panel, image = drawn(decision(**WITHOUT_VLM))
    assert panel.vlm_sees is None
    assert not (image[:, 480:] == VLM).all(-1).any()
    assert bars(image, panel, AGENT) == pytest.approx([0.5, 0.5], abs=0.01)


def test_a_run_without_an_agent_shows_none():
    panel, image = drawn(decision(**WITHOUT_AGENT))
    assert panel.agent_sees is None
    assert not (image[:, 480:] == AGENT).all(-1).any()
    assert bars(image, panel, VLM) == pytest.approx([-0.25, -0.25], abs=0.01)


def test_a_picture_that_becomes_smaller_stays_in_its_place():
    """As when the second simulator has to be given up."""
    panel, _ = drawn(decision())
    small = noise(84, 96)
    image = np.asarray(panel.draw(decision()._replace(picture=small)))
    where = cut(image, panel.picture)
    assert (where[30:450] == small.repeat(5, 0).repeat(5, 1)).all()


def test_long_names_are_shortened_to_their_room():
    assert fitted("left/right", 100, 20) == "left/right"
    short = fitted("the torque of the left hind leg's upper joint", 100, 20)
    assert short.startswith("the tor")
    assert short.endswith("…")
    assert font(20).getlength(short) <= 100
