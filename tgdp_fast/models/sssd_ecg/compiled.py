"""SSSD-ECG for sampling, with all constants computed once: the same call at a fraction of its cost.

:class:`tgdp_fast.SSSDECG` computes several things at every call that depend only on the parameters, on the diffusion
step or on the labels, but not on the signal. They are folded here, in float64, exactly:

- the S4 kernels, including D at lag 0, become spectra;
- conv3(x + fc_t(step embedding)) = conv3(x) + a bias, from a table with a row per diffusion step. The zero padding
  excludes the embedding: the bias lacks the part of the left tap at the first position, and that of the right tap at
  the last;
- fc_label(label embedding) joins the bias of the first LayerNorm of each block;
- weight_norm is applied; the residual and skip convolutions become one matmul, with 1 / sqrt 2 in its weights; the
  scale of the skip sum is in the weights of the head.

Signals stay [B, channels, L] throughout, so nothing is permuted between layers; each block is a call of the operator
:func:`tgdp_fast.ops.residual_block_`. The state, the residual stream, the skip sum, the long convolution, LayerNorm and
the accumulation of matmuls are float32. The weights of a block's matmuls are rounded to ``precision``, and so are their
other factors if the CPU has matmuls of that precision.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tgdp_fast.models.s4 import S4Block
from tgdp_fast.models.sssd_ecg.layers import ResidualBlock, SSSDECGModules, WeightNormConv1d, diffusion_step_features
from tgdp_fast.ops import ResidualBlockWeights, S4Weights, prepare_long_convolution, residual_block_
from tgdp_fast.ops.residual_block import multiplies_bf16, samples_together, without_unread_taps
from tgdp_fast.runtime.checks import check_choice, check_integer
from tgdp_fast.runtime.precision import PRECISIONS


@runtime_checkable
class DiscreteSchedule(Protocol):
    """The part of a :class:`tgdp_fast.NoiseSchedule` that is read: its number of diffusion steps."""

    @property
    def num_train_steps(self) -> int | None: ...


@runtime_checkable
class Table(Protocol):
    """The part of a :class:`tgdp_fast.SolverTable` that is read: the diffusion step of each evaluation, [K]."""

    @property
    def times(self) -> np.ndarray: ...


#: Types that ``compile_for_sampling`` accepts as diffusion steps.
Times = DiscreteSchedule | Table | Sequence[float] | np.ndarray | Tensor | None

_AGAIN = "call network.compile_for_sampling(...) again"
#: Bytes of the state kept between blocks on the CPU, where samples share one pass over the weights.
_STATE_BYTES = 16 * 2**20
#: Samples per pass through PyTorch's kernels on a GPU: enough to fill it with few launches.
_SAMPLES = 64
#: Number of diffusion steps outside the table whose biases are kept.
_KEPT_TIMES = 64


# --------------------------------------------------------------------------------------------------------- foldings


def _storage(precision: str, channels: int, device: torch.device) -> torch.dtype:
    """The dtype of the factors of a block's matmuls; float32 on a CPU whose kernels do not multiply that type."""
    dtype = PRECISIONS[precision]
    if device.type != "cpu":
        return dtype
    served = dtype == torch.bfloat16 and channels % 2 == 0 and multiplies_bf16()
    return dtype if served else torch.float32


def _block_weights(
    block: ResidualBlock, rounding: torch.dtype, storage: torch.dtype, length: int
) -> ResidualBlockWeights:
    """A block's weights for signals of at most ``length`` samples; those of matmuls are rounded to a dtype."""

    def factor(weight: Tensor) -> Tensor:
        return weight.to(rounding).to(storage).contiguous()

    halves = (block.res_conv, math.sqrt(0.5)), (block.skip_conv, 1.0)
    weights = ResidualBlockWeights(
        factor(_convolution(block).weight_in(torch.float64).transpose(1, 2).flatten(1)),
        _s4_weights(block.S41, factor, storage, length),
        _s4_weights(block.S42, factor, storage, length),
        factor(torch.cat([scale * half.weight_in(torch.float64)[..., 0] for half, scale in halves])),
        torch.cat([scale * half.bias.double() for half, scale in halves]).float(),
    )
    # Taps take as much memory as packed spectra do.
    return without_unread_taps(weights)


