"""`covr-fast push`, against a stand-in of the hub: what arrives, byte for byte; every refusal in one line."""

import json
import shutil
import socket

import pytest
import torch
from hub_stand_in import TOKEN, hub_stand_in, use_hub
from huggingface_hub import constants
from small_runs import call

from covr_fast import SAC
from covr_fast.agents import AgentConfig
from covr_fast.checkpoint import save_checkpoint
from covr_fast.errors import UserError
from covr_fast.push import push
from covr_fast.run_folder import RunFolder
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.model.nano import write_nano

LORA = TunerConfig(mode="lora", lora_rank=2, lora_alpha=4)


def make_run(run, model, tuner: TunerConfig | None):
    """A folder with the checkpoint of a run whose VLM is `model`, tuned or as it is."""
    agent = SAC((3, 48, 48), (2,), AgentConfig(channels=(8,), strides=(4,), latent=8, hidden=8), seed=0)
    prior = ActionPrior.from_pretrained(model, action_dim=2, device="cpu", prompt="Drive.")
    if tuner:
        VLMTuner(prior, tuner)
    save_checkpoint(run, agent, prior, {}, None)
    return run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model that is also on the hub, as maker/base."""
    folder = tmp_path_factory.mktemp("models") / "base"
    folder.mkdir()
    write_nano(folder, seed=5)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "full", "nano", None)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    return make_run(tmp_path_factory.mktemp("runs") / "adapter", base, LORA)


@pytest.fixture(scope="module")
def nano_adapter(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "nano", "nano", LORA)


def saved(run) -> dict[str, bytes]:
    vlm = run / "checkpoint" / "vlm"
    return {path.relative_to(vlm).as_posix(): path.read_bytes() for path in vlm.rglob("*") if path.is_file()}


def assert_no_path_of(run, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        assert str(run.parent.parent).encode() not in content, name


def assert_same_answers(repo: str, run) -> None:
    frames = torch.randint(256, (3, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = ActionPrior.from_pretrained(repo, action_dim=2, device="cpu")
    ours = ActionPrior.from_pretrained(run / "checkpoint" / "vlm", action_dim=2, device="cpu")
    assert theirs.prompt == "Drive."
    assert theirs(frames).token_ids.tolist() == ours(frames).token_ids.tolist()


# ---------------------------------------------------------------------- what arrives


def test_full_weights(hub, full):
    address, upload = push(full, "tuned", private=True)
    assert address == f"{hub.address}/me/tuned"
    assert upload.base is None
    assert "me/tuned" in hub.private
    there, here = hub.models["me/tuned"], saved(full)
    changed = {name for name in here if there[name] != here[name]}
    assert there.keys() == here.keys() | {".gitattributes"}
    assert changed == {"README.md"}
    assert b'folder = "me/tuned"' in there["README.md"]
    assert_no_path_of(full, there)
    assert_same_answers("me/tuned", full)


def test_an_adapter_of_a_folder_is_refused_or_gets_the_name_of_its_base(hub, adapter, base):
    with pytest.raises(UserError, match=rf"adapter of {base}, a folder .*: --base OWNER/NAME says which"):
        push(adapter, "tuned")
    assert hub.requests == []
    _, upload = push(adapter, "me/tuned", base="maker/base")
    assert upload.base == "maker/base"
    there, here = hub.models["me/tuned"], saved(adapter)
    changed = {name for name in here if there[name] != here[name]}
    assert changed == {"README.md", "adapter_config.json", "action_prior.json"}
    named = json.loads(there["adapter_config.json"])
    assert named == json.loads(here["adapter_config.json"]) | {"base_model_name_or_path": "maker/base"}
    assert json.loads(there["action_prior.json"])["base"] == "maker/base"
    assert b"base_model: maker/base\n" in there["README.md"]
    assert b"license: mit\n" in there["README.md"]
    assert_no_path_of(adapter, there)
    assert_no_path_of(base, there)
    assert saved(adapter) == here
    hub.models["maker/base"] = {path.name: path.read_bytes() for path in base.iterdir()}
    assert_same_answers("me/tuned", adapter)


def test_an_adapter_of_nano_brings_its_base(hub, nano_adapter):
    _, upload = push(nano_adapter, "me/tuned")
    assert upload.base == "nano_base"
    there = hub.models["me/tuned"]
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "nano_base"
    assert there["nano_base/model.safetensors"] == saved(nano_adapter)["nano_base/model.safetensors"]
    assert_no_path_of(nano_adapter, there)
    assert_same_answers("me/tuned", nano_adapter)


def test_an_adapter_of_nano_as_older_versions_saved_it(hub, nano_adapter, tmp_path):
    run = shutil.copytree(nano_adapter, tmp_path / "run")
    shutil.rmtree(run / "checkpoint" / "vlm" / "nano_base")
    _, upload = push(run, "me/tuned")
    assert upload.base == "nano"
    assert_same_answers("me/tuned", nano_adapter)


def test_another_model_replaces_the_first_and_other_files_stay(hub, full, nano_adapter):
    push(nano_adapter, "me/tuned")
    hub.models["me/tuned"] |= {"notes.txt": b"mine", "plots/a.png": b"mine"}
    push(full, "me/tuned")
    there = hub.models["me/tuned"]
    assert there.keys() == saved(full).keys() | {".gitattributes", "notes.txt", "plots/a.png"}
    assert hub.commits == ["me/tuned", "me/tuned"]
    assert_same_answers("me/tuned", full)


# ---------------------------------------------------------------------- the command


def test_the_command(hub, full, monkeypatch, capfd):
    assert call(monkeypatch, "push", str(full), "me/tuned", "--private") == 0
    assert hub.private == {"me/tuned"}
    out, err = capfd.readouterr()
    assert f"now on {hub.address}/me/tuned" in out
    assert "model.safetensors" in out
    assert TOKEN not in out + err


def test_a_dry_run_needs_no_hub(full, monkeypatch, capfd, tmp_path):
    use_hub(monkeypatch, closed_port(), tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    assert call(monkeypatch, "push", str(full), "me/tuned", "--dry-run") == 0
    out, _ = capfd.readouterr()
    for name, content in saved(full).items():
        if name != "README.md":
            assert f"{len(content):,} bytes  {name}\n" in out


def refusal(monkeypatch, capfd, *arguments: str) -> str:
    assert call(monkeypatch, "push", *arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert TOKEN not in err
    return err


def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_no_connection(full, monkeypatch, capfd, tmp_path):
    use_hub(monkeypatch, closed_port(), tmp_path)
    error = refusal(monkeypatch, capfd, str(full), "me/tuned")
    assert f"'me/tuned' was not pushed to {constants.ENDPOINT}: " in error
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1" in refusal(monkeypatch, capfd, str(full), "me/tuned")


def test_not_logged_in(hub, full, monkeypatch, capfd, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert "run 'hf auth login', or set HF_TOKEN" in refusal(monkeypatch, capfd, str(full), "me/tuned")
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf_wrong" not in refusal(monkeypatch, capfd, str(full), "me/tuned")


def test_a_hub_that_refuses_the_commit(hub, full, monkeypatch, capfd):
    hub.refuses = f"no room for {TOKEN} at all"
    assert "no room for TOKEN at all" in refusal(monkeypatch, capfd, str(full), "me/tuned")
    assert hub.models["me/tuned"].keys() == {".gitattributes"}


def test_what_is_no_run_or_no_name(hub, full, adapter, tmp_path, monkeypatch, capfd):
    assert "holds no run" in refusal(monkeypatch, capfd, str(tmp_path), "me/tuned")
    for name in ("a/b/c", "", "me/", "me tuned"):
        assert "give NAME or OWNER/NAME" in refusal(monkeypatch, capfd, str(full), name)
    for run, base in ((full, "maker/base"), (adapter, "./base")):
        assert f"--base {base} " in refusal(monkeypatch, capfd, str(run), "tuned", "--base", base)
    assert hub.requests == []


def test_a_run_that_is_training(hub, full, monkeypatch, capfd):
    with RunFolder(full).claimed(resume=True):
        assert "is being written by another run" in refusal(monkeypatch, capfd, str(full), "me/tuned")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "README.md"])
def test_another_path_of_this_machine(hub, tmp_path, name, monkeypatch, capfd):
    run = make_run(tmp_path / "runs" / "a", "nano", None)
    file = run / "checkpoint" / "vlm" / name
    text = file.read_text()
    if name == "README.md":
        file.write_text(text + f"\nSee {run}/curves.png\n")
    else:
        file.write_text(json.dumps(json.loads(text) | {"x": [{"y": "/home/me/secret"}]}))
    error = refusal(monkeypatch, capfd, str(run), "me/tuned")
    assert f"{file} contains the path" in error
    assert hub.requests == []
