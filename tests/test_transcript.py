"""prompt.txt and answers.jsonl: what the VLM is told and what it says."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from small_runs import at_each_step, roundless, run_until_killed, small_config

from covr_fast import Trainer, load_policy, tasks
from covr_fast.errors import UserError
from covr_fast.evaluate import actor_policy
from covr_fast.load_vlm import load_prior, task_words
from covr_fast.rounds import vlm_images
from covr_fast.transcript import MOST_LINES
from covr_fast.vlm import ActionPrior
from covr_fast.vlm.answer.prompt import parse_action
from covr_fast.words import Words


def answers(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with rounds; and for every update of the transcript its step, whether it wrote, and its ids."""
    out = tmp_path_factory.mktemp("finished")
    trainer = Trainer(small_config(), out)
    asked, update = [], trainer.vlm.transcript.update

    def watched(step, ids):
        version = trainer.vlm.transcript._written
        update(step, ids)
        asked.append((step, trainer.vlm.transcript._written > version, ids))

    trainer.vlm.transcript.update = watched
    trainer.run()
    return trainer, asked


def test_prompt_txt_is_the_conversation_as_the_model_gets_it(finished):
    trainer, _ = finished
    text = (trainer.out / "prompt.txt").read_text()
    conversation, note = text.split("\n\n---\n")
    assert conversation == trainer.prior.text
    assert task_words(trainer.config) in conversation
    size = (trainer.config.env.height, trainer.config.env.width)
    backbone = trainer.prior.backbone
    tokens = backbone.process(conversation, torch.zeros(1, 3, *size, dtype=torch.uint8))["input_ids"][0]
    image = int((tokens == backbone.image_token_id).sum())
    assert f"<|image_pad|> stands for a frame of 48x48 pixels, as {image} tokens." in note
    shared = int((tokens == backbone.image_token_id).nonzero()[0])
    assert f"is {len(tokens)} tokens, of which all frames share the first {shared}." in note


def test_each_version_answers_a_few_lines_and_is_told_what_was_executed(finished):
    trainer, asked = finished
    lines = answers(trainer.out)
    rounds = trainer.vlm.rounds.schedule.rounds
    assert rounds >= 2
    assert trainer.prior.version == rounds
    per_version = Counter(line["version"] for line in lines)
    assert per_version.keys() == set(range(rounds + 1))
    assert all(0 < count <= MOST_LINES for count in per_version.values())
    written = [(step, ids) for step, new, ids in asked if new]
    assert [step for step, _ in written] == sorted({line["step"] for line in lines})
    assert written[0][0] == trainer.config.env.batch_size  # the first transitions of the run
    assert len(asked) > len(written)

    last, ids = [line for line in lines if line["version"] == rounds], written[-1][1][:MOST_LINES]
    again = trainer.prior(vlm_images(trainer.config, trainer.buffer, ids))
    assert [line["text"] for line in last] == again.text
    executed = torch.tensor([line["executed"] for line in last])
    assert torch.allclose(executed, trainer.buffer.actions(ids).cpu(), atol=6e-5)
    assert all(len(parse_action(line["text"])) == 2 for line in lines)


