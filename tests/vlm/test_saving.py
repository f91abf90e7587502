"""What `save_pretrained` wrote opens as what was saved, from anywhere and whatever the folder held before."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import random_frames, write_checkpoint, write_qwen2_5_vl

from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.finetune.lora import trainable

OPTIONS = {"action_dim": 2, "prompt": "Drive.", "device": "cpu"}
LORA = TunerConfig(mode="lora", lora_rank=2, lora_alpha=4)
FULL = TunerConfig(mode="full")


def tuned(prior: ActionPrior, config: TunerConfig, seed: int) -> ActionPrior:
    """`prior` with other weights published, as after a round of fine-tuning."""
    tuner = VLMTuner(prior, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(tuner._backbone.model):
            scale = 0.1 * weight.float().std() + 0.01
            weight += (scale * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
    tuner.publish()
    return prior


def images() -> torch.Tensor:
    return random_frames((64, 64), seed=3)


def edit(file: Path, **changes) -> None:
    """Changes settings in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def contents(prior: ActionPrior) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in prior.backbone.model.named_parameters()}


def assert_same(opened: ActionPrior, saved: ActionPrior) -> None:
    ours, theirs = contents(opened), contents(saved)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype, name
        assert torch.equal(ours[name], weight), name
    expected = saved(images()).token_ids
    assert torch.equal(opened(images()).token_ids, expected)
    assert torch.equal(opened.reference(images()).token_ids, expected)


def use(folder: Path) -> dict[Path, str]:
    """Fills a folder with files of other models, and with the user's own, which are returned."""
    folder.mkdir()
    stale = {
        "config.json": {"model_type": "gpt2"},
        "generation_config.json": {"max_length": 3, "repetition_penalty": 9.0},
        "model.safetensors.index.json": {"weight_map": {"x": "model-00001-of-00002.safetensors"}},
        "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "/no/such"},
        "processor_config.json": {"processor_class": "NoSuchProcessor", "image_processor": {"size": 3}},
        "preprocessor_config.json": {"image_processor_type": "NoSuchImageProcessor"},
        "action_prior.json": {"base": "/no/such", "seed": 9, "action_dim": 6, "decimals": 4, "prompt": "No"},
    }
    for name, content in stale.items():
        (folder / name).write_text(json.dumps(content))
    for name in ("model-00001-of-00002.safetensors", "model.safetensors", "adapter_model.safetensors"):
        (folder / name).write_bytes(b"stale")
    own = {folder / "notes.txt": "mine", folder / "README.md": "my card", folder / "plots" / "a.txt": "a"}
    for path, text in own.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return own


@pytest.fixture(scope="module")
def adapter(checkpoint):
    """Of `checkpoint`, saved in a folder."""
    directory = checkpoint.with_name("adapter")
    tuned(ActionPrior.from_pretrained(checkpoint, **OPTIONS), LORA, 0).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("start", ["plain", "adapted"])
def test_every_backbone_in_an_empty_and_in_a_used_folder(checkpoint, adapter, start, mode, tmp_path):
    opened = ActionPrior.from_pretrained(checkpoint if start == "plain" else adapter, **OPTIONS)
    prior = tuned(opened, LORA if mode == "lora" else FULL, 1)
    prior.save_pretrained(tmp_path / "empty")
    assert_same(ActionPrior.from_pretrained(tmp_path / "empty", **OPTIONS), prior)
    own = use(tmp_path / "used")
    prior.save_pretrained(tmp_path / "used")
    assert_same(ActionPrior.from_pretrained(tmp_path / "used", **OPTIONS), prior)
    assert {path: path.read_text() for path in own} == own
    files = {path.name for path in (tmp_path / "empty").iterdir()}
    own_names = {"notes.txt", "README.md", "plots"}
    assert {path.name for path in (tmp_path / "used").iterdir()} == files | own_names
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "used"}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_saved_into_the_folder_that_it_was_opened_from(checkpoint, adapter, mode, tmp_path):
    """Weights may be mapped from the very file that is replaced."""
    source = shutil.copytree(adapter if mode == "lora" else checkpoint, tmp_path / "model")
    prior = tuned(ActionPrior.from_pretrained(source, **OPTIONS), LORA if mode == "lora" else FULL, 2)
    for _ in range(2):
        prior.save_pretrained(source)
    assert_same(ActionPrior.from_pretrained(source, **OPTIONS), prior)


