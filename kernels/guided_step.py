"""One guided solver step, in one pass over memory and with the noise made in registers.

Reference twin ``tgdp_fast.ops.guided_step.guided_step_reference``; the same arithmetic, in float32, as
``csrc/common/solver_step.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels import launching
from tgdp_fast.kernels.launching import Block, Compilation
from tgdp_fast.kernels.philox import normal_elements, normal_groups, normal_pairs

#: The most history slots that the kernel has coefficients for.
MOST_SLOTS = 2


@triton.jit
def locate(start, lanes, size, long: tl.constexpr):
    """Sample and position in it (int64) of the flat positions start + lanes, for samples of ``size`` positions.

    One 64-bit division a program. Where ``long``, size is no less than the number of lanes, which then touch two
    samples at most; else they and size are small, and a lane takes one 32-bit division.
    """
    first = start // size
    position = start - first * size + lanes
    if long:
        beyond = position >= size
        sample = first + beyond.to(tl.int64)
        position = tl.where(beyond, position - size, position)
    else:
        further = position.to(tl.int32) // size.to(tl.int32)
        sample = first + further
        position = position - further * size
    return sample, position


@triton.jit
def _row(slots: tl.constexpr, from_x, from_1, from_2, from_epsilon, x, m1, m2, guided):
    """A row of the solver's matrix times the values at its columns; 2 (2 + slots) FLOPs."""
    total = tl.cast(from_x, tl.float32) * x
    if slots > 0:
        total += tl.cast(from_1, tl.float32) * m1
    if slots > 1:
        total += tl.cast(from_2, tl.float32) * m2
    return total + tl.cast(from_epsilon, tl.float32) * guided


@triton.jit
def _store(pointer, offsets, value, mask):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


