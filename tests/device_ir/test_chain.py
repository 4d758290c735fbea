"""Which programs of a kernel in a chain wait for the kernel in front, as compiled."""

from unittest import mock

import numpy as np
import pytest
import torch
from matrix import BF16, F16
from planting import module
from ttsem import ops

from csrc_triton.chain import chained, next_place


def gram():
    module("row_norms").gram_parts(torch.randn(40, 1100).to(BF16))


def coefficient():
    module("row_norms").quadratic_coefficient(torch.randn(300, 8).to(BF16), torch.randn(3, 8, 8), 2.0)


def outer_pair():
    g, x, s, u = (torch.randn(300, size).to(F16) for size in (144, 272, 16, 16))
    config = module("outer_pair").pick_pair(144, 272, 16, F16, "sm_90", F16)
    rule = module("sweep").Rule()
    module("outer_pair").outer_pair(g, s, rule, x, u, rule, config, (F16, F16))


def waits(call, place):
    """How often each program of `call`'s only launch waits, by their order."""
    found, before = [0], dict(ops.OPS)

    def assembly(interp, op, args):
        if "griddepcontrol" not in op.text:
            return before["tt.elementwise_inline_asm"](interp, op, args)
        found[-1] += "griddepcontrol.wait" in op.text
        return [np.zeros((), np.int32)]

    def end(interp, op, args):
        found.append(0)
        return before["tt.return"](interp, op, args)

    with (
        mock.patch.dict(ops.OPS, {"tt.elementwise_inline_asm": assembly, "tt.return": end}),
        chained(place != "", *([place] if place not in ("", "first") else [])),
    ):
        if place not in ("", "first"):
            next_place()
        call()
    return found[:-1]


@pytest.mark.parametrize("call", [gram, coefficient, outer_pair])
@pytest.mark.parametrize("place", ["", "first", "link", "open", "late"])
def test_the_programs_that_wait(call, place):
    found = waits(call, place)
    assert len(found) > 1
    # Of a late kernel the last program alone, so that it ends after the one in front, and the others make room.
    expected = {"link": [1] * len(found), "open": [1] * len(found), "late": [0] * (len(found) - 1) + [1]}
    assert found == expected.get(place, [0] * len(found))
