# The extension module is called through covr_fast.ops and covr_fast.buffer only, which check what they pass.
from typing import Any

def __getattr__(name: str) -> Any: ...
