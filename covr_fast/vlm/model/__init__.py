"""The VLM itself: architectures, loading and saving, adapters, attention, images and rows."""
