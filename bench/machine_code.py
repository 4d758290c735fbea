"""Reading what the compiler emits: how wide a kernel's accesses of global memory are, and which of them its main loop makes."""

import re
from collections.abc import Iterator
from typing import NamedTuple


class AccessWidths(NamedTuple):
    """How many instructions load and store global memory, by the bits a thread moves with one (TMA is not among them); and of
    the loads in loops with matrix instructions, how many move 16 bits or fewer, and how many more."""

    loads: tuple[tuple[int, int], ...] = ()
    stores: tuple[tuple[int, int], ...] = ()
    narrow_in_loop: int = 0
    wide_in_loop: int = 0

    def __str__(self) -> str:
        def listed(widths):
            return "+".join(f"{count}x{bits}" for bits, count in widths) or "0"

        return f"loads={listed(self.loads)} stores={listed(self.stores)}"


# PTX: ld.global.v4.b32, st.global.b16, cp.async.cg.shared.global [...], [...], 0x10 (a copy into shared memory); AMD:
# global_load_dwordx4, buffer_load_ushort, global_store_short.
_PTX = re.compile(r"\b(ld|st)\.global(?:\.[\w:]*)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (0x[0-9a-f]+|\d+)")
_AMD = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def _accesses(line: str) -> Iterator[tuple[bool, int]]:
    """(whether it loads, bits) of an instruction on this line."""
    for kind, count, bits in _PTX.findall(line):
        yield kind == "ld", int(count or 1) * int(bits)
    for size in _PTX_COPY.findall(line):
        yield True, 8 * int(size, 0)
    for kind, what in _AMD.findall(line):
        yield kind == "load", _AMD_BITS.get(what.split("_")[0]) or (8 if "byte" in what else 16)


def access_widths(code: str, matrix: str) -> AccessWidths:
    """The `AccessWidths` of PTX or of AMD's assembly, in which the pattern `matrix` finds matrix instructions."""
    lines = code.splitlines()
    inside = set()
    for first, last in _loops(lines):
        if any(re.search(matrix, line) for line in lines[first:last]):
            inside.update(range(first, last))
    loads: dict[int, int] = {}
    stores: dict[int, int] = {}
    in_loop = {False: 0, True: 0}
    for i, line in enumerate(lines):
        for is_load, bits in _accesses(line):
            counts = loads if is_load else stores
            counts[bits] = counts.get(bits, 0) + 1
            in_loop[bits > 16] += is_load and i in inside
    return AccessWidths(
        *(tuple(sorted(counts.items(), reverse=True)) for counts in (loads, stores)), in_loop[False], in_loop[True]
    )


_LABEL = re.compile(r"^(\$L\w+|\.LBB\w+):")
_BRANCH = re.compile(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\b\s+(\$L\w+|\.LBB\w+)")


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """The spans that a branch backwards closes and that hold no other such span."""
    labels, spans = {}, []
    for i, line in enumerate(lines):
        if found := _LABEL.match(line):
            labels[found.group(1)] = i
        elif (found := _BRANCH.search(line)) and found.group(1) in labels:
            spans.append((labels[found.group(1)], i))
    return [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
