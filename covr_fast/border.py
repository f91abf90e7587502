"""The border to C++ and CUDA: the one place where a tensor becomes an address.

C++ gets no more than a number, so whatever it is told about the memory behind must be checked here. What is
allocated for it says its dtype and its device: torch's defaults are the process's, and other libraries change
them while they work.
"""

import torch
from torch import Tensor

CPU = torch.device("cpu")


def address(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> int:
    """The address of a contiguous tensor of exactly this dtype and device; None is the CPU.

    Raises:
        TypeError: it is another one.
    """
    right_device = tensor.is_cpu if device is None else tensor.device == device
    if right_device and tensor.dtype is dtype and tensor.is_contiguous():
        return tensor.data_ptr()
    layout = "contiguous" if tensor.is_contiguous() else f"with strides {tensor.stride()}"
    raise TypeError(
        f"a kernel was to get a contiguous {dtype} tensor on {device or CPU}, but was given {tensor.dtype} "
        f"{list(tensor.shape)} on {tensor.device}, {layout}"
    )
