"""The convolution of an S4 layer, as long as the signal and over both sides, with its activation.

y[b, h, t] = gelu( sum_s taps[h, L - 1 + t - s] u[b, h, s] )
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tgdp_fast.ops import _cuda, _triton, registry
from tgdp_fast.runtime import fakes, native
from tgdp_fast.runtime.checks import check_choice

__all__ = [
    "LONGEST",
    "LongConvolution",
    "long_convolution",
    "long_convolution_reference",
    "prepare_long_convolution",
    "two_sided_convolution",
]

_OPERATOR = "long_convolution"
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)
#: Sizes of transforms that the CPU kernel has.
_POINTS = (64, 128, 256, 512, 1024)
#: And those of the CUDA kernel.
_CUDA_POINTS = (256, 512, 1024)
#: Positions of the longest signal that these and the Triton kernel serve.
LONGEST = _POINTS[-1]
#: Of float16 spectra over their scales: small parts keep their digits.
_LARGEST_HALF = 16384.0


class LongConvolution(NamedTuple):
    """Filters of a layer, and what :func:`prepare_long_convolution` computed of them once.

    Attributes:
        taps: [H, 2 L - 1] for lags -(L-1) .. L-1, as they were given: what the reference uses.
        packed: their spectra as one kernel for the taps' device reads them, float32 or float16: the CPU's
            [ceil(H / 16), M, 2, 16], Triton's [H, 2, A, B] with A B = M, CUDA's [H, M, 2]; None where there is no such
            kernel.
        scales: float32, what the spectra are relative to: the CPU's for each channel, in whole groups of 16, or none of
            them for float32 spectra; Triton's for each channel; CUDA's for each channel, or none of them; or None.
    """

    taps: Tensor
    packed: Tensor | None
    scales: Tensor | None

    @property
    def channels(self) -> int:
        return self.taps.shape[0]

    @property
    def length(self) -> int:
        """The longest signal that it serves."""
        return (self.taps.shape[1] + 1) // 2

    def without_taps(self) -> LongConvolution:
        """The same without the memory of the taps, for kernels that read the packed spectra; of the taps only the shape
        is kept, on the device "meta".

        Raises:
            ValueError: there are no packed spectra.
        """
        if self.packed is None:
            raise ValueError("there are no packed spectra, and nothing else than taps; keep them")
        return self._replace(taps=self.taps.to("meta"))


def prepare_long_convolution(
    taps: Tensor, dtype: torch.dtype = torch.float32, *, backend: str = "auto"
) -> LongConvolution:
    """Everything about a layer's filters that does not depend on its input, computed in float64.

    Changing ``taps`` later does not change what was prepared from them.

    Args:
        taps: [H, 2 L - 1] floating point, lags -(L-1) .. L-1: lag 0, which includes the skip term D, is at index L - 1.
            See :func:`tgdp_fast.models.s4.two_sided_taps`.
        dtype: of the inputs that are to come. For float16 and bfloat16 the spectra are kept in float16, relative to a
            power of two for each channel: half the bytes to read, and an error of 3e-4.
        backend: whose kernel will read the spectra. Each has its own layout; the other backends refuse it. "auto" is
            the backend set around this call (:func:`tgdp_fast.ops.use_backend`, TGDP_BACKEND), else that of the device:
            on a GPU CUDA, which was measured to be faster, or Triton if CUDA kernels are not installed. Residual blocks
            on a GPU (:func:`tgdp_fast.ops.residual_block_`) read either.

    Returns:
        For :func:`long_convolution` on the device of the taps. Spectra take 8 H M bytes, or 4 H M for 16 bits, with M
        the power of two from L on, at least 64, or 256 on a GPU. There are none if the backend is not installed.

    Raises:
        ValueError: a wrong shape or dtype, or an unknown backend.
    """
    check_choice("backend", backend, (*registry.BACKENDS, "auto"))
    if taps.ndim != 2 or taps.shape[1] % 2 == 0:
        raise ValueError(
            f"taps must have shape [H, 2 L - 1], an odd number for each channel with lag 0 in the middle, got "
            f"{tuple(taps.shape)}"
        )
    _check_dtype("taps", taps.dtype)
    _check_dtype("dtype", dtype)
    length = (taps.shape[1] + 1) // 2
    packed = scales = None
    reader = None if dtype == torch.float64 else _reader(taps.device.type, dtype, backend)
    if reader is not None:
        with torch.no_grad():
            packed, scales = _PACKERS[reader](taps, length, dtype in _HALF)
    return LongConvolution(taps, packed, scales)


def _reader(device_type: str, dtype: torch.dtype, backend: str) -> str | None:
    """The backend that spectra on a device are packed for, or None if there is no kernel for them."""
    there = {
        "triton": _triton.MISSING is None and device_type == _triton.DEVICE_TYPE,
        "cuda": native.CUDA_MISSING is None and device_type == "cuda",
        "cpu": native.CPU_MISSING is None and device_type == "cpu",
    }
    if backend != "auto":
        return backend if there.get(backend, False) else None
    around = registry.requested_backend()
    if there.get(around, False):
        return around
    # 1.7 and 2.9 ms for twelve layers of 64 samples in 16 bits, 1.8 and 5.2 in float32 (see measured.py).
    return next((name for name in ("cuda", "triton", "cpu") if there[name]), None)


def _pack_for_cpu(taps: Tensor, length: int, half: bool) -> tuple[Tensor | None, Tensor | None]:
    points = _points(length)
    if points is None:
        return None, None
    spectra = torch.view_as_real(_spectra(taps.to(torch.float64), points).contiguous())
    packed, scales = torch.ops.tgdp_fast.pack_long_convolution(spectra, half)
    return packed, scales


def _pack_for_triton(taps: Tensor, length: int, half: bool) -> tuple[Tensor | None, Tensor | None]:
    from tgdp_fast.kernels.long_convolution import pack, points_of

    points = points_of(length)
    return (None, None) if points is None else pack(_spectra(taps.to(torch.float64), points), half)


def _pack_for_cuda(taps: Tensor, length: int, half: bool) -> tuple[Tensor | None, Tensor | None]:
    points = next((points for points in _CUDA_POINTS if points >= length), None)
    if points is None:
        return None, None
    spectra = _spectra(taps.to(torch.float64), points)
    scales = spectra.real.new_empty(0)
    if half:
        # Powers of two round nothing.
        largest = torch.view_as_real(spectra).abs().amax((1, 2)) if len(spectra) else scales
        usable = largest.isfinite() & (largest > 0)
        scales = torch.exp2((torch.where(usable, largest, _LARGEST_HALF) / _LARGEST_HALF).log2().ceil())
        spectra = spectra / scales[:, None]
    return torch.view_as_real(spectra).to(torch.float16 if half else torch.float32).contiguous(), scales.float()


_PACKERS = {"triton": _pack_for_triton, "cuda": _pack_for_cuda, "cpu": _pack_for_cpu}


def long_convolution(u: Tensor, prepared: LongConvolution, *, gelu: bool = True, backend: str = "auto") -> Tensor:
    """Each channel convolved with a filter over all positions before and after, and exact GELU (with erf) of that.

    Precision: transforms in float32 whatever the dtype of u, in float64 if u is float64; by Triton for u of 16 bits as
    matmuls of float16 with an error of 5e-4. The result of a channel of a sample does not depend on the batch or on the
    number of threads; the last digits of Triton's may depend on the batch. NaN stays in its
    channel and sample. Works under inference_mode and ``torch.compile(fullgraph=True)``. Differentiable in u and the
    taps if the reference serves the call; with "auto" it does whenever a gradient may be needed.

    Cost for N = B H L elements of b bytes and spectra of M >= L points in s bytes per number: 2 N b + 2 H M s bytes of
    memory traffic, and about N (8 M log2(M) / L + 25) FLOPs: 57 million for B = 1, H = 512, L = 1000. By definition it
    would be N (2 L + 25).

    Args:
        u: [B, H, L] floating point.
        prepared: by :func:`prepare_long_convolution` for H channels and signals of L samples or more.
        gelu: False omits the activation.
        backend: "auto", "reference", or a faster implementation by name; "cpu", "triton" and "cuda" serve float32,
            bfloat16 and float16 and L up to 1024, with what was prepared for them.

    Returns:
        [B, H, L], contiguous, new, in the dtype of u.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        BackendUnavailableError: the requested backend cannot serve the call.

    Source: the S4 layer of Alcaraz & Strodthoff, "Diffusion-based Conditional ECG Generation with Structured State
        Space Models", 2023, arXiv 2301.08227; two-sided filters as in Goel et al., ICML 2022, arXiv 2202.09729.
    """
    _check(u, prepared)
    implementation = registry.resolve(_OPERATOR, backend, u, *prepared, gelu)
    output: Tensor = implementation.function(u, *prepared, gelu)
    return output


def long_convolution_reference(u: Tensor, prepared: LongConvolution, *, gelu: bool = True) -> Tensor:
    """Plain PyTorch twin of :func:`long_convolution`, without checks, under ordinary autograd: real transforms of 2 L
    points, of the taps too.
    """
    return _reference(u, *prepared, gelu)


def _reference(u: Tensor, taps: Tensor, packed: Tensor | None, scales: Tensor | None, gelu: bool) -> Tensor:
    precision = torch.float64 if u.dtype == torch.float64 else torch.float32
    length = u.shape[-1]
    longer = (taps.shape[1] + 1) // 2 - length
    y = two_sided_convolution(u.to(precision), taps[:, longer : taps.shape[1] - longer].to(precision))
    return (functional.gelu(y) if gelu else y).to(u.dtype).contiguous()


def two_sided_convolution(u: Tensor, taps: Tensor) -> Tensor:
    """y[t] = sum over lags m of taps[m] u[t - m], zero outside the signal; by transforms of twice the length.

    Args:
        u: [B, H, L].
        taps: [H, 2 L - 1], lags -(L-1) .. L-1, in the dtype of u: float32 or float64.

    Returns:
        [B, H, L].
    """
    if u.numel() == 0:  # Some libraries cannot transform nothing.
        return u.clone()
    length = u.shape[-1]
    # Output t stands at index t + L - 1; what wraps around falls on others.
    spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(taps, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., length - 1 : 2 * length - 1]


def _points(length: int) -> int | None:
    """Points of the CPU kernel's transform, or None if it has none so long."""
    return next((points for points in _POINTS if points >= length), None)