def _s4_weights(block: S4Block, factor: Callable[[Tensor], Tensor], storage: torch.dtype, length: int) -> S4Weights:
    layer, norm = block.s4_layer, block.norm_layer
    taps = layer.taps(length)
    # On a GPU, Triton computes the residual blocks.
    filters = prepare_long_convolution(taps, storage)
    return S4Weights(
        filters._replace(taps=filters.taps.float()),
        factor(layer.output_linear.weight.double()),
        layer.output_linear.bias.float().flatten().clone(),
        norm.weight.float().clone(),
        norm.bias.float().clone(),
        norm.eps,
    )


def _convolution(block: ResidualBlock) -> WeightNormConv1d:
    convolution = block.conv_layer.get_submodule("conv")
    assert isinstance(convolution, WeightNormConv1d)
    return convolution


def step_bias(source: SSSDECGModules, times: Tensor) -> Tensor:
    """Contribution of the diffusion steps to the convolutions of three taps, including their own bias.

    Args:
        source: the network.
        times: [T], on its device.

    Returns:
        float32 [T, blocks, 3, 2 res_channels]: the bias inside the signal, and the parts that the first and the last
        position lack. Computed in float64.
    """
    group = source.residual_layer
    embedding = diffusion_step_features(times, group.fc_t1.in_features)
    for layer in (group.fc_t1, group.fc_t2):
        embedding = functional.silu(_linear(layer, embedding))
    rows = []
    for block in group.residual_blocks:
        assert isinstance(block, ResidualBlock)
        convolution = _convolution(block)
        weight = convolution.weight_in(torch.float64)
        left, centre, right = _linear(block.fc_t, embedding) @ weight.permute(2, 1, 0)
        whole = left + centre + right + convolution.bias.double()
        rows.append(torch.stack([whole, left, right], dim=1).float())
    return torch.stack(rows, dim=1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight.double(), layer.bias.double())


