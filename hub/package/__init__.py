"""ALLoRA's layer and its Triton kernels for the `kernels` library; `hub/build.py` puts the modules beside this file."""

from . import layers, per_sample
from .layer.batch_invariance import use_batch_invariant
from .layer.functional import allora_linear
from .layer.linear import FusedALLoRALinear
from .layer.wrapped import WrappedALLoRALinear

__all__ = [
    "FusedALLoRALinear",
    "WrappedALLoRALinear",
    "allora_linear",
    "layers",
    "per_sample",
    "use_batch_invariant",
]