# ---------------------------------------------------------------------- nano, whose base is a seed


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_nano(mode, tmp_path):
    options = {**OPTIONS, "seed": 3, "decimals": 1}
    prior = tuned(ActionPrior.from_pretrained("nano", **options), LORA if mode == "lora" else FULL, 0)
    prior.save_pretrained(tmp_path / "a")
    again = ActionPrior.from_pretrained(tmp_path / "a", action_dim=2, device="cpu")
    assert again.prompt == "Drive."
    assert again.settings.decimals == 1
    assert_same(again, prior)
    again.save_pretrained(tmp_path / "b")
    assert_same(ActionPrior.from_pretrained(tmp_path / "b", action_dim=2, device="cpu"), prior)


def test_nano_is_not_a_folder_of_that_name(tmp_path, monkeypatch):
    prior = ActionPrior.from_pretrained("nano", **OPTIONS)
    monkeypatch.chdir(tmp_path)
    tuned(ActionPrior.from_pretrained("nano", **OPTIONS), LORA, 0).save_pretrained("nano")
    assert_same(ActionPrior.from_pretrained("nano", **OPTIONS), prior)


# ---------------------------------------------------------------------- what an adapter says of its base


@pytest.fixture
def nano_base(tmp_path):
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    write_qwen2_5_vl(folder)
    return folder


@pytest.fixture
def adapted(nano_base):
    """A prior with a tuned adapter on `nano_base`."""
    return tuned(ActionPrior.from_pretrained(nano_base, **OPTIONS), LORA, 0)


