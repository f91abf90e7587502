"""Settings that belong to the VLM change with it, and what does not suit it is said."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny

from covr_fast import TrainConfig
from covr_fast.presets import PRESETS
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.model.nano import is_nano

SMALL = {
    "steps": 60, "warmup": 32, "decisions-per-update": 8, "threads": 1, "log-every": 30,
    "env.num-envs": 2, "env.batch-size": 2, "env.action-repeat": 1, "env.max-episode-steps": 6,
    "replay.batch-size": 16, "replay.capacity": 200, "covr.psi-0": 30, "covr.min-samples": 4,
    "eval.episodes": 2, "vlm.every": 10, "tuner.max-steps": 2, "tuner.lora-rank": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint that is not nano, as far as anyone can tell a pretrained one."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    tiny.write_qwen2_vl(folder)
    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_suits_its_own_model_nano_and_a_pretrained_one(name, pretrained):
    for model in (None, "nano", str(pretrained), "Qwen/Qwen2.5-VL-3B-Instruct"):
        config = TrainConfig.preset(name, model)
        config.check()
        assert config.doubts() == []
        assert config.vlm.model == (PRESETS[name].model if model is None else model)


@pytest.mark.parametrize("name", PRESETS)
def test_what_teaches_random_weights_is_not_done_to_a_pretrained_model(name):
    nano, real = (TrainConfig.preset(name, model) for model in ("nano", "Qwen/Qwen2.5-VL-3B-Instruct"))
    assert nano.tuner.mode == "full"
    drives = real.env.id.lower().startswith(("carracing", "racetrack", "highway", "carla"))
    assert real.tuner == TunerConfig(lora_alpha=256 if drives else 16)  # the paper's LoRA
    assert real.agent.prior_weight == (2.0 if drives else 1.0)  # the paper's lambda
    assert not real.env.grayscale
    assert not real.vlm.motion
    assert real.vlm.decimals == 2
    assert max(real.env.height, real.env.width) >= 84
    assert (nano.steps, nano.covr, nano.env.id) == (real.steps, real.covr, real.env.id)


def test_doubtful_settings_are_named_with_a_remedy():
    config = TrainConfig.preset("carracing")
    config.vlm.model = "Qwen/Qwen2.5-VL-3B-Instruct"
    said = config.doubts()
    for setting in ("tuner.learning_rate=0.002", "tuner.epochs=40", "vlm.motion", "env.grayscale"):
        assert any(sentence.startswith(setting) for sentence in said), setting
    config = TrainConfig.preset("carracing")
    config.tuner = replace(config.tuner, mode="lora")
    (sentence,) = config.doubts()
    assert "use tuner.mode='full'" in sentence


def test_an_adapter_on_another_runs_checkpoint_is_doubted(tmp_path, pretrained):
    shutil.copytree(pretrained, tmp_path / "run" / "checkpoint" / "vlm")
    (tmp_path / "run" / "config.json").write_text("{}")
    (sentence,) = TrainConfig.preset("carracing", str(tmp_path / "run" / "checkpoint" / "vlm")).doubts()
    assert "changes when that run goes on" in sentence
    assert "copy the folder to another place" in sentence
    assert TrainConfig.preset("carracing", str(pretrained)).doubts() == []


def test_nano_is_recognised_where_it_was_saved(tmp_path, pretrained):
    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    prior = ActionPrior.from_pretrained("nano", action_dim=2)
    prior.save_pretrained(whole)
    VLMTuner(prior, TunerConfig(lora_rank=2))
    prior.save_pretrained(adapter)
    assert is_nano("nano")
    assert is_nano(whole)
    assert is_nano(adapter)
    assert not is_nano(pretrained)
    assert not is_nano(tmp_path / "nothing")
    assert not is_nano("Qwen/Qwen2.5-VL-3B-Instruct")


def test_the_command_takes_the_models_settings_and_says_so(tmp_path, pretrained):
    out = tmp_path / "run"
    fields = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "-m", "covr_fast.cli", "train", "carracing", "--out", str(out), *fields]
    given = ["--no-video", "--eval.no-vlm", "--vlm.model", str(pretrained), "--tuner.learning-rate", "0.005"]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["tuner"]["mode"] == "lora"
    assert config["tuner"]["learning_rate"] == 0.005  # what is given beats what suits
    assert config["env"]["grayscale"] is False
    assert (out / "checkpoint" / "vlm" / "adapter_config.json").is_file()
    assert "for what was asked for the preset sets" in done.stdout
    assert "tuner.mode=lora" in done.stdout
    assert "note: tuner.learning_rate=0.005 with tuner.mode='lora'" in done.stdout
