"""One guided solver step, in one pass over memory and with the noise made in registers.

Reference twin ``tgdp_fast.ops.guided_step.guided_step_reference``; the same arithmetic, in float32, as
``csrc/common/solver_step.h``.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgdp_fast.kernels import launching
from tgdp_fast.kernels.launching import Block, Compilation
from tgdp_fast.kernels.philox import normal_elements, normal_groups, normal_pairs


@triton.jit
def locate(start, lanes, size, long: tl.constexpr):
    """Sample and position in it (int64) of the flat positions start + lanes, for samples of ``size`` positions.

    One 64-bit division per program. If ``long``, size is at least the number of lanes, which then touch at most two
    samples; otherwise both are small, and a lane takes one 32-bit division.
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
def _row(coefficients, x, moments, guided):
    """A row of the solver's matrix times the values at its columns; 2 (2 + H) FLOPs for H history slots."""
    total = tl.cast(coefficients[0], tl.float32) * x
    for i in tl.static_range(len(moments)):
        total += tl.cast(coefficients[1 + i], tl.float32) * moments[i]
    return total + tl.cast(coefficients[1 + len(moments)], tl.float32) * guided


@triton.jit
def _store(pointer, offsets, value, mask):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


# The compiled code depends neither on the noise coordinates nor on the size of a sample.
@triton.jit(do_not_specialize=["sample_size", "key_low", "key_high", "evaluation"])
def guided_step_kernel(
    x_next,
    history_next,
    x0,
    x,
    epsilon,
    gradient,
    history,
    sample_index,
    elements,
    sample_size,
    step,
    key_low,
    key_high,
    evaluation,
    normals: tl.constexpr,
    long: tl.constexpr,
    block: tl.constexpr,
):
    """Elements [program * block, (program + 1) * block) of all samples, one after the other.

    Every tensor is contiguous and float32, bfloat16 or float16 each; x_next, x0 and x have ``elements`` elements,
    epsilon and gradient too, both histories H * elements for the H history slots of the step's matrix. Without
    gradient, history or sample_index the pointer is None: no guidance, zeros, samples 0, 1, ... ``step`` is a
    ``tgdp_fast.ops.SolverStep``. The key and the evaluation are the bits of unsigned 32-bit words. ``long``: a sample
    has no fewer elements than a program.

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

    Twin: ``guided_step_reference``. Moves elements * (b (3 + 2 H) + e + g) bytes for b, e and g bytes an element of x,
    epsilon and gradient, and computes about elements * (5 + (1 + H) (3 + 2 H)) FLOPs, 2 more and the noise with it.
    """
    start = tl.program_id(0).to(tl.int64) * block
    # Four neighbours a thread whatever the dtypes: a flat tile would take eight of 16 bits, and move tensors of another
    # dtype through shared memory.
    lanes = 4 * tl.arange(0, block // 4)[:, None] + tl.arange(0, 4)[None, :]
    offsets = start + lanes
    inside = offsets < elements

    state = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    guided = tl.load(epsilon + offsets, mask=inside, other=0.0).to(tl.float32)
    if gradient is not None:
        guided -= tl.cast(step.guidance_weight, tl.float32) * tl.load(gradient + offsets, mask=inside, other=0.0).to(
            tl.float32
        )
    alpha = tl.cast(step.alpha, tl.float32)
    sigma = tl.cast(step.sigma, tl.float32)
    # A division, because 1 / alpha may overflow.
    clean = tl.div_rn(state - sigma * guided, tl.broadcast_to(alpha, state.shape))
    if step.clamp is not None:
        lowest, highest = tl.cast(step.clamp[0], tl.float32), tl.cast(step.clamp[1], tl.float32)
        # By comparisons, so that NaN stays NaN.
        limited = tl.where(clean < lowest, lowest, clean)
        limited = tl.where(limited > highest, highest, limited)
        # Recomputed only where the clamp acts: elsewhere the round trip through x0 would cost digits at small sigma.
        recomputed = tl.div_rn(state - alpha * limited, tl.broadcast_to(sigma, state.shape))
        guided = tl.where(limited == clean, guided, recomputed)
        clean = limited
    _store(x0, offsets, clean, inside)

    moments = ()
    for i in tl.static_range(len(step.matrix) - 1):
        if history is not None:
            slot = tl.load(history + (offsets + i * elements), mask=inside, other=0.0).to(tl.float32)
        else:
            slot = tl.zeros_like(state)
        moments = moments + (slot,)  # type: ignore[assignment]
    for i in tl.static_range(len(step.matrix) - 1):
        row = _row(step.matrix[1 + i], state, moments, guided)
        _store(history_next, offsets + i * elements, row, inside)

    row = _row(step.matrix[0], state, moments, guided)
    if normals > 0:
        k0 = key_low.to(tl.uint32, bitcast=True)
        k1 = key_high.to(tl.uint32, bitcast=True)
        c3 = evaluation.to(tl.uint32, bitcast=True)
        # The units that make their normals together: rows, pairs or elements of the tile.
        if normals == 4:
            units = tl.arange(0, block // 4)
        elif normals == 2:
            units = 2 * tl.arange(0, block // 4)[:, None] + tl.arange(0, 2)[None, :]
        else:
            units = lanes
        sample, position = locate(start // normals, units, sample_size // normals, long)
        if sample_index is not None:
            sample = tl.load(sample_index + sample, mask=normals * units < elements - start, other=0)
        if normals == 4:
            z0, z1, z2, z3 = normal_groups(position, sample, c3, k0, k1)
            # [rows, 2, 2], with z0, z1 first and z2, z3 then.
            z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (block // 4, 4))
        elif normals == 2:
            first, second = normal_pairs(position, sample, c3, k0, k1)
            z = tl.reshape(tl.join(first, second), (block // 4, 4))
        else:
            z = normal_elements(position, sample, c3, k0, k1)
        row += tl.cast(step.noise_scale, tl.float32) * z
    _store(x_next, offsets, row, inside)


def launch(
    outputs: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None,
    history: Tensor | None,
    sample_index: Tensor | None,
    step: Any,
    noise: tuple[int, int, int],
) -> None:
    """Fill outputs, x_next [B, ...], history_next [H, B, ...] and x0 [B, ...], from contiguous tensors.

    step: a ``tgdp_fast.ops.SolverStep``, its matrix a tuple of tuples; noise: the words of the key and the evaluation,
    in [0, 2^32).
    """
    elements = x.numel()
    if elements == 0:
        return
    sample_size = elements // len(x)
    normals = _normals(sample_size) if step.noise_scale != 0.0 else 0
    block = _block(normals)
    launching.launch(
        guided_step_kernel,
        (triton.cdiv(elements, block.elements),),
        *outputs,
        x,
        epsilon,
        gradient,
        history,
        sample_index if normals else None,
        elements,
        sample_size,
        step,
        *map(_signed, noise),
        tile=block,
        normals=normals,
        long=sample_size >= block.elements,
        block=block.elements,
    )


def _normals(sample_size: int) -> int:
    """The number of normals made together."""
    return 4 if sample_size % 4 == 0 else 2 if sample_size % 2 == 0 else 1


def _block(normals: int) -> Block:
    """Eight elements per thread, so that each has several loads in flight.

    Four if each element makes its own noise; otherwise registers would spill.
    """
    return Block(512 if normals == 1 else 1024, 4)


def _signed(word: int) -> int:
    """The same 32 bits: an argument of one type whatever its value."""
    return word - (1 << 32) if word >= 1 << 31 else word


#: As ``tgdp_fast.ops.SolverStep``, which this layer must not import.
_Step = namedtuple("_Step", "matrix noise_scale guidance_weight alpha sigma clamp")


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
    """A launch on tensors without data: x, epsilon and gradient of these dtypes, a batch of samples of a size."""

    def empty(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, epsilon, gradient = dtypes
    step = _Step(
        matrix=((0.5,) * (2 + slots),) * (1 + slots),
        noise_scale=0.5 if noise else 0.0,
        guidance_weight=0.5,
        alpha=0.5,
        sigma=0.5,
        clamp=(-1.0, 1.0) if clamp else None,
    )
    return partial(
        launch,
        (empty(x, *shape), empty(x, slots, *shape), empty(x, *shape)),
        empty(x, *shape),
        empty(epsilon, *shape),
        None if gradient is None else empty(gradient, *shape),
        empty(x, slots, *shape) if history and slots else None,
        empty(torch.int64, shape[0]) if sample_index else None,
        step,
        (0, 0, 0),
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
