"""Every operator, backend and precision on awkward shapes, against float64 and beside eager PyTorch's own error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tgdp_fast.benchmark import eager
from tgdp_fast.benchmark.accuracy import PRECISIONS, Error, error_of, within
from tgdp_fast.benchmark.problems import (
    PerceptronInputs,
    ResidualBlockInputs,
    StepInputs,
    perceptron_inputs,
    residual_block_inputs,
    step_inputs,
    trajectory_inputs,
)
from tgdp_fast.experiments.results import markdown_table
from tgdp_fast.ops import (
    BackendUnavailableError,
    SolverStep,
    TrajectoryNetwork,
    gated_activation,
    guided_step,
    long_convolution,
    mlp_forward,
    mlp_value_and_grad,
    prepare_long_convolution,
    registry,
    residual_block_,
    trajectory,
)
from tgdp_fast.ops.noise import normal
from tgdp_fast.ops.residual_block import residual_block_reference_
from tgdp_fast.ops.trajectory import trajectory_reference
from tgdp_fast.runtime.checks import check_choice

Row = dict[str, Any]

KEYS = (
    "operator", "backend", "dtype", "shape", "max_error", "mean_error", "eager_max_error", "eager_mean_error", "verdict"
)  # fmt: skip

_SEED = 11


@dataclass(frozen=True)
class _PerceptronShape:
    """Batch, inputs and widths, and how the tensors lie in memory."""

    batch: int
    inputs: int
    widths: tuple[int, ...]
    bias_rows: str = "shared"
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"[{self.batch}, {self.inputs}] {'x'.join(map(str, self.widths))}, {self.bias_rows} bias, {self.layout}"


PERCEPTRONS = (
    _PerceptronShape(0, 3, (16, 16)),
    _PerceptronShape(1, 2, (128,) * 4),
    _PerceptronShape(1, 1, (1,)),
    _PerceptronShape(37, 2, (33,)),
    _PerceptronShape(129, 1, (17, 31)),
    _PerceptronShape(65, 5, (48, 20, 7), "per sample"),
    _PerceptronShape(1, 7, (40, 24), "per sample"),
    _PerceptronShape(33, 64, (130, 127, 129), layout="strided"),
    _PerceptronShape(64, 17, (64, 64), "per sample", "strided"),
    _PerceptronShape(31, 10, (50, 50), layout="misaligned"),
    _PerceptronShape(77, 2, (512,) * 4),
    _PerceptronShape(5, 3904, (96, 64), "per sample"),
)


@dataclass(frozen=True)
class _StepShape:
    """Shape of x, history slots, and what the step does besides."""

    shape: tuple[int, ...]
    slots: int
    noise: bool = False
    clamp: bool = False
    layout: str = "contiguous"

    def __str__(self) -> str:
        parts = [f"{list(self.shape)}", f"{self.slots} slots", *["noise"] * self.noise, *["clamp"] * self.clamp]
        return ", ".join([*parts, self.layout])


STEPS = (
    _StepShape((0, 3), 1),
    _StepShape((1, 1), 0),
    _StepShape((1, 2), 2, noise=True),
    _StepShape((5,), 1, noise=True, clamp=True),
    _StepShape((7, 3), 0, noise=True),
    _StepShape((33, 5), 1, clamp=True),
    _StepShape((6, 2, 7), 2, noise=True, layout="strided"),
    _StepShape((9, 13), 1, noise=True, layout="misaligned"),
    _StepShape((3, 8, 1000), 2, noise=True, clamp=True),
    _StepShape((4099, 2), 1),
)


def place(tensor: Tensor, layout: str) -> Tensor:
    """The same values: "contiguous", "strided" (every second entry of a larger transposed buffer, the rest NaN) or
    "misaligned" (one entry past the start of a buffer).
    """
    if layout == "strided":
        buffer = tensor.new_full([2 * size for size in reversed(tensor.shape)], math.nan)
        view = buffer[tuple(slice(1, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.ndim)))
        return view.copy_(tensor)
    if layout == "misaligned":
        return tensor.new_full((tensor.numel() + 1,), math.nan)[1:].view(tensor.shape).copy_(tensor)
    return tensor.contiguous()


#: What a check yields: shape, outputs by backend name, exact outputs, eager's outputs.
_Check = tuple[str, Callable[[str], Sequence[Tensor]], Sequence[Tensor], Sequence[Tensor]]


def _perceptrons(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[_PerceptronShape, PerceptronInputs]]:
    for shape in PERCEPTRONS:
        inputs = perceptron_inputs(
            shape.batch, shape.inputs, shape.widths, dtype, device, bias_rows=shape.bias_rows, seed=_SEED
        )
        yield shape, inputs


def _forward(dtype: torch.dtype, device: torch.device) -> Iterator[_Check]:
    for shape, inputs in _perceptrons(dtype, device):
        placed = inputs.map(partial(place, layout=shape.layout))

        def outputs(backend: str, placed: PerceptronInputs = placed) -> Sequence[Tensor]:
            with torch.no_grad():
                return mlp_value_and_grad(*placed, backend=backend)

        yield str(shape), outputs, eager.value_and_grad(*inputs.to(torch.float64)), eager.value_and_grad(*inputs)


def _backward(dtype: torch.dtype, device: torch.device) -> Iterator[_Check]:
    for shape, inputs in _perceptrons(dtype, device):
        generator = torch.Generator().manual_seed(_SEED)
        scale = max(shape.batch, 1) ** -0.5
        fb, gb = (
            (scale * torch.randn(size, generator=generator)).to(device, dtype)
            for size in ((shape.batch,), (shape.batch, shape.inputs))
        )
        placed = inputs.map(partial(place, layout=shape.layout))

        def outputs(
            backend: str, placed: PerceptronInputs = placed, fb: Tensor = fb, gb: Tensor = gb
        ) -> Sequence[Tensor]:
            leaves = placed.map(lambda tensor: tensor.detach().requires_grad_())
            return torch.autograd.grad(mlp_value_and_grad(*leaves, backend=backend), leaves.flat(), [fb, gb])

        exact = eager.backward(fb.double(), gb.double(), inputs.to(torch.float64))
        yield str(shape), outputs, exact, eager.backward(fb, gb, inputs)


#: Outputs of the networks of :data:`PERCEPTRONS`, in turn: one, few and many.
_OUTPUTS = (1, 3, 8, 9, 70)


def _several_outputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, PerceptronInputs, str]]:
    for shape, outputs in zip(PERCEPTRONS, itertools.cycle(_OUTPUTS), strict=False):
        inputs = perceptron_inputs(
            shape.batch,
            shape.inputs,
            shape.widths,
            dtype,
            device,
            outputs=outputs,
            bias_rows=shape.bias_rows,
            seed=_SEED,
        )
        yield f"{shape}, {outputs} outputs", inputs, shape.layout


def _outputs(dtype: torch.dtype, device: torch.device) -> Iterator[_Check]:
    for name, inputs, layout in _several_outputs(dtype, device):
        placed = inputs.map(partial(place, layout=layout))

        def outputs(backend: str, placed: PerceptronInputs = placed) -> Sequence[Tensor]:
            return [mlp_forward(*placed, backend=backend)]

        yield name, outputs, [eager.perceptron(*inputs.to(torch.float64))], [eager.perceptron(*inputs)]


def _outputs_backward(dtype: torch.dtype, device: torch.device) -> Iterator[_Check]:
    for name, inputs, layout in _several_outputs(dtype, device):
        rows, outputs = len(inputs.x), len(inputs.biases[-1])
        generator = torch.Generator().manual_seed(_SEED)
        cotangent = (max(rows, 1) ** -0.5 * torch.randn(rows, outputs, generator=generator)).to(device, dtype)
        placed = inputs.map(partial(place, layout=layout))

        def gradients(
            function: Callable[..., Tensor], inputs: PerceptronInputs, cotangent: Tensor = cotangent
        ) -> Sequence[Tensor]:
            leaves = inputs.map(lambda tensor: tensor.detach().requires_grad_())
            return torch.autograd.grad(function(*leaves), leaves.flat(), cotangent.to(inputs.x.dtype))

        def call(
            backend: str, placed: PerceptronInputs = placed, gradients: Callable[..., Sequence[Tensor]] = gradients
        ) -> Sequence[Tensor]:
            return gradients(partial(mlp_forward, backend=backend), placed)

        exact = gradients(eager.perceptron, inputs.to(torch.float64))
        yield name, call, exact, gradients(eager.perceptron, inputs)


def _step(dtype: torch.dtype, device: torch.device) -> Iterator[_Check]:
    generator = torch.Generator().manual_seed(_SEED)
    for shape in STEPS:
        inputs = step_inputs(shape.shape, shape.slots, dtype, device, seed=_SEED)
        random_matrix = torch.randn(1 + shape.slots, 2 + shape.slots, generator=generator, dtype=torch.float64)
        step: dict[str, Any] = {
            "matrix": random_matrix.tolist(),
            "guidance_weight": 0.7,
            "alpha": 0.8,
            "sigma": 0.6,
            "clamp": (-1.0, 1.0) if shape.clamp else None,
            "noise_scale": 0.5 if shape.noise else 0.0,
        }
        # Indices past 2^32, so that 64-bit counters are seen.
        sample_index = torch.arange(shape.shape[0], device=device) * 3 + 2**33
        z = None
        if shape.noise:
            elements = math.prod(shape.shape[1:])
            z = normal(_SEED, sample_index, elements, 5, device=device).reshape(shape.shape)
        placed = inputs.map(partial(place, layout=shape.layout))

        def outputs(
            backend: str,
            placed: StepInputs = placed,
            step: dict[str, Any] = step,
            sample_index: Tensor = sample_index,
        ) -> Sequence[Tensor]:
            x_next, history, x0 = guided_step(
                *placed, step=SolverStep(**step), seed=_SEED, sample_index=sample_index, evaluation=5, backend=backend
            )
            return [x_next, x0, *(() if history is None else history.unbind(0))]

        exact = eager.guided_step(*inputs.map(Tensor.double), **step, z=None if z is None else z.double())
        plain = eager.guided_step(*inputs, **step, z=None if z is None else z.to(dtype))
        yield str(shape), outputs, exact, plain


@dataclass(frozen=True)
class _GateShape:
    """Shape of the output, rows of the bias, and how x lies in memory."""

    shape: tuple[int, int, int]
    bias: str = "no"
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{list(self.shape)}, {self.bias} bias, {self.layout}"


GATES = (
    _GateShape((0, 2, 3), "shared"),
    _GateShape((3, 2, 0), "shared"),
    _GateShape((1, 1, 37)),
    _GateShape((65, 3, 1), "per sample"),
    _GateShape((2, 7, 129), "shared"),
    _GateShape((3, 5, 33), "per sample", "strided"),
    _GateShape((2, 3, 1000), "per sample", "misaligned"),
    _GateShape((1, 5, 1025), "shared"),
    _GateShape((2, 64, 61)),
)


def _gate(dtype: torch.dtype, device: torch.device) -> Iterator[_Check]:
    generator = torch.Generator().manual_seed(_SEED)
    for shape in GATES:
        batch, channels, length = shape.shape
        # Up to where both functions are flat.
        x = (4.0 * torch.randn(batch, 2 * channels, length, generator=generator)).to(device, dtype)
        size = {"no": None, "shared": (2 * channels,), "per sample": (batch, 2 * channels)}[shape.bias]
        bias = None if size is None else torch.randn(size, generator=generator).to(device, dtype)
        placed = place(x, shape.layout)

        def outputs(backend: str, placed: Tensor = placed, bias: Tensor | None = bias) -> Sequence[Tensor]:
            return [gated_activation(placed, bias, backend=backend)]

        exact = eager.gated_activation(x.double(), None if bias is None else bias.double())
        yield str(shape), outputs, [exact], [eager.gated_activation(x, bias)]


@dataclass(frozen=True)
class _ConvolutionShape:
    """Shape of u, whether with the activation, and how u lies in memory."""

    shape: tuple[int, int, int]
    gelu: bool = True
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{list(self.shape)}, {'' if self.gelu else 'no '}GELU, {self.layout}"


CONVOLUTIONS = (
    _ConvolutionShape((0, 3, 5)),
    _ConvolutionShape((2, 0, 5)),
    _ConvolutionShape((3, 2, 1)),
    _ConvolutionShape((1, 17, 2), gelu=False),
    _ConvolutionShape((2, 5, 63), layout="strided"),
    _ConvolutionShape((5, 16, 64), gelu=False),
    _ConvolutionShape((2, 33, 129), layout="misaligned"),
    _ConvolutionShape((1, 20, 250)),
    _ConvolutionShape((2, 18, 500), gelu=False, layout="strided"),
    _ConvolutionShape((9, 32, 1000)),
    _ConvolutionShape((1, 3, 1025)),
)


def _convolution(dtype: torch.dtype, device: torch.device) -> Iterator[_Check]:
    generator = torch.Generator().manual_seed(_SEED)
    for shape in CONVOLUTIONS:
        _, channels, length = shape.shape
        u = torch.randn(shape.shape, generator=generator).to(device, dtype)
        # Sums of L terms of about the size of u.
        scale = length**-0.5
        taps = (scale * torch.randn(channels, 2 * length - 1, generator=generator, dtype=torch.float64)).to(device)
        placed = place(u, shape.layout)

        def outputs(
            backend: str, placed: Tensor = placed, taps: Tensor = taps, gelu: bool = shape.gelu
        ) -> Sequence[Tensor]:
            prepared = prepare_long_convolution(taps, dtype, backend=backend)
            return [long_convolution(placed, prepared, gelu=gelu, backend=backend)]

        # Some libraries cannot transform nothing.
        spectrum = (
            torch.fft.rfft(taps, n=2 * length) if channels else taps.new_zeros(0, length + 1, dtype=torch.cdouble)
        )
        exact, plain = (
            eager.long_convolution(values, transformed, gelu=shape.gelu) if values.numel() else values
            for values, transformed in ((u.double(), spectrum), (u, spectrum.to(torch.cfloat)))
        )
        yield str(shape), outputs, [exact], [plain]


@dataclass(frozen=True)
class _BlockShape:
    shape: tuple[int, int, int, int]
    labels: str = "per sample"
    steps: str = "shared"

    def __str__(self) -> str:
        return f"B, C, S, L = {self.shape}, labels {self.labels}, steps {self.steps}"


BLOCKS = (
    _BlockShape((0, 2, 2, 5)),
    _BlockShape((3, 2, 4, 1), steps="per sample"),
    _BlockShape((2, 3, 1, 2), labels="none"),
    _BlockShape((1, 16, 16, 63), labels="shared"),
    _BlockShape((3, 10, 0, 65), steps="per sample"),
    _BlockShape((2, 34, 20, 129), steps="per sample"),
    _BlockShape((1, 64, 64, 1000)),
)


def _block(dtype: torch.dtype, device: torch.device) -> Iterator[_Check]:
    """The state, which is float32 whatever the weights, rounded to the dtype."""
    for shape in BLOCKS:
        inputs = residual_block_inputs(shape.shape, dtype, device, labels=shape.labels, steps=shape.steps, seed=_SEED)

        def outputs(backend: str, inputs: ResidualBlockInputs = inputs) -> Sequence[Tensor]:
            return [residual_block_(inputs.state.clone(), *inputs.others, backend=backend).to(dtype)]

        plain = residual_block_reference_(inputs.state.clone(), *inputs.others).to(dtype)
        yield str(shape), outputs, [residual_block_reference_(*inputs.double())], [plain]


@dataclass(frozen=True)
class _TrajectoryShape:
    """Samples, their size, the widths of both networks, and the solver."""

    batch: int
    size: int
    score: tuple[int, ...]
    guidance: tuple[int, ...] = ()
    solver: str = "dpmpp_2m"
    sample_bias: bool = False
    limits: bool = False

    def __str__(self) -> str:
        networks = f"{'x'.join(map(str, self.score))} and {'x'.join(map(str, self.guidance)) or 'no'} guidance"
        extras = ["labels"] * self.sample_bias + ["clamp, norm limit"] * self.limits
        return ", ".join([f"[{self.batch}, {self.size}]", networks, self.solver, *extras])


TRAJECTORIES = (
    _TrajectoryShape(0, 2, (16,), (16,)),
    _TrajectoryShape(1, 1, (8,), (12, 5)),
    _TrajectoryShape(67, 2, (64, 64), (48, 20), "ddpm"),
    _TrajectoryShape(33, 9, (33, 17), (130,), sample_bias=True),
    _TrajectoryShape(130, 8, (40,), (), "heun", limits=True),
    _TrajectoryShape(70, 37, (96, 64), (64, 96), "dpmpp_2m_sde", sample_bias=True, limits=True),
)


def _trajectory(dtype: torch.dtype, device: torch.device) -> Iterator[_Check]:
    """States are float32 whatever the networks' dtype; the results are rounded to it, so that one limit serves all."""
    for shape in TRAJECTORIES:
        x, score, guidance, plan = trajectory_inputs(
            (shape.batch, shape.size),
            shape.score,
            shape.guidance,
            dtype,
            device,
            solver=shape.solver,
            sample_bias=shape.sample_bias,
            limits=shape.limits,
            seed=_SEED,
        )
        sample_index = torch.arange(shape.batch, device=device) * 3 + 2**33

        def outputs(
            backend: str,
            call: tuple[Any, ...] = (x, score, guidance, plan),
            sample_index: Tensor = sample_index,
        ) -> Sequence[Tensor]:
            return [trajectory(*call, seed=_SEED, sample_index=sample_index, backend=backend).x.to(dtype)]

        double = (_double(score), None if guidance is None else _double(guidance))
        exact = trajectory_reference(x.double(), *double, plan, _SEED, sample_index)[0]
        yield str(shape), outputs, [exact], [trajectory_reference(x, score, guidance, plan, _SEED, sample_index)[0]]


