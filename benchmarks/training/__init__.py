"""A policy's training from pixels, ours and Stable-Baselines3's: the parts of bench_train.py."""