def test_a_relative_base_is_found_from_anywhere(nano_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prior = tuned(ActionPrior.from_pretrained("models/base", **OPTIONS), LORA, 0)
    prior.save_pretrained("adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(nano_base)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert_same(ActionPrior.from_pretrained("../adapter", **OPTIONS), prior)


def test_an_opened_adapter_names_its_base_and_not_its_folder(adapted, nano_base, tmp_path):
    adapted.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "action_prior.json").unlink()  # as peft alone would have written it
    tuned(ActionPrior.from_pretrained(tmp_path / "a", **OPTIONS), LORA, 1).save_pretrained(tmp_path / "b")
    for name, key in (("adapter_config", "base_model_name_or_path"), ("action_prior", "base")):
        assert json.loads((tmp_path / "b" / f"{name}.json").read_text())[key] == str(nano_base)


def test_a_base_that_was_moved(adapted, nano_base, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    moved = nano_base.rename(tmp_path / "moved")
    config = tmp_path / "adapter" / "adapter_config.json"
    message = f'base {str(nano_base)!r}.*put it back, or write.*"base_model_name_or_path" of {config}'
    with pytest.raises(FileNotFoundError, match=message):
        ActionPrior.from_pretrained(tmp_path / "adapter", **OPTIONS)
    edit(config, base_model_name_or_path=str(moved))
    assert_same(ActionPrior.from_pretrained(tmp_path / "adapter", **OPTIONS), adapted)


def test_an_adapter_without_a_base_or_with_one_that_is_none(adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "action_prior.json").unlink()
    config = tmp_path / "a" / "adapter_config.json"
    for named, message in (
        (None, "names no base"),
        (str(tmp_path / "a"), "is an adapter itself"),
        (str(tmp_path), "cannot be opened"),
    ):
        edit(config, base_model_name_or_path=named)
        with pytest.raises(ValueError, match=message):
            ActionPrior.from_pretrained(tmp_path / "a", **OPTIONS)
    edit(config, base_model_name_or_path="nano", target_modules=["no_such_module"])
    with pytest.raises(ValueError, match="does not fit its base 'nano'"):
        ActionPrior.from_pretrained(tmp_path / "a", **OPTIONS)


def test_an_adapter_does_not_replace_its_base(adapted, nano_base, tmp_path):
    before = {path.name: path.read_bytes() for path in nano_base.iterdir()}
    (tmp_path / "link").symlink_to(nano_base)
    for folder in (nano_base, tmp_path / "link", Path(os.path.relpath(nano_base))):
        with pytest.raises(ValueError, match=r"holds the base of this adapter.*another directory"):
            adapted.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in nano_base.iterdir()} == before


def test_an_adapter_does_not_replace_a_base_that_an_interrupted_save_left(nano_base):
    left = nano_base.rename(nano_base.with_name(".base.old"))
    prior = tuned(ActionPrior.from_pretrained(nano_base, **OPTIONS), LORA, 0)
    with pytest.raises(ValueError, match="holds the base of this adapter"):
        prior.save_pretrained(nano_base)
    assert (left / "model.safetensors").is_file()


def test_an_adapter_of_weights_that_are_in_no_checkpoint(tmp_path):
    prior = tuned(ActionPrior.from_pretrained("nano", **OPTIONS), FULL, 0)
    with pytest.raises(ValueError, match=r"mode='lora'.*no longer those of 'nano': save the prior"):
        VLMTuner(prior, LORA)
    prior.save_pretrained(tmp_path / "full")
    again = tuned(ActionPrior.from_pretrained(tmp_path / "full", **OPTIONS), LORA, 1)
    again.save_pretrained(tmp_path / "adapter")
    assert_same(ActionPrior.from_pretrained(tmp_path / "adapter", **OPTIONS), again)


def test_an_adapter_with_embeddings_of_its_own(adapted, tmp_path):
    with torch.no_grad():
        adapted.backbone.base.get_input_embeddings().weight += 0.1
    adapted.backbone.model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    opened = ActionPrior.from_pretrained(tmp_path / "a", **OPTIONS)
    assert_same(opened, adapted)
    opened.save_pretrained(tmp_path / "b")
    assert_same(ActionPrior.from_pretrained(tmp_path / "b", **OPTIONS), adapted)


def test_full_training_of_an_opened_adapter_begins_where_it_was(adapted, nano_base, tmp_path):
    answers = adapted(images()).token_ids
    adapted.save_pretrained(tmp_path / "adapter")
    opened = ActionPrior.from_pretrained(tmp_path / "adapter", **OPTIONS)
    version = opened.version
    tuner = VLMTuner(opened, FULL)
    assert opened.version == version
    assert torch.equal(opened(images()).token_ids, answers)
    whole = ActionPrior.from_pretrained(nano_base, **OPTIONS).backbone.model
    assert tuner.parameters == sum(weight.numel() for weight in whole.parameters())


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_an_adapter_beside_full_weights(weights, adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / weights).write_bytes(b"stale")
    message = f"holds full weights and an adapter, of which one is stale: remove .*{weights}"
    with pytest.raises(ValueError, match=message):
        ActionPrior.from_pretrained(tmp_path / "both", **OPTIONS)


@pytest.mark.parametrize(
    "name, content",
    [
        ("action_prior.json", '{"base": "nan'),
        ("action_prior.json", "[]"),
        ("action_prior.json", '{"base": "nano", "sead": 0}'),
        ("adapter_config.json", '{"base_model'),
    ],
)
def test_a_damaged_file_is_named(name, content, adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        ActionPrior.from_pretrained(tmp_path / "a", **OPTIONS)


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_dtype_is_kept(mode, tmp_path):
    prior = ActionPrior.from_pretrained("nano", dtype=torch.bfloat16, **OPTIONS)
    tuned(prior, LORA if mode == "lora" else FULL, 0).save_pretrained(tmp_path / "a")
    opened = ActionPrior.from_pretrained(tmp_path / "a", **OPTIONS)
    assert opened.backbone.dtype == torch.bfloat16
    ours, theirs = contents(opened), contents(prior)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert torch.equal(opened(images()).token_ids, prior(images()).token_ids)
    asked = ActionPrior.from_pretrained(tmp_path / "a", dtype=torch.float32, **OPTIONS)
    assert asked.backbone.dtype == torch.float32


def test_settings_of_before_dtypes_were_kept(tmp_path):
    prior = ActionPrior.from_pretrained("nano", **OPTIONS)
    prior.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "action_prior.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("dtype", "quantization")}))
    assert_same(ActionPrior.from_pretrained(tmp_path / "a", action_dim=2, device="cpu"), prior)


def test_other_tools_open_full_weights(checkpoint, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    prior = tuned(ActionPrior.from_pretrained(checkpoint, **OPTIONS), FULL, 0)
    prior.save_pretrained(tmp_path / "full")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "full")
    for name, weight in contents(prior).items():
        assert torch.equal(model.get_parameter(name), weight), name
    assert model.generation_config.eos_token_id == prior.backbone.base.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "full")
    assert tokenizer.chat_template == prior.backbone.tokenizer.chat_template
    kept = AutoImageProcessor.from_pretrained(tmp_path / "full").to_dict()
    assert kept == prior.backbone.processor.image_processor.to_dict()
    written = json.loads((tmp_path / "full" / "processor_config.json").read_text())
    assert written["processor_class"] == type(prior.backbone.processor).__name__
    assert "video_processor" not in written


def test_a_generation_config_that_transformers_warns_of(nano_base, tmp_path):
    edit(nano_base / "generation_config.json", temperature=0.9, top_p=0.6)
    prior = tuned(ActionPrior.from_pretrained(nano_base, **OPTIONS), FULL, 0)
    prior.reference(images())
    prior.save_pretrained(tmp_path / "full")
    assert_same(ActionPrior.from_pretrained(tmp_path / "full", **OPTIONS), prior)


@pytest.mark.parametrize("nested", [False, True])
def test_settings_for_videos_are_handed_on(nested, tmp_path):
    """Nothing here looks at videos, but others may, with what is saved."""
    base = write_checkpoint("qwen3_vl", tmp_path)
    settings = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 7}
    name = "processor" if nested else "video_preprocessor"
    content = {"video_processor": settings} if nested else settings
    (base / f"{name}_config.json").write_text(json.dumps(content))
    for folder in ("a", "b"):
        ActionPrior.from_pretrained(base, **OPTIONS).save_pretrained(tmp_path / folder)
        base = tmp_path / folder
        written = json.loads((base / "processor_config.json").read_text())
        assert written["video_processor"] == settings


