"""How checkpoints are opened: where the weights go, what is never run, and models on the hub."""

import json
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from hub_stand_in import TOKEN, hub_stand_in, use_hub
from huggingface_hub import constants
from tiny import WRITERS, equal, open_prior, random_frames, weights_of, write_checkpoint
from transformers import AutoModelForImageTextToText

from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.footprint import Request, footprint
from covr_fast.vlm.model.loading import find_model, load_backbone

LORA = TunerConfig(mode="lora", lora_rank=2, lora_alpha=4)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_checkpoint("qwen2_vl", tmp_path_factory.mktemp("checkpoints"))


def answers(prior: ActionPrior) -> torch.Tensor:
    return prior(random_frames((60, 84))).token_ids


# ---------------------------------------------------------------------- where the weights go


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_weights_go_to_the_device_as_they_are_read(name, tmp_path, monkeypatch):
    """Not into host memory first, as one copy more. The device "meta" stands for a GPU."""
    placed = []
    original = AutoModelForImageTextToText.from_pretrained

    def spy(*args, **options):
        model = original(*args, **options)
        placed.append({tensor.device.type for tensor in (*model.parameters(), *model.buffers())})
        return model

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", spy)
    options = {"seed": 0, "attention": "sdpa", "dtype": torch.bfloat16, "device": torch.device("meta")}
    load_backbone(write_checkpoint(name, tmp_path), **options)
    assert placed == [{"meta"}]


