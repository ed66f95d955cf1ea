"""log(1 + t) inside Triton kernels, for 0 <= t <= 1: from the series of artanh, small values keep their digits.

Each form takes what it is added to: computed before or after, the same operations became other machine code.
"""

import triton
import triton.language as tl


@triton.jit
def softplus(z, t):
    """max(z, 0) + log(1 + t), for t = exp(-|z|); of a rounded quotient."""
    s = tl.div_rn(t, 2.0 + t)
    g = s * s
    return tl.maximum(z, 0.0) + 2.0 * (s + s * (g * _artanh_series(g)))


@triton.jit
def cross_entropy(x, target, t):
    """max(x, 0) - target x + log(1 + t), for t = exp(-|x|); of a plain quotient."""
    s = t / (2.0 + t)
    g = s * s
    series = _artanh_series(g)
    return tl.where(x > 0, (1.0 - target) * x, -target * x) + 2.0 * s * (series * g + 1.0)


@triton.jit
def _artanh_series(g):
    """1/3 + g/5 + ... + g^5/13: artanh(s) = s + s g series(g) with g = s^2, and log(1 + t) = 2 artanh(t / (2 + t)).

    For s <= 1/3, so t <= 1, what is left out is 2e-8 of the result.
    """
    series = g * (1.0 / 13) + 1.0 / 11
    series = series * g + 1.0 / 9
    series = series * g + 1.0 / 7
    series = series * g + 1.0 / 5
    return series * g + 1.0 / 3
