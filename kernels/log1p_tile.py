"""log(1 + t) inside Triton kernels, for 0 <= t <= 1: from the series of artanh, small values keep their digits."""

import triton

# the interpreter looks for it in the module of every function that it runs
import triton.language as tl  # noqa: F401


@triton.jit
def artanh_series(g):
    """1/3 + g/5 + ... + g^5/13: artanh(s) = s + s g series(g) with g = s^2, and log(1 + t) = 2 artanh(t / (2 + t)).

    For s <= 1/3, so t <= 1, what is left out is 2e-8 of the result.
    """
    series = g * (1.0 / 13) + 1.0 / 11
    series = series * g + 1.0 / 9
    series = series * g + 1.0 / 7
    series = series * g + 1.0 / 5
    return series * g + 1.0 / 3
