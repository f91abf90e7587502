"""What the VLM is asked and what it may answer: the prompt, and the grammar of answers."""
