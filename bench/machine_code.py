"""Reading machine code: how wide a kernel's accesses of global memory are, and which of them its main loop makes."""

import re
from collections.abc import Iterator
from typing import NamedTuple


class AccessWidths(NamedTuple):
    """How many instructions load and store global memory, by the bits a thread moves with one (TMA is not among them), and how
    many loads of 16 bits or fewer lie in a loop with matrix instructions."""

    loads: tuple[tuple[int, int], ...] = ()
    stores: tuple[tuple[int, int], ...] = ()
    scalar_in_loop: int = 0

    def __str__(self) -> str:
        def listed(widths):
            return "+".join(f"{count}x{bits}" for bits, count in widths) or "0"

        return f"loads={listed(self.loads)} stores={listed(self.stores)}"


# NVIDIA: LDG.E.128, LDG.E.U16.CONSTANT, LDGSTS.E.BYPASS.LTC128B.128 (a copy into shared memory), STG.E; AMD:
# global_load_dwordx4, buffer_load_ushort, global_store_short.
_NVIDIA = re.compile(r"\b(LDGSTS|LDG|STG)((?:\.\w+)*)")
_AMD = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(lds_)?(\w+)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def _accesses(line: str) -> Iterator[tuple[bool, int]]:
    """(whether it loads, bits) of an instruction on this line."""
    for name, suffixes in _NVIDIA.findall(line):
        # The width is a part of its own: LTC128B is a hint to the cache.
        parts = suffixes.split(".")
        bits = next((int(p) for p in parts if p in ("64", "128", "256")), None)
        bits = bits or next((int(p[1:]) for p in parts if re.fullmatch("[US](8|16)", p)), 32)
        yield name != "STG", bits
    for kind, _, what in _AMD.findall(line):
        bits = next((b for prefix, b in _AMD_BITS.items() if re.match(rf"{prefix}\b", what)), None)
        yield kind == "load", bits or (8 if "byte" in what else 16)


def access_widths(code: str, matrix: str) -> AccessWidths:
    """The `AccessWidths` of disassembled code, in which the pattern `matrix` finds matrix instructions."""
    lines = code.splitlines()
    inside = set()
    for first, last in _loops(lines):
        if any(re.search(matrix, line) for line in lines[first:last]):
            inside.update(range(first, last))
    loads: dict[int, int] = {}
    stores: dict[int, int] = {}
    scalar = 0
    for i, line in enumerate(lines):
        for is_load, bits in _accesses(line):
            counts = loads if is_load else stores
            counts[bits] = counts.get(bits, 0) + 1
            scalar += is_load and bits <= 16 and i in inside
    return AccessWidths(*(tuple(sorted(counts.items(), reverse=True)) for counts in (loads, stores)), scalar)


_LABEL = re.compile(r"^\s*(\.L\w+|\.LBB\w+):")
_BRANCH = re.compile(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)")


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """The spans that a branch backwards closes and that hold no other such span."""
    labels, spans = {}, []
    for i, line in enumerate(lines):
        if found := _LABEL.match(line):
            labels[found.group(1)] = i
        elif (found := _BRANCH.search(line)) and found.group(1) in labels:
            spans.append((labels[found.group(1)], i))
    return [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
