# The compiled module takes raw pointers; ops and the buffer check what they pass and are the typed layer.
from typing import Any

with_cuda: bool

def __getattr__(name: str) -> Any: ...
