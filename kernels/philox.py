"""Standard normal noise inside kernels: steps 2 to 5 of the specification in ``tgdp_fast/ops/noise.py``.

Reference twins ``tgdp_fast.ops.noise.philox4x32`` and ``tgdp_fast.ops.noise.normal``. Only integer and basic float32
arithmetic, no device library: words are equal bit for bit and normals agree to 1e-6 on every backend. The polynomials
are those of ``csrc/common/normal.h``.

Device functions; shapes broadcast. Per Philox call about 60 integer instructions, per Box-Muller pair about 75 FLOPs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four uint32 words of the counter (c0, c1, c2, c3) under the key (k0, k1), all uint32."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        # The key wraps around on purpose.
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """float32 in [2^-33, 1] from a uint32 word; the product is exact, so that a fused sum changes nothing."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def log_positive(u):
    """log(u) for normal float32 u > 0, below 1 unit in the last place, also near u = 1."""
    # u = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) are 0x3F3504F3.
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    k = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    # log(1 + f) = f - f^2 / 2 + f^3 p(f)
    p = -0.0785982463 * f + 0.128817678
    p = p * f - 0.131287233
    p = p * f + 0.141811717
    p = p * f - 0.16624556
    p = p * f + 0.200022873
    p = p * f - 0.250008103
    p = p * f + 0.333333167
    # k ln 2 in two parts, the first of 15 bits, so that its product is exact. Small terms are added first.
    square = f * f
    small = (square * f) * p + (k * 1.42860677e-6 - 0.5 * square)
    return k * 0.693145752 + (f + small)


@triton.jit
def cos_and_sin(theta):
    """Cosine and sine of float32 theta in [0, 2 pi], below 1 unit in the last place."""
    # theta = n pi / 2 + r, |r| <= pi / 4; adding 1.5 * 2^23 rounds to the nearest integer. The parts of pi / 2 have few
    # enough bits for exact products with n <= 4.
    shifted = theta * 0.636619772 + 12582912.0
    n = shifted - 12582912.0
    # r is kept with what its rounding loses, `rest`.
    coarse = theta - n * 1.57079601
    r = coarse - n * 3.13913915e-7
    rest = (coarse - r) - n * 3.13913915e-7 - n * 2.56334407e-12
    square = r * r
    s = -1.95166558e-4 * square + 8.33217354e-3
    s = s * square - 0.166666549
    s = r + (s * (square * r) + rest)
    c = 2.44377301e-5 * square - 1.38873614e-3
    c = c * square + 0.0416666467
    half = 0.5 * square
    first = 1.0 - half
    c = first + (((1.0 - first) - half) + (c * (square * square) - r * rest))
    # The quarter is in the low bits of `shifted`: odd ones exchange the two, and bit 1 gives the sign.
    quarter = shifted.to(tl.uint32, bitcast=True)
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(radius_word, angle_word):
    """Two independent standard normals, float32, from two uint32 words."""
    radius = tl.sqrt_rn(-2.0 * log_positive(uniform(radius_word)))
    # An explicit operation with one rounding: a compiler that fused the bare product with a sum would not round it.
    cosine, sine = cos_and_sin(tl.fma(uniform(angle_word), 6.28318548, 0.0))
    return radius * cosine, radius * sine


@triton.jit
def normal_groups(group, sample, evaluation, k0, k1):
    """The four normals of elements 4 group .. 4 group + 3 of each sample: one Philox call, two Box-Muller pairs.

    group, sample: int64; evaluation, k0, k1: uint32 scalars.
    """
    w0, w1, w2, w3 = philox4x32(
        group.to(tl.uint32), sample.to(tl.uint32), (sample >> 32).to(tl.uint32), evaluation, k0, k1
    )
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normal_pairs(pair, sample, evaluation, k0, k1):
    """The two normals of elements 2 pair and 2 pair + 1 of each sample: a Philox call and a Box-Muller pair each.

    pair, sample: int64; evaluation, k0, k1: uint32 scalars.
    """
    w0, w1, w2, w3 = philox4x32(
        (pair >> 1).to(tl.uint32), sample.to(tl.uint32), (sample >> 32).to(tl.uint32), evaluation, k0, k1
    )
    odd = (pair & 1) != 0
    return box_muller(tl.where(odd, w2, w0), tl.where(odd, w3, w1))


@triton.jit
def normal_elements(element, sample, evaluation, k0, k1):
    """The normal of one element of each sample: a Philox call and a Box-Muller pair each, of which one half is used.

    element, sample: int64; evaluation, k0, k1: uint32 scalars.
    """
    first, second = normal_pairs(element >> 1, sample, evaluation, k0, k1)
    return tl.where((element & 1) != 0, second, first)
