import numpy
import pytest
import red_zones
import torch

with pytest.MonkeyPatch.context() as patch:
    # As for the library's kernels in the conftest above: built for the interpreter where there is no GPU.
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("bench.atomics")


@pytest.fixture(autouse=True)
def _configurations(request, monkeypatch):
    """Those of `--configurations-of`, where it is given."""
    arch = request.config.getoption("--configurations-of")
    if arch is not None:
        if torch.cuda.is_available():
            raise pytest.UsageError("--configurations-of is for machines without a GPU: here its own are tested")
        from csrc_triton import configs, plans

        monkeypatch.setattr(configs, "arch_of", lambda device: arch)
        # Gluon has no interpreter.
        monkeypatch.delitem(plans.PERSISTENT, "pipelined")


@pytest.fixture(autouse=True)
def _fresh_zones():
    red_zones._zones.clear()


@pytest.fixture(autouse=True)
def _fresh_plans():
    """What another test planned may have been planned for another amount of scratch."""
    from csrc_triton.sweep_plan import plan_sweep

    plan_sweep.cache_clear()
    yield
    plan_sweep.cache_clear()


@pytest.fixture
def dots_in_one_order(monkeypatch):
    """On some CPUs numpy's BLAS sums a row in another order where it lies elsewhere in its tile, which no GPU's dot does."""
    monkeypatch.setattr(
        numpy, "matmul", lambda a, b, dtype=None: numpy.einsum("mk,kn->mn", a, b).astype(dtype or a.dtype)
    )