def test_a_checkpoint_of_several_files(qwen, tmp_path):
    prior = open_prior(qwen)
    folder = shutil.copytree(qwen, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    prior.backbone.model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    opened = open_prior(folder)
    assert equal(weights_of(opened), weights_of(prior))
    assert torch.equal(answers(opened), answers(prior))
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        open_prior(folder)


# ---------------------------------------------------------------------- code in a checkpoint


def put_code_into(folder, trace) -> None:
    """Code of a checkpoint's own in every place where transformers looks for some. It leaves a file if it is
    imported."""
    code = f"open({str(trace)!r}, 'w')\nclass Own: pass\ndef generate(*_, **__): pass\n"
    (folder / "own.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    names = {
        "config.json": ("AutoConfig", "AutoModelForImageTextToText"),
        "tokenizer_config.json": ("AutoTokenizer",),
        "preprocessor_config.json": ("AutoImageProcessor", "AutoProcessor"),
        "processor_config.json": ("AutoProcessor",),
    }
    for file, classes in names.items():
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        own = {name: "own.Own" if name != "AutoTokenizer" else ["own.Own", "own.Own"] for name in classes}
        path.write_text(json.dumps(content | {"auto_map": own}))


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_code_in_a_checkpoint_is_not_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask, and take this answer
    folder, trace = write_checkpoint(name, tmp_path), tmp_path / "trace"
    expected = weights_of(open_prior(folder))
    put_code_into(folder, trace)
    prior = open_prior(folder)
    prior.reference(random_frames((56, 56)))
    assert equal(weights_of(prior), expected)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "own"}))
    with pytest.raises(ValueError, match="cannot read a model configuration"):
        open_prior(folder)
    assert not trace.exists()


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def put(hub, name: str, folder) -> None:
    files = (path for path in folder.rglob("*") if path.is_file())
    hub.models[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_full_weights_from_the_hub_and_then_without_it(hub, qwen, monkeypatch, tmp_path):
    put(hub, "maker/qwen", qwen)
    hub.models["maker/qwen"] |= {"onnx/model.safetensors": b"huge", "pytorch_model.bin": b"huge"}
    hub.models["maker/qwen"]["README.md"] = b"# Qwen"
    prior = open_prior("maker/qwen")
    assert prior.settings.base == prior.backbone.source == "maker/qwen"
    assert equal(weights_of(prior), weights_of(open_prior(qwen)))
    assert not [asked for asked in hub.requests if "onnx" in asked or "pytorch" in asked]
    VLMTuner(prior, LORA)
    prior.save_pretrained(tmp_path / "adapter")
    use_hub(monkeypatch, closed_port(), tmp_path / "cache")
    (find_model("maker/qwen").folder / "README.md").unlink()  # not everything there is needed
    began = time.perf_counter()
    opened = open_prior(tmp_path / "adapter")
    assert opened.backbone.source == "maker/qwen"
    assert torch.equal(answers(opened), answers(prior))
    assert time.perf_counter() - began < 20  # transformers alone would try every file for 23 seconds


def test_an_adapter_from_the_hub(hub, qwen, tmp_path):
    put(hub, "maker/qwen", qwen)
    prior = open_prior("maker/qwen")
    VLMTuner(prior, LORA)
    prior.save_pretrained(tmp_path / "adapter")
    put(hub, "maker/adapter", tmp_path / "adapter")
    opened = ActionPrior.from_pretrained("maker/adapter", action_dim=2, device="cpu")
    assert (opened.prompt, opened.backbone.source) == ("Drive.", "maker/qwen")
    assert equal(weights_of(opened), weights_of(prior))


def test_pickled_weights_are_taken_where_there_are_no_others(hub, qwen):
    put(hub, "maker/old", qwen)
    files = hub.models["maker/old"]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    assert (find_model("maker/old").folder / "pytorch_model.bin").is_file()


def test_memory_is_counted_without_downloading_weights(hub, qwen, tmp_path):
    put(hub, "maker/qwen", qwen)
    tuned = open_prior(qwen)
    VLMTuner(tuned, LORA)
    tuned.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "maker/qwen"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    put(hub, "maker/adapter", tmp_path / "adapter")
    base, *others = (
        footprint(Request(model, 2, (60, 84), 4, 10, LORA, device_type="cpu")).serving[0].nbytes
        for model in (str(qwen), "maker/qwen", "maker/adapter")
    )
    assert others == [base, base]
    assert not [asked for asked in hub.requests if "safetensors" in asked]


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message, which is all that a user sees: there is no stack of exceptions."""
    text = str(error.value)
    assert "\n" not in text
    assert error.value.__cause__ is None
    assert error.value.__context__ is None or error.value.__suppress_context__
    return text


def test_a_model_that_was_not_downloaded_and_no_connection(monkeypatch, tmp_path):
    use_hub(monkeypatch, closed_port(), tmp_path / "cache")
    began = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        open_prior("Qwen/Qwen2.5-VL-3B-Instruct")
    assert time.perf_counter() - began < 5
    text = one_line(error)
    assert "run 'hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir Qwen2.5-VL-3B-Instruct'" in text
    assert f"{constants.ENDPOINT} cannot be reached" in text
    assert str(tmp_path / "cache") in text
    assert "HF_HOME" in text
    assert "--vlm.model Qwen2.5-VL-3B-Instruct" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE=1 forbids to download it"):
        open_prior("Qwen/Qwen2.5-VL-3B-Instruct")


def test_a_download_that_was_interrupted(hub, qwen, monkeypatch, tmp_path):
    put(hub, "maker/qwen", qwen)
    (find_model("maker/qwen").folder / "model.safetensors").unlink()
    use_hub(monkeypatch, closed_port(), tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="is incomplete: run 'hf download maker/qwen") as error:
        open_prior("maker/qwen")
    one_line(error)


def test_an_adapter_whose_base_was_not_downloaded(hub, qwen, monkeypatch, tmp_path):
    put(hub, "maker/qwen", qwen)
    prior = open_prior("maker/qwen")
    VLMTuner(prior, LORA)
    prior.save_pretrained(tmp_path / "adapter")
    use_hub(monkeypatch, closed_port(), tmp_path / "another cache")
    with pytest.raises(FileNotFoundError, match=r"base 'maker/qwen' of .*hf download maker/qwen") as error:
        open_prior(tmp_path / "adapter")
    one_line(error)


def test_gated_and_missing_models(hub, qwen):
    put(hub, "maker/gated", qwen)
    hub.gated.add("maker/gated")
    with pytest.raises(
        PermissionError, match=f"accept its terms on {hub.address}/maker/gated, and log in"
    ) as error:
        open_prior("maker/gated")
    assert TOKEN not in one_line(error)
    with pytest.raises(FileNotFoundError, match="has no model 'maker/none', or it is private") as error:
        open_prior("maker/none")
    one_line(error)


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such", "/no/such", "a/b/c"])
def test_what_is_neither_a_folder_nor_the_name_of_a_model(name):
    with pytest.raises(FileNotFoundError, match="no model directory at"):
        open_prior(name)


def test_a_script_hears_nothing_of_a_kernel_that_it_does_not_need():
    """bitsandbytes warns when peft imports it, which opening any VLM does; it is imported once a process."""
    script = "from covr_fast.vlm import ActionPrior; ActionPrior.from_pretrained('nano', action_dim=1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "gemm_4bit" not in done.stderr
