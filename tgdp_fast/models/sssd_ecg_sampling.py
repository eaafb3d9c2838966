"""SSSD-ECG with everything that stays the same in sampling computed once: the same call, a fraction of its cost.

What :class:`tgdp_fast.models.sssd_ecg.SSSDECG` computes at every call although it depends on the parameters alone, or
on the diffusion step or the labels but not on the signal, is folded here, in float64, exactly:

- the S4 kernels, D at lag 0 included, become spectra;
- conv3(x + fc_t(step embedding)) = conv3(x) + a bias, from a table with a row per diffusion step. The zero padding sees
  no embedding: at the first position the bias lacks the part of the left tap, at the last that of the right one;
- fc_label(label embedding) joins the bias of the first LayerNorm of each block;
- weight_norm; the residual and skip convolutions as one product, 1 / sqrt 2 in its weights; the scale of the skip sum
  in the weights of the head.

Signals stay [B, channels, L] throughout, so nothing is permuted between layers. Float32 are the state, the residual
stream and the skip sum, the long convolution, LayerNorm and the accumulation of products; ``precision`` says to what
the factors of a block's products are rounded.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tgdp_fast._checks import check_choice, check_integer
from tgdp_fast.models.s4 import S4Block
from tgdp_fast.models.sssd_ecg import ResidualBlock, WeightNormConv1d, diffusion_step_features
from tgdp_fast.ops import gated_activation
from tgdp_fast.schedule import NoiseSchedule
from tgdp_fast.solvers import SolverTable

if TYPE_CHECKING:
    from tgdp_fast.models.sssd_ecg import SSSDECG

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: What ``compile_for_sampling`` takes as diffusion steps.
Times = NoiseSchedule | SolverTable | Sequence[float] | np.ndarray | Tensor | None

_AGAIN = "call network.compile_for_sampling(...) again"
#: Bytes of activations of the samples that pass a block together on the CPU: what its caches hold.
_PART_BYTES = 6 * 2**20
#: Bytes of the state that is kept between blocks on the CPU, where samples share one pass over the weights.
_STATE_BYTES = 16 * 2**20
#: Samples that pass the network together elsewhere: enough to fill a GPU, and few kernels to launch for a large batch.
_SAMPLES = 64
#: Diffusion steps outside the table whose biases are kept.
_KEPT_TIMES = 64


# ------------------------------------------------------------------------------------------------ long convolution


class PreparedTaps(NamedTuple):
    """A two-sided filter, ready for :func:`long_convolution`.

    Attributes:
        spectrum: complex64 [H, n // 2 + 1], of the taps at their lags modulo n.
        n: length of the transform, at least 2 L - 1 for the longest signal L.
    """

    spectrum: Tensor
    n: int


def transform_length(length: int) -> int:
    """The least m 2^k of at least 2 length - 1, m in 4 .. 7: lengths that transforms are fast for."""
    least = 2 * length - 1
    doublings = max(0, (least - 1).bit_length() - 3)
    return next(m << doublings for m in (4, 5, 6, 7, 8) if m << doublings >= least)


def prepare_taps(taps: Tensor) -> PreparedTaps:
    """The filter [H, 2 L - 1] of :meth:`tgdp_fast.models.s4.S4Layer.taps` for signals of up to L samples."""
    length = (taps.shape[1] + 1) // 2
    n = transform_length(length)
    circular = taps.new_zeros((taps.shape[0], n))
    circular[:, :length] = taps[:, length - 1 :]
    if length > 1:
        circular[:, 1 - length :] = taps[:, : length - 1]
    return PreparedTaps(torch.fft.rfft(circular).to(torch.complex64), n)


def long_convolution(u: Tensor, prepared: PreparedTaps, gelu: bool = True) -> Tensor:
    """y[t] = sum over lags m of taps[m] u[t - m], zero outside the signal, then the exact GELU.

    Args:
        u: float32 [B, H, L].
        prepared: for signals of at least L samples.
        gelu: whether to apply it.

    Returns:
        float32 [B, H, L], contiguous, new.
    """
    if u.shape[0] == 0:  # Some libraries cannot transform nothing.
        return torch.empty_like(u)
    spectrum = torch.fft.rfft(u, n=prepared.n).mul_(prepared.spectrum)
    y = torch.fft.irfft(spectrum, n=prepared.n)[..., : u.shape[-1]]
    return functional.gelu(y) if gelu else y.contiguous()


# ------------------------------------------------------------------------------------------------------- products


class _Products:
    """Products of weights [M, K] with the samples of [B, K, L], factors rounded to a precision, sums in float32.

    On the CPU each sample has a product of its own: no slower, in bfloat16 twice as fast, and its bits depend on no
    other sample (unless L = 1, where libraries sum in an order that alignment decides). There the factors of float16
    products are rounded but held as float32, because PyTorch's own float16 products are fifty times slower.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.dtype = PRECISIONS[precision]
        self.each = device.type == "cpu"
        self.storage = torch.float32 if self.each and precision == "fp16" else self.dtype

    def weight(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype).to(self.storage).contiguous()

    def rounded(self, values: Tensor) -> Tensor:
        """``values``, float32, as factors."""
        if self.dtype == torch.float16:  # Nothing bounds them; infinity would spread over the whole signal.
            values = values.clamp(-65504.0, 65504.0)
        return values.to(self.dtype).to(self.storage)

    def add(self, target: Tensor, weight: Tensor, values: Tensor) -> None:
        """target [B, M, L] += weight @ values; float32."""
        if weight.dtype == torch.float32:
            if self.each:
                for sample, factor in zip(target.unbind(), values.unbind(), strict=True):
                    sample.addmm_(weight, factor)
            else:
                target.baddbmm_(weight.expand(len(values), -1, -1), values)
        elif self.each:
            for sample, factor in zip(target.unbind(), values.unbind(), strict=True):
                sample.add_(torch.mm(weight, factor))
        else:
            target.add_(torch.bmm(weight.expand(len(values), -1, -1), values, out_dtype=torch.float32))


# --------------------------------------------------------------------------------------------------------- foldings


@dataclass(frozen=True)
class _S4:
    """One S4 block: normalise(u + mixture gelu(taps * u) + mixture_bias) * norm_weight + norm_bias."""

    taps: PreparedTaps
    mixture: Tensor  # [H, H]
    mixture_bias: Tensor  # [H, 1]
    norm_weight: Tensor  # [H, 1]
    norm_bias: Tensor  # [H, 1]
    epsilon: float

    @classmethod
    def of(cls, block: S4Block, products: _Products, length: int) -> _S4:
        layer, norm = block.s4_layer, block.norm_layer
        return cls(
            prepare_taps(layer.taps(length)),
            products.weight(layer.output_linear.weight.double()),
            layer.output_linear.bias.float().clone(),
            norm.weight.float()[:, None].clone(),
            norm.bias.float()[:, None].clone(),
            norm.eps,
        )


@dataclass(frozen=True)
class _Block:
    """One residual block. Rows of ``output``: what the residual stream gets, times 1 / sqrt 2, then the skip sum."""

    convolution: Tensor  # [2 C, 3 C], the left tap's C columns first
    first: _S4
    second: _S4
    output: Tensor  # [C + S, C]
    output_bias: Tensor  # [C + S, 1]

    @classmethod
    def of(cls, block: ResidualBlock, products: _Products, length: int) -> _Block:
        halves = (block.res_conv, math.sqrt(0.5)), (block.skip_conv, 1.0)
        return cls(
            products.weight(_convolution(block).weight_in(torch.float64).transpose(1, 2).flatten(1)),
            _S4.of(block.S41, products, length),
            _S4.of(block.S42, products, length),
            products.weight(torch.cat([scale * half.weight_in(torch.float64)[..., 0] for half, scale in halves])),
            torch.cat([scale * half.bias.double() for half, scale in halves]).float()[:, None],
        )


def _convolution(block: ResidualBlock) -> WeightNormConv1d:
    convolution = block.conv_layer.get_submodule("conv")
    assert isinstance(convolution, WeightNormConv1d)
    return convolution


def step_bias(source: SSSDECG, times: Tensor) -> Tensor:
    """What the diffusion steps add to the convolutions of three taps, their own bias included.

    Args:
        source: the network.
        times: [T], on its device.

    Returns:
        float32 [T, blocks, 3, 2 res_channels]: the bias inside the signal, and what of it the first and the last
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
    """Tells whether a module's parameters and buffers are those that they were."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = [
            (holder, name, f"{prefix}.{name}".lstrip("."), tensor, _version(tensor), tensor.data_ptr())
            for prefix, child in module.named_modules()
            for holder in (child._parameters, child._buffers)
            for name, tensor in holder.items()
            if tensor is not None
        ]

    def changed(self) -> str | None:
        """The name of the first tensor that was replaced, moved, converted or changed in place since, or None."""
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
        network: whose sizes they have.
        length: of the signals, L.

    Attributes:
        samples: that pass the network together; state [samples, C + S, L] is the residual stream, then the skip sum.
        part: of them pass a block together; taps [part, 3 C, L] holds what the three taps of a convolution see, zero
            where they see padding; u and square [part, 2 C, L].
    """

    def __init__(self, network: CompiledSSSDECG, length: int, batch: int) -> None:
        c, s = network.source.res_channels, network.source.skip_channels
        device = network.device
        self.length = length
        if device.type == "cpu":
            most = max(1, _STATE_BYTES // (4 * (c + s) * length))
            part = max(1, _PART_BYTES // (4 * 9 * c * length))
        else:
            most = part = _SAMPLES
        self.samples = min(most, max(1, batch))
        self.part = min(part, self.samples)
        self.is_largest = self.samples == most
        # Ordinary tensors, which calls in and outside inference mode may write.
        with torch.inference_mode(False):
            self.state = torch.empty((self.samples, c + s, length), device=device)
            self.taps = torch.zeros((self.part, 3 * c, length), device=device, dtype=network.products.storage)
            self.u = torch.empty((self.part, 2 * c, length), device=device)
            self.square = torch.empty_like(self.u)


class CompiledSSSDECG(nn.Module):
    """What :meth:`tgdp_fast.models.sssd_ecg.SSSDECG.compile_for_sampling` returns; see there.

    Attributes:
        source: the network that it was made of.
        precision: of its products.
        length: longest signal that it takes.
        takes_host_time: tells :class:`tgdp_fast.Denoiser` to leave the time on the host, where it can be looked up.
    """

    takes_host_time = True

    def __init__(self, source: SSSDECG, times: Times, *, precision: str, length: int | None) -> None:
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
        self.training = False  # Not by a call, which would have the source drop its kernels.
        with torch.inference_mode(False), torch.no_grad():
            self._fold(steps)
        self._forget()

    def _fold(self, steps: Tensor) -> None:
        source = self.source
        self.products = _Products(self.precision, self.device)
        self._blocks = [
            _Block.of(block, self.products, self.length)
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
        # Of the whole network these are a thousandth of the work: in float32 whatever the precision.
        self._ends = [
            (weight.float()[..., 0], bias.float()[:, None].clone())
            for weight, bias in (
                (stem.weight_in(torch.float64), stem.bias),
                (scale * hidden.weight_in(torch.float64), hidden.bias),
                (last.weight.clone(), last.bias),
            )
        ]
        self._float32 = _Products("fp32", self.device)
        self._label_weight: Tensor | None = None
        label_bias = torch.stack([block.first.norm_bias[:, 0] for block in self._blocks]).double()
        if source.embedding is not None:
            layers = [block.get_submodule("fc_label") for block in source.residual_layer.residual_blocks]
            self._label_weight = torch.cat([layer.get_parameter("weight").float() for layer in layers])
            label_bias = label_bias + torch.stack([layer.get_parameter("bias").double() for layer in layers])
        self._label_bias = label_bias.float()
        rows = step_bias(source, steps.to(self.device))
        self._step_rows = dict(zip(steps.tolist(), rows.unbind(), strict=True))
        self._table_size = len(self._step_rows)
        self._watch = _Watch(source)

    def _forget(self) -> None:
        """Drop what calls keep for the next one."""
        self._labels: tuple[Tensor, int, Tensor] | None = None
        self._workspace: _Workspace | None = None
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where it was compiled."""
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
        """The network's prediction; shapes and errors as for :class:`tgdp_fast.models.sssd_ecg.SSSDECG`.

        Args:
            x: [B, in_channels, L] with L in 1 .. length, on the network's device.
            time: diffusion steps [B], or [1] for all. Looked up if they are on the host. On another device nobody can
                look without waiting for it, so their biases are computed at each call: for a small batch that takes
                longer than the rest.
            labels: as for the network, [B] or [B, num_classes].

        Returns:
            [B, out_channels, L], new, in the dtype of x, without gradients.

        Raises:
            ValueError: a bad shape or device; x requires a gradient.
            RuntimeError: training mode, or the network was changed since it was compiled.
        """
        self._check(x, time)
        # Where the caller has it enabled, it would round the products that are to be in float32.
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

    # what depends on the step and on the labels ---------------------------------------------------------------

    def _step_biases(self, time: Tensor) -> Tensor:
        """[T] -> [T, blocks, 3, 2 C], see :func:`step_bias`."""
        if time.device.type != "cpu":
            return step_bias(self.source, time)
        values = time.tolist()
        missing = [value for value in dict.fromkeys(values) if value not in self._step_rows]
        if not missing:
            return torch.stack([self._step_rows[value] for value in values])
        with torch.inference_mode(False), torch.no_grad():
            rows = step_bias(self.source, torch.tensor(missing, dtype=torch.float64).to(self.device))
        found = self._step_rows | dict(zip(missing, rows.unbind(), strict=True))
        if not _capturing(self.device):  # The memory of a recording is not for others.
            self._step_rows.update({value: found[value].clone() for value in missing})
            for value in list(self._step_rows)[self._table_size :][:-_KEPT_TIMES]:
                del self._step_rows[value]
        return torch.stack([found[value] for value in values])

    def _label_biases(self, labels: Tensor | None) -> Tensor:
        """[B] or [B, num_classes] -> the bias of each block's first LayerNorm, [B or 1, blocks, 2 C]."""
        if self._label_weight is None or labels is None:
            self.source.embed_labels(labels)  # raises unless both are missing
            return self._label_bias[None]
        # A recording must compute what it depends on, and what it computes is valid in its replays only.
        keeps = not labels.is_inference() and not _capturing(self.device)
        kept = self._labels
        if keeps and kept is not None and kept[0] is labels and kept[1] == labels._version:
            return kept[2]
        each = labels.split(1) if self.products.each else (labels,)
        embeddings = [embedding.float() for part in each if (embedding := self.source.embed_labels(part)) is not None]
        biases = torch.cat([functional.linear(embedding, self._label_weight) for embedding in embeddings])
        biases = biases.unflatten(1, self._label_bias.shape) + self._label_bias
        if keeps:
            self._labels = labels, labels._version, biases
        return biases

    # layers ---------------------------------------------------------------------------------------------------

    def _predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        batch, _, length = x.shape
        label_biases = self._label_biases(labels)
        if len(label_biases) not in (1, batch):
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
            self._predict_together(x[rows], steps, _rows(label_biases, rows), output[rows], work)
        return output

    def _predict_together(self, x: Tensor, steps: Tensor, labels: Tensor, output: Tensor, work: _Workspace) -> None:
        """At most ``work.samples`` samples; ``steps`` and ``labels`` have a row for each, or one for all."""
        state = work.state[: len(x)]
        channels = self.source.res_channels
        stream, skip = state[:, :channels], state[:, channels:]
        stem, hidden, last = self._ends
        stream.copy_(stem[1].expand_as(stream))
        self._float32.add(stream, stem[0], x)
        stream.relu_()
        skip.zero_()
        # Block after block, so that the samples share its weights and spectra while they are in the cache.
        for k, block in enumerate(self._blocks):
            for rows in _slices(len(x), work.part):
                self._run_block(block, state[rows], _rows(steps, rows)[:, k], _rows(labels, rows)[:, k], work)
        h = hidden[1].expand_as(skip).contiguous()
        self._float32.add(h, hidden[0], skip)
        output.copy_(last[1].expand_as(output))
        self._float32.add(output, last[0], h.relu_())

    def _run_block(self, block: _Block, state: Tensor, step: Tensor, label_bias: Tensor, work: _Workspace) -> None:
        """state [b, C + S, L], in place; step [b or 1, 3, 2 C]; label_bias [b or 1, 2 C]."""
        u = work.u[: len(state)]
        self._convolve(block, state, step, u, work)
        self._run_s4(block.first, u, label_bias[..., None], work)
        self._run_s4(block.second, u, block.second.norm_bias, work)
        gated = self.products.rounded(gated_activation(u))
        state[:, : self.source.res_channels].mul_(math.sqrt(0.5))
        state.add_(block.output_bias)
        self.products.add(state, block.output, gated)

    def _convolve(self, block: _Block, state: Tensor, step: Tensor, u: Tensor, work: _Workspace) -> None:
        """u = the convolution of three taps of the residual stream, with the step's bias."""
        left, centre, right = work.taps[: len(state)].chunk(3, dim=1)
        centre.copy_(self.products.rounded(state[:, : self.source.res_channels]))
        left[..., 1:] = centre[..., :-1]
        right[..., :-1] = centre[..., 1:]
        whole, at_first, at_last = step.unbind(1)
        u.copy_(whole[..., None].expand_as(u))
        u[..., 0].sub_(at_first)
        u[..., -1].sub_(at_last)
        self.products.add(u, block.convolution, work.taps[: len(state)])

    def _run_s4(self, layer: _S4, u: Tensor, norm_bias: Tensor, work: _Workspace) -> None:
        """u [b, 2 C, L], in place."""
        mixed = self.products.rounded(long_convolution(u, layer.taps))
        u.add_(layer.mixture_bias)
        self.products.add(u, layer.mixture, mixed)
        # LayerNorm over the channels. Moments by var_mean would take ten times as long along this dimension.
        square = work.square[: len(u)]
        u.sub_(u.mean(1, keepdim=True))
        torch.mul(u, u, out=square)
        u.mul_(square.mean(1, keepdim=True).add_(layer.epsilon).rsqrt_())
        u.mul_(layer.norm_weight).add_(norm_bias)

    # copies ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Copies hold no buffers. They watch their own network, so this one has to be what it was."""
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
    """The different times, float32 values [K], on the host."""
    if times is None:
        return torch.empty(0)
    if isinstance(times, NoiseSchedule):
        if times.num_train_steps is None:
            raise ValueError(
                "schedule must be discrete, to have a list of diffusion steps, got a continuous one; pass the solver's "
                "table: compile_for_sampling(solver_table(name, schedule, steps))"
            )
        times = np.arange(times.num_train_steps)
    elif isinstance(times, SolverTable):
        times = times.times.copy()
    try:
        steps = torch.as_tensor(times).detach().to("cpu", torch.float32)
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


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _rows(values: Tensor, rows: slice) -> Tensor:
    """The rows, or the one row that is for all."""
    return values if len(values) == 1 else values[rows]


def _capturing(device: torch.device) -> bool:
    """Whether calls are being recorded in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
