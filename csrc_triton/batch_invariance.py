"""Whether the bits of a row of y and dX may depend on how many rows are beside it. Pure Python.

They do where block sizes, the way of a GEMM, or the number of parts a sum is cut into follow M. Switched on, whatever touches
y or dX is planned for PLANNED_ROWS rows, however many there are, and sums over K, N and R run in the order that this gives.
A tile's rows do not meet in its matrix products, so neither a row's place nor its neighbours matter.
"""

PLANNED_ROWS = 2048

_enabled = False


def enabled() -> bool:
    """Whether it is switched on, in this process."""
    return _enabled


def enable(on: bool) -> None:
    """Switch it on or off for every launch from now on, in every thread: backward passes run in threads of their own."""
    global _enabled
    _enabled = on


def planned_rows(M: int) -> int:
    """The number of rows to plan for where there are M."""
    return PLANNED_ROWS if _enabled else M
