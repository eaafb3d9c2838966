"""Counter-based standard normal noise: z = normal(seed, sample index, element, evaluation).

Noise is a function of its coordinates and not a stream, so the same seed gives the same samples in every
batch size, on any number of workers, after a resume, and (to rounding) on every backend.

Specification, complete enough for a twin in C++, CUDA or Triton
----------------------------------------------------------------
All words are unsigned 32-bit integers; ``fl32`` rounds to the nearest float32, ties to even.

1. Coordinates. ``seed`` in [0, 2^64); ``sample`` a signed 64-bit integer, read as its two's complement bits;
   ``element`` >= 0, the row-major index inside one sample; ``evaluation`` in [0, 2^32), 0 for the initial
   draw x_T and k + 1 for the 0-based solver evaluation k.
2. Counter and key::

       c0 = element // 4      c1 = sample mod 2^32      c2 = (sample >> 32) mod 2^32      c3 = evaluation
       k0 = seed mod 2^32     k1 = seed >> 32

3. Philox4x32-10 (Salmon et al., SC 2011; the Random123 library). Ten times::

       p0 = 0xD2511F53 * c0,  p1 = 0xCD9E8D57 * c2                  (64-bit products)
       (c0, c1, c2, c3) = (high(p1) ^ c1 ^ k0,  low(p1),  high(p0) ^ c3 ^ k1,  low(p0))
       k0 += 0x9E3779B9,  k1 += 0xBB67AE85                          (mod 2^32)

   The words w0..w3 are c0..c3 after the tenth round.
4. Uniforms, in float32: u_j = fl32(fl32(w_j) * 2^-32 + 2^-33). The product is exact, so a fused multiply-add
   gives the same bits. fl32(w_j) rounds from the full 32-bit *unsigned* word (no truncation to 24 bits),
   hence u_j lies in [2^-33, 1], both ends included: log(u_j) is finite, and u_j = 1 gives the radius 0.
5. Box-Muller, in float32. w0 and w2 give radii, w1 and w3 give angles::

       r = sqrt(-2 log(u_0)), theta = fl32(6.28318548202514648 * u_1), z_0 = r cos(theta), z_1 = r sin(theta)
       and the same with (u_2, u_3) for z_2 and z_3

   theta lies in [0, 2 pi]. Element e of the sample is z_(e mod 4). sin, cos and log must be accurate to about
   one unit in the last place over these ranges (on CUDA: sinf, cosf, logf, not the fast intrinsics). Then |z|
   < 6.77 and twins agree to 1e-6.

Test vectors: for Philox the known answers of Random123, and fixed normals, both in the tests of this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tgdp_fast.runtime import native
from tgdp_fast.runtime.checks import check_integer

__all__ = ["key_words", "normal", "philox4x32"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
# 2^16 counters at a time: about 10 MB of working memory whatever the size of the result, and faster than
# larger chunks.
_COUNTERS_PER_CHUNK = 1 << 16


def philox4x32(
    counter: Sequence[Tensor | int], key: Sequence[int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 random function on int64 tensors that hold unsigned 32-bit words.

    Args:
        counter: four words, each an int or an int64 tensor; shapes broadcast. Only the low 32 bits are used.
        key: two ints; only the low 32 bits are used.
        rounds: number of rounds, 10 for the standard generator.

    Returns:
        Four int64 tensors of the broadcast shape, every value in [0, 2^32).

    Raises:
        ValueError: counter does not have four words, the key not two, a tensor is not int64, or rounds < 1.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    if len(counter) != 4:
        raise ValueError(f"counter must have 4 words, got {len(counter)}; pass a sequence of ints or int64 tensors")
    if len(key) != 2:
        raise ValueError(f"key must have 2 words, got {len(key)}; pass (seed mod 2^32, seed >> 32)")
    rounds = check_integer("rounds", rounds, 1)
    words = []
    for position, word in enumerate(counter):
        tensor = word if isinstance(word, Tensor) else torch.tensor(int(word) & _MASK, dtype=torch.int64, device="cpu")
        if tensor.dtype != torch.int64:
            raise ValueError(f"counter[{position}] must be int64, got {tensor.dtype}; convert it with .to(torch.int64)")
        words.append(tensor & _MASK)
    c0, c1, c2, c3 = words
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(rounds):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


def normal(
    seed: int,
    sample_index: Tensor,
    num_elements: int,
    evaluation: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise for given samples, elements and evaluation; see the module's specification.

    Row b depends on (seed, sample_index[b], evaluation) alone, and its first n values do not depend on
    num_elements.

    Args:
        seed: integer in [0, 2^64).
        sample_index: [B] int64, the global index of each sample (any value, repeats allowed).
        num_elements: values per sample, N >= 0, at most 2^34.
        evaluation: integer in [0, 2^32); 0 for the initial draw x_T, k + 1 for the 0-based solver evaluation
            k.
        device: where to generate; default the device of sample_index.

    Returns:
        [B, N] float32, contiguous. Working memory beyond the result is bounded (one copy of the result where
        N is not a multiple of 4, and about 10 MB).

    Raises:
        ValueError: an argument is out of range, or sample_index is not a 1-D int64 tensor.

    Source: Philox4x32-10 (Salmon et al., SC 2011) and the Box-Muller transform.
    """
    key_low, key_high, evaluation = key_words(seed, evaluation)
    num_elements = check_integer("num_elements", num_elements, 0)
    if num_elements > 4 << 32:
        raise ValueError(
            f"num_elements must be at most 2^34 (a 32-bit counter numbers groups of four), "
            f"got {num_elements}; split each sample in several with their own sample_index"
        )
    if not isinstance(sample_index, Tensor) or sample_index.dtype != torch.int64 or sample_index.ndim != 1:
        what = type(sample_index).__name__
        if isinstance(sample_index, Tensor):
            what = f"{sample_index.dtype} of shape {tuple(sample_index.shape)}"
        raise ValueError(
            f"sample_index must be a 1-D int64 tensor, got {what}; "
            "use for example torch.arange(first, first + batch, dtype=torch.int64)"
        )
    samples = sample_index.to(sample_index.device if device is None else torch.device(device))
    # A compiler that inlines pointwise code would expand the ten rounds exponentially: it sees one operator
    # instead.
    generate = _normal_operator if torch.compiler.is_compiling() else _normal
    return generate(samples, num_elements, key_low, key_high, evaluation)


