"""The model card: a header that the hub reads, an example that runs, and the user's own card left alone."""

import re

import pytest
import yaml
from hub_stand_in import hub_stand_in
from tiny import make_nano, open_prior, write_checkpoint

from covr_fast.vlm import TunerConfig, VLMTuner
from covr_fast.vlm.model.card import card_for_hub

LORA = TunerConfig(mode="lora", lora_rank=2, lora_alpha=4)


def read(folder) -> tuple[dict, str]:
    """Header and text."""
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = write_checkpoint("llava", tmp_path_factory.mktemp("checkpoints"))
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: maker\nlicense_link: https://maker.org/l\n---\n# LLaVA\n"
    )
    return folder


@pytest.mark.parametrize("adapted", [True, False])
def test_of_nano(adapted, tmp_path, monkeypatch, capsys):
    prior = make_nano(prompt="Drive\nwell.", decimals=1, image_size=112)
    if adapted:
        VLMTuner(prior, LORA)
    prior.save_pretrained(tmp_path / "a")
    header, text = read(tmp_path / "a")
    assert header == {
        "library_name": "peft" if adapted else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["covr_fast", "reinforcement-learning", *(["lora"] if adapted else [])],
    }
    assert "> Drive\n> well.\n" in text
    assert "2 numbers in [-1, 1] in steps of 0.1, for example `Action: [0.4, -0.3]`" in text
    assert "The longer side of a frame is resized to 112 pixels." in text
    assert "nano, a small random model" in text
    monkeypatch.chdir(tmp_path / "a")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    assert "['Action: [" in capsys.readouterr().out


def test_of_a_base_in_a_folder(llava, tmp_path):
    prior = open_prior(llava)
    VLMTuner(prior, LORA)
    prior.save_pretrained(tmp_path / "a")
    header, text = read(tmp_path / "a")
    assert "base_model" not in header
    assert (header["license"], header["license_name"], header["license_link"]) == (
        "other",
        "maker",
        "https://maker.org/l",
    )
    assert "`maker` (https://maker.org/l)" in text
    assert "a folder named `llava`" in text
    assert str(llava.parent) not in text


def test_of_a_base_on_the_hub(llava, tmp_path, monkeypatch):
    with hub_stand_in(monkeypatch, tmp_path / "cache") as hub:
        hub.models["maker/llava"] = {path.name: path.read_bytes() for path in llava.iterdir()}
        prior = open_prior("maker/llava")
        VLMTuner(prior, LORA)
        prior.save_pretrained(tmp_path / "a")
        header, text = read(tmp_path / "a")
        assert (header["base_model"], header["license_name"]) == ("maker/llava", "maker")
        monkeypatch.chdir(tmp_path / "a")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == 2
        for code in blocks:
            exec(code, {})


def test_full_weights_keep_the_name_of_their_base(tmp_path):
    make_nano().save_pretrained(tmp_path / "a")
    for _ in range(2):
        open_prior(tmp_path / "a").save_pretrained(tmp_path / "a")
    assert "nano, a small random model" in read(tmp_path / "a")[1]


def test_a_card_of_the_user_stays_and_one_of_a_model_goes(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    prior = make_nano()
    (folder / "README.md").write_text("# My notes\nlibrary_name: none\n")
    prior.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# My notes\nlibrary_name: none\n"
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Another model\n")
    prior.save_pretrained(folder)
    assert "# Weights of a model that answers with actions" in read(folder)[1]


@pytest.mark.parametrize("card", ["", "---\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", b"\xff\xfe"])
def test_a_damaged_card_of_the_base(card, llava, tmp_path):
    prior = open_prior(llava)
    before = (llava / "README.md").read_bytes()
    try:
        (llava / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
        prior.save_pretrained(tmp_path / "a")
    finally:
        (llava / "README.md").write_bytes(before)
    assert "No licence was found" in read(tmp_path / "a")[1]


def test_on_the_hub_names_hold(llava, tmp_path):
    prior = open_prior(llava)
    VLMTuner(prior, LORA)
    prior.save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text() + "\nWritten by hand.\n"
    (tmp_path / "a" / "README.md").write_text(card_for_hub(card, "me/tuned", str(llava), "maker/llava"))
    header, text = read(tmp_path / "a")
    assert (header["base_model"], header["license_name"]) == ("maker/llava", "maker")
    assert "[maker/llava](https://huggingface.co/maker/llava)" in text
    assert 'folder = "me/tuned"' in text
    assert "Written by hand." in text
    assert "not on the hub" not in text
