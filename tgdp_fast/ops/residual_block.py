"""A residual block of the SSSD-ECG network in sampling, where everything but the signal was computed before.

With x the residual stream and skip the sum that the network's head reads, C and S channels of ``state``, and H = 2 C:

u = convolution [x at t - 1; x at t; x at t + 1] + step bias
u = LayerNorm(u + mixture gelu(filters * u) + mixture bias), for each of two S4 layers, the labels' bias added to the
    first
x, skip = [x / sqrt 2; skip] + output (tanh(u[:C]) sigmoid(u[C:])) + output bias
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tgdp_fast.ops import _cuda, _triton, registry
from tgdp_fast.ops.gated_activation import gated_activation_reference
from tgdp_fast.ops.long_convolution import (
    LONGEST,
    LongConvolution,
    long_convolution_reference,
    packed_for,
    unsupported_without_taps,
)
from tgdp_fast.runtime import fakes, native

__all__ = ["ResidualBlockWeights", "S4Weights", "residual_block_", "residual_block_reference_"]

_OPERATOR = "residual_block_"
_MATMUL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Residual channels that a GPU's program has registers for.
_MOST_GPU_CHANNELS = 512
#: Positions of such a program at most.
_POSITIONS = 64


class S4Weights(NamedTuple):
    """An S4 layer with its residual connection and LayerNorm.

    Attributes:
        filters: its long convolution, D included, for signals of at least L samples; on a GPU prepared for "triton".
        mixture: [H, H], in the dtype to which the factors of its matmul are rounded.
        mixture_bias, norm_weight, norm_bias: float32 [H].
        epsilon: of LayerNorm.
    """

    filters: LongConvolution
    mixture: Tensor
    mixture_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    epsilon: float


class ResidualBlockWeights(NamedTuple):
    """The parameters of a block. ``convolution``, ``output`` and both mixtures have one dtype: float32, bfloat16 or
    float16, to which the factors of their matmuls are rounded; sums are float32.

    Attributes:
        convolution: [H, 3 C], the columns of the tap that sees t - 1 first.
        first, second: the S4 layers.
        output: [C + S, C]. Its first C rows make the residual stream and hold the factor 1 / sqrt 2 already.
        output_bias: float32 [C + S], likewise.
    """

    convolution: Tensor
    first: S4Weights
    second: S4Weights
    output: Tensor
    output_bias: Tensor


def residual_block_(
    state: Tensor,
    step_bias: Tensor,
    label_bias: Tensor | None,
    weights: ResidualBlockWeights,
    *,
    backend: str = "auto",
) -> Tensor:
    """Replaces the residual stream and the skip sum by their values after the block. No gradients.

    The result of a sample does not depend on its batch or on the number of threads; on a GPU the last digits may depend
    on the batch. NaN stays in its sample.

    Cost for B samples: B L (6 H C + 4 H^2 + 2 (C + S) C) FLOPs of matmuls and two long convolutions; 8 B (C + S) L
    bytes of state and all weights once from memory, if the rest stays in a cache: 4 B H L bytes each for u
    and for gelu(filters * u), half of the latter in 16 bits. With C = S = 256 and L = 1000: 2.1 GFLOP for a sample.

    Args:
        state: float32 [B, C + S, L], contiguous: the residual stream, then the skip sum. Changed in place.
        step_bias: float32 [B or 1, 3, H]: the bias of diffusion step and convolution inside the signal, and the parts
            that the first and the last position lack, because a tap sees padding.
        label_bias: float32 [B or 1, H], added to the bias of the first LayerNorm; or None.
        weights: of the block.
        backend: "auto", "reference", or a faster implementation by name; "cpu" serves float32 and, if the CPU
            multiplies it, bfloat16, for an even C and L up to 1024; "triton" all of them for C up to 512 and L up to
            1024, with the CUDA long convolution if the filters are prepared for it.

    Returns:
        ``state``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        BackendUnavailableError: the requested backend cannot serve the call.

    Source: the residual block of Alcaraz & Strodthoff, "Diffusion-based Conditional ECG Generation with Structured
        State Space Models", 2023, arXiv 2301.08227.
    """
    _check(state, step_bias, label_bias, weights)
    implementation = registry.resolve(_OPERATOR, backend, state, step_bias, label_bias, weights)
    implementation.function(state, step_bias, label_bias, weights)
    return state


def residual_block_reference_(
    state: Tensor, step_bias: Tensor, label_bias: Tensor | None, weights: ResidualBlockWeights
) -> Tensor:
    """Plain PyTorch twin of :func:`residual_block_`, without checks; all in float64 if state and weights are."""
    channels = weights.output.shape[1]
    x = _factor(state[:, :channels], weights.convolution)
    taps = [functional.pad(x[..., :-1], (1, 0)), x, functional.pad(x[..., 1:], (0, 1))]
    inside, at_first, at_last = step_bias.unbind(1)
    u = _matmul(weights.convolution, torch.cat(taps, dim=1)).add_(inside[..., None])
    u[..., 0].sub_(at_first)
    u[..., -1].sub_(at_last)
    u = _s4(u, weights.first, label_bias)
    u = _s4(u, weights.second, None)
    gated = _factor(gated_activation_reference(u), weights.output)
    state[:, :channels].mul_(math.sqrt(0.5))
    return state.add_(_matmul(weights.output, gated)).add_(weights.output_bias[:, None])


def _s4(u: Tensor, layer: S4Weights, label_bias: Tensor | None) -> Tensor:
    y = _factor(long_convolution_reference(u, layer.filters), layer.mixture)
    u = u.add_(_matmul(layer.mixture, y)).add_(layer.mixture_bias[:, None])
    # Moments by var_mean would take ten times as long along this dimension.
    u.sub_(u.mean(1, keepdim=True))
    u.mul_(u.square().mean(1, keepdim=True).add_(layer.epsilon).rsqrt_())
    bias = layer.norm_bias if label_bias is None else layer.norm_bias + label_bias
    return u.mul_(layer.norm_weight[:, None]).add_(bias[..., None])


def _factor(values: Tensor, weight: Tensor) -> Tensor:
    """``values`` as a factor of a matmul with ``weight``."""
    if weight.dtype == torch.float16:  # They are unbounded; infinity would spread over the whole signal.
        values = values.clamp(-65504.0, 65504.0)
    return values if weight.dtype in (torch.float32, torch.float64) else values.to(weight.dtype)


def _matmul(weight: Tensor, values: Tensor) -> Tensor:
    """weight [M, K] times each of values [B, K, L]: sums in float32, or in float64 of float64 values."""
    if values.device.type != "cpu" and values.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(weight.expand(len(values), -1, -1), values, out_dtype=torch.float32)
    wide = torch.promote_types(values.dtype, torch.float32)
    return weight.to(wide) @ values.to(wide)


def _check(state: Tensor, step_bias: Tensor, label_bias: Tensor | None, weights: ResidualBlockWeights) -> None:
    if not isinstance(weights, ResidualBlockWeights):
        raise ValueError(f"weights must be ResidualBlockWeights, got {type(weights).__name__}")
    dtype = weights.output.dtype
    if dtype not in _MATMUL_DTYPES:
        raise ValueError(f"weights.output must be float32, bfloat16 or float16, got {dtype}; convert it with .to()")
    channels = weights.output.shape[-1]
    rows, double = weights.output.shape[0], 2 * channels
    if state.ndim != 3 or state.shape[1] != rows or state.shape[2] == 0 or not state.is_contiguous():
        raise ValueError(
            f"state must be contiguous, of shape [B, {rows}, L] for these weights, L at least 1, got shape "
            f"{tuple(state.shape)} and strides {state.stride()}"
        )
    expected = {"convolution": ((double, 3 * channels), dtype), "output_bias": ((rows,), torch.float32)}
    _check_fields("weights", weights, expected, state.device)
    vector = ((double,), torch.float32)
    for name, layer in (("first", weights.first), ("second", weights.second)):
        expected = {"mixture": ((double, double), dtype), "mixture_bias": vector, "norm_weight": vector}
        _check_fields(f"weights.{name}", layer, expected | {"norm_bias": vector}, state.device)
        filters = layer.filters
        if filters.channels != double or filters.length < state.shape[2]:
            raise ValueError(
                f"weights.{name}.filters must be for {double} channels and signals of {state.shape[2]} samples or "
                f"more, got {filters.channels} channels and length {filters.length}"
            )
    biases: list[tuple[str, Tensor, tuple[int, ...]]] = [("step_bias", step_bias, (3, double))]
    if label_bias is not None:
        biases.append(("label_bias", label_bias, (double,)))
    for name, bias, shape in biases:
        if bias.ndim != 1 + len(shape) or bias.shape[1:] != shape or len(bias) not in (1, len(state)):
            raise ValueError(
                f"{name} must have shape [{len(state)} or 1, {', '.join(map(str, shape))}], got {tuple(bias.shape)}"
            )
    for name, tensor in (("state", state), *((name, bias) for name, bias, _ in biases)):
        if tensor.dtype != torch.float32 or tensor.device != state.device:
            raise ValueError(
                f"{name} must be float32 on {state.device}, got {tensor.dtype} on {tensor.device}; use .to()"
            )


def _check_fields(
    name: str,
    fields: ResidualBlockWeights | S4Weights,
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]],
    device: torch.device,
) -> None:
    for field, (shape, dtype) in expected.items():
        tensor = getattr(fields, field)
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name}.{field} must be {dtype} of shape {shape} on {device}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )


def _unsupported_by_reference(
    state: Tensor, step_bias: Tensor, label_bias: Tensor | None, weights: ResidualBlockWeights
) -> str | None:
    for layer in (weights.first, weights.second):
        reason = unsupported_without_taps(state, layer.filters.taps)
        if reason is not None:
            return reason
    return None


def without_unread_taps(weights: ResidualBlockWeights) -> ResidualBlockWeights:
    """The weights without the taps of their filters, if a kernel would serve a call that names no backend.

    Raises:
        BackendUnavailableError: the backend set around this call cannot serve it.
    """
    state = weights.output_bias.new_empty(1, len(weights.output_bias), 1)
    step_bias = state.new_empty(1, 3, len(weights.first.norm_bias))
    if registry.resolve(_OPERATOR, "auto", state, step_bias, None, weights).backend == "reference":
        return weights
    first, second = (layer._replace(filters=layer.filters.without_taps()) for layer in (weights.first, weights.second))
    return weights._replace(first=first, second=second)


def samples_together(device: torch.device, channels: int, length: int) -> int | None:
    """The best number of samples for one call of the kernels of a GPU, or None if they do not serve it.

    Full rounds of LayerNorm's programs, one per multiprocessor; as many rounds as the level-2 cache holds inputs and
    outputs of a layer, 8 bytes for each of 2 C L numbers.
    """
    if _triton.MISSING is not None or device.type != "cuda" or channels > _MOST_GPU_CHANNELS or length > LONGEST:
        return None
    properties = torch.cuda.get_device_properties(device)
    return _whole_rounds(properties.multi_processor_count, properties.L2_cache_size, channels, length)


def _whole_rounds(multiprocessors: int, cache: int, channels: int, length: int) -> int:
    round_of = max(multiprocessors // math.ceil(length / _POSITIONS), 1)
    return round_of * max(cache // (16 * channels * length * round_of), 1)


def multiplies_bf16() -> bool:
    """Whether the CPU kernel is installed and the CPU multiplies bfloat16."""
    return native.CPU_MISSING is None and bool(torch.ops.tgdp_fast.has_bf16_matmuls())


def _unsupported_by_cpu(
    state: Tensor, step_bias: Tensor, label_bias: Tensor | None, weights: ResidualBlockWeights
) -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "it works under no transform of torch.func"
    dtype = weights.output.dtype
    if dtype == torch.float16:
        return "it multiplies float32 and bfloat16, not float16"
    if dtype == torch.bfloat16 and not multiplies_bf16():
        return "this processor does not multiply bfloat16"
    if dtype == torch.bfloat16 and weights.output.shape[1] % 2:
        return f"in bfloat16 it serves an even number of channels, not {weights.output.shape[1]}"
    return _unsupported_filters(weights, "cpu")


def _unsupported_by_triton(
    state: Tensor, step_bias: Tensor, label_bias: Tensor | None, weights: ResidualBlockWeights
) -> str | None:
    reason = _triton.unsupported_device(state)
    if reason is not None:
        return reason
    if torch._C._are_functorch_transforms_active():
        return "it works under no transform of torch.func"
    if weights.output.shape[1] > _MOST_GPU_CHANNELS:
        return f"it serves up to {_MOST_GPU_CHANNELS} residual channels, not {weights.output.shape[1]}"
    dtype = weights.output.dtype
    for layer in (weights.first, weights.second):
        packed = layer.filters.packed
        if packed is None:
            continue
        if dtype == torch.float32 and packed.dtype != torch.float32:
            return "the filters were prepared for 16 bits; use prepare_long_convolution(taps, torch.float32)"
        if packed_for(packed) == "cuda":
            if dtype != torch.float32 and packed.dtype == torch.float32:
                return f"the filters were prepared for float32; use prepare_long_convolution(taps, {dtype})"
            reason = native.CUDA_MISSING or _cuda.unsupported_device(state)
            if reason is not None:
                return f"the filters were prepared for CUDA: {reason}"
    return _unsupported_filters(weights, "triton", "cuda")


def _unsupported_filters(weights: ResidualBlockWeights, *backends: str) -> str | None:
    for layer in (weights.first, weights.second):
        packed = layer.filters.packed
        if packed is None or packed_for(packed) not in backends:
            device = "the CPU" if backends == ("cpu",) else "Triton or CUDA"
            return f"it serves filters of up to {LONGEST} samples that prepare_long_convolution prepared for {device}"
    return None


def _call_cpu(state: Tensor, step_bias: Tensor, label_bias: Tensor | None, weights: ResidualBlockWeights) -> None:
    torch.ops.tgdp_fast.residual_block_(*_flat(state, step_bias, label_bias, weights))


def _call_triton(state: Tensor, step_bias: Tensor, label_bias: Tensor | None, weights: ResidualBlockWeights) -> None:
    torch.ops.tgdp_fast.residual_block_triton_(*_flat(state, step_bias, label_bias, weights))


def _with_whole_rows(bias: Tensor) -> Tensor:
    """``bias`` with contiguous rows; rows may lie apart."""
    return bias if bias.shape[0] > 0 and bias[0].is_contiguous() else bias.contiguous()


def _flat(
    state: Tensor, step_bias: Tensor, label_bias: Tensor | None, weights: ResidualBlockWeights
) -> tuple[Any, ...]:
    """The call as the arguments of a PyTorch operator: without the taps, and with contiguous weights."""
    first, second = weights.first, weights.second
    layers = [
        [tensor.contiguous() for tensor in (*layer.filters[1:], *layer[1:5]) if tensor is not None]
        for layer in (first, second)
    ]
    return (
        state,
        _with_whole_rows(step_bias),
        None if label_bias is None else _with_whole_rows(label_bias),
        weights.convolution.contiguous(),
        layers[0],
        first.epsilon,
        layers[1],
        second.epsilon,
        weights.output.contiguous(),
        weights.output_bias.contiguous(),
    )


def _launch_triton(
    state: Tensor,
    step_bias: Tensor,
    label_bias: Tensor | None,
    convolution: Tensor,
    first: list[Tensor],
    first_epsilon: float,
    second: list[Tensor],
    second_epsilon: float,
    output: Tensor,
    output_bias: Tensor,
) -> None:
    from tgdp_fast.kernels.residual_block import Block, Layer, launch

    def layer(tensors: list[Tensor], epsilon: float) -> Layer:
        packed, scales, mixture, mixture_bias, norm_weight, norm_bias = tensors
        return Layer(packed, scales, mixture, mixture_bias, norm_weight, norm_bias, epsilon)

    layers = layer(first, first_epsilon), layer(second, second_epsilon)
    weights = Block(convolution, *layers, output, output_bias)
    with torch.cuda.device_of(state):
        launch(state, step_bias, label_bias, weights)


_triton.define(
    "residual_block_triton_",
    "(Tensor(a!) state, Tensor step_bias, Tensor? label_bias, Tensor convolution, Tensor[] first, float first_epsilon, "
    "Tensor[] second, float second_epsilon, Tensor output, Tensor output_bias) -> ()",
    _launch_triton,
    fakes.nothing,
)

registry.register(_OPERATOR, "cpu", _call_cpu, _unsupported_by_cpu, missing=native.CPU_MISSING)
registry.register(_OPERATOR, "triton", _call_triton, _unsupported_by_triton, missing=_triton.MISSING)
registry.register(_OPERATOR, "reference", residual_block_reference_, _unsupported_by_reference)
