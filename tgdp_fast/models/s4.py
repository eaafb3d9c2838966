"""S4: convolutions as long as the signal whose kernels a structured state space generates.

A kernel is the impulse response k[l] = Re(C Abar^l Bbar) of x' = A x + B u, y = Re(C x), discretised with step dt by
the bilinear transform. A is normal plus low rank, here of rank 1, in the basis that makes the normal part diagonal:

    A = diag(w, conj w) - (P, conj P) (Q, conj Q)^T,     Q = conj P

Only one pole of each conjugate pair is stored. In that form the kernel's discrete Fourier transform is a few sums over
poles, evaluated at the roots of unity omega, or rather at z = 2 (1 - omega) / (1 + omega):

    R_XY(z) = dt sum_n [ X_n Y_n / (z - dt w_n) + conj(X_n Y_n) / (z - dt conj(w_n)) ]
    DFT k   = 2 / (1 + omega) ( R_BC - R_PC R_BQ / (1 + R_PQ) ),     C the stored C~ = C (I - Abar^L)

A layer has two kernels per feature, one over the past and one over the future. Names of parameters and buffers are
those of the released SSSD-ECG checkpoints; complex values are stored as real tensors with a last dimension of 2.

Sources: Gu, Goel & Re, "Efficiently Modeling Long Sequences with Structured State Spaces", ICLR 2022, arXiv
2111.00396 (section 3, Algorithm 1, appendix C); Gu et al., "HiPPO", NeurIPS 2020, arXiv 2008.07669; two-sided kernels
as in Goel et al., "It's Raw! Audio Generation with State-Space Models", ICML 2022, arXiv 2202.09729.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tgdp_fast.ops.long_convolution import two_sided_convolution
from tgdp_fast.runtime.checks import check_choice, check_integer

CAUCHY = ("pair", "half")
DT_RANGE = (1e-3, 1e-1)
_REAL = (torch.float32, torch.float64)
#: Features whose kernels the CPU computes together: few enough that the terms of their sums stay in its cache.
_FEATURES = 16

# ------------------------------------------------------------------------------------------------- initial values


@lru_cache
def hippo_legs(d_state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The HiPPO-LegS state space in normal-plus-low-rank form: w, P and B, each complex128 [d_state / 2].

    Of each conjugate pair the pole with the positive imaginary part, in increasing order; eigenvectors with the phase
    that makes P positive, so that they are the same on each machine.

    Source: Gu et al. 2022, Theorem 1 and appendix C.1.
    """
    n = np.arange(d_state, dtype=np.float64)
    p, b = np.sqrt(n + 0.5), np.sqrt(2 * n + 1)
    # A + P P^T = S - I / 2 with S skew-symmetric: the Hermitian -i S has orthonormal eigenvectors, accurate in float64.
    s = 0.5 * b[:, None] * b[None, :] * np.sign(n[None, :] - n[:, None])
    frequencies, vectors = np.linalg.eigh(-1j * s)
    frequencies, vectors = frequencies[d_state // 2 :], vectors[:, d_state // 2 :]
    projected = vectors.conj().T @ p
    vectors = vectors * (projected / np.abs(projected))
    return -0.5 + 1j * frequencies, vectors.conj().T @ p, vectors.conj().T @ b


@lru_cache
def _eigenbasis(d_state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues of A, eigenvectors and their inverse, complex128: good enough for the initial C, not for kernels.

    A itself has no usable eigenbasis (condition number 1e15 at d_state 64). A matrix within 1e-11 of it has one, of
    1e10, and nearly the same powers, for A + A^* is negative definite: powers come out within 1e-6. Source: Davies,
    "Approximate diagonalization", SIAM Journal on Matrix Analysis and Applications 29(4), 2007.
    """
    w, p, _ = hippo_legs(d_state)
    poles, p = np.concatenate([w, w.conj()]), np.concatenate([p, p.conj()])
    matrix = np.diag(poles) - np.outer(p, p.conj())
    change = np.random.default_rng(0).standard_normal(matrix.shape)
    values, vectors = np.linalg.eig(matrix + 1e-11 * np.linalg.norm(matrix, 2) * change)
    return values, vectors, np.linalg.inv(vectors)


def length_corrected(c: Tensor, dt: Tensor, d_state: int, length: int) -> Tensor:
    """C~ = C (I - Abar^length), which makes the closed form the kernel of that length instead of an aliased one.

    Shapes: c [2, H, d_state / 2] complex; dt [H]; the result has the shape of c, in complex128, accurate to 1e-6.
    """
    values, vectors, inverse = (torch.as_tensor(array, device=c.device) for array in _eigenbasis(d_state))
    half_steps = 0.5 * dt.to(torch.float64)[:, None] * values
    decay = ((1 + half_steps) / (1 - half_steps)) ** length
    c = c.to(torch.complex128)
    powers = ((torch.cat([c, c.conj()], dim=-1) @ vectors) * decay) @ inverse
    return c - powers[..., : d_state // 2]


def fourier_nodes(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """omega_j = exp(-2 pi i j / length) and z_j = 2 (1 - omega_j) / (1 + omega_j) for j = 0 .. length // 2.

    z belongs to omega as rounded to ``dtype``: the two together, not each alone, decide the accuracy of a kernel. At
    omega = -1 the imaginary part of exp(-i pi) in float64, -1.2e-16, keeps z finite.

    Returns:
        omega and z, [length // 2 + 1, 2] of ``dtype``: real and imaginary parts.
    """
    omega = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
    rounded = torch.view_as_real(torch.as_tensor(omega)).to(dtype)
    omega = torch.view_as_complex(rounded.to(torch.float64))
    return rounded, torch.view_as_real(2 * (1 - omega) / (1 + omega)).to(dtype)


# -------------------------------------------------------------------------------------------------------- kernels


class NPLRKernel(nn.Module):
    """The kernels of a normal-plus-low-rank state space, over the past and over the future, for each feature.

    Only C is trained. The nodes are part of the function that a checkpoint was trained on: kernels are computed from
    the stored omega and z, with their rounding.

    Args:
        features: number of features H.
        d_state: state size N, even.
        l_max: number of taps of each kernel.
        cauchy: "pair" for the kernels above. "half" leaves out the conjugate poles, which is another function: released
            code computes it where its CUDA extension and PyKeOps are missing (it warns of a "slow Cauchy kernel"), so a
            checkpoint may have been trained on it.

    State: C [2, H, N/2, 2]; buffers B, P, Q [1, H, N/2, 2], w [H, N/2, 2], log_dt [H], omega and z [l_max // 2 + 1, 2].
    log_dt is log-uniform in 1e-3 .. 1e-1 at first, C standard normal before the correction to C~.
    """

    B: Tensor
    P: Tensor
    Q: Tensor
    w: Tensor
    log_dt: Tensor
    omega: Tensor
    z: Tensor

    def __init__(self, features: int, d_state: int = 64, l_max: int = 1000, cauchy: str = "pair") -> None:
        super().__init__()
        self.features = check_integer("features", features, 1)
        self.d_state = check_integer("d_state", d_state, 2)
        if self.d_state % 2:
            raise ValueError(f"d_state must be even (the state consists of conjugate pairs), got {d_state}")
        self.l_max = check_integer("l_max", l_max, 1)
        self.cauchy = check_choice("cauchy", cauchy, CAUCHY)
        dtype = torch.get_default_dtype()
        w, p, b = (torch.as_tensor(array).expand(features, -1) for array in hippo_legs(self.d_state))

        low, high = (math.log(bound) for bound in DT_RANGE)
        log_dt = low + (high - low) * torch.rand(features)
        c = torch.randn(2, features, self.d_state // 2, dtype=torch.complex64)
        self.C = nn.Parameter(_real_view(length_corrected(c, log_dt.exp(), self.d_state, self.l_max), dtype))
        self.register_buffer("log_dt", log_dt)
        self.register_buffer("B", _real_view(b[None], dtype))
        self.register_buffer("P", _real_view(p[None], dtype))
        self.register_buffer("w", _real_view(w, dtype))
        self.register_buffer("Q", _real_view(p[None].conj(), dtype))
        omega, z = fourier_nodes(self.l_max, dtype)
        self.register_buffer("omega", omega)
        self.register_buffer("z", z)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The kernels over the past (lags 0, 1, ..) and over the future (leads 1, 2, ..): [2, H, l_max].

        Differentiable in C. What the sums need is computed again in the backward pass rather than kept: at H = 512,
        l_max = 1000 that would be 131 MB for each layer in float32.

        Args:
            dtype: float32 or float64, of the arithmetic and the result; default that of the stored tensors.

        Raises:
            ValueError: another dtype, also of the stored tensors when none is given.
        """
        dtype = self.C.dtype if dtype is None else dtype
        if dtype not in _REAL:
            raise ValueError(
                f"kernels of S4 need dtype float32 or float64, got {dtype}; keep the model in float32 and use "
                "torch.autocast for products in 16 bits"
            )
        if torch.is_grad_enabled() and self.C.requires_grad:
            kernels: Tensor = checkpoint(self._generate, self.C, dtype, use_reentrant=False, preserve_rng_state=False)
            return kernels
        return self._generate(self.C, dtype)

    def _generate(self, stored_c: Tensor, dtype: torch.dtype) -> Tensor:
        c, b, p, q, w, omega, z = (
            torch.view_as_complex(stored.to(dtype).contiguous())
            for stored in (stored_c, self.B, self.P, self.Q, self.w, self.omega, self.z)
        )
        dt = self.log_dt.to(dtype).exp()[:, None]
        numerators = torch.cat([b, p])[:, None] * torch.cat([c, q])[None]  # B and P times C, C (future) and Q
        together = _FEATURES if stored_c.device.type == "cpu" else self.features
        kernels = []
        for start in range(0, self.features, together):
            rows = slice(start, start + together)
            poles, products = dt[rows] * w[rows], numerators[:, :, rows]
            if self.cauchy == "pair":
                poles = torch.cat([poles, poles.conj()], dim=-1)
                products = torch.cat([products, products.conj()], dim=-1)
            sums = dt[rows] * torch.einsum("xyhn,hnj->xyhj", products, (z - poles[..., None]).reciprocal_())
            spectrum = sums[0, :2] - sums[1, :2] * sums[0, 2] / (1 + sums[1, 2])
            kernels.append(torch.fft.irfft(2 / (1 + omega) * spectrum, n=self.l_max))
        return torch.cat(kernels, dim=1)


def _real_view(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Complex [...] -> real [..., 2] of ``dtype``, with memory of its own."""
    return torch.view_as_real(values.resolve_conj()).to(dtype, memory_format=torch.contiguous_format, copy=True)


class _Kept(NamedTuple):
    """Kernels, and what they were computed from."""

    tensors: list[Tensor]
    state: tuple[Any, ...]
    kernels: Tensor


class S4Kernel(nn.Module):
    """The kernels of an :class:`NPLRKernel`, computed anew only where they may have changed.

    In training mode, and wherever somebody may ask for the gradient of C, each call computes them. Otherwise they are
    kept, and computed again when a tensor they depend on has been replaced, moved, converted or changed in place.
    Changes that PyTorch does not count (through ``.data``, a NumPy view or an optimiser of another library) are noticed
    after the next call of :meth:`train` or :meth:`eval`.

    Arguments as for :class:`NPLRKernel`.
    """

    def __init__(self, features: int, d_state: int = 64, l_max: int = 1000, cauchy: str = "pair") -> None:
        super().__init__()
        self.kernel = NPLRKernel(features, d_state, l_max, cauchy)
        self._kept: _Kept | None = None

    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps of each kernel: [2, H, length], see :meth:`NPLRKernel.forward`.

        Raises:
            ValueError: a length outside 1 .. l_max.
        """
        l_max = self.kernel.l_max
        if not 1 <= length <= l_max:
            raise ValueError(
                f"length must be in 1..{l_max}, the number of taps (l_max), got {length}; cut the signal, or train a "
                "model with a larger l_max"
            )
        if self.training or (torch.is_grad_enabled() and self.kernel.C.requires_grad):
            self._kept = None
            kernels: Tensor = self.kernel()
            return kernels[..., :length]
        return self._without_gradients()[..., :length]

    def _without_gradients(self) -> Tensor:
        tensors = [*self.kernel.parameters(), *self.kernel.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            return self._compute()  # Their changes are not counted.
        state = (self.kernel.cauchy, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        kept = self._kept
        if kept is None or kept.state != state or any(a is not b for a, b in zip(kept.tensors, tensors, strict=True)):
            kept = self._kept = _Kept(tensors, state, self._compute())
        return kept.kernels

    def _compute(self) -> Tensor:
        # Tensors made in inference mode could not be used where a gradient of the input is wanted later.
        with torch.inference_mode(False), torch.no_grad():
            kernels: Tensor = self.kernel()
        return kernels

    def train(self, mode: bool = True) -> S4Kernel:
        self._kept = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles do not hold kept kernels."""
        return {**self.__dict__, "_kept": None}


# --------------------------------------------------------------------------------------------------------- layers


def two_sided_taps(kernels: Tensor) -> Tensor:
    """Kernels over the past and the future [2, H, L] -> one filter [H, 2 L - 1] for lags -(L-1) .. L-1.

    Lag 0 is at index L - 1. The last tap over the future would belong to lag -L, which reaches no sample.
    """
    past, future = kernels
    return torch.cat([future[..., :-1].flip(-1), past], dim=-1)


def two_sided_convolution_direct(u: Tensor, taps: Tensor) -> Tensor:
    """:func:`two_sided_convolution` term by term: L times the work, without the rounding of transforms."""
    length = u.shape[-1]
    t = torch.arange(length, device=u.device)
    matrices = taps[:, t[:, None] - t[None, :] + length - 1]
    return torch.einsum("hts,bhs->bht", matrices, u)


class TransposedLinear(nn.Module):
    """Linear map of the second-to-last dimension: [..., H, L] -> weight [H, H] @ [..., H, L] + bias [H, 1]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(features)
        self.weight = nn.Parameter(torch.empty(features, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(features, 1).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x + self.bias


class S4Layer(nn.Module):
    """output_linear(gelu(K * u + D u)): a two-sided long convolution per feature, exact GELU, and a linear mixture.

    Args:
        features: number of features H.
        d_state, l_max, cauchy: see :class:`NPLRKernel`.

    Shapes: ``forward(u [B, H, L]) -> [B, H, L]`` for any L in 1 .. l_max. A shorter signal meets the first L taps of
    each kernel: the sampling step stays what it is. The convolution is computed in the dtype of the parameters, also
    under autocast, for it sums as many terms as the signal is long.
    """

    def __init__(self, features: int, d_state: int = 64, l_max: int = 1000, cauchy: str = "pair") -> None:
        super().__init__()
        self.D = nn.Parameter(torch.randn(1, features))
        self.kernel = S4Kernel(features, d_state, l_max, cauchy)
        self.output_linear = TransposedLinear(features)

    def taps(self, length: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """The whole convolution as one filter, D included at lag 0, without gradients: what sampling can precompute.

        Args:
            length: of the signal, default l_max.
            dtype: float64 or float32, of the arithmetic and the result.

        Returns:
            [H, 2 length - 1] for lags -(length-1) .. length-1; apply it with :func:`two_sided_convolution`.

        Raises:
            ValueError: a length outside 1 .. l_max, or another dtype.
        """
        nplr = self.kernel.kernel
        length = nplr.l_max if length is None else check_integer("length", length, 1)
        if length > nplr.l_max:
            raise ValueError(f"length must be at most l_max = {nplr.l_max}, got {length}")
        with torch.no_grad():
            taps = two_sided_taps(nplr(dtype)[..., :length])
            taps[:, length - 1] += self.D[0].to(dtype)
        return taps

    def forward(self, u: Tensor) -> Tensor:
        kernels = self.kernel(u.shape[-1])
        u = u.to(kernels.dtype)
        y = two_sided_convolution(u, two_sided_taps(kernels)) + self.D[0, :, None] * u
        result: Tensor = self.output_linear(functional.gelu(y))
        return result


class S4Block(nn.Module):
    """LayerNorm over the features of u + S4Layer(u). Arguments and shapes as for :class:`S4Layer`."""

    def __init__(self, features: int, d_state: int = 64, l_max: int = 1000, cauchy: str = "pair") -> None:
        super().__init__()
        self.s4_layer = S4Layer(features, d_state, l_max, cauchy)
        self.norm_layer = nn.LayerNorm(features)

    def forward(self, u: Tensor) -> Tensor:
        result: Tensor = self.norm_layer((u + self.s4_layer(u)).transpose(1, 2)).transpose(1, 2)
        return result