def key_words(seed: int, evaluation: int) -> tuple[int, int, int]:
    """Low and high word of the seed, and the evaluation, after checking their ranges: k0, k1 and c3.

    Raises:
        ValueError: seed is not an integer in [0, 2^64), or evaluation none in [0, 2^32).
    """
    seed = _check_below("seed", seed, 64, "fold a larger or negative seed into this range first")
    evaluation = _check_below("evaluation", evaluation, 32, "0 is the initial draw and k + 1 the evaluation k")
    return seed & _MASK, seed >> 32, evaluation


def _normal(samples: Tensor, num_elements: int, key_low: int, key_high: int, evaluation: int) -> Tensor:
    if samples.device.type == "cpu" and native.CPU_MISSING is None:
        count = samples.shape[0] * num_elements
        flat = torch.ops.tgdp_fast.normal_range(samples, num_elements, 0, count, key_low, key_high, evaluation)
        return flat.view(samples.shape[0], num_elements)
    return _normal_reference(samples, num_elements, key_low, key_high, evaluation)


def _normal_reference(samples: Tensor, num_elements: int, key_low: int, key_high: int, evaluation: int) -> Tensor:
    """Plain PyTorch twin of the native generator."""
    groups = -(-num_elements // 4)
    total = samples.shape[0] * groups
    out = torch.empty((total, 4), dtype=torch.float32, device=samples.device)
    # Counters are numbered through all samples, so that few long and many short samples chunk alike.
    for start in range(0, total, _COUNTERS_PER_CHUNK):
        stop = min(start + _COUNTERS_PER_CHUNK, total)
        flat = torch.arange(start, stop, dtype=torch.int64, device=samples.device)
        row = torch.div(flat, groups, rounding_mode="floor")
        sample = samples[row]
        words = philox4x32((flat - row * groups, sample, sample >> 32, evaluation), (key_low, key_high))
        normals = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
        torch.stack(normals, dim=1, out=out[start:stop])
    # A copy only where the groups of four overshoot. (contiguous() would return one sample's slice as it is.)
    padded = out.view(samples.shape[0], 4 * groups)
    if num_elements == 4 * groups:
        return padded
    return padded[:, :num_elements].clone(memory_format=torch.contiguous_format)


_normal_operator = torch.library.custom_op(
    "tgdp_fast::normal",
    _normal,
    mutates_args=(),
    schema="(Tensor samples, SymInt num_elements, SymInt key_low, SymInt key_high, SymInt evaluation) -> Tensor",
)


@_normal_operator.register_fake
def _(samples: Tensor, num_elements: int, key_low: int, key_high: int, evaluation: int) -> Tensor:
    return samples.new_empty((samples.shape[0], num_elements), dtype=torch.float32)


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of multiplier * word, for 2^31 <= multiplier < 2^32 and 0 <= word < 2^32.

    The 64-bit product may exceed int64, so take multiplier - 2^32 (a negative number of at most 31 bits)
    instead: that product never overflows, has the same low word, and its high word is short of exactly
    ``word``.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _MASK


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Step 5 of the specification."""
    radius = torch.sqrt(-2.0 * torch.log(_uniform(radius_word)))
    angle = (2.0 * math.pi) * _uniform(angle_word)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _uniform(word: Tensor) -> Tensor:
    """Step 4 of the specification."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def _check_below(name: str, value: int, bits: int, advice: str) -> int:
    if type(value) is int and 0 <= value < 1 << bits:  # also what a tracing compiler can follow
        return value
    number = check_integer(name, value, 0, f"{name} is an integer in [0, 2^{bits}); {advice}")
    if number >= 1 << bits:
        raise ValueError(f"{name} must be below 2^{bits}, got {number}; {advice}")
    return number
