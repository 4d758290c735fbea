"""Tensor parallelism by `torch.distributed.tensor.parallel`: what torch's own plans leave to say about the adapter.

`ColwiseParallel` needs no counterpart here. `RowwiseParallel` gives the right results too, but keeps the whole of lora_A
in every process.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel

from ..layer.linear import FusedALLoRALinear


class RowwiseALLoRA(RowwiseParallel):
    """`RowwiseParallel` with lora_A ``[R, K]`` cut over K as the weight ``[N, K]`` is.

    Each process then has its part of lora_A, its gradient and its optimizer state, and the gradient crosses no process.
    Arguments are RowwiseParallel's.

    Raises:
        TypeError: from `parallelize_module`, where the module is no `FusedALLoRALinear`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, FusedALLoRALinear):
            raise TypeError(
                f"RowwiseALLoRA is for FusedALLoRALinear, got {type(module).__name__}: for a plain layer use torch's "
                "RowwiseParallel; the weight of a quantized layer cannot be cut"
            )
        module.check_one_adapter()
        lora_A = distribute_tensor(module.lora_A, device_mesh, [Shard(1)], src_data_rank=self.src_data_rank)
        module.lora_A = nn.Parameter(lora_A, requires_grad=module.lora_A.requires_grad)
        return super()._apply(module, device_mesh)
