"""Many runs: a grid of presets, agents, methods and seeds, each run in a process of its own."""
