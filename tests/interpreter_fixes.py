"""Make Triton's CPU interpreter compute what the GPU computes: bfloat16, NaN in min and max, run-time loop bounds.

One fix is for speed: reductions with a combine function of one's own.

The interpreter of Triton 3.6 to 3.9 keeps bfloat16 as the 16-bit integers of its bits and then adds, compares and
multiplies those integers. Here every such operation widens to float32, runs there, and rounds once to nearest even:
what the hardware does. `install` is called once, after triton was imported with TRITON_INTERPRET=1.
"""

import functools
import warnings

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle


def install() -> None:
    """Patch the interpreter of this process."""
    for name in ("binary_op", "unary_op", "create_fma", "create_dot"):
        setattr(InterpreterBuilder, name, _through_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _round_to_bf16(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value])), tl.bfloat16)
    InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    ReduceOps.generic_reduce = _by_slices(ReduceOps.generic_reduce)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _once(interpreter._patch_lang)
    GridExecutor.__call__ = _without_float_warnings(GridExecutor.__call__)


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bits (uint16) of float values, rounded to nearest, ties to even; NaN stays NaN."""
    values = np.asarray(values).astype(np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(argument) -> bool:
    return isinstance(argument, TensorHandle) and argument.dtype.scalar == tl.bfloat16


def _widen_handle(argument):
    return TensorHandle(widen(argument.data), tl.float32) if _is_bf16(argument) else argument


def _through_float32(method):
    @functools.wraps(method)
    def wrapped(self, *arguments):
        handles = [argument for argument in arguments if isinstance(argument, TensorHandle)]
        if not any(map(_is_bf16, handles)):
            return method(self, *arguments)
        result = method(self, *map(_widen_handle, arguments))
        if result.data.dtype == np.bool_:
            return TensorHandle(result.data, tl.int1)
        # the last operand has the type of the result: the right side, the addend, the accumulator of a dot
        return TensorHandle(narrow(result.data), tl.bfloat16) if _is_bf16(handles[-1]) else result

    return wrapped


def _cast(method):
    @functools.wraps(method)
    def wrapped(self, source, target_type):
        target = target_type.scalar
        if _is_bf16(source) == (target == tl.bfloat16):
            return method(self, source, target_type)
        if _is_bf16(source):
            return TensorHandle(widen(source.data).astype(interpreter._get_np_dtype(target)), target)
        return TensorHandle(narrow(source.data), tl.bfloat16)

    return wrapped


def _round_to_bf16(method):
    @functools.wraps(method)
    def wrapped(self, source, target_type, rounding_mode):
        to_nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if target_type.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32 and to_nearest:
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return method(self, source, target_type, rounding_mode)

    return wrapped


def _by_slices(method):
    """Combine whole slices along the axis, in the order of the elements, instead of one element after another."""

    @functools.wraps(method)
    def wrapped(self, operands):
        if self.axis is None:
            return method(self, operands)
        slices = zip(
            *(
                [self.to_tensor(part, operand.dtype) for part in np.moveaxis(operand.handle.data, self.axis, 0)]
                for operand in operands
            ),
            strict=True,
        )
        combined = next(slices)
        for part in slices:
            combined = self.combine_fn.fn(*combined, *part)
            combined = combined if isinstance(combined, tuple) else (combined,)
        results = (x.handle.data.reshape(x.shape) for x in combined)
        results = (np.expand_dims(x, self.axis) if self.keep_dims else x for x in results)
        return [self.to_tensor(x, operand.dtype) for x, operand in zip(results, operands, strict=True)]

    return wrapped


def _with_index(method):
    """Mend Triton 3.6, where numpy >= 2.4 refuses to make the one-element array of a loop bound an int."""

    @functools.wraps(method)
    def wrapped(tensor, scope):
        method(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    return wrapped


def _once(method):
    """Do not search the whole language again at each call of a device function, where the launch has patched it."""

    @functools.wraps(method)
    def wrapped(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return method(fn)

    return wrapped


def _without_float_warnings(method):
    """A GPU makes inf and NaN silently; the tests turn numpy's warnings about them into errors."""

    @functools.wraps(method)
    def wrapped(self, *arguments, **keywords):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return method(self, *arguments, **keywords)

    return wrapped