def test_they_change_nothing_else(tmp_path, finished):
    trainer = Trainer(small_config(vlm__temperature=1.0), tmp_path / "with")
    without = Trainer(small_config(vlm__temperature=1.0), tmp_path / "without")
    without.vlm.transcript.update = lambda step, ids: None
    for each in (trainer, without):
        each.run()
    assert not (tmp_path / "without/answers.jsonl").exists()
    pairs = zip(trainer.agent.actor.parameters(), without.agent.actor.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert trainer.counters.returns == without.counters.returns


def test_a_resumed_run_goes_on_with_them(tmp_path):
    out = tmp_path / "run"
    trainer = Trainer(small_config(checkpoint_every=60), out)
    run_until_killed(trainer, 150)
    begun = answers(out)
    saved = Trainer(small_config(checkpoint_every=60), out, resume=True)
    kept = [line for line in begun if line["step"] <= saved.step]
    assert 0 < len(kept) < len(begun), "this test needs a round after the checkpoint"
    assert answers(out) == begun, "a trainer that is only built writes nothing"
    with (out / "answers.jsonl").open("a") as file:
        file.write('{"step": 148, "ver')  # cut off by the kill
    saved.run()
    lines = answers(out)
    assert lines[: len(kept)] == kept
    versions = [line["version"] for line in lines]
    assert versions == sorted(versions)
    assert set(versions) == set(range(saved.prior.version + 1))
    assert max(Counter(versions).values()) <= MOST_LINES


def test_in_the_background_they_are_the_labellers(tmp_path, monkeypatch):
    trainer = Trainer(roundless(steps=120, vlm__background=True), tmp_path)

    def wait_for_labels(_rows):
        while trainer.step >= 40 and trainer.vlm.labeller.latest is None:
            trainer.vlm.labeller.step()

    at_each_step(trainer, wait_for_labels)
    given, note = [], trainer.vlm.transcript.note
    monkeypatch.setattr(trainer.vlm.transcript, "note", lambda *args: (given.append(args[1]), note(*args)))
    trainer.run()
    lines = answers(tmp_path)
    ids = given[0][:MOST_LINES]
    assert [line["version"] for line in lines] == [0] * len(ids)
    said = trainer.prior(vlm_images(trainer.config, trainer.buffer, ids))
    assert [line["text"] for line in lines] == said.text
    executed = torch.tensor([line["executed"] for line in lines])
    torch.testing.assert_close(executed, trainer.buffer.actions(ids), rtol=0, atol=1e-4)


def test_a_damaged_line_is_named_before_anything_is_built(tmp_path):
    run_until_killed(Trainer(small_config(checkpoint_every=60), tmp_path), 80)
    good = (tmp_path / "answers.jsonl").read_text()
    (tmp_path / "answers.jsonl").write_text("rubbish\n" + good)
    with pytest.raises(UserError, match=r"answers.jsonl is damaged in line 1"):
        Trainer(small_config(checkpoint_every=60), tmp_path, resume=True)


# ---- which prompt ----------------------------------------------------------------------------------


def test_a_prompt_of_the_user_s_replaces_the_task_s():
    prior = load_prior(small_config(vlm__prompt="Drive."), 2, torch.device("cpu"), "nano")
    assert prior.prompt == "Drive."
    prior = load_prior(small_config(), 2, torch.device("cpu"), "nano")
    assert prior.prompt == task_words(small_config())
    assert re.search(r"racing car.*\[-1, 1\]\. Answer in this format: Action: \[0\.4, -0\.3\]$", prior.prompt)


def test_a_saved_model_is_told_the_task_of_the_run_that_it_begins(tmp_path):
    ActionPrior.from_pretrained("nano", action_dim=2, prompt="Fly.").save_pretrained(tmp_path)
    config = small_config(vlm__model=str(tmp_path))
    prior = load_prior(config, 2, torch.device("cpu"), config.vlm.model)
    assert prior.prompt == task_words(config)


def test_a_resumed_vlm_is_told_what_it_was_tuned_with(tmp_path, monkeypatch):
    out = tmp_path / "run"
    trainer = Trainer(small_config(checkpoint_every=60), out)
    run_until_killed(trainer, 80)
    told = trainer.prior.prompt
    monkeypatch.setattr(tasks, "words_for", lambda *_: Words("A newer version has other words.", ("a", "b")))
    resumed = Trainer(small_config(checkpoint_every=60), out, resume=True)
    assert "other words" in task_words(resumed.config)
    assert resumed.prior.prompt == told


# ---- the actor alone -------------------------------------------------------------------------------


def test_load_policy_gives_the_trained_actor(finished, tmp_path):
    trainer, _ = finished
    copy = shutil.copytree(trainer.out, tmp_path / "copy")
    obs = torch.randint(256, (3, *trainer.config.env.obs_shape), dtype=torch.uint8).numpy()
    action = load_policy(str(copy))(obs)
    assert action.shape == (3, 2)
    assert (action == actor_policy(trainer.agent, trainer.config)(obs)).all()
    with pytest.raises(UserError, match="is it the folder of a run"):
        load_policy(tmp_path)
