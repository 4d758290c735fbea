"""Rows in groups with an adapter each: ``from allora_kernels import grouped_linear, multi_adapter_linear, Adapter``."""

from .adapters import Adapter, multi_adapter_linear
from .linear import grouped_linear

__all__ = ["Adapter", "grouped_linear", "multi_adapter_linear"]
