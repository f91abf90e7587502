"""Every part of the installed package once, in half a minute: `make package` runs it at the lowest versions.

TRITON_INTERPRET=1 python tests/smoke.py, from a folder of one's own.
"""

import importlib.metadata
import io
import itertools
import json
import subprocess
import sysconfig
from pathlib import Path

import gymnasium
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

import covr_fast
from covr_fast import ReplayBuffer, ops
from covr_fast.integrations import sb3, torchrl
from covr_fast.integrations.transformers import return_weighted_loss
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner

FRAME = (3, 16, 16)
TRAIN = """
  --steps 64 --warmup 32 --log-every 16 --decisions-per-update 8 --threads 1
  --env.num-envs 2 --env.batch-size 2 --env.action-repeat 1 --env.max-episode-steps 6
  --replay.batch-size 16 --replay.capacity 200 --covr.psi-0 30 --covr.min-samples 4
  --eval.episodes 2 --tuner.max-steps 2
"""


def covr(*arguments: str, expect: int = 0) -> str:
    command = [str(Path(sysconfig.get_path("scripts")) / "covr-fast"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == expect, f"{arguments} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def the_package_is_the_installed_one() -> None:
    assert "site-packages" in covr_fast.__file__, covr_fast.__file__
    assert importlib.metadata.version("covr-fast") == covr_fast.__version__
    home = Path(covr_fast.__file__).parent
    assert (home / "py.typed").is_file()
    assert (home / "_C.pyi").is_file()
    assert not (home.parent / "tests").exists()


def operations() -> None:
    rewards, ends = torch.rand(40, 4), torch.rand(40, 4) < 0.1
    returns = ops.discounted_returns(rewards, ends, 0.9)
    torch.testing.assert_close(returns, ops.discounted_returns(rewards, ends, 0.9, backend="reference"))
    kept = ops.exploration_filter(returns.flatten(), entropy=0.5)
    assert kept.indices.tolist() == torch.nonzero(returns.flatten() > kept.cutoff).flatten().tolist()
    hidden, head = torch.randn(3, 5, 8), torch.randn(20, 8)
    batch = (hidden, head, torch.randint(20, (3, 5)), ops.return_weights(torch.tensor([1.0, 2.0, 3.0])))
    losses = {
        name: ops.return_weighted_linear_cross_entropy(*batch, backend=name)
        for name in ("reference", "cpp", "triton")
    }
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["reference"])
    images = torch.randint(256, (2, *FRAME), dtype=torch.uint8)
    centred = ops.random_shift(images, torch.full((2, 2), 4))
    torch.testing.assert_close(centred, images / 255)


def buffer() -> None:
    store = ReplayBuffer(100, num_envs=2, obs_shape=FRAME, action_shape=(1,), sampler="prioritized", seed=0)
    frames = np.random.default_rng(0).integers(256, size=(11, 2, *FRAME), dtype=np.uint8)
    flag = np.zeros(2, bool)
    for obs, after in itertools.pairwise(frames):
        store.add(obs, np.zeros((2, 1), np.float32), np.ones(2, np.float32), after, flag, flag)
    store.save("store.covr")
    batch = ReplayBuffer.load("store.covr").sample(16, dtype=torch.uint8)
    rows = frames.reshape(-1, *FRAME)
    assert all((rows == row.numpy()).all((1, 2, 3)).any() for row in batch.obs)


def stable_baselines3() -> None:
    def env() -> gymnasium.Env:
        return gymnasium.wrappers.TransformObservation(
            gymnasium.make("Pendulum-v1"),
            lambda obs: np.full((36, 36, 1), 100 + 10 * obs[2], np.uint8),
            gymnasium.spaces.Box(0, 255, (36, 36, 1), np.uint8),
        )

    agent = SAC(
        "CnnPolicy", VecFrameStack(DummyVecEnv([env]), 3), replay_buffer_class=sb3.FastReplayBuffer,
        buffer_size=200, learning_starts=20, batch_size=8, seed=0, policy_kwargs={"net_arch": [16]},
    )  # fmt: skip
    agent.learn(30)
    assert len(agent.replay_buffer.buffer) == 30
    assert agent.replay_buffer.sample(8).observations.shape == (8, 3, 36, 36)


def torchrl_replay() -> None:
    replay = torchrl.FastReplayBuffer(100, obs_keys=("observation",), sampler="prioritized", batch_size=8)
    values = torch.arange(21.0).view(21, 1)
    rows = TensorDict(
        {
            "observation": values[:-1],
            "action": torch.zeros(20, 1),
            "next": {
                "observation": values[1:],
                "reward": torch.ones(20, 1),
                "done": torch.zeros(20, 1, dtype=torch.bool),
                "terminated": torch.zeros(20, 1, dtype=torch.bool),
            },
        },
        batch_size=[20],
    )
    replay.extend(rows)
    batch = replay.sample()
    assert torch.equal(batch["next", "observation"], batch["observation"] + 1)
    batch["td_error"] = batch["observation"][:, 0]
    replay.update_tensordict_priority(batch)
    torch.save(replay.state_dict(), io.BytesIO())


def weighted_fine_tuning() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "weight": weight} for weight in (0.0, 1.0)]
    trained = return_weighted_loss(Trainer)(
        LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)),
        TrainingArguments("trainer", max_steps=2, save_strategy="no", report_to=[], use_cpu=True),
        train_dataset=rows,
        data_collator=default_data_collator,
    ).train()
    assert 0.5 < trained.training_loss < 2  # half of log(8)


def vlm() -> None:
    prior = ActionPrior.from_pretrained("nano", action_dim=2, decimals=1)
    images = torch.randint(256, (4, 3, 28, 28), dtype=torch.uint8)
    answers = prior(images)
    assert torch.equal(answers.token_ids, prior.reference(images).token_ids)
    tuner = VLMTuner(prior, TunerConfig(mode="lora", lora_rank=2, max_steps=2))
    tuner.start(images, torch.rand(4, 2) * 2 - 1, torch.arange(4.0))
    assert tuner.poll() is not None
    tuner.publish()
    answers = prior(images)
    prior.save_pretrained("adapter")
    assert ActionPrior.from_pretrained("adapter", action_dim=2, decimals=1)(images).text == answers.text
    quantized = ActionPrior.from_pretrained("nano", action_dim=2, quantization="4bit")
    assert torch.equal(quantized(images).token_ids, quantized.reference(images).token_ids)


def command_line() -> None:
    assert "covr-fast train" in covr("--help")
    assert covr("--version").split()[1] == covr_fast.__version__
    assert json.loads(covr("doctor", "--json"))["ready_to_train"]
    covr("train", "carracing", "--out", "run", *TRAIN.split())
    assert {"summary.json", "curves.png", "checkpoint"} <= {path.name for path in Path("run").iterdir()}
    assert list(Path("run").glob("episode.*"))
    assert "over 1 episode" in covr("evaluate", "run", "--episodes", "1")
    covr("report", "run")
    assert "</html>" in Path("report.html").read_text()


if __name__ == "__main__":
    for part in (
        the_package_is_the_installed_one, operations, buffer, stable_baselines3, torchrl_replay,
        weighted_fine_tuning, vlm, command_line,
    ):  # fmt: skip
        part()
        print(f"{part.__name__.replace('_', ' ')}: ok", flush=True)
