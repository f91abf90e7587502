"""What a run writes into the model card of its VLM."""

import json
from dataclasses import replace

import pytest
from small_runs import run_until, small_config

from covr_fast import Trainer
from covr_fast.report import read_summary


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run, finished and interrupted before its first round. Its VLM is an adapter of nano."""
    folder = tmp_path_factory.mktemp("runs")
    config = small_config(eval__vlm=True)
    config.tuner = replace(config.tuner, mode="lora", lora_rank=2)
    Trainer(config, folder / "finished").run()
    run_until(Trainer(config, folder / "interrupted"), 40)
    return folder


def card(run) -> str:
    return (run / "checkpoint" / "vlm" / "README.md").read_text()


def test_task_rounds_and_returns(runs):
    text, summary = card(runs / "finished"), read_summary(runs / "finished")
    assert "library_name: peft" in text
    assert f"`{summary['environment']}`, frames of 48x48" in text
    assert f"{summary['steps']} environment steps" in text
    assert "torch.zeros(1, 3, 48, 48, dtype=torch.uint8)" in text
    assert "Tuned: LoRA" in text
    assert summary["rounds"]
    kept = sum(record["kept"] for record in summary["rounds"])
    assert f"- Rounds: {len(summary['rounds'])}, on {kept:.0f} samples" in text
    for record in summary["rounds"]:
        assert f"| {record['round']:.0f} | {record['step']:.0f} | {record['samples']:.0f} | " in text
    for name, label in (("vlm_before", "VLM alone, before"), ("vlm_after", "VLM alone, after")):
        measured = summary["evaluations"][name]
        assert f"| {label} | {measured['mean']:.1f} | {measured['std']:.1f} | 2 |" in text


def test_before_the_first_round(runs):
    text = card(runs / "interrupted")
    assert "- Rounds: 0, on 0 samples" in text
    assert "| VLM alone, before |" in text
    assert "| VLM alone, after |" not in text


def test_the_adapter_in_a_checkpoint_names_its_base_where_it_is(runs):
    vlm = runs / "finished" / "checkpoint" / "vlm"
    named = json.loads((vlm / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(vlm / "nano_base")
    assert (vlm / "nano_base" / "model.safetensors").is_file()


def test_the_console_says_which_attention_and_why(tmp_path, capsys):
    run_until(Trainer(small_config(), tmp_path / "run"), 8)
    expected = "attention of the VLM: sdpa (FlashAttention cannot run: the device is cpu, not cuda)"
    assert expected in capsys.readouterr().out
