"""A residual block of SSSD-ECG in sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tgdp_fast.lab.accuracy import error_of
from tgdp_fast.lab.cases.case import SEED, Call, Case, Check, Draw, Setup, UnservedError, bytes_of, largest_error
from tgdp_fast.ops import LongConvolution, ResidualBlockWeights, S4Weights, prepare_long_convolution, residual_block_
from tgdp_fast.ops.residual_block import residual_block_reference_
from tgdp_fast.runtime.precision import PRECISIONS

#: Residual and skip channels, and positions, of a timed sample; blocks one after another as in a network, with more
#: weights than caches hold.
CHANNELS, LENGTH, BLOCKS = 256, 1000, 3

#: For validate: B, C, S, L; rows of the biases of labels and of steps.
SHAPES = (
    ((0, 2, 2, 5), "per sample", "shared"),
    ((3, 2, 4, 1), "per sample", "per sample"),
    ((2, 3, 1, 2), "none", "shared"),
    ((1, 16, 16, 63), "shared", "shared"),
    ((3, 10, 0, 65), "per sample", "per sample"),
    ((2, 34, 20, 129), "per sample", "per sample"),
    ((1, 64, 64, 1000), "per sample", "shared"),
)


class ResidualBlockInputs(NamedTuple):
    """Arguments of ``residual_block_``."""

    state: Tensor
    step_bias: Tensor
    label_bias: Tensor | None
    weights: ResidualBlockWeights

    @property
    def others(self) -> tuple[Tensor, Tensor | None, ResidualBlockWeights]:
        """All but the state."""
        return self.step_bias, self.label_bias, self.weights

    def double(self) -> ResidualBlockInputs:
        """The same numbers in float64, for the reference alone."""
        state, step_bias, label_bias, (convolution, first, second, output, output_bias) = self
        weights = convolution.double(), _double(first), _double(second), output.double(), output_bias.double()
        labels = None if label_bias is None else label_bias.double()
        return ResidualBlockInputs(state.double(), step_bias.double(), labels, ResidualBlockWeights(*weights))


def _double(layer: S4Weights) -> S4Weights:
    filters = LongConvolution(layer.filters.taps.double(), None, None)
    mixture, mixture_bias, norm_weight, norm_bias = (tensor.double() for tensor in layer[1:5])
    return S4Weights(filters, mixture, mixture_bias, norm_weight, norm_bias, layer.epsilon)


def residual_block_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    labels: str = "per sample",
    steps: str = "shared",
    seed: int = 0,
) -> ResidualBlockInputs:
    """A block whose layers all have outputs of order one.

    Args:
        shape: samples B, residual channels C, skip channels S and positions L.
        dtype: of the weights of matmuls.
        device: of all tensors.
        labels, steps: "shared" for biases with one row, "per sample" for B rows; labels: "none" for no bias.
        seed: of the random numbers.
    """
    batch, channels, skip, length = shape
    draw = Draw(torch.float32, device, seed)

    def layer() -> S4Weights:
        width = 2 * channels
        taps = draw(width, 2 * length - 1, scale=length**-0.5)
        return S4Weights(
            prepare_long_convolution(taps, dtype),
            draw(width, width, scale=width**-0.5, dtype=dtype),
            draw(width, scale=0.3),
            1 + draw(width, scale=0.2),
            draw(width, scale=0.3),
            1e-5,
        )

    weights = ResidualBlockWeights(
        draw(2 * channels, 3 * channels, scale=(3 * channels) ** -0.5, dtype=dtype),
        layer(),
        layer(),
        draw(channels + skip, channels, scale=channels**-0.5, dtype=dtype),
        draw(channels + skip, scale=0.3),
    )
    rows = {"shared": 1, "per sample": batch}
    return ResidualBlockInputs(
        draw(batch, channels + skip, length),
        draw(rows[steps], 3, 2 * channels, scale=0.5),
        None if labels == "none" else draw(rows[labels], 2 * channels, scale=0.5),
        weights,
    )


def check(draw: Draw, shape: tuple[int, int, int, int], labels: str, steps: str) -> Check:
    """The operator on an entry of :data:`SHAPES`: the state, float32 whatever the weights, rounded to the dtype."""
    dtype = draw.dtype
    inputs = residual_block_inputs(shape, dtype, draw.device, labels=labels, steps=steps, seed=draw.seed)
    return Check(
        f"B, C, S, L = {shape}, labels {labels}, steps {steps}",
        lambda backend: [residual_block_(inputs.state.clone(), *inputs.others, backend=backend).to(dtype)],
        [residual_block_reference_(*inputs.double())],
        [residual_block_reference_(inputs.state.clone(), *inputs.others).to(dtype)],
    )


def case(batch: int, *, quick: bool = False) -> Case:
    """Blocks one after another on a state [batch, 2 CHANNELS, LENGTH]. Work: matmuls, and weights, spectra and state
    once.
    """
    weights, spectra = 16.0 * CHANNELS**2, 2.0 * 2 * CHANNELS * 1024 * 2
    state = 4.0 * 2 * batch * 2 * CHANNELS * LENGTH
    flops = BLOCKS * 2.0 * batch * LENGTH * weights
    return Case(
        f"residual_block/{batch}",
        f"[{batch}, {2 * CHANNELS}, {LENGTH}]",
        ("fp32", "bf16"),
        40.0 * CHANNELS * LENGTH * (4 * batch + 8 * BLOCKS),
        lambda precision: (BLOCKS * (bytes_of(precision) * (weights + spectra) + state), flops, precision),
        partial(_setup, batch),
        ("residual_block_",),
        quick=quick,
    )


def _setup(batch: int, precision: str, device: torch.device) -> Setup:
    dtype, shape = PRECISIONS[precision], (batch, CHANNELS, CHANNELS, LENGTH)
    blocks = [residual_block_inputs(shape, dtype, device, seed=SEED + k) for k in range(BLOCKS)]
    initial = blocks[0].state

    def call(provider: str) -> Call:
        if provider == "peer":
            raise UnservedError("sssd_ecg times other people's blocks")
        block: Callable[..., Tensor] = partial(residual_block_, backend=provider)
        if provider == "compile":
            block = torch.compile(residual_block_reference_, dynamic=False)
        state = torch.empty_like(initial)

        def run() -> Sequence[Tensor]:
            state.copy_(initial)
            for inputs in blocks:
                block(state, *inputs.others)
            return [state]

        return run

    def check(provider: str, call: Call) -> float:
        exact, plain = initial.double(), initial.clone()
        for inputs in blocks:
            residual_block_reference_(exact, *inputs.double().others)
            residual_block_reference_(plain, *inputs.others)
        return largest_error(provider, call(), [exact], error_of([plain], [exact]), dtype)

    return Setup(call, check)
