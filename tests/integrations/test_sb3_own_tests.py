"""Stable-Baselines3's own tests of replay buffers, with FastReplayBuffer in the place of its buffers.

They come with SB3's source distribution, which pip downloads; without a registry they are skipped. Left
out are tests of what does not use these buffers (on-policy algorithms) and of hindsight replay.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sb3 = pytest.importorskip("stable_baselines3")

OFF_POLICY = "(DQN or SAC or TD3 or DDPG or dqn or sac or td3 or offpolicy or replay or buffer)"
CHOICE = f"{OFF_POLICY} and not her and not Her and not A2C and not PPO and not a2c and not ppo"


@pytest.fixture(scope="module")
def tests(tmp_path_factory) -> Path:
    """The folder with SB3's tests."""
    folder = tmp_path_factory.mktemp("sb3")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    source = ["--no-binary", "stable_baselines3", f"stable_baselines3=={sb3.__version__}"]
    done = subprocess.run([*download, *source], capture_output=True, text=True, timeout=300)
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"SB3's source distribution cannot be downloaded: {done.stderr.strip()[-200:]}")
    shutil.unpack_archive(archives[0], folder)
    return next(folder.glob("stable_baselines3-*/tests"))


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(["test_buffers.py", "test_n_step_replay.py"], id="buffers"),
        pytest.param(["test_save_load.py"], id="save and load", marks=pytest.mark.slow),
        pytest.param(
            ["test_vec_normalize.py", "test_dict_env.py", "test_run.py"], id="agents", marks=pytest.mark.slow
        ),
    ],
)
def test_swapped_in(tests, files):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "sb3_swapped", "-p", "no:cacheprovider"]
    choice = ["-k", "not Her" if "test_buffers.py" in files else CHOICE]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *choice, *files], cwd=tests, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
