"""The VLM itself: architectures, loading and saving, adapters, attention, images and rows."""

import logging

# bitsandbytes, which peft imports, warns of a faster kernel that is missing even where nothing is quantized.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