def _spectra(taps: Tensor, points: int) -> Tensor:
    """sum over lags l of taps[l] exp(-2 pi i l (k - 1/4) / M) / M for k < M = points: [H, M] complex128.

    Those are M-th roots of i: lags below 0 come from the end, divided by it.
    """
    length = (taps.shape[1] + 1) // 2
    folded = taps.new_zeros(taps.shape[0], points, 2)
    folded[:, :length, 0] = taps[:, length - 1 :]
    folded[:, points - length + 1 :, 1] = -taps[:, : length - 1]
    weighted = torch.view_as_complex(folded)
    if taps.shape[0] == 0:  # Some libraries cannot transform nothing.
        return weighted
    angles = torch.arange(points, dtype=torch.float64, device=taps.device) * (math.pi / (2 * points))
    return torch.fft.fft(weighted * torch.polar(torch.ones_like(angles), angles), norm="forward")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _FLOATING:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}; convert it with .to()")


def _check(u: Tensor, prepared: LongConvolution) -> None:
    if u.ndim != 3 or u.shape[2] == 0:
        raise ValueError(f"u must have shape [B, H, L], L at least 1, got {tuple(u.shape)}")
    _check_dtype("u", u.dtype)
    if not isinstance(prepared, LongConvolution):
        raise ValueError(
            f"prepared must be a LongConvolution, got {type(prepared).__name__}; use prepare_long_convolution(taps)"
        )
    if prepared.channels != u.shape[1] or prepared.length < u.shape[2]:
        raise ValueError(
            f"prepared must be for {u.shape[1]} channels and signals of {u.shape[2]} samples or more, got "
            f"{prepared.channels} channels and length {prepared.length}; prepare it from taps of shape "
            f"({u.shape[1]}, {2 * u.shape[2] - 1})"
        )
    held = prepared.taps if prepared.packed is None or not prepared.taps.is_meta else prepared.packed
    if held.device != u.device:
        raise ValueError(
            f"prepared must be on the device of u, {u.device}, got {held.device}; prepare it from taps there"
        )


