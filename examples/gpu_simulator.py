"""SAC on a simulator whose frames are torch tensors, as those of GPU simulators: add -> sample -> update.

A dot is steered to a target; all environments move and are drawn in a few torch operations. On a GPU the
frames go from the simulator straight into the buffer's ring, batches are made where they are used, and no
step waits for the host. On a CPU the same code runs; `add` takes the tensors as they are there, too.

    python examples/gpu_simulator.py [environments] [steps]
"""

import sys
import time

import torch
from torch import Tensor

from covr_fast import SAC, ReplayBuffer
from covr_fast.agents import AgentConfig

SIZE, STACK, LONGEST = 48, 3, 50


class Reach:
    """Environments [n] in which a green dot, moved by actions in [-1, 1], shall reach a red one."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.device = n, device
        self.grid = torch.linspace(0, 1, SIZE, device=device)
        self.dot, self.target = torch.rand(n, 2, device=device), torch.rand(n, 2, device=device)
        self.time = torch.zeros(n, dtype=torch.int64, device=device)
        self.stack = self.frame().repeat(1, STACK, 1, 1)

    def frame(self) -> Tensor:
        """uint8 [n, 3, SIZE, SIZE]."""
        blobs = []
        for place in self.target, self.dot:
            along = torch.exp(-(((self.grid - place[:, :, None]) / 0.06) ** 2))  # [n, 2, SIZE]
            blobs.append(along[:, 0, :, None] * along[:, 1, None, :])
        return (255 * torch.stack([*blobs, torch.zeros_like(blobs[0])], 1)).to(torch.uint8)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next observations, which are the final ones of episodes that end here; reward and both ends."""
        self.dot = (self.dot + 0.1 * action).clamp(0, 1)
        self.time += 1
        distance = (self.dot - self.target).norm(dim=1)
        self.stack = torch.cat([self.stack[:, 3:], self.frame()], 1)
        terminated = distance < 0.08
        return self.stack, terminated.float() - distance, terminated, ~terminated & (self.time >= LONGEST)

    def restart(self, ended: Tensor) -> Tensor:
        """New episodes where the last one has ended. Returns the observations to act on."""
        self.dot = torch.where(ended[:, None], torch.rand_like(self.dot), self.dot)
        self.target = torch.where(ended[:, None], torch.rand_like(self.target), self.target)
        self.time = torch.where(ended, 0, self.time)
        first = self.frame().repeat(1, STACK, 1, 1)
        self.stack = torch.where(ended[:, None, None, None], first, self.stack)
        return self.stack


def main(n: int, steps: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    simulator, shape = Reach(n, device), (3 * STACK, SIZE, SIZE)
    agent = SAC(shape, (2,), AgentConfig(hidden=256), device=device)
    buffer = ReplayBuffer(
        100_000, num_envs=n, obs_shape=shape, action_shape=(2,), frame_stack=STACK, device=device, seed=0
    )
    batches = buffer.sampling(64, augment="shift", memory_format=torch.channels_last)
    obs, warm_up = simulator.stack, max(2, steps // 10)
    rewards = torch.zeros(steps, device=device)
    begin = time.perf_counter()
    for step in range(steps):
        action = agent.act(obs) if step >= warm_up else 2 * torch.rand(n, 2, device=device) - 1
        next_obs, reward, terminated, truncated = simulator.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, truncated)
        rewards[step] = reward.mean()
        obs = simulator.restart(terminated | truncated)
        if step >= warm_up:
            agent.update_from(batches, guide=False)  # on a GPU one CUDA graph draws and updates
    quarter = steps // 4
    first, last = rewards[:quarter].mean().item(), rewards[-quarter:].mean().item()  # waits for the device
    seconds = time.perf_counter() - begin
    print(f"{device}: {steps / seconds:.0f} steps/s, {n * steps / seconds:.0f} transitions/s")
    print(f"mean reward {first:.3f} in the first quarter, {last:.3f} in the last; {buffer}")


if __name__ == "__main__":
    main(*(int(argument) for argument in (sys.argv[1:] + ["16", "600"][len(sys.argv) - 1 :])))
