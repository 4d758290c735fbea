"""Where the kernels run: on a GPU if there is one, else by Triton's interpreter on CPU tensors.

The tests need Triton; that the package does not is in `test_rooms.py`.
"""

import gc
import os

import pytest
import torch

pytest_plugins = ["going_on"]

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Kernels are built for the interpreter or for a GPU when they are first imported. The variable is taken back, so
    # that tests of models take the eager backend on the CPU as a user's would; kernel tests set it again.
    os.environ["TRITON_INTERPRET"] = "1"
    import quick_interpreter

    import csrc_triton  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
    quick_interpreter.install()


def pytest_addoption(parser):
    parser.addoption(
        "--configurations-of",
        metavar="ARCH",
        help="without a GPU: run tests/kernels with the tiles, plans and cuts that this architecture's GPU gets (sm_90)",
    )


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(no_gpu)


def pytest_collection_finish():
    # What is imported stays. Else every collection goes through it again, and each training asks for one: a third of a second.
    gc.freeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of a kernel test: "cpu" by the interpreter, "cuda" for real."""
    if request.param == "cpu":
        if HAS_GPU:
            pytest.skip("the kernels are built for the GPU in this process")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread: for trainings so small that more only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers for a test whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "triton"])
def backend(request, monkeypatch):
    """The backend that calls on CPU tensors take."""
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels are built for the GPU in this process")
    monkeypatch.setenv("TRITON_INTERPRET", str(int(request.param == "triton")))
    return request.param