def unsupported_without_taps(u: Tensor, taps: Tensor, *_: Any) -> str | None:
    """Why the reference cannot take a call, or None."""
    dropped = taps.is_meta and not u.is_meta
    return (
        "the taps were dropped; prepare the filters where this backend is asked for, and keep them" if dropped else None
    )


def _unsupported_by_cpu(
    u: Tensor, taps: Tensor, packed: Tensor | None, scales: Tensor | None, gelu: bool
) -> str | None:
    return _unsupported(u, taps, packed, "cpu")


def _unsupported_by_triton(
    u: Tensor, taps: Tensor, packed: Tensor | None, scales: Tensor | None, gelu: bool
) -> str | None:
    return _triton.unsupported_device(u) or _unsupported(u, taps, packed, "triton")


def _unsupported_by_cuda(
    u: Tensor, taps: Tensor, packed: Tensor | None, scales: Tensor | None, gelu: bool
) -> str | None:
    reason = _unsupported(u, taps, packed, "cuda") or _cuda.unsupported_device(u)
    if reason is None and u.shape[0] * u.shape[1] >= 2**31:
        return f"it serves fewer than 2^31 signals, not {u.shape[0]} x {u.shape[1]}"
    return reason


def _unsupported(u: Tensor, taps: Tensor, packed: Tensor | None, backend: str) -> str | None:
    wanted = torch.is_grad_enabled() and (u.requires_grad or taps.requires_grad)
    if wanted or torch._C._are_functorch_transforms_active():
        return "it computes no gradients, and somebody may ask for one; use torch.no_grad() where nobody does"
    reason = registry.unsupported_float64(u)
    if reason is not None:
        return reason
    if u.shape[2] > LONGEST:
        return f"it serves up to {LONGEST} positions, not {u.shape[2]}"
    if packed is None or packed_for(packed) != backend:
        call = f"prepare_long_convolution(taps, {u.dtype}, backend={backend!r})"
        return f"the taps were prepared for another device or dtype or backend; use {call}"
    if packed.dtype == torch.float16 and u.dtype == torch.float32:
        return "the taps were prepared for inputs of 16 bits; use prepare_long_convolution(taps, torch.float32)"
    return None


