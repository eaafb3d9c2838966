"""The CUDA kernels on the CPU: builds their sources with g++ under emulation.h and calls them by ctypes.

Functions mirror the reference twins, on CPU tensors. Outputs are filled with NaN before and surrounded by numbers that
must survive.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tgdp_fast.ops import LongConvolution, TrajectoryNetwork, TrajectoryPlan
from tgdp_fast.ops.noise import key_words

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = (
    "csrc/cuda/guided_step.cu",
    "csrc/cuda/long_convolution.cu",
    "csrc/cuda/mlp_value_and_grad.cu",
    "csrc/cuda/trajectory.cu",
    "csrc/cuda/trajectory_cluster.cu",
    "tests/cuda/emulation.cpp",
    "tests/cuda/emulation_faults.cu",
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORWARD, REVERSE, RANDOM = range(3)
_GUARD = 64  # elements before and after an output

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


class EmulationError(RuntimeError):
    """What the emulation or a launcher reported."""


class Elements(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int)]


class Guidance(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("sigma", ctypes.c_float),
        ("clamp", ctypes.c_bool),
        ("lowest", ctypes.c_float),
        ("highest", ctypes.c_float),
    ]


class NoiseCoordinates(ctypes.Structure):
    _fields_ = [
        ("sample_size", ctypes.c_int64),
        ("samples", ctypes.c_void_p),
        ("key_low", ctypes.c_uint32),
        ("key_high", ctypes.c_uint32),
        ("evaluation", ctypes.c_uint32),
    ]


class SolverStep(ctypes.Structure):
    _fields_ = [
        ("elements", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("x", Elements),
        ("epsilon", Elements),
        ("gradient", Elements),
        ("history", ctypes.POINTER(Elements)),
        ("matrix", ctypes.POINTER(ctypes.c_float)),
        ("guidance", Guidance),
        ("noise_scale", ctypes.c_float),
        ("noise", NoiseCoordinates),
        ("x_next", ctypes.c_void_p),
        ("history_next", ctypes.c_void_p),
        ("x0", ctypes.c_void_p),
    ]


class NetworkCall(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.c_int64),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        ("weights", ctypes.POINTER(ctypes.c_void_p)),
        ("weight_strides", ctypes.POINTER(ctypes.c_int64)),
        ("biases", ctypes.POINTER(ctypes.c_void_p)),
    ]


class MlpValueAndGradCall(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("batch", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("network", NetworkCall),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("first_bias", ctypes.c_void_p),
        ("first_bias_stride", ctypes.c_int64),
        ("value", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("keep", ctypes.POINTER(ctypes.c_void_p)),
        ("scratch", ctypes.c_void_p),
    ]


class LongConvolutionCall(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("y_dtype", ctypes.c_int),
        ("u", ctypes.c_void_p),
        ("u_sample", ctypes.c_int64),
        ("u_channel", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("y_sample", ctypes.c_int64),
        ("y_channel", ctypes.c_int64),
        ("spectra", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("points", ctypes.c_int64),
        ("gelu", ctypes.c_bool),
        ("saturate", ctypes.c_bool),
    ]


class LaunchPlan(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("blocks", "rows", "panel", "depth", "shared_bytes", "scratch_bytes", "cluster")
    ]


class TrajectoryNetworkCall(ctypes.Structure):
    _fields_ = [
        ("network", NetworkCall),
        ("evaluation_bias", ctypes.c_void_p),
        ("evaluation_bias_stride", ctypes.c_int64),
        ("sample_bias", ctypes.c_void_p),
        ("sample_bias_stride", ctypes.c_int64),
    ]


class Trajectory(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("evaluations", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("sample_index", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("clamp", ctypes.c_bool),
        ("lowest", ctypes.c_float),
        ("highest", ctypes.c_float),
        ("gradient_norm_limit", ctypes.c_float),
        ("key_low", ctypes.c_uint32),
        ("key_high", ctypes.c_uint32),
        ("out", ctypes.c_void_p),
    ]


class TrajectoryKernelCall(Trajectory):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("score", TrajectoryNetworkCall),
        ("guidance", TrajectoryNetworkCall),
        ("first_failure", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    ]


def _build(linked: Path) -> None:
    objects, running = [], []
    for source in SOURCES:
        target = linked.with_name(f"{Path(source).stem}.o")
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-DTGDP_EMULATION", f"-I{HERE}"]
        command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-x", "c++"]
        command += ["-c", str(ROOT / source), "-o", str(target)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        objects.append(str(target))
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    partial = linked.with_suffix(".partial")
    subprocess.run(["g++", "-shared", *objects, "-o", str(partial)], check=True)
    partial.rename(linked)


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, built once for all processes of a test run."""
    scratch = os.environ.get("TGDP_TEST_SCRATCH")
    if scratch is None:  # not under pytest
        scratch = tempfile.mkdtemp(prefix="tgdp_emulation_")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    linked = Path(scratch) / "libkernels.so"
    with open(linked.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not linked.exists():
            _build(linked)
    loaded = ctypes.CDLL(linked)
    for name in (
        "tgdp_cuda_guided_step",
        "tgdp_cuda_long_convolution",
        "tgdp_cuda_mlp_value_and_grad",
        "tgdp_cuda_mlp_plan",
        "tgdp_cuda_trajectory",
        "tgdp_cuda_trajectory_plan",
        "test_fault",
        "test_cluster_fault",
        "test_product",
        "test_strided_accesses",
    ):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def check(message: bytes | None) -> None:
    if message is not None:
        raise EmulationError(message.decode())


def choose(order: int = FORWARD, seed: int = 0, left_out: int = -1, *, forget: bool = False) -> None:
    """Order of threads and blocks, and the number of a barrier that is left out."""
    library().tgdp_emulation_choose(order, ctypes.c_uint64(seed), left_out, int(forget))


def choose_device(sms: int = 2, shared_per_block: int = 227, shared_per_sm: int = 228, *, clusters: int = 0) -> None:
    """What launchers see of the device; shared memory in KiB, clusters that run at once."""
    library().tgdp_emulation_device(sms, shared_per_block << 10, shared_per_sm << 10, clusters)


def barriers() -> int:
    """Places of barriers that were met since they were forgotten."""
    return int(library().tgdp_emulation_barriers())


def bank_conflicts() -> int:
    """Matrices loaded for tensor cores whose rows share banks of shared memory, since the last answer."""
    library().tgdp_emulation_bank_conflicts.restype = ctypes.c_int64
    return int(library().tgdp_emulation_bank_conflicts())


def access_conflicts(*, watch: bool) -> int:
    """Turns beside the first that accesses of a warp to shared memory took since the last answer, while watched."""
    library().tgdp_emulation_access_conflicts.restype = ctypes.c_int64
    return int(library().tgdp_emulation_access_conflicts(int(watch)))


class Output:
    """Memory of an output within a larger piece; `shift` elements more to make it misaligned."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, shift: int = 0) -> None:
        count = int(torch.Size(shape).numel())
        self.memory = torch.full((count + 2 * _GUARD + shift,), 77.0, dtype=dtype)
        self.begin, self.end = _GUARD + shift, _GUARD + shift + count
        self.values = self.memory[self.begin : self.end].view(shape)
        self.values.fill_(torch.nan)

    def finish(self) -> Tensor:
        around = torch.cat([self.memory[: self.begin], self.memory[self.end :]])
        assert bool((around == 77.0).all()), "written outside of the output"
        return self.values


def shifted(tensor: Tensor, shift: int) -> Tensor:
    """The same values, contiguous, `shift` elements past an aligned address, with NaN around them."""
    memory = torch.full((tensor.numel() + 32 + shift,), torch.nan, dtype=tensor.dtype)
    part = memory[16 + shift : 16 + shift + tensor.numel()].view(tensor.shape)
    return part.copy_(tensor)


def guided_step(
    x: Tensor,
    epsilon: Tensor,
    gradient: Tensor | None = None,
    history: Tensor | None = None,
    *,
    matrix: Sequence[Sequence[float]],
    noise_scale: float = 0.0,
    guidance_weight: float = 0.0,
    alpha: float = 1.0,
    sigma: float = 0.0,
    clamp: tuple[float, float] | None = None,
    seed: int = 0,
    sample_index: Tensor | None = None,
    evaluation: int = 0,
    shift: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As guided_step_reference; all tensors contiguous."""
    slots = len(matrix) - 1
    outputs = [Output(shape, x.dtype, shift) for shape in (x.shape, (slots, *x.shape), x.shape)]
    elements = (Elements * max(slots, 1))()
    for slot in range(slots):
        elements[slot] = _elements(None if history is None else history[slot])
    entries = [entry for row in matrix for entry in row]
    limits = (0.0, 0.0) if clamp is None else clamp
    key_low, key_high, evaluation = key_words(seed, evaluation)
    size = max(x[:1].numel(), 1) if x.shape[0] else 1
    samples = None if sample_index is None else sample_index.data_ptr()
    step = SolverStep(
        x.numel(), slots, _elements(x), _elements(epsilon), _elements(gradient), elements,
        (ctypes.c_float * len(entries))(*entries), Guidance(guidance_weight, alpha, sigma, clamp is not None, *limits),
        noise_scale, NoiseCoordinates(size, samples, key_low, key_high, evaluation),
        *(output.values.data_ptr() for output in outputs),
    )  # fmt: skip
    check(library().tgdp_cuda_guided_step(ctypes.byref(step), None))
    x_next, history_next, x0 = (output.finish() for output in outputs)
    return x_next, history_next if slots else None, x0


def _elements(tensor: Tensor | None) -> Elements:
    if tensor is None:
        return Elements(None, 0)
    assert tensor.is_contiguous()
    return Elements(tensor.data_ptr(), DTYPES[tensor.dtype])


def long_convolution(
    u: Tensor,
    prepared: LongConvolution,
    *,
    gelu: bool = True,
    room: int = 0,
    shift: int = 0,
    dtype: torch.dtype | None = None,
    saturate: bool = False,
) -> Tensor:
    """As long_convolution_reference, of what _pack_for_cuda packed; rows of the output have `room` elements more, and
    `dtype`, that of u.
    """
    assert u.stride(2) == 1 or u.shape[2] == 1
    packed, scales = prepared.packed, prepared.scales
    assert packed is not None
    assert scales is not None
    assert packed.is_contiguous()
    batch, channels, length = u.shape
    result = dtype or u.dtype
    output = Output((batch, channels, length + room), result, shift)
    call = LongConvolutionCall(
        batch, channels, length, DTYPES[u.dtype], DTYPES[result], u.data_ptr(), u.stride(0), u.stride(1),
        output.values.data_ptr(), channels * (length + room), length + room,
        packed.data_ptr(), scales.data_ptr() if len(scales) else None, packed.shape[1], gelu, saturate,
    )  # fmt: skip
    check(library().tgdp_cuda_long_convolution(ctypes.byref(call), None))
    values = output.finish()
    assert bool(values[..., length:].isnan().all()), "written behind a row of the output"
    return values[..., :length]


def mlp_value_and_grad(
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    save_pre_activations: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """As the forward's reference; matrices may be slices whose rows are in one piece."""
    batch, inputs = x.shape
    bias = first_bias.unsqueeze(0) if first_bias.ndim == 1 else first_bias
    outputs = [Output(shape, x.dtype) for shape in ((batch,), (batch, inputs))]
    kept = [Output((batch, len(weight)), x.dtype) for weight in weights[:-1]] if save_pre_activations else []
    for matrix in (x, bias, *weights):
        assert matrix.stride(1) == 1 or matrix.shape[1] <= 1
    call = MlpValueAndGradCall(
        DTYPES[x.dtype], batch, inputs, _layers(weights, biases),
        x.data_ptr(), x.stride(0), bias.data_ptr(), 0 if bias.shape[0] == 1 else bias.stride(0),
        *(output.values.data_ptr() for output in outputs),
        _pointers([output.values for output in kept]) if kept else None, None,
    )  # fmt: skip
    scratch = scratch_for(plan_of(call))
    call.scratch = scratch.data_ptr()
    check(library().tgdp_cuda_mlp_value_and_grad(ctypes.byref(call), None))
    value, gradient = (output.finish() for output in outputs)
    return value, gradient, tuple(output.finish() for output in kept)


def plan_of(call: MlpValueAndGradCall | TrajectoryKernelCall) -> LaunchPlan:
    """How a call is cut into blocks on the chosen device; its tensors are not read."""
    ask = "tgdp_cuda_mlp_plan" if isinstance(call, MlpValueAndGradCall) else "tgdp_cuda_trajectory_plan"
    plan = LaunchPlan()
    check(getattr(library(), ask)(ctypes.byref(call), ctypes.byref(plan)))
    return plan


def trajectory_plan(
    size: int,
    score_widths: Sequence[int],
    guidance_widths: Sequence[int],
    batch: int,
    dtype: torch.dtype,
    slots: int = 1,
) -> LaunchPlan:
    """As plan_of for a trajectory of networks with these hidden layers."""
    call = TrajectoryKernelCall()
    call.dtype, call.batch, call.size, call.slots = DTYPES[dtype], batch, size, slots
    for network, widths in ((call.score.network, score_widths), (call.guidance.network, guidance_widths)):
        network.layers, network.widths = len(widths), (ctypes.c_int64 * len(widths))(*widths)
    return plan_of(call)


def scratch_for(plan: LaunchPlan) -> Tensor:
    return torch.full((plan.scratch_bytes // 4,), torch.nan)


def trajectory(
    x: Tensor,
    score: TrajectoryNetwork,
    guidance: TrajectoryNetwork | None,
    plan: TrajectoryPlan,
    seed: int = 0,
    sample_index: Tensor | None = None,
) -> tuple[Tensor, int]:
    """As trajectory_reference, for x and biases in float32; matrices may be slices whose rows are in one piece."""
    batch, size = x.shape
    indices = torch.arange(batch) if sample_index is None else sample_index
    out, table = Output((batch, size), torch.float32), plan.table().float()
    diverged = torch.full((1,), 2**31 - 1, dtype=torch.int32)
    key_low, key_high, _ = key_words(seed, 0)
    lowest, highest = (0.0, 0.0) if plan.clamp is None else plan.clamp
    call = TrajectoryKernelCall(
        batch, size, plan.history, len(plan.matrix), x.data_ptr(), indices.data_ptr(), table.data_ptr(),
        plan.clamp is not None, lowest, highest, plan.gradient_norm_limit or 0.0, key_low, key_high,
        out.values.data_ptr(), DTYPES[score.weights[0].dtype], _network(score), _network(guidance),
        diverged.data_ptr(), None,
    )  # fmt: skip
    scratch = scratch_for(plan_of(call))
    call.scratch = scratch.data_ptr()
    check(library().tgdp_cuda_trajectory(ctypes.byref(call), None))
    return out.finish(), -1 if int(diverged) == 2**31 - 1 else int(diverged)


def _network(network: TrajectoryNetwork | None) -> TrajectoryNetworkCall:
    if network is None:
        return TrajectoryNetworkCall()
    rows, labels = network.evaluation_bias, network.sample_bias
    assert rows.stride(1) == 1 or rows.shape[1] == 1
    return TrajectoryNetworkCall(
        _layers(network.weights, network.biases), rows.data_ptr(), rows.stride(0),
        None if labels is None else labels.data_ptr(), 0 if labels is None else labels.stride(0),
    )  # fmt: skip


def _layers(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> NetworkCall:
    widths = [weight.shape[0] for weight in weights[:-1]]
    strides = [weight.stride(0) for weight in weights]
    return NetworkCall(
        len(widths), (ctypes.c_int64 * len(widths))(*widths), _pointers(weights),
        (ctypes.c_int64 * len(strides))(*strides), _pointers(biases),
    )  # fmt: skip


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