# ---------------------------------------------------------------------- for other tools


@pytest.fixture
def no_video_half(monkeypatch):
    """Lets transformers make processors with None as their video half, which would need torchvision."""
    from transformers import ProcessorMixin, processing_utils

    check = ProcessorMixin.check_argument_for_proper_class
    loaders = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING
    halves = {name: loaders[name] for name in ("tokenizer", "image_processor")}
    halves["video_processor"] = SimpleNamespace(from_pretrained=lambda *_, **__: None)

    def check_if_given(self, name, argument):
        return None if argument is None else check(self, name, argument)

    monkeypatch.setattr(processing_utils, "MODALITY_TO_AUTOPROCESSOR_MAPPING", halves)
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", check_if_given)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_folder_has_a_processor_that_takes_images(checkpoint, mode, tmp_path, no_video_half):
    from transformers import AutoProcessor

    prior = tuned(ActionPrior.from_pretrained(checkpoint, **OPTIONS), LORA if mode == "lora" else FULL, 0)
    prior.save_pretrained(tmp_path / "a")
    processor = AutoProcessor.from_pretrained(tmp_path / "a")
    pictures = [[image] for image in images().permute(0, 2, 3, 1).numpy()]
    given = processor(text=[prior.text] * len(pictures), images=pictures, return_tensors="pt")
    expected = prior.backbone.process(prior.text, images())
    assert given.keys() == expected.keys() >= {"pixel_values", "input_ids"}
    assert all(torch.equal(given[name], expected[name]) for name in expected)


@pytest.mark.parametrize("moved", [False, True])
def test_other_tools_open_an_adapter_of_nano(moved, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    prior = tuned(ActionPrior.from_pretrained("nano", **{**OPTIONS, "seed": 3}), LORA, 0)
    prior.save_pretrained(tmp_path / "a")
    folder = (tmp_path / "a").rename(tmp_path / "b") if moved else tmp_path / "a"
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForImageTextToText.from_pretrained(folder / "nano_base" if moved else named)
    theirs = dict(PeftModel.from_pretrained(base, folder).named_parameters())
    ours = contents(prior)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    assert_same(ActionPrior.from_pretrained(folder, **OPTIONS), prior)


def test_an_adapter_of_nano_is_saved_anew_with_its_base(tmp_path):
    prior = tuned(ActionPrior.from_pretrained("nano", **{**OPTIONS, "seed": 3}), LORA, 0)
    prior.save_pretrained(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    opened = tuned(ActionPrior.from_pretrained(tmp_path / "b", **OPTIONS), LORA, 1)
    opened.save_pretrained(tmp_path / "b")
    opened.save_pretrained(tmp_path / "c")
    shutil.rmtree(tmp_path / "b")
    assert_same(ActionPrior.from_pretrained(tmp_path / "c", **OPTIONS), opened)


def test_an_adapter_of_nano_as_older_versions_saved_it(tmp_path):
    prior = tuned(ActionPrior.from_pretrained("nano", **{**OPTIONS, "seed": 3}), LORA, 0)
    prior.save_pretrained(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "nano_base")
    edit(tmp_path / "a" / "adapter_config.json", base_model_name_or_path="nano")
    assert_same(ActionPrior.from_pretrained(tmp_path / "a", **OPTIONS), prior)


def test_an_adapter_does_not_replace_its_base_beside_it(tmp_path):
    """As peft alone leaves it: without the settings that say that the base is nano."""
    prior = tuned(ActionPrior.from_pretrained("nano", **{**OPTIONS, "seed": 3}), LORA, 0)
    prior.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "action_prior.json").unlink()
    opened = ActionPrior.from_pretrained(tmp_path / "a", **OPTIONS)
    with pytest.raises(ValueError, match="holds the base of this adapter"):
        opened.save_pretrained(tmp_path / "a")
    opened.save_pretrained(tmp_path / "b")
    assert_same(ActionPrior.from_pretrained(tmp_path / "b", **OPTIONS), opened)
