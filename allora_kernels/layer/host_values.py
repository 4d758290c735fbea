"""Numbers that the host knows, as a tensor on a device, without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[int | float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """``torch.tensor(values)`` on `device`. On a GPU the copy waits for nothing; while a CUDA graph is captured it is an error,
    as a replay would read memory of the host that others use by then."""
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return torch.tensor(values, device=device, dtype=dtype)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)
