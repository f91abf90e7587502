# Functions on tensors check each argument: see csrc/common/border.h.
from typing import Any

with_cuda: bool

def __getattr__(name: str) -> Any: ...
