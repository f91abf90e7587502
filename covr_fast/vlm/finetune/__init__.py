"""How the VLM learns: the loss of a round, and the weights that it changes."""
