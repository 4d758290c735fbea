"""y and S by one GEMM whose first column writes S: run twice, as programs here run one after another (`asynchrony.ByTiles`)."""

from unittest import mock

from asynchrony import ByTiles, as_late_as_allowed
from planting import module

from csrc_triton import configs
from csrc_triton.chain import chained, next_place


def y_and_s(tensors, config, overlap=False):
    """``(y, S)`` of x, weight, bias, a and b; `overlap`: the GEMM begins while the kernel that counts its tiles runs."""
    # Those of a copy, where a fault is planted.
    launcher, launch = module("adapted_linear_pipelined").adapted_linear_pipelined, module("launching").launch
    names = launcher.__globals__

    def launched(kernel, grid, *args, **options):
        if kernel is not names["_adapted_linear_pipelined_kernel"]:
            launch(kernel, grid, *args, **options)
            return
        s, under_way = args[7:9]
        assert (under_way == 1).all()
        ran.by_tiles = ByTiles(s, config.BLOCK_M, under_way)
        if overlap:
            ran.after_kernel_in_front = range(under_way.data_ptr(), under_way.data_ptr() + under_way.nbytes)
        launch(kernel, grid, *args, **options)
        assert not under_way.any()
        ran.by_tiles.is_written = True
        with chained(overlap, "midway"):
            next_place()
            launch(kernel, grid, *args, **options)

    with (
        as_late_as_allowed() as ran,
        mock.patch.dict(names, launch=launched),
        mock.patch.object(configs, "can_overlap", lambda device: overlap),
    ):
        return launcher(*tensors, config)