# Neither the noise coordinates nor the size of a sample change what is compiled.
@triton.jit(do_not_specialize=["sample_size", "key_low", "key_high", "evaluation"])
def guided_step_kernel(
    x_next_pointer,
    history_next_pointer,
    x0_pointer,
    x_pointer,
    epsilon_pointer,
    gradient_pointer,
    history_pointer,
    sample_index_pointer,
    elements,
    sample_size,
    x_from_x,
    x_from_1,
    x_from_2,
    x_from_epsilon,
    m1_from_x,
    m1_from_1,
    m1_from_2,
    m1_from_epsilon,
    m2_from_x,
    m2_from_1,
    m2_from_2,
    m2_from_epsilon,
    noise_scale,
    guidance_weight,
    alpha,
    sigma,
    lowest,
    highest,
    key_low,
    key_high,
    evaluation,
    slots: tl.constexpr,
    clamp: tl.constexpr,
    normals: tl.constexpr,
    long: tl.constexpr,
    block: tl.constexpr,
):
    """Elements [program * block, (program + 1) * block) of all samples, one after the other.

    Every tensor is contiguous and float32, bfloat16 or float16 each; x_next, x0 and x have ``elements`` elements,
    epsilon and gradient too, both histories slots * elements. Without gradient, history or sample_index the pointer is
    None: no guidance, zeros, samples 0, 1, ... Coefficients are those of ``slots`` history slots. The key and the
    evaluation are the bits of unsigned 32-bit words. ``long``: a sample has no fewer elements than a program.

    ``normals`` is how noise is made:

    0: none.
    4: by groups of four elements, for samples of a multiple of four. The groups are the rows of the tile
       [block / 4, 4], so that one Philox call and two Box-Muller pairs serve all of a thread's row, without waste.
    2: by pairs, for samples of an even size: a Philox call for each Box-Muller pair. Samples of two elements waste
       nothing either, larger ones every second call.
    1: by elements, for the others. Every element calls Philox and uses one half of a Box-Muller pair: about 165
       instructions an element for noise in place of 70 by groups (compiled for sm_90), which take about as long as the
       memory does for float32. Rows that follow the groups of such samples would start at any address, and read and
       write single elements in four times as many memory transactions.

    Moves elements * (b (3 + 2 slots) + e + g) bytes for b, e and g bytes an element of x, epsilon and gradient, and
    computes about elements * (5 + (1 + slots) (3 + 2 slots)) FLOPs, 2 more and the noise with it.
    """
    start = tl.program_id(0).to(tl.int64) * block
    # Four neighbours a thread whatever the dtypes: a flat tile would take eight of 16 bits, and move tensors of another
    # dtype through shared memory.
    lanes = 4 * tl.arange(0, block // 4)[:, None] + tl.arange(0, 4)[None, :]
    offsets = start + lanes
    inside = offsets < elements

    x = tl.load(x_pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    guided = tl.load(epsilon_pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    if gradient_pointer is not None:
        gradient = tl.load(gradient_pointer + offsets, mask=inside, other=0.0).to(tl.float32)
        guided -= tl.cast(guidance_weight, tl.float32) * gradient
    alpha = tl.cast(alpha, tl.float32)
    sigma = tl.cast(sigma, tl.float32)
    # The quotient is one, for 1 / alpha may overflow.
    x0 = tl.div_rn(x - sigma * guided, tl.broadcast_to(alpha, x.shape))
    if clamp:
        # By comparisons, so that NaN stays NaN.
        limited = tl.where(x0 < tl.cast(lowest, tl.float32), tl.cast(lowest, tl.float32), x0)
        limited = tl.where(limited > tl.cast(highest, tl.float32), tl.cast(highest, tl.float32), limited)
        # Recomputed where the clamp acts only: elsewhere the round trip through x0 would cost digits at small sigma.
        recomputed = tl.div_rn(x - alpha * limited, tl.broadcast_to(sigma, x.shape))
        guided = tl.where(limited == x0, guided, recomputed)
        x0 = limited
    _store(x0_pointer, offsets, x0, inside)

    m1 = tl.zeros_like(x)
    m2 = tl.zeros_like(x)
    if history_pointer is not None:
        if slots > 0:
            m1 = tl.load(history_pointer + offsets, mask=inside, other=0.0).to(tl.float32)
        if slots > 1:
            m2 = tl.load(history_pointer + (offsets + elements), mask=inside, other=0.0).to(tl.float32)
    if slots > 0:
        row = _row(slots, m1_from_x, m1_from_1, m1_from_2, m1_from_epsilon, x, m1, m2, guided)
        _store(history_next_pointer, offsets, row, inside)
    if slots > 1:
        row = _row(slots, m2_from_x, m2_from_1, m2_from_2, m2_from_epsilon, x, m1, m2, guided)
        _store(history_next_pointer, offsets + elements, row, inside)

    row = _row(slots, x_from_x, x_from_1, x_from_2, x_from_epsilon, x, m1, m2, guided)
    if normals > 0:
        k0 = key_low.to(tl.uint32, bitcast=True)
        k1 = key_high.to(tl.uint32, bitcast=True)
        c3 = evaluation.to(tl.uint32, bitcast=True)
        # What makes its normals at once: rows, pairs or elements of the tile.
        if normals == 4:
            units = tl.arange(0, block // 4)
        elif normals == 2:
            units = 2 * tl.arange(0, block // 4)[:, None] + tl.arange(0, 2)[None, :]
        else:
            units = lanes
        sample, position = locate(start // normals, units, sample_size // normals, long)
        if sample_index_pointer is not None:
            sample = tl.load(sample_index_pointer + sample, mask=normals * units < elements - start, other=0)
        if normals == 4:
            z0, z1, z2, z3 = normal_groups(position, sample, c3, k0, k1)
            # [rows, 2, 2], with z0, z1 first and z2, z3 then.
            z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (block // 4, 4))
        elif normals == 2:
            first, second = normal_pairs(position, sample, c3, k0, k1)
            z = tl.reshape(tl.join(first, second), (block // 4, 4))
        else:
            z = normal_elements(position, sample, c3, k0, k1)
        row += tl.cast(noise_scale, tl.float32) * z
    _store(x_next_pointer, offsets, row, inside)


def launch(
    x_next: Tensor,
    history_next: Tensor,
    x0: Tensor,
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None,
    history: Tensor | None,
    matrix: Sequence[float],
    noise_scale: float,
    guidance_weight: float,
    alpha: float,
    sigma: float,
    clamp: Sequence[float] | None,
    key_low: int,
    key_high: int,
    sample_index: Tensor | None,
    evaluation: int,
) -> None:
    """Fill x_next and x0 [B, ...] and history_next [H, B, ...], H <= MOST_SLOTS, from contiguous tensors.

    matrix: the (1 + H) (2 + H) entries, row by row; key_low, key_high, evaluation: in [0, 2^32).
    """
    elements = x.numel()
    if elements == 0:
        return
    slots = len(history_next)
    sample_size = elements // len(x)
    normals = _normals(sample_size) if noise_scale != 0.0 else 0
    block = _block(normals)
    tensors = (x_next, history_next, x0, x, epsilon, gradient, history, sample_index if normals else None)
    launching.launch(
        guided_step_kernel,
        (triton.cdiv(elements, block.elements),),
        *tensors,
        elements,
        sample_size,
        *_coefficients(matrix, slots),
        noise_scale,
        guidance_weight,
        alpha,
        sigma,
        *((0.0, 0.0) if clamp is None else clamp),
        _signed(key_low),
        _signed(key_high),
        _signed(evaluation),
        tile=block,
        slots=slots,
        clamp=clamp is not None,
        normals=normals,
        long=sample_size >= block.elements,
        block=block.elements,
    )


def _normals(sample_size: int) -> int:
    """How many normals are made at once."""
    return 4 if sample_size % 4 == 0 else 2 if sample_size % 2 == 0 else 1


def _block(normals: int) -> Block:
    """Eight elements a thread, so that several loads of each are under way at once.

    Four where each element makes its own noise, or some of its registers would be spilled.
    """
    return Block(512 if normals == 1 else 1024, 4)


def _coefficients(matrix: Sequence[float], slots: int) -> list[float]:
    """The entries at their places in a matrix of MOST_SLOTS slots."""
    padded = []
    for row in range(1 + MOST_SLOTS):
        entries = matrix[row * (2 + slots) : (row + 1) * (2 + slots)] if row <= slots else [0.0] * (2 + slots)
        padded += [*entries[:-1], *[0.0] * (MOST_SLOTS - slots), entries[-1]]
    return padded


def _signed(word: int) -> int:
    """The same 32 bits: an argument of one type whatever its value."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _without_data(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    slots: int,
    shape: tuple[int, int],
    *,
    history: bool = True,
    sample_index: bool = False,
    clamp: bool = False,
    noise: bool = False,
) -> Callable[[], None]:
    """A launch for a record: x, epsilon and gradient of these dtypes, a batch of samples of a size."""

    def empty(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, epsilon, gradient = dtypes
    return partial(
        launch,
        x_next=empty(x, *shape),
        history_next=empty(x, slots, *shape),
        x0=empty(x, *shape),
        x=empty(x, *shape),
        epsilon=empty(epsilon, *shape),
        gradient=None if gradient is None else empty(gradient, *shape),
        history=empty(x, slots, *shape) if history and slots else None,
        matrix=[0.5] * ((1 + slots) * (2 + slots)),
        noise_scale=0.5 if noise else 0.0,
        guidance_weight=0.5,
        alpha=0.5,
        sigma=0.5,
        clamp=(-1.0, 1.0) if clamp else None,
        key_low=0,
        key_high=0,
        sample_index=empty(torch.int64, shape[0]) if sample_index else None,
        evaluation=0,
    )


def shipped() -> list[Compilation]:
    """The steps of the solvers in use: multistep without noise, its first step, ancestral, and stochastic multistep."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    ecg, plane, odd = (256, 8000), (10_000, 2), (33, 12_001)
    call = _without_data
    return launching.recorded(
        {
            "ancestral": call((fp32, fp32, fp32), 0, ecg, sample_index=True, noise=True),
            "multistep": call((fp32, bf16, bf16), 1, ecg),
            "multistep, first": call((fp32, bf16, bf16), 1, ecg, history=False, clamp=True),
            "multistep, stochastic": call((bf16, bf16, fp32), 1, ecg, sample_index=True, clamp=True, noise=True),
            "third order, unguided": call((fp16, fp16, None), 2, (1 << 20, 4096)),
            "ancestral, two elements": call((fp32, fp32, fp32), 0, plane, sample_index=True, noise=True),
            "stochastic, odd size": call((fp32, bf16, fp32), 2, odd, clamp=True, noise=True),
            "ancestral, one element": call((fp32, fp32, fp32), 0, (10_000, 1), noise=True),
        }
    )
