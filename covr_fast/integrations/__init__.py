"""Drop-ins for other libraries: `sb3` (Stable-Baselines3) and `torchrl`."""
