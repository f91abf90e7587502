"""The prompt for the VLM, and the grammar of its answers."""
