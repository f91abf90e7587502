"""Drop-ins for other libraries: buffers in `sb3` (Stable-Baselines3) and `torchrl`, and `transformers`, the
weighted loss in the Hugging Face Trainer and TRL's.
"""