def packed_for(packed: Tensor) -> str:
    """The backend that packed spectra are for: of the CPU's, the second size is the number of points."""
    if packed.ndim == 3:
        return "cuda"
    return "triton" if packed.shape[1] == 2 else "cpu"


# The same operator on tensors of either device.
def _call_native(u: Tensor, taps: Tensor, packed: Tensor, scales: Tensor, gelu: bool) -> Tensor:
    output: Tensor = torch.ops.tgdp_fast.long_convolution(u, packed, scales, gelu)
    return output


def _call_triton(u: Tensor, taps: Tensor, packed: Tensor, scales: Tensor, gelu: bool) -> Tensor:
    output: Tensor = torch.ops.tgdp_fast.long_convolution_triton(u, packed, scales, gelu)
    return output


def _launch_triton(u: Tensor, packed: Tensor, scales: Tensor, gelu: bool) -> Tensor:
    from tgdp_fast.kernels.long_convolution import launch

    output = fakes.long_convolution(u, packed, scales, gelu)
    with torch.cuda.device_of(u):
        launch(output, u.contiguous(), packed, scales, activation=gelu, exact=u.dtype == torch.float32)
    return output


_triton.define(
    "long_convolution_triton",
    "(Tensor u, Tensor packed, Tensor scales, bool gelu) -> Tensor",
    _launch_triton,
    fakes.long_convolution,
)

registry.register(_OPERATOR, "cpu", _call_native, _unsupported_by_cpu, missing=native.CPU_MISSING)
registry.register(_OPERATOR, "cuda", _call_native, _unsupported_by_cuda, missing=native.CUDA_MISSING)
registry.register(_OPERATOR, "triton", _call_triton, _unsupported_by_triton, missing=_triton.MISSING)
registry.register(_OPERATOR, "reference", _reference, unsupported_without_taps)
