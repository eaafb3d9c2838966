"""One guided solver step: guidance, optional clamp, solver matrix and noise in one operator.

    eps'   = epsilon - guidance_weight * gradient
    x0     = (x - sigma eps') / alpha           with clamp: x0 limited to [lo, hi], and eps' recomputed from it
    [x, m] = A [x, m, eps'] + [d z, 0]          z = normal(seed, sample_index, element, evaluation)

The guidance is the noise-prediction form of Theorem 3.1 of TGDP (Ouyang et al., NeurIPS 2024, arXiv 2405.16876), with
guidance_weight = scale * sigma and gradient = grad_x log h(x, t).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tgdp_fast.ops import _cuda, _triton, measured, noise, registry
from tgdp_fast.runtime import fakes, native
from tgdp_fast.runtime.checks import check_number

__all__ = ["GuidedStepOutput", "SolverStep", "guided_step", "guided_step_reference"]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SolverStep(NamedTuple):
    """The numbers of one model evaluation of a linear solver with H history slots, on the host.

    Attributes:
        matrix: (1 + H) x (2 + H) floats A; columns [x, m_1..m_H, eps'], rows [x, m_1..m_H]. Nested sequences or a numpy
            array.
        noise_scale: factor d of the noise.
        guidance_weight: factor of the gradient; scale * sigma for exact guidance at scale 1.
        alpha: signal coefficient at the time of this evaluation, > 0.
        sigma: noise coefficient at the time of this evaluation, >= 0.
        clamp: (lo, hi) limits of x0, or None. If x0 lies within them, eps' does not change by a bit.
    """

    matrix: Sequence[Sequence[float]] | np.ndarray
    noise_scale: float = 0.0
    guidance_weight: float = 0.0
    alpha: float = 1.0
    sigma: float = 0.0
    clamp: tuple[float, float] | None = None


class GuidedStepOutput(NamedTuple):
    """What a step returns: next state, next history (None without history slots), predicted x_0."""

    x_next: Tensor
    history_next: Tensor | None
    x0: Tensor


def guided_step(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None = None,
    history: Tensor | None = None,
    *,
    step: SolverStep,
    seed: int = 0,
    sample_index: Tensor | None = None,
    evaluation: int = 0,
    backend: str = "auto",
) -> GuidedStepOutput:
    """Advance the state by one model evaluation of a linear solver, with guidance and noise.

    A sampling operator: its outputs never carry an autograd graph. Works under inference_mode and under
    ``torch.compile(fullgraph=True)`` (there, give the matrix as nested tuples, not as a numpy array, and note that the
    ranges of the coefficients are not checked). Reads no tensor value on the host.

    Precision: arithmetic in float32 whatever the dtypes of the tensors, in float64 if x is float64; outputs have the
    dtype of x. Coefficients are rounded once to that precision. A coefficient that is exactly zero may or may not be
    multiplied, so a non-finite input behind a zero coefficient may or may not show.

    Cost for N = B * prod(shape) elements, H history slots, b bytes per element of x, e and g bytes per element of
    epsilon and gradient: N (b (3 + 2 H) + e + g) bytes of memory traffic when each input is read once and each output
    written once (the reference makes one pass per operation), and about N (5 + (1 + H) (3 + 2 H)) FLOPs, plus 2 N for
    the noise and its generation (per four elements, about 100 integer operations, 2 logarithms, 2 sines and 2 cosines).

    Args:
        x: [B, ...] state x_t, floating point.
        epsilon: shape of x, predicted noise; any floating dtype.
        gradient: shape of x, grad_x log h; any floating dtype; may be None when guidance_weight is 0 (and is not read
            then).
        history: [H, *x.shape], the solver's history slots; None stands for zeros, as at the start of a trajectory.
        step: the solver's numbers.
        seed: integer in [0, 2^64).
        sample_index: [B] int64 on the device of x, global index of each sample; default 0..B-1.
        evaluation: evaluation index of the noise function, in [0, 2^32). The sampling loop passes k + 1 for the 0-based
            evaluation k, because the initial draw has index 0.
        backend: "auto", "reference", or a faster implementation by name; "cpu" and "triton" serve float32, bfloat16
            and float16 (a float64 epsilon, gradient or history is converted first), "triton" up to two history slots.

    Returns:
        x_next [B, ...], history_next [H, B, ...] (None when H = 0) and x0 [B, ...], all contiguous, new, of the dtype
        of x. x0 is the clean sample predicted from the guided (and clamped) noise prediction.

    Raises:
        ValueError: shapes, dtypes, devices or ranges do not fit; a guidance weight without a gradient; a clamp at sigma
            = 0, where x0 does not depend on eps' and so no eps' can express the clamp.
        BackendUnavailableError: the requested backend cannot serve the call.

    Source: TGDP Theorem 3.1 in noise-prediction form, and the solver written as a matrix.
    """
    step = _checked(step, gradient is not None)
    _check_tensors(x, epsilon, gradient, history, sample_index, len(step.matrix) - 1)
    if step.guidance_weight == 0.0:
        gradient = None
    with torch.no_grad():
        implementation = registry.resolve("guided_step", backend, x, epsilon, gradient, history, step)
        return GuidedStepOutput(
            *implementation.function(
                x, epsilon, gradient, history, step, seed=seed, sample_index=sample_index, evaluation=evaluation
            )
        )


def guided_epsilon(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None,
    guidance_weight: float,
    alpha: float,
    sigma: float,
    clamp: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Guided, clamped epsilon and the clean sample it predicts: the first half of :func:`guided_step`.

    epsilon' = epsilon - guidance_weight * gradient;  x0 = (x - sigma epsilon') / alpha, clamped.

    Shapes: x, epsilon, gradient [B, ...] -> (epsilon' [B, ...], x0 [B, ...]).
    """
    guided = epsilon
    if gradient is not None and guidance_weight != 0.0:
        guided = guided - guidance_weight * gradient
    x0 = (x - sigma * guided) / alpha
    if clamp is None:
        return guided, x0
    limited = x0.clamp(*clamp)
    # Recomputed only where the clamp acts: elsewhere the round trip through x0 would cost digits at small sigma.
    return torch.where(limited == x0, guided, (x - alpha * limited) / sigma), limited


def limit_gradient(gradient: Tensor, weight: float, limit: float) -> Tensor:
    """Shorten each sample's gradient [B, ...] to an L2 norm of at most ``limit`` for ``weight`` times it."""
    length = abs(weight) * gradient.flatten(1).norm(dim=1)
    factor = (limit / length.clamp_min(1e-30)).clamp_max(1.0)
    return gradient * factor.reshape(-1, *[1] * (gradient.ndim - 1))


def guided_step_reference(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None,
    history: Tensor | None,
    step: SolverStep,
    *,
    seed: int = 0,
    sample_index: Tensor | None = None,
    evaluation: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Plain PyTorch twin of :func:`guided_step`: the same arguments, without checks and without backend."""
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = x.to(precision)
    gradient = None if gradient is None else gradient.to(precision)
    guided, x0 = guided_epsilon(
        state, epsilon.to(precision), gradient, step.guidance_weight, step.alpha, step.sigma, step.clamp
    )

    slots = len(step.matrix) - 1
    inputs = [state, *([None] * slots if history is None else history.to(precision).unbind(0)), guided]
    rows = []
    for coefficients in step.matrix:
        row = torch.zeros_like(state)
        for coefficient, value in zip(coefficients, inputs, strict=True):
            if coefficient != 0.0 and value is not None:
                row = row + coefficient * value
        rows.append(row)
    if step.noise_scale != 0.0:
        if sample_index is None:
            sample_index = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
        z = noise.normal(seed, sample_index, x[:1].numel() if x.shape[0] else 0, evaluation, device=x.device)
        rows[0] = rows[0] + step.noise_scale * z.to(precision).view(x.shape)

    history_next = torch.stack(rows[1:]).to(x.dtype) if slots else None
    return rows[0].to(x.dtype).contiguous(), history_next, x0.to(x.dtype).contiguous()


def _number(name: str, value: float, minimum: float = -math.inf) -> float:
    # A float that changes between calls is symbolic while compiling, and a symbol has no finiteness to test.
    if torch.compiler.is_compiling() or (type(value) is float and minimum <= value and math.isfinite(value)):
        return value
    return check_number(name, value, minimum)


def _checked(step: SolverStep, guided: bool) -> SolverStep:
    """The step with its matrix as tuples of floats; ``guided``: whether there is a gradient."""
    rows = _check_matrix(step.matrix)
    noise_scale = _number("noise_scale", step.noise_scale)
    guidance_weight = _number("guidance_weight", step.guidance_weight)
    alpha = _number("alpha", step.alpha, 0.0)
    sigma = _number("sigma", step.sigma, 0.0)
    if alpha == 0.0:
        raise ValueError("alpha must be > 0, got 0.0; without signal no clean sample can be predicted")
    if guidance_weight != 0.0 and not guided:
        raise ValueError(f"gradient must be given when guidance_weight is not 0, got None with {guidance_weight}")
    clamp = step.clamp
    if clamp is not None:
        if len(clamp) != 2:
            raise ValueError(f"clamp must be (lo, hi) or None, got {clamp!r}")
        clamp = (_number("clamp[0]", clamp[0]), _number("clamp[1]", clamp[1]))
        if clamp[0] > clamp[1]:
            raise ValueError(f"clamp must have lo <= hi, got {clamp}; swap the two")
        if sigma == 0.0:
            raise ValueError(
                "clamp needs sigma > 0, got 0.0: there x0 = x / alpha whatever epsilon is, and the step "
                "cannot be limited through epsilon; pass clamp=None and clamp the result yourself"
            )
    return SolverStep(rows, noise_scale, guidance_weight, alpha, sigma, clamp)


def _check_matrix(matrix: object) -> tuple[tuple[float, ...], ...]:
    if isinstance(matrix, Tensor):
        raise ValueError("matrix must be nested floats or a numpy array, got a tensor; pass matrix.tolist()")
    # Host floats, so that no step waits for a device.
    nested: object = matrix.tolist() if isinstance(matrix, np.ndarray) else matrix
    if not isinstance(nested, Sequence) or not all(isinstance(row, Sequence) for row in nested):
        raise ValueError(f"matrix must be 2-D of shape (1 + H, 2 + H), got {matrix!r}")
    lengths = [len(row) for row in nested]
    if not lengths or any(length != len(nested) + 1 for length in lengths):
        raise ValueError(
            f"matrix must have shape (1 + H, 2 + H) for H history slots, got {len(lengths)} rows of lengths {lengths}"
        )
    rows = tuple(map(tuple, nested))
    if not torch.compiler.is_compiling():
        for value in itertools.chain.from_iterable(rows):
            if type(value) is not float or not math.isfinite(value):
                return tuple(tuple(check_number("matrix entries", value) for value in row) for row in rows)
    return rows


def _check_tensors(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None,
    history: Tensor | None,
    sample_index: Tensor | None,
    slots: int,
) -> None:
    if x.ndim < 1:
        raise ValueError("x must have shape [B, ...], got a 0-D tensor; add a batch dimension")
    expected = {"x": x.shape, "epsilon": x.shape, "gradient": x.shape, "history": (slots, *x.shape)}
    tensors = {"x": x, "epsilon": epsilon, "gradient": gradient, "history": history}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATING:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{name} must have shape {tuple(expected[name])} (x is {tuple(x.shape)} and the matrix has "
                f"{slots} history slots), got {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}; move it with .to()")
    if sample_index is None:
        return
    if sample_index.dtype != torch.int64 or sample_index.shape != x.shape[:1]:
        raise ValueError(
            f"sample_index must be int64 of shape [{x.shape[0]}], got {sample_index.dtype} of shape "
            f"{tuple(sample_index.shape)}"
        )
    if sample_index.device != x.device:
        raise ValueError(f"sample_index must be on the device of x, {x.device}, got {sample_index.device}")


def _call_native(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None,
    history: Tensor | None,
    step: SolverStep,
    *,
    seed: int,
    sample_index: Tensor | None,
    evaluation: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The step by the operator of the CPU and CUDA extensions."""
    matrix, noise_scale, *others = step
    entries = [entry for row in matrix for entry in row]
    words = (0, 0, 0) if noise_scale == 0.0 else noise.key_words(seed, evaluation)
    x_next, history_next, x0 = torch.ops.tgdp_fast.guided_step(
        x, epsilon, gradient, history, entries, noise_scale, *others, *words[:2], sample_index, words[2]
    )
    return x_next, history_next if len(matrix) > 1 else None, x0


def _call_triton(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None,
    history: Tensor | None,
    step: SolverStep,
    *,
    seed: int,
    sample_index: Tensor | None,
    evaluation: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The step by Triton's operator, with all numbers of the step in one list, the matrix last."""
    matrix, *scalars, clamp = step
    words = (0, 0, 0) if step.noise_scale == 0.0 else noise.key_words(seed, evaluation)
    numbers = [*scalars, *itertools.chain.from_iterable(matrix)]
    x_next, history_next, x0 = torch.ops.tgdp_fast.guided_step_triton(
        x, epsilon, gradient, history, sample_index, numbers, clamp, words
    )
    return x_next, history_next if len(matrix) > 1 else None, x0


def _fake_triton(
    x: Tensor, epsilon: Tensor, gradient: Any, history: Any, sample_index: Any, numbers: list[float], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fakes.step_outputs(x, fakes.history_slots(len(numbers) - _SCALARS))


#: Numbers of a step before its matrix: noise_scale, guidance_weight, alpha, sigma.
_SCALARS = 4
_MOST_TRITON_SLOTS = 2


def _launch_triton(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None,
    history: Tensor | None,
    sample_index: Tensor | None,
    numbers: list[float],
    clamp: list[float] | None,
    words: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    from tgdp_fast.kernels.guided_step import launch

    scalars, entries = numbers[:_SCALARS], numbers[_SCALARS:]
    slots = fakes.history_slots(len(entries))
    rows = tuple(tuple(entries[i : i + 2 + slots]) for i in range(0, len(entries), 2 + slots))
    noise_scale, guidance_weight, alpha, sigma = scalars
    limits = None if clamp is None else (clamp[0], clamp[1])
    step = SolverStep(rows, noise_scale, guidance_weight, alpha, sigma, limits)
    if step.noise_scale != 0.0 and x.numel() > (4 << 32) * x.shape[0]:
        raise ValueError(
            "samples with noise must have at most 2^34 elements (a 32-bit counter numbers groups of four), got "
            f"x of shape {tuple(x.shape)}"
        )
    outputs = fakes.step_outputs(x, slots)
    readable, (low, high, evaluation) = _triton.readable, words
    tensors = readable(x), readable(epsilon), readable(gradient), readable(history), readable(sample_index)
    with torch.cuda.device_of(x):
        launch(outputs, *tensors, step, (low, high, evaluation))
    return outputs


def _unsupported_by_triton(x: Tensor, epsilon: Tensor, gradient: Any, history: Any, step: SolverStep) -> str | None:
    slots = len(step.matrix) - 1
    if slots > _MOST_TRITON_SLOTS:
        return f"it serves at most {_MOST_TRITON_SLOTS} history slots, not {slots}"
    return _triton.unsupported_device(x) or registry.unsupported_float64(x)


def _unsupported_by_cuda(x: Tensor, epsilon: Tensor, gradient: Any, history: Any, step: SolverStep) -> str | None:
    if len(step.matrix) > 17:
        return "it serves at most 16 history slots"
    return registry.unsupported_float64(x) or _cuda.unsupported_device(x)


_triton.define(
    "guided_step_triton",
    "(Tensor x, Tensor epsilon, Tensor? gradient, Tensor? history, Tensor? sample_index, float[] numbers, "
    "float[]? clamp, SymInt[] words) -> (Tensor, Tensor, Tensor)",
    _launch_triton,
    _fake_triton,
)

registry.register("guided_step", "cpu", _call_native, registry.unsupported_float64, missing=native.CPU_MISSING)
registry.register("guided_step", "triton", _call_triton, _unsupported_by_triton, missing=_triton.MISSING)
# The same operator on tensors of another device.
registry.register(
    "guided_step",
    "cuda",
    _call_native,
    _unsupported_by_cuda,
    prefer=measured.preferred_to_cuda_step,
    missing=native.CUDA_MISSING,
)
registry.register("guided_step", "reference", guided_step_reference)
