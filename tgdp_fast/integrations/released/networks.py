"""The networks of released code: SSSD-ECG's, and the guidance network of the ECG experiment with its holder."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tgdp_fast.models.ecg_stem import ECGStem
from tgdp_fast.models.mlp import check_labels_given, encode_labels
from tgdp_fast.models.sssd_ecg.network import SSSDECG
from tgdp_fast.ops import mlp_value_and_grad
from tgdp_fast.runtime.checkpoint import CheckpointError
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number
from tgdp_fast.runtime.reading import refused
from tgdp_fast.runtime.state_dict import read_state_dict, restored

CONVENTIONS = ("paper", "released")

#: Names in SSSD-ECG -> names here, where they differ; the three widths of the step embedding are one argument here.
_NAMES = {
    "s4_lmax": "l_max",
    "s4_d_state": "d_state",
    "label_embed_classes": "num_classes",
    "label_embed_dim": "label_dim",
}
_STEP_DIMS = ("diffusion_step_embed_dim_in", "diffusion_step_embed_dim_mid", "diffusion_step_embed_dim_out")


class SSSD_ECG(SSSDECG):  # noqa: N801
    """:class:`tgdp_fast.SSSDECG` with the constructor's names and the call of SSSD-ECG's code.

    In everything else it is a network of this package: ``Denoiser(network, schedule)`` accepts it, and it has
    ``compile_for_sampling()``. The defaults are the paper's.

    Args:
        in_channels, res_channels, skip_channels, out_channels, num_res_layers: as in :class:`tgdp_fast.SSSDECG`.
        diffusion_step_embed_dim_in, diffusion_step_embed_dim_mid, diffusion_step_embed_dim_out: widths of the diffusion
            step's features, of the hidden layer and of the embedding.
        s4_lmax, s4_d_state: length of the S4 kernels, and size of their state.
        s4_dropout: only relevant in training. This network has no dropout, so training with a value above 0 is refused.
        s4_bidirectional, s4_layernorm: must be true, as in every released checkpoint.
        label_embed_classes, label_embed_dim: number of statements, and width of their embedding. In released code
            the default is 0 classes, an unconditional network.
        convention: "paper" for ``cauchy="pair"``, "released" for ``cauchy="half"``, which the unchanged released
            repository computes without its CUDA extension. A checkpoint does not record which of the two it was trained
            on, and the wrong one changes the prediction by a third. Without ``convention`` and ``cauchy`` the network
            uses "pair" and :meth:`load_state_dict` warns.
        cauchy: "pair" or "half"; overrides ``convention``.

    Shapes: ``forward((audio [B, in_channels, L], cond, diffusion_steps [B] or [B, 1])) -> [B, out_channels, L]``, with
    cond rows [B, label_embed_classes], class indices [B], or None for a network without labels. The call
    ``forward(x, time, labels)`` of :class:`tgdp_fast.SSSDECG` also works.

    Raises:
        ValueError: an argument out of range; see :class:`tgdp_fast.SSSDECG`.
    """

    def __init__(
        self,
        in_channels: int = 8,
        res_channels: int = 256,
        skip_channels: int = 256,
        out_channels: int = 8,
        num_res_layers: int = 36,
        diffusion_step_embed_dim_in: int = 128,
        diffusion_step_embed_dim_mid: int = 512,
        diffusion_step_embed_dim_out: int = 512,
        s4_lmax: int = 1000,
        s4_d_state: int = 64,
        s4_dropout: float = 0.0,
        s4_bidirectional: bool | int = True,
        s4_layernorm: bool | int = True,
        label_embed_classes: int = 71,
        label_embed_dim: int = 128,
        *,
        convention: str | None = None,
        cauchy: str | None = None,
    ) -> None:
        for name, value in (("s4_bidirectional", s4_bidirectional), ("s4_layernorm", s4_layernorm)):
            if not value:
                raise ValueError(f"{name} must be true, got {value!r}; SSSD-ECG's checkpoints have no other network")
        if convention is not None:
            check_choice("convention", convention, CONVENTIONS)
        self._chosen = convention is not None or cauchy is not None
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            res_channels=res_channels,
            skip_channels=skip_channels,
            num_res_layers=num_res_layers,
            step_dims=(diffusion_step_embed_dim_in, diffusion_step_embed_dim_mid, diffusion_step_embed_dim_out),
            num_classes=label_embed_classes,
            label_dim=label_embed_dim,
            l_max=s4_lmax,
            d_state=s4_d_state,
            cauchy=cauchy if cauchy is not None else "half" if convention == "released" else "pair",
        )
        self.s4_dropout = check_number("s4_dropout", s4_dropout, 0.0, 1.0)

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], *, cauchy: str, config: Mapping[str, Any] | None = None
    ) -> SSSD_ECG:
        """:meth:`tgdp_fast.SSSDECG.from_checkpoint`, ``config`` with the names of either constructor.

        Returns:
            The network in float32, on the CPU, in eval mode. Only tensors are unpickled.

        Raises:
            CheckpointError, ValueError: as in :meth:`tgdp_fast.SSSDECG.from_checkpoint`.
        """
        plain = SSSDECG.from_checkpoint(path, cauchy=cauchy, config=_our_config(config or {}))
        sizes = plain.to_config()
        own = {name: sizes[ours] for name, ours in _NAMES.items()}
        own |= dict(zip(_STEP_DIMS, sizes["step_dims"], strict=True))
        own |= {name: value for name, value in sizes.items() if name.endswith("channels") or name == "num_res_layers"}
        network = cls(**own, cauchy=cauchy)
        network.load_state_dict(plain.state_dict())
        return network.eval()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in any module, with a warning if it is unknown which kernels the weights were trained on."""
        if not self._chosen:
            warnings.warn(
                "SSSD_ECG was built without convention and cauchy, so its kernels are those of cauchy='pair'. If these "
                "weights were trained with the log line 'Falling back on slow Cauchy kernel', as the repository does "
                "as it is, they need convention='released': the wrong kernels change the prediction by a third. Say "
                "convention='paper' or 'released' to choose",
                UserWarning,
                stacklevel=2,
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor | None, Tensor], time: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        if self.training and self.s4_dropout > 0.0:
            raise ValueError(
                f"s4_dropout must be 0 for training, got {self.s4_dropout}: there is no dropout in this network; call "
                ".eval() to sample, which it does not change"
            )
        if not isinstance(x, Tensor):
            if time is not None or labels is not None or len(x) != 3:
                raise ValueError(
                    f"the input must be (audio, cond, diffusion_steps), or x, time and labels, got {len(x)} entries"
                )
            x, labels, time = x
        if time is None:
            raise ValueError("diffusion_steps are missing: call network((audio, cond, diffusion_steps))")
        return super().forward(x, time.reshape(-1), labels)


