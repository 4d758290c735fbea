"""Triton's interpreter without the work that it repeats, and without a fault of version 3.9's.

For a launch it replaces what triton.language does by its own, and at every call of a device function it searches the whole
language again for what is left to replace: a third and more of the time of a kernel test. Here it is searched once for each
module that functions are from. Most of the rest goes into descriptions of values that nothing reads: the shape of a
tensor, the type of a tuple. Here they are made when they are asked for, and those of blocks once for each dtype and shape.

Triton also works out whether a sum or a product of 32-bit integers overflows, and tells nobody. Here it is an error.
"""

import functools

import numpy
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    """For the rest of the process."""
    _search_once()
    _describe_late()
    _convert_bits()
    _say_overflows()
    _mend_conditions()


def _search_once() -> None:
    patch_language, run_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
    # The modules that this launch came by, and after each such row of them what was replaced.
    searched, replaced = [], {}

    def patch_once(function):
        module = function.__module__
        if module in searched:
            return interpreter._LangPatchScope()
        searched.append(module)
        changes = replaced.get(tuple(searched))
        if changes is None:
            scope = patch_language(function)
            replaced[tuple(searched)] = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
            return scope
        scope = interpreter._LangPatchScope()
        for change in changes:
            scope.set_attr(*change)
        return scope

    def run_and_forget(self, *args, **kwargs):
        searched.clear()
        try:
            return run_grid(self, *args, **kwargs)
        finally:
            searched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_and_forget


def _describe_late() -> None:
    describe_tuple, describe_block, numpy_dtype = (
        core.tuple.__init__,
        core.block_type.__init__,
        interpreter._get_np_dtype,
    )
    blocks, numpy_dtypes = {}, {}

    def init_tuple(self, args, type=None):
        self.values = list(args)
        if type is not None:
            describe_tuple(self, self.values, type)

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar

    def init_block(self, element_ty, shape):
        sizes = tuple(getattr(size, "value", size) for size in shape)
        known = blocks.get((str(element_ty), sizes))
        if known is None:
            describe_block(self, element_ty, shape)
            known = blocks[str(element_ty), sizes] = dict(self.__dict__)
        self.__dict__.update(known)

    def known_numpy_dtype(dtype):
        found = numpy_dtypes.get(str(dtype))
        if found is None:
            found = numpy_dtypes[str(dtype)] = numpy_dtype(dtype)
        return found

    def late(owner, name, describe):
        described = functools.cached_property(describe)
        described.__set_name__(owner, name)
        setattr(owner, name, described)

    late(core.tuple, "type", lambda self: core._type_for_tuple_values(self.values))
    late(core.tensor, "numel", lambda self: core.constexpr(self.type.numel if self.type.is_block() else 1))
    late(
        core.tensor,
        "shape",
        lambda self: core.tuple(map(core.constexpr, self.type.shape if self.type.is_block() else ())),
    )
    core.tuple.__init__, core.tensor.__init__, core.block_type.__init__ = init_tuple, init_tensor, init_block
    interpreter._get_np_dtype = known_numpy_dtype


def _convert_bits() -> None:
    convert = interpreter._convert_float

    def convert_bits(data, from_dtype, to_dtype, rounding):
        # As Triton does for every pair of formats by taking them apart. Its bf16 are the upper halves of fp32.
        if from_dtype == core.bfloat16 and to_dtype == core.float32:
            return data.astype(numpy.uint32) << 16
        if from_dtype == core.float32 and to_dtype == core.bfloat16:
            return (data.view(numpy.uint32) >> 16).astype(numpy.uint16)
        return convert(data, from_dtype, to_dtype, rounding)

    interpreter._convert_float = convert_bits


def _say_overflows() -> None:
    operations = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}

    def check(self, lhs, rhs, operation):
        dtype = lhs.type.scalar
        if dtype.int_bitwidth >= 64:
            return
        exact = operations[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=numpy.int64)
        least, most = dtype.get_int_min_value(), dtype.get_int_max_value()
        assert least <= exact.min() and exact.max() <= most, f"{operation.__name__} of {dtype} overflows"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _mend_conditions() -> None:
    splat = interpreter.InterpreterBuilder.create_splat

    def splat_bool(self, shape, scalar):
        # Triton 3.9 makes integers of a condition, and then takes no integers for a mask.
        block = splat(self, shape, scalar)
        block.data = block.data.astype(scalar.data.dtype, copy=False)
        return block

    interpreter.InterpreterBuilder.create_splat = splat_bool