def _double(network: TrajectoryNetwork) -> TrajectoryNetwork:
    weights, biases, evaluation_bias, sample_bias = network
    return TrajectoryNetwork(
        [w.double() for w in weights],
        [b.double() for b in biases],
        evaluation_bias.double(),
        None if sample_bias is None else sample_bias.double(),
    )


#: The checks of every registered operator.
CHECKS: dict[str, Callable[[torch.dtype, torch.device], Iterator[_Check]]] = {
    "gated_activation": _gate,
    "guided_step": _step,
    "long_convolution": _convolution,
    "mlp_value_and_grad": _forward,
    "mlp_value_and_grad_backward": _backward,
    "mlp_forward": _outputs,
    "mlp_backward": _outputs_backward,
    "residual_block_": _block,
    "trajectory": _trajectory,
}


def validate(backend: str | None = None, operators: Sequence[str] = (), precisions: Sequence[str] = ()) -> list[Row]:
    """Check every operator on every backend that is there, or on ``backend`` alone.

    Args:
        backend: a backend's name.
        operators: names of operators, in all precisions or in ``precisions`` ("fp32", "bf16", "fp16"); empty for all.

    Returns:
        A row per operator, backend, dtype and shape; ``verdict`` is "passed", "failed", "unchecked" (an operator that
        has no checks here: a failure), or "refused: reason" where the backend says that it does not take such a call.

    Raises:
        ValueError: no such backend, operator or precision, or a backend that no operator has here.
    """
    report = registry.backend_report()
    for name in operators:
        check_choice("--operators", name, report)
    for name in precisions:
        check_choice("--precisions", name, PRECISIONS)
    if backend is not None:
        check_choice("--backend", backend, registry.BACKENDS)
        reasons = {states[backend] for states in report.values()}
        if "available" not in reasons:
            raise ValueError(f"--backend must be one that is available here, got {backend!r}: {'; '.join(reasons)}")
    rows: list[Row] = []
    for operator, states in report.items():
        if operators and operator not in operators:
            continue
        names = [name for name, state in states.items() if state == "available" and backend in (None, name)]
        if operator not in CHECKS:
            empty = dict.fromkeys(KEYS)
            rows += [empty | {"operator": operator, "backend": name, "verdict": "unchecked"} for name in names]
            continue
        for name, precision in itertools.product(names, precisions or PRECISIONS):
            rows += _rows(operator, name, precision)
    return rows


