"""Per-sample gradients of the adapters: recorded in an ordinary backward pass, clipped, and their noise measured."""

from .clipping import clip_, norms
from .noise import NoiseScale, noise_scale
from .recorded import clear, record

__all__ = ["NoiseScale", "clear", "clip_", "noise_scale", "norms", "record"]
