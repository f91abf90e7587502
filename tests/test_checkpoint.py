import os
import signal
import time

import pytest

from covr_fast import SAC
from covr_fast.agents import AgentConfig
from covr_fast.checkpoint import newest_folder, replaced_folder, save_checkpoint
from covr_fast.errors import UserError
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner


def fill(folder, text):
    with replaced_folder(folder) as new:
        for name in ("a", "b"):
            (new / name).write_text(text)


def test_replaces_whole_folders(tmp_path):
    target = tmp_path / "checkpoint"
    fill(target, "one")
    fill(target, "two")
    assert (newest_folder(target) / "a").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path):
    target = tmp_path / "checkpoint"
    fill(target, "one")
    with pytest.raises(TypeError):
        fill(target, 12)
    assert (newest_folder(target) / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_killed_between_the_two_moves(tmp_path):
    target = tmp_path / "checkpoint"
    fill(target, "one")
    target.rename(target.with_name("checkpoint.old"))
    assert (newest_folder(target) / "a").read_text() == "one"


def test_killed_anywhere(tmp_path):
    """Whatever is found afterwards is one whole generation, and no older than what was there before."""
    target, newest = tmp_path / "checkpoint", 0
    fill(target, str(newest))
    for attempt in range(400):
        if attempt >= 20 and newest > 0:  # a busy machine needs longer for the first
            break
        writer = os.fork()
        if writer == 0:
            for number in range(newest + 1, newest + 1000):
                fill(target, str(number))
            os._exit(0)
        time.sleep(0.002 * attempt)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        found = {name: (newest_folder(target) / name).read_text() for name in ("a", "b")}
        assert found["a"] == found["b"]
        assert int(found["a"]) >= newest
        newest = int(found["a"])
    assert newest > 0


def test_an_adapter_of_the_vlm_that_would_be_replaced(tmp_path):
    agent = SAC((3, 48, 48), (2,), AgentConfig(channels=(8,), strides=(4,), latent=8, hidden=8), seed=0)
    options = {"action_dim": 2, "device": "cpu"}
    save_checkpoint(tmp_path, agent, ActionPrior.from_pretrained("nano", **options), {}, None)
    folder = tmp_path / "checkpoint" / "vlm"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    prior = ActionPrior.from_pretrained(folder, **options)
    VLMTuner(prior, TunerConfig(mode="lora", lora_rank=2))
    with pytest.raises(UserError, match=r"adapter of .*vlm, which saving would remove: copy that model"):
        save_checkpoint(tmp_path, agent, prior, {}, None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    save_checkpoint(tmp_path / "another", agent, prior, {}, None)