class _Watch:
    """Detects changes of a module's parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = [
            (holder, name, f"{prefix}.{name}".lstrip("."), tensor, _version(tensor), tensor.data_ptr())
            for prefix, child in module.named_modules()
            for holder in (child._parameters, child._buffers)
            for name, tensor in holder.items()
            if tensor is not None
        ]

    def changed(self) -> str | None:
        """The name of the first tensor that was replaced, moved, converted or changed in place since then, or None."""
        for holder, name, full_name, tensor, version, address in self._tensors:
            current = holder.get(name)
            if current is not tensor or _version(tensor) != version or tensor.data_ptr() != address:
                return full_name
        return None


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; PyTorch does not count it for those made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


# --------------------------------------------------------------------------------------------------------- network


class _Workspace:
    """Buffers of one signal length, reused by each call.

    Args:
        network: determines their sizes.
        length: L, of the signals.
        batch: number of samples in the call.

    Attributes:
        samples: number that pass the network together. state [samples, C + S, L] is the residual stream, then the skip
            sum.
    """

    def __init__(self, network: CompiledSSSDECG, length: int, batch: int) -> None:
        channels = network.source.res_channels + network.source.skip_channels
        if network.device.type == "cpu":
            most = max(1, _STATE_BYTES // (4 * channels * length))
        else:
            most = samples_together(network.device, network.source.res_channels, length) or _SAMPLES
        self.length = length
        self.samples = min(most, max(1, batch))
        self.is_largest = self.samples == most
        # An ordinary tensor, which calls inside and outside inference mode may write.
        with torch.inference_mode(False):
            self.state = torch.empty((self.samples, channels, length), dtype=torch.float32, device=network.device)


class CompiledSSSDECG(nn.Module):
    """The result of :meth:`tgdp_fast.SSSDECG.compile_for_sampling`; see there.

    Attributes:
        source: the original network, whose weights are in checkpoints.
        precision: of its matmuls.
        length: the longest signal.
        takes_host_time: tells :class:`tgdp_fast.Denoiser` to leave the time on the host, for the lookup.
    """

    takes_host_time = True

    def __init__(self, source: SSSDECGModules, times: Times, *, precision: str, length: int | None) -> None:
        super().__init__()
        self.precision = check_choice("precision", precision, PRECISIONS)
        self.length = source.l_max if length is None else check_integer("length", length, 1)
        if self.length > source.l_max:
            raise ValueError(
                f"length must be at most {source.l_max}, the network's l_max, got {length}; train a network with a "
                "larger l_max"
            )
        steps = _diffusion_steps(times)
        self.source = source
        if any(module.training for module in source.modules()):
            raise ValueError("network must be in eval mode to be compiled for sampling; call network.eval() first")
        self.training = False  # Set directly: a call of eval() would make the source drop its kernels.
        with torch.inference_mode(False), torch.no_grad():
            self._fold(steps)
        self._forget()

    def _fold(self, steps: Tensor) -> None:
        source = self.source
        storage = _storage(self.precision, source.res_channels, self.device)
        self._blocks = [
            _block_weights(block, PRECISIONS[self.precision], storage, self.length)
            for block in source.residual_layer.residual_blocks
            if isinstance(block, ResidualBlock)
        ]
        stem, hidden = (sequence[0].get_submodule("conv") for sequence in (source.init_conv, source.final_conv))
        last = source.final_conv[2].get_submodule("conv")
        assert isinstance(stem, WeightNormConv1d)
        assert isinstance(hidden, WeightNormConv1d)
        assert isinstance(last, nn.Conv1d)
        assert last.bias is not None
        scale = math.sqrt(1.0 / len(self._blocks))
        # These are a thousandth of the network's work, so they are in float32 for every precision.
        self._ends = [
            (weight.float()[..., 0], bias.float()[:, None].clone())
            for weight, bias in (
                (stem.weight_in(torch.float64), stem.bias),
                (scale * hidden.weight_in(torch.float64), hidden.bias),
                (last.weight.clone(), last.bias),
            )
        ]
        self._label_layer: tuple[Tensor, Tensor] | None = None
        if source.embedding is not None:
            layers = [block.get_submodule("fc_label") for block in source.residual_layer.residual_blocks]
            weight, bias = (torch.cat([layer.get_parameter(n) for layer in layers]).float() for n in ("weight", "bias"))
            self._label_layer = weight, bias
        rows = step_bias(source, steps.to(self.device))
        self._step_rows = dict(zip(steps.tolist(), rows.unbind(), strict=True))
        self._table_size = len(self._step_rows)
        self._watch = _Watch(source)

    def _forget(self) -> None:
        """Drop everything kept between calls."""
        self._labels: tuple[Tensor, int, Tensor] | None = None
        self._workspace: _Workspace | None = None
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """The device it was compiled for."""
        return self.source.final_conv[2].get_submodule("conv").get_parameter("weight").device

    @property
    def num_classes(self) -> int:
        """Label classes; 0 for an unconditional network."""
        return self.source.num_classes

    @property
    def event_shape(self) -> tuple[int, int]:
        """Shape of one sample of full length: (in_channels, length)."""
        return self.source.in_channels, self.length

    def extra_repr(self) -> str:
        return f"precision={self.precision}, length={self.length}"

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's prediction; shapes and errors as for :class:`tgdp_fast.SSSDECG`.

        Args:
            x: [B, in_channels, L] with L in 1 .. length, on the network's device.
            time: diffusion steps [B], or [1] for all. They are looked up if they are on the host. On another device a
                lookup would wait for the device, so their biases are computed at each call; for a small batch this
                takes longer than the rest.
            labels: as in the network, [B] or [B, num_classes].

        Returns:
            [B, out_channels, L], new, in the dtype of x, without gradients.

        Raises:
            ValueError: a bad shape or device; x requires a gradient.
            RuntimeError: training mode, or the network was changed since it was compiled.
        """
        self._check(x, time)
        # If the caller has it enabled, it would round matmuls that must be in float32.
        without_autocast: AbstractContextManager[Any] = nullcontext()
        if torch.amp.is_autocast_available(x.device.type):
            without_autocast = torch.autocast(x.device.type, enabled=False)
        with self._lock, torch.no_grad(), without_autocast:
            return self._predict(x.float(), time.reshape(-1), labels).to(x.dtype)

    def _check(self, x: Tensor, time: Tensor) -> None:
        source = self.source
        if self.training or source.training:
            raise RuntimeError(
                "a network compiled for sampling cannot be trained, and it is in training mode; call .eval(), or train "
                "the network that it was compiled from and compile that again"
            )
        changed = self._watch.changed()
        if changed is not None:
            raise RuntimeError(f"{changed} of the network was changed or moved since it was compiled; {_AGAIN}")
        if x.ndim != 3 or x.shape[1] != source.in_channels or not 1 <= x.shape[2] <= self.length:
            advice = "" if self.length == source.l_max else "; for longer signals compile with a larger length"
            raise ValueError(
                f"x must have shape [B, {source.in_channels}, L] with L in 1..{self.length}, got {tuple(x.shape)}"
                f"{advice}"
            )
        if x.device != self.device:
            raise ValueError(f"x must be on {self.device}, where the network was compiled, got {x.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                "x must not require a gradient: a network compiled for sampling has none; use torch.no_grad(), "
                "x.detach(), or the network that it was compiled from"
            )
        if time.numel() not in (1, len(x)):
            raise ValueError(f"time must have shape [{len(x)}] or [1], one diffusion step per sample, got {time.shape}")

    # parts that depend on the step and on the labels ---------------------------------------------------------------

    def _step_biases(self, time: Tensor) -> Tensor:
        """[T] -> [T, blocks, 3, 2 C], see :func:`step_bias`."""
        if time.device.type != "cpu":
            return step_bias(self.source, time)
        values = time.tolist()
        missing = [value for value in dict.fromkeys(values) if value not in self._step_rows]
        if not missing:
            return torch.stack([self._step_rows[value] for value in values])
        with torch.inference_mode(False), torch.no_grad():
            rows = step_bias(self.source, torch.tensor(missing, dtype=torch.float64, device="cpu").to(self.device))
        found = self._step_rows | dict(zip(missing, rows.unbind(), strict=True))
        if not _capturing(self.device):  # Memory of a captured graph must not be used by others.
            self._step_rows.update({value: found[value].clone() for value in missing})
            for value in list(self._step_rows)[self._table_size :][:-_KEPT_TIMES]:
                del self._step_rows[value]
        return torch.stack([found[value] for value in values])

    def _label_biases(self, labels: Tensor | None) -> Tensor | None:
        """[B] or [B, num_classes] -> contribution to the bias of each block's first LayerNorm, [B, blocks, 2 C]."""
        if self._label_layer is None or labels is None:
            self.source.embed_labels(labels)  # raises unless both are missing
            return None
        # A captured graph must compute all its inputs, and its results are valid only in its replays.
        keeps = not labels.is_inference() and not _capturing(self.device)
        kept = self._labels
        if keeps and kept is not None and kept[0] is labels and kept[1] == labels._version:
            return kept[2]
        # One by one on the CPU, so that the bits of a sample do not depend on other samples.
        each = labels.split(1) if self.device.type == "cpu" else (labels,)
        embeddings = [embedding.float() for part in each if (embedding := self.source.embed_labels(part)) is not None]
        biases = torch.cat([functional.linear(embedding, *self._label_layer) for embedding in embeddings])
        biases = biases.unflatten(1, (len(self._blocks), -1))
        if keeps:
            self._labels = labels, labels._version, biases
        return biases

    # layers ---------------------------------------------------------------------------------------------------

    def _predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        batch, _, length = x.shape
        label_biases = self._label_biases(labels)
        if label_biases is not None and len(label_biases) not in (1, batch):
            raise ValueError(f"labels must have {batch} rows, one per sample of x, got {len(label_biases)}")
        if len(time) > 1 and (time.stride(0) == 0 or (time.device.type == "cpu" and bool((time == time[0]).all()))):
            time = time[:1]
        output = x.new_empty((batch, self.source.out_channels, length))
        work = self._workspace
        if work is None or work.length != length or (batch > work.samples and not work.is_largest):
            work = self._workspace = _Workspace(self, length, batch)
        step_biases = self._step_biases(time) if len(time) == 1 else None
        for rows in _slices(batch, work.samples):
            steps = self._step_biases(time[rows]) if step_biases is None else step_biases
            part = None if label_biases is None else _rows(label_biases, rows)
            self._predict_together(x[rows], steps, part, output[rows], work.state)
        return output

    def _predict_together(self, x: Tensor, steps: Tensor, labels: Tensor | None, output: Tensor, state: Tensor) -> None:
        """At most as many samples as ``state`` has rows; ``steps`` and ``labels`` have one row each, or one for all."""
        state = state[: len(x)]
        channels = self.source.res_channels
        stream, skip = state[:, :channels], state[:, channels:]
        stem, hidden, last = self._ends
        _add_matmul(stream.copy_(stem[1].expand_as(stream)), stem[0], x).relu_()
        skip.zero_()
        # One block after the other, so that all samples use its weights and spectra while these are in the cache.
        for k, weights in enumerate(self._blocks):
            residual_block_(state, steps[:, k], None if labels is None else labels[:, k], weights)
        h = _add_matmul(hidden[1].expand_as(skip).contiguous(), hidden[0], skip)
        _add_matmul(output.copy_(last[1].expand_as(output)), last[0], h.relu_())

    # copies ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Copies include no buffers. They watch their own network, so this one must be unchanged."""
        changed = self._watch.changed()
        if changed is not None:
            raise RuntimeError(f"{changed} of the network was changed or moved since it was compiled; {_AGAIN}")
        dropped = ("_watch", "_labels", "_workspace", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch = _Watch(self.source)
        self._forget()


def _diffusion_steps(times: Times) -> Tensor:
    """The distinct times, float32 values [K], on the host."""
    if times is None:
        return torch.empty(0, dtype=torch.float32, device="cpu")
    if isinstance(times, DiscreteSchedule):
        if times.num_train_steps is None:
            raise ValueError(
                "schedule must be discrete, to have a list of diffusion steps, got a continuous one; pass the solver's "
                "table: compile_for_sampling(solver_table(name, schedule, steps))"
            )
        times = np.arange(times.num_train_steps)
    elif isinstance(times, Table):
        times = times.times.copy()
    try:
        steps = times if isinstance(times, Tensor) else torch.as_tensor(times, device="cpu")
        steps = steps.detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "schedule_or_table must be a NoiseSchedule, a SolverTable, diffusion steps [K] or None, got "
            f"{type(times).__name__}: {error}"
        ) from None
    if steps.ndim != 1 or not bool(steps.isfinite().all()):
        raise ValueError(
            f"schedule_or_table must hold finite diffusion steps, of shape [K], got shape {tuple(steps.shape)}"
        )
    return steps.unique()


def _add_matmul(target: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """target [B, M, L] += weight [M, K] times values [B, K, L]; float32."""
    if target.device.type != "cpu":
        return target.baddbmm_(weight.expand(len(values), -1, -1), values)
    # One by one is as fast, and bits do not depend on other samples (unless L = 1, where the order of sums in libraries
    # depends on alignment).
    for sample, factor in zip(target.unbind(), values.unbind(), strict=True):
        sample.addmm_(weight, factor)
    return target


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _rows(values: Tensor, rows: slice) -> Tensor:
    """The rows, or the one row that is common to all."""
    return values if len(values) == 1 else values[rows]


def _capturing(device: torch.device) -> bool:
    """Whether calls are being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
