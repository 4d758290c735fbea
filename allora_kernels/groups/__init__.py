"""Groups of rows with a weight and an adapter each: ``from allora_kernels import grouped_linear``."""

from .linear import grouped_linear

__all__ = ["grouped_linear"]
