"""GELU and its slope inside Triton kernels: the exact ones, not those of tanh, for one exponential each.

With Phi(-a) = 1 - Phi(a) of the normal distribution, for a = |x| >= 0,

    gelu(x) = x Phi(x) = max(x, 0) - a Phi(-a),    gelu'(x) = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)

and Phi(-a) = 2^(-1 + c1 a + ... + cn a^n): one exponential, and neither the value nor the slope cancels. Phi(-a)
and a Phi(-a) err by at most 8e-7 with n = 5, a five-thousandth of a rounding to bfloat16 or TF32, and with n = 8, for
results in full float32 (PRECISION "ieee"), by no more than the rounding of the polynomial itself.

The slope for bfloat16 and TF32 is gelu'(-a) = (p0 + ... + p3 a^3) 2^(c1 a + c2 a^2) and gelu'(a) = 1 - gelu'(-a), which
err by at most 1.05e-5, a hundredth of a rounding to bfloat16 and less than a twentieth of one to TF32. In full float32
the slope takes two exponentials.
"""

import triton
import triton.language as tl

MINUS_HALF_LOG2E = tl.constexpr(-0.7213475204444817)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def gelu(x, PRECISION: tl.constexpr):
    """x Phi(x) of finite float32 values."""
    a = tl.abs(x)
    return tl.maximum(x, 0.0) - a * _phi_of_minus(a, PRECISION)


@triton.jit
def gelu_slope(x, PRECISION: tl.constexpr):
    """The derivative of x Phi(x)."""
    if PRECISION == "ieee":
        return normal_cdf(x, PRECISION) + x * (tl.exp2(x * x * MINUS_HALF_LOG2E) * INV_SQRT_2PI)
    else:
        # past 16 the exponential is 0, but a polynomial times 0 must not be infinite
        a = tl.minimum(tl.abs(x), 16.0, propagate_nan=tl.PropagateNan.ALL)
        p = a * -0.08167395748972116 - 0.14749336117
        p = p * a - 0.50799988896
        p = p * a + 0.4999895957976
        q = p * tl.exp2((a * -0.67435102143 - 0.83510810573) * a)
        return tl.where(x < 0, q, 1.0 - q)


@triton.jit
def normal_cdf(x, PRECISION: tl.constexpr):
    """Phi(x); x times it is GELU of infinities too."""
    q = _phi_of_minus(tl.abs(x), PRECISION)
    return tl.where(x < 0, q, 1.0 - q)


@triton.jit
def _phi_of_minus(a, PRECISION: tl.constexpr):
    """Phi(-a) for a >= 0; the leading coefficients are negative, so that it ends at 0."""
    if PRECISION == "ieee":
        r = a * -2.3349481563201103e-06 + 3.3737804967151637e-05
        r = r * a - 0.0001612937758634966
        r = r * a - 0.00019170369872601223
        r = r * a + 0.007126865364952107
        r = r * a - 0.05253361329524553
        r = r * a - 0.4591982814977852
        r = r * a - 1.151106041920315
    else:
        r = a * -0.0005028710739447221 + 0.0073006813237252
        r = r * a - 0.05238806808156837
        r = r * a - 0.45936818197577445
        r = r * a - 1.1510701654243576
    return tl.exp2(r * a - 1.0)