def _rows(operator: str, backend: str, precision: str) -> Iterator[Row]:
    dtype = PRECISIONS[precision]
    for shape, outputs, exact, plain in CHECKS[operator](dtype, _device_for(backend)):
        yardstick = error_of(plain, exact)
        error, verdict = Error(math.nan, math.nan), ""
        try:
            got = outputs(backend)
        except BackendUnavailableError as refusal:
            verdict = f"refused: {refusal.reason}"
        except (RuntimeError, ValueError) as problem:
            verdict = f"failed: {str(problem).splitlines()[0]}"
        else:
            error = error_of(got, exact)
            right = within(error, yardstick, dtype) and all(value.dtype == dtype for value in got)
            verdict = "passed" if right else "failed"
        values = (operator, backend, precision, shape, *error, *yardstick, verdict)
        yield dict(zip(KEYS, values, strict=True))


def _device_for(backend: str) -> torch.device:
    """Where a backend's tensors have to be; Triton serves CPU tensors in its interpreter."""
    cuda = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def failures(rows: Sequence[Row]) -> list[Row]:
    """The rows that are neither passed nor refused."""
    return [row for row in rows if row["verdict"] != "passed" and not row["verdict"].startswith("refused")]


def table(rows: Sequence[Row]) -> str:
    """Markdown with a line per row."""
    header = ["operator", "backend", "dtype", "shape", "max", "mean", "eager max", "eager mean", "verdict"]
    body = [[_text(row[key]) for key in KEYS] for row in rows]
    return markdown_table(header, body)


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.1e}" if isinstance(value, float) else str(value)
