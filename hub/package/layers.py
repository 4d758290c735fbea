"""Layers for `kernels.kernelize`, which gives their forward pass to modules of a model and keeps the modules' own state."""

from torch import Tensor, nn

from .layer.functional import allora_linear


class ALLoRALinear(nn.Module):
    """``y = x Wᵀ + bias + (x Aᵀ) Bᵀ``, trained by ALLoRA's rule.

    The module has frozen `weight` ``[N, K]`` and `bias` ``[N]`` or None, trained `lora_A` ``[R, K]`` and `lora_B` ``[N, R]``,
    and the numbers or names `eta` and `norm`, as in `allora_linear`. Its forward pass takes `input` ``[..., K]``.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return allora_linear(input, self.weight, self.bias, self.lora_A, self.lora_B, eta=self.eta, norm=self.norm)