def _our_config(config: Mapping[str, Any]) -> dict[str, Any]:
    result = {_NAMES.get(name, name): value for name, value in config.items() if name not in _STEP_DIMS}
    steps = [config[name] for name in _STEP_DIMS if name in config]
    if len(steps) not in (0, 3):
        raise ValueError(f"config must have all of {', '.join(_STEP_DIMS)} or none, got {len(steps)} of them")
    for name in ("s4_dropout", "s4_bidirectional", "s4_layernorm"):
        result.pop(name, None)
    return result | ({"step_dims": tuple(steps)} if steps else {})


class _FourierFeatures(nn.Module):
    """sin and cos of 2 pi W t with fixed random W [frequencies]."""

    def __init__(self, frequencies: int, scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(scale * torch.randn(frequencies, dtype=torch.float32), requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        # Up to 1e5 radians: in float32 the order of multiplication affects the third digit of a sine.
        angles = t.to(self.W.dtype)[:, None] * self.W * (2.0 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class GuidanceQt(ECGStem):
    """The guidance network of the ECG experiment, f(x, t), with the tensor names of released checkpoints.

        features = conv2(conv1(x))                     two convolutions, kernel 10, stride 2, no activations
        f = qt([features, embed(t), condition])        SiLU between the layers of qt; embed: Fourier features, Linear

    The defaults are the paper's: 8 leads of 1,000 samples, 4 x 512, 32 time features: 2,809,169 parameters. The
    released code trains f on log r(x_0) (``loss="log_mse"``) and uses it as log h, so :func:`tgdp_fast.sample` accepts
    this network as guidance, in the convention of the formula.

    Args:
        action_dim: number of features after the convolutions; it follows from the size of a signal and may be omitted.
        state_dim: width of the condition, 0 for none.
        in_channels, length: leads and samples of the signal.
        width, depth: hidden layers of ``qt``.
        time_features: number of Fourier features, even.
        time_scale: standard deviation of their frequencies, in cycles per diffusion step.

    Shapes: ``forward(x [B, in_channels, length], t [B] or [B, 1], condition [B, state_dim]) -> [B, 1]``, t the index of
    the diffusion step.

    Raises:
        ValueError: bad sizes, or an ``action_dim`` that signals of this size do not have.
    """

    def __init__(
        self,
        action_dim: int | None = None,
        state_dim: int = 0,
        *,
        in_channels: int = 8,
        length: int = 1000,
        width: int = 512,
        depth: int = 4,
        time_features: int = 32,
        time_scale: float = 30.0,
    ) -> None:
        super().__init__(
            (check_integer("in_channels", in_channels, 1), check_integer("length", length, 1)),
        )
        self.event_shape = (in_channels, length)
        if action_dim not in (None, self.num_features):
            raise ValueError(
                f"action_dim must be {self.num_features}, what the convolutions make of {in_channels} leads of "
                f"{length} samples, got {action_dim!r}; give in_channels and length of other signals"
            )
        self.num_classes = check_integer("state_dim", state_dim, 0)
        width, depth = check_integer("width", width, 1), check_integer("depth", depth, 1)
        if check_integer("time_features", time_features, 2) % 2:
            raise ValueError(f"time_features must be even (a sine and a cosine each), got {time_features}")
        self.embed = nn.Sequential(
            _FourierFeatures(time_features // 2, check_number("time_scale", time_scale)),
            nn.Linear(time_features, time_features, dtype=torch.float32),
        )
        sizes = [self.num_features + time_features + self.num_classes] + [width] * depth + [1]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after, dtype=torch.float32), nn.SiLU()]
        self.qt = nn.Sequential(*layers[:-1])

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, length: int = 1000, state_dim: int = 0) -> GuidanceQt:
        """Load a file of ``torch.save`` or safetensors; sizes that are not given follow from its tensors.

        Returns:
            The network in float32, on the CPU, in eval mode. Only tensors are unpickled.

        Raises:
            CheckpointError: the file cannot be read, or a tensor is missing, unknown or of another shape.
        """
        tensors = read_state_dict(path, anchor="conv1.weight")
        needed = {"conv1.weight": 3, "embed.1.weight": 2, "qt.0.weight": 2}
        for name, dimensions in needed.items():
            if name not in tensors or tensors[name].ndim != dimensions:
                raise CheckpointError(
                    f"{path} is no checkpoint of GuidanceQt: {name} must be there with {dimensions} dimensions"
                )
        layers = {name.split(".")[1] for name in tensors if name.startswith("qt.")}
        sizes = {
            "in_channels": tensors["conv1.weight"].shape[1],
            "width": tensors["qt.0.weight"].shape[0],
            "depth": max(1, len(layers) - 1),
            "time_features": tensors["embed.1.weight"].shape[0],
        }
        with refused(CheckpointError, f"{path} is no checkpoint of GuidanceQt"):
            return restored(lambda: cls(state_dim=state_dim, length=length, **sizes), sizes, tensors, path).eval()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """f(x, t, condition) [B, 1], differentiable by autograd."""
        self._check_condition(condition)
        features, times = super().forward(x), self.embed(t.reshape(-1))
        rows = [features, times.expand(len(features), -1)]
        if condition is not None:
            rows.append(encode_labels(condition, self.num_classes, features.dtype))
        result: Tensor = self.qt(torch.cat(rows, dim=1))
        return result

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """f [B] and its gradient in x [B, in_channels, length], in closed form; t a number or [B].

        ``labels`` are the condition, rows [B, state_dim] or indices [B].

        Raises:
            ValueError: labels without a ``state_dim``, or none with one.
        """
        self._check_condition(labels)
        linear = cast("list[nn.Linear]", [layer for layer in self.qt if not isinstance(layer, nn.SiLU)])
        first = linear[0].weight
        rows = self.embed(torch.as_tensor(t, device=x.device).reshape(-1))
        if labels is not None:
            condition = encode_labels(labels, self.num_classes, rows.dtype)
            rows = torch.cat([rows.expand(len(condition), -1), condition], dim=1)
        value, gradient = mlp_value_and_grad(
            super().forward(x),
            rows @ first[:, self.num_features :].t() + linear[0].bias,
            [first[:, : self.num_features].contiguous(), *(layer.weight for layer in linear[1:])],
            [layer.bias for layer in linear[1:]],
        )
        return value, self.transpose(gradient)

    def _check_condition(self, condition: Tensor | None) -> None:
        check_labels_given(condition, self.num_classes, "GuidanceQt", "leave them out, or build it with state_dim")


class Bandit_Critic_Guide(nn.Module):  # noqa: N801
    """Holder of the guidance network in released scripts, for sampling: ``qt``, ``guidance_scale`` and the gradient.

    It can be used as any guidance, here and in :func:`tgdp_fast.sample`. It lacks the training parts of the released
    class (domain classifier, target records, ``update_qt``): use :func:`tgdp_fast.fit_guidance` to train.

    Args:
        adim, sdim: ``action_dim`` and ``state_dim`` of :class:`GuidanceQt`.
        args: any object whose attribute ``device`` is the device of the network; other attributes are ignored.
        sizes: further arguments of :class:`GuidanceQt`, by keyword.

    Attributes:
        qt: the :class:`GuidanceQt`; checkpoints contain its tensors.
        guidance_scale: factor of value and gradient, 1.

    Raises:
        ValueError: as in :class:`GuidanceQt`.
    """

    def __init__(self, adim: int | None = None, sdim: int = 0, args: Any = None, **sizes: Any) -> None:
        super().__init__()
        self.qt = GuidanceQt(adim, sdim, **sizes)
        self.guidance_scale = 1.0
        if getattr(args, "device", None) is not None:
            self.qt.to(args.device)

    @property
    def num_classes(self) -> int:
        """Width of the condition; 0 for none."""
        return self.qt.num_classes

    def calculate_guidance(self, a: Tensor, t: float | Tensor, condition: Tensor | None = None) -> Tensor:
        """guidance_scale * grad f: a [B, in_channels, length], t a number, [B] or [B, 1]; of the shape of ``a``."""
        with torch.no_grad():
            return self.log_ratio_and_grad(a, t, condition)[1]

    def log_ratio_and_grad(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """guidance_scale times :meth:`GuidanceQt.log_ratio_and_grad`."""
        scale = check_number("guidance_scale", self.guidance_scale)
        value, gradient = self.qt.log_ratio_and_grad(x, t, labels)
        return scale * value, scale * gradient
