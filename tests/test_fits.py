"""Whether a run fits: what is added up, and what the doctor says of it."""

import json
from dataclasses import replace

import pytest
import torch

from covr_fast import ReplayBuffer, TrainConfig, cli, fits
from covr_fast.agents.sac import SAC
from covr_fast.errors import UserError
from covr_fast.live_bytes import LiveBytes
from covr_fast.vlm.footprint import Footprint, Part

NANO = ["--vlm.model", "nano"]


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig.preset("carracing", "nano")


@pytest.fixture
def memory(config) -> fits.RunMemory:
    return fits.run_memory(config, "cuda")


def test_in_turn_only_one_takes_its_passing_memory(config):
    groups = {
        "the VLM, to answer": [Part("a", 1, ""), Part("b", 20, "", passing=True)],
        "a round of fine-tuning": [Part("c", 300, ""), Part("d", 4000, "", passing=True)],
        "the agent": [Part("e", 50_000, "", passing=True)],
        "besides": [],
    }
    vlm = Footprint(groups["the VLM, to answer"], [], torch.float32, None, 9, 50)
    memory = fits.RunMemory(config, vlm, groups)
    assert (memory.total(overlap=True), memory.total(overlap=False)) == (54_321, 50_301)
    assert (memory.serving, memory.needed) == (21, 50_301)


@pytest.mark.parametrize(
    "steps, psi_0, most", [(100_000, 5000, 25_000), (3000, 2500, 2500), (100, 2500, 100)]
)
def test_a_round_has_at_most_half_of_the_decisions_since_the_last(config, steps, psi_0, most):
    changed = replace(config, steps=steps, covr=replace(config.covr, psi_0=psi_0, schedule="linear"))
    changed.replay.capacity, changed.env.action_repeat = 10**6, 4
    assert fits._samples(changed) == most // 8


def test_the_replay_buffer_is_as_large_as_a_real_one(config, memory):
    env = config.env
    buffer = ReplayBuffer(
        config.replay.capacity,
        num_envs=env.num_envs,
        obs_shape=env.obs_shape,
        action_shape=(2,),
        frame_stack=env.frame_stack,
    )
    told = {part.name: part.nbytes for part in memory.groups["the agent"]}
    assert told["replay buffer"] == buffer._storage.frame_bytes


def test_an_update_is_as_large_as_a_real_one_of_that_batch(config, memory):
    config.replay.batch_size = 32
    told = {part.name: part.nbytes for part in fits._agent(config, 2, "cpu")}
    agent = SAC(fits.agent_obs_shape(config), (2,), config.agent)
    agent.update(fits._batch(config, 32, 2), guide=True)
    with LiveBytes("cpu") as live:
        agent.update(fits._batch(config, 32, 2), guide=True)
    assert told["an update"] == pytest.approx(live.peak, rel=0.05)


def test_frames_in_host_memory_take_none_of_the_gpu(config, memory):
    config = TrainConfig.from_dict(config.to_dict())
    config.replay.device = "cpu"
    on_host = fits.run_memory(config, "cuda")
    names = [part.name for parts in on_host.groups.values() for part in parts]
    assert "replay buffer" not in names
    assert "frames" not in names
    assert on_host.needed < memory.needed


def test_remedies_are_what_the_settings_save(config, monkeypatch):
    monkeypatch.setattr(fits, "_CONTEXT", Part("CUDA itself", 0, ""))
    config.replay.capacity = 2000
    memory = fits.run_memory(config, "cuda")
    found, with_all = fits.remedies(memory, "cuda")
    saves = {remedy.flag: remedy.saves for remedy in found}
    assert list(saves.values()) == sorted(saves.values(), reverse=True)
    assert "--tuner.micro-batch 4" in saves
    assert "--vlm.quantization 4bit" not in saves  # not with tuner.mode=full
    cheaper = TrainConfig.from_dict(config.to_dict())
    cheaper.replay.device = "cpu"
    assert saves["--replay.device cpu"] == memory.needed - fits.run_memory(cheaper, "cuda").needed
    assert 0 < with_all < memory.needed - max(saves.values())


def said(capsys, *arguments: str) -> tuple[int, str]:
    code = cli.run(["doctor", *arguments])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("gigabytes, code, words", [(2, 0, "fits: needs"), (0.001, 1, "does not fit: needs")])
def test_the_verdict(gigabytes, code, words, capsys, monkeypatch):
    monkeypatch.setattr(fits, "host", lambda: fits.Device("this machine", int(gigabytes * 1e9)))
    got, text = said(capsys, "carracing", *NANO, "--device", "cpu")
    assert got == code
    (line,) = (line for line in text.splitlines() if line.startswith("this machine: "))
    assert words in line
    assert ("what would take less" in text) == bool(code)


def test_gpus_of_this_machine_are_asked_first(capsys, monkeypatch):
    monkeypatch.setattr(
        fits, "gpus", lambda: [fits.Device("cuda:0, a small one", 10**9), fits.Device("cuda:1", 10**11)]
    )
    code, text = said(capsys, "carracing", *NANO)
    assert code == 0
    assert "cuda:0, a small one: does not fit" in text
    assert "cuda:1: fits" in text
    assert "a GPU of" not in text


def test_json_has_the_same_numbers(capsys, monkeypatch):
    monkeypatch.setattr(fits, "gpus", lambda: [])
    code, text = said(capsys, "carracing", *NANO, "--json", "--tuner.micro-batch", "8")
    told = json.loads(text)
    assert (code == 0) == told["fits_here"]
    assert [device["name"] for device in told["devices"][:3]] == [f"a GPU of {n} GB" for n in (24, 40, 80)]
    parts = [part for owner in told["parts"].values() for part in owner]
    assert told["rounds_beside"] == sum(part["nbytes"] for part in parts)
    (activations,) = (part for part in parts if part["name"] == "activations")
    assert activations["how"].startswith("8 samples")


def test_mistakes_are_told_in_one_line(tmp_path):
    cases = {
        str(tmp_path): "cannot read a model configuration",
        str(tmp_path / "nowhere"): "no model directory",
    }
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    cases[str(tmp_path / "bert")] = "architecture 'bert' is not supported"
    for model, words in cases.items():
        with pytest.raises(UserError, match=words) as error:
            cli.run(["doctor", "--vlm.model", model])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown preset"):
        cli.run(["doctor", "carracin", *NANO])
