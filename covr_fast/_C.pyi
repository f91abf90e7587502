# The compiled module takes raw pointers; its callers in ops and the buffer are the typed layer.
from typing import Any

with_cuda: bool

def __getattr__(name: str) -> Any: ...
