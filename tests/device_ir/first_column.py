"""A GEMM whose first column writes what its other tiles need: run twice, as programs here run one after another
(`asynchrony.ByTiles`)."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from asynchrony import Asynchrony, ByRounds, ByTiles, as_late_as_allowed
from planting import module

from csrc_triton import chain, configs, plans
from csrc_triton.chain import chained, next_place


class _Memory:
    """The addresses of these tensors."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._ranges = [range(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]

    def __contains__(self, address: int) -> bool:
        return any(address in addresses for addresses in self._ranges)


@contextlib.contextmanager
def twice(block_m: int, overlap: bool) -> Iterator[Asynchrony]:
    """Launches of that GEMM, in tiles of block_m rows, run twice; `overlap`: it begins while the kernel in front runs."""
    # Those of a copy, where a fault is planted.
    launch, names = module("launching").launch, module("adapted_linear_pipelined").adapted_linear_pipelined.__globals__

    def launched(kernel, grid, *args, **options):
        if kernel is not names["_adapted_linear_pipelined_kernel"]:
            launch(kernel, grid, *args, **options)
            return
        a, y, (s, tiles) = args[2].base, args[5].base, args[7:9]
        assert (tiles[:-1] == 1).all() and tiles[-1] == 0
        ran.by_tiles = ByTiles(s, block_m, tiles, *grid)
        if overlap:
            ran.after_kernel_in_front = _Memory(tiles, a)
        launch(kernel, grid, *args, **options)
        # Each program takes one that is none.
        columns = configs.cdiv(y.shape[1], 4 * args[5].block_shape[1])
        assert not tiles[:-1].any() and tiles[-1] == grid[0] + len(tiles[:-1]) * columns
        ran.by_tiles.is_written, tiles[-1] = True, 0
        with chained(overlap, "link"):
            next_place()
            launch(kernel, grid, *args, **options)
        ran.by_tiles = None

    with (
        as_late_as_allowed() as ran,
        mock.patch.dict(names, launch=launched),
        mock.patch.object(configs, "can_overlap", lambda device: overlap),
    ):
        yield ran


def y_and_s(tensors, config, overlap=False):
    """``(y, S)`` of x, weight, bias, a and b."""
    with twice(config.BLOCK_M, overlap):
        return module("adapted_linear_pipelined").adapted_linear_pipelined(*tensors, config)


def gradients(tensors, eta, norm, config, overlap=False):
    """``(dX, dA, dB)`` of g, x, s, weight, a and b; dS and u are NaN to what sums up dB and dA until it has waited for them."""
    under_way = torch.zeros(chain.MAX_ROUNDS, dtype=torch.int32)
    gemm, names = module("adapted_linear_pipelined"), module("layer_grads_pipelined").layer_grads_pipelined.__globals__
    sums = names["outer_pair"]

    def noted(g, s, rule_g, x, u, *rest):
        # They begin with the GEMM, in which no count is up any more: so that what does not wait is seen.
        ran.by_rounds = ByRounds([u], len(u), 1, under_way.data_ptr())
        return sums(g, s, rule_g, x, u, *rest)

    with (
        twice(config.BLOCK_M, overlap) as ran,
        mock.patch.dict(names, outer_pair=noted, launch_by_first_column=gemm.launch_by_first_column),
        mock.patch.object(module("layer_grads"), "counts", lambda device: under_way),
    ):
        found = module("layer_grads").layer_grads(
            *tensors, eta, norm, *(t.dtype for t in tensors[-2:]), plan=plans.Plan("column", config)
        )
    assert ran.by_rounds is not None and not under_way.any()
    return found
