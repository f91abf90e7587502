"""The video of an evaluation episode: real small ones, of the three kinds of runs."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from small_runs import roundless

from covr_fast import Trainer
from covr_fast.evaluate import actor_policy, evaluate, vlm_policy
from covr_fast.panel import Decision, Panel
from covr_fast.video import EpisodeVideo, record_episode

DECISIONS, REPEAT, CROP = 5, 2, 4
NAMES = ("left/right", "brake/gas")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with frames in colour, of which the agent sees the centre, and the VLM three greys as colours."""
    config = roundless(
        steps=64, env__action_repeat=REPEAT, env__max_episode_steps=REPEAT * DECISIONS, env__grayscale=False,
        replay__augment="crop", replay__pad=CROP, vlm__motion=True,
    )  # fmt: skip
    trainer = Trainer(config, tmp_path_factory.mktemp("run"))
    trainer.run()
    return trainer


@pytest.fixture
def told(monkeypatch) -> list[Decision]:
    """What the video is told."""
    decisions: list[Decision] = []
    add = EpisodeVideo.add

    def watched(self, decision):
        decisions.append(decision)
        add(self, decision)

    monkeypatch.setattr(EpisodeVideo, "add", watched)
    return decisions


def episode(trainer: Trainer, policy) -> list[tuple[torch.Tensor, np.ndarray, float]]:
    """The same evaluation episode without a video: uint8[1, C, H, W] obs, action and return so far."""
    seen = []
    evaluate(
        policy,
        trainer.config.env,
        1,
        seed=trainer.config.eval.seed,
        watch=lambda _, obs, action, total: seen.append((torch.from_numpy(obs[None].copy()), action, total)),
    )
    return seen


def clip_of(folder, told: list[Decision]) -> np.ndarray:
    """The video's frames, which have to show what it was told."""
    clip = iio.imread(folder / "episode.mp4")
    panel = Panel(NAMES, told[0])
    assert clip.shape == (len(told), panel.size[1], panel.size[0], 3)
    for frame, decision in zip(clip, told, strict=True):  # H.264 is not exact
        assert decision.picture.shape == (480, 480, 3)
        assert np.abs(frame[:480, :480].astype(int) - decision.picture).mean() < 6
        assert np.abs(frame.astype(int) - np.asarray(panel.draw(decision))).mean() < 6
    red, green, blue = clip[:, :300, :480].mean((0, 1, 2))
    assert green > max(red, blue) + 20, "the grass is green"
    return clip


def test_agent_and_vlm(trained, tmp_path, told):
    record_episode(trained.config, trained.agent, trained.prior, tmp_path)
    assert len(clip_of(tmp_path, told)) == DECISIONS
    expected = episode(trained, actor_policy(trained.agent, trained.config))
    for step, (decision, (obs, action, total)) in enumerate(zip(told, expected, strict=True)):
        centre = obs[..., CROP:-CROP, CROP:-CROP]
        assert (decision.agent_sees == centre[0, -3:].permute(1, 2, 0).numpy()).all()
        assert (decision.action == action).all()
        assert decision.value == pytest.approx(trained.agent.value(centre).item(), abs=1e-5)
        assert decision.vlm_sees.shape == (48, 48, 3)
        answer = trained.prior(torch.from_numpy(decision.vlm_sees).permute(2, 0, 1)[None]).action[0]
        assert (decision.prior == answer.cpu().numpy()).all()
        assert (decision.total, decision.step) == (total, step * REPEAT)
    colours = told[-1].vlm_sees.astype(int)
    assert np.ptp(colours, axis=2).max() > 10, "what moves has colours"


def test_an_agent_alone(trained, tmp_path, told):
    record_episode(trained.config, trained.agent, None, tmp_path)
    clip_of(tmp_path, told)
    expected = episode(trained, actor_policy(trained.agent, trained.config))
    assert [d.total for d in told] == [total for _, _, total in expected]
    for decision in told:
        assert decision.agent_sees is not None
        assert decision.vlm_sees is decision.prior is None


def test_a_vlm_alone(trained, tmp_path, told):
    record_episode(trained.config, None, trained.prior, tmp_path)
    clip_of(tmp_path, told)
    expected = episode(trained, vlm_policy(trained.prior, trained.config))
    for decision, (_, action, total) in zip(told, expected, strict=True):
        assert (decision.prior == action).all()
        assert decision.total == total
        assert decision.agent_sees is decision.action is decision.value is None


def test_somebody_has_to_act(trained, tmp_path):
    with pytest.raises(ValueError, match="needs an agent or a VLM"):
        record_episode(trained.config, None, None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def video() -> EpisodeVideo:
    """Three frames."""
    video = EpisodeVideo(NAMES, fps=4)
    pixels = np.random.default_rng(0).integers(0, 256, (84, 96, 3), np.uint8)
    for step in range(3):
        action = np.array([0.0, step / 2])
        video.add(Decision(pixels, pixels, None, action, None, 1.0, float(step), step))
    return video


def test_frames_are_kept_as_they_are_drawn(video):
    assert len(video) == 3
    first, *_, last = video.frames()
    assert first.shape == last.shape
    assert (first[:420, :480] == last[:420, :480]).all()
    assert not (first == last).all()


def test_without_an_encoder_it_is_a_gif(video, tmp_path, monkeypatch):
    """ffmpeg ends without a file, or with half a one, and says nothing to those who feed it."""
    monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda path: (2, 0.5))
    assert video.write(tmp_path) == tmp_path / "episode.gif"
    assert [file.name for file in tmp_path.iterdir()] == ["episode.gif"]
    clip = iio.imread(tmp_path / "episode.gif")
    assert clip.shape[0] == 3
    assert iio.immeta(tmp_path / "episode.gif")["duration"] == 250


def test_a_video_is_small_and_plays_while_it_loads(video, tmp_path):
    content = video.write(tmp_path).read_bytes()
    assert len(content) < 300_000
    assert content.index(b"moov") < content.index(b"mdat")
    assert iio.immeta(tmp_path / "episode.mp4")["fps"] == 4
