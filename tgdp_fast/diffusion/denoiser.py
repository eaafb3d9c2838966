"""The frozen source model: any network and prediction type, with one method that returns epsilon."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SolverTable
from tgdp_fast.models import ARCHITECTURES, uncompiled
from tgdp_fast.runtime.checkpoint import CheckpointError, described, load_checkpoint
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number
from tgdp_fast.runtime.pretrained import Pretrained
from tgdp_fast.runtime.state_dict import load_state_dict_checked, restored

PREDICTIONS = ("epsilon", "sample", "v_prediction", "score")
TIME_INPUTS = ("time", "half_log_snr")


def per_sample(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A float, or a tensor [B] reshaped to broadcast over ``x`` [B, ...]."""
    return value.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(value, Tensor) else value


def number_on(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``. A number on the host is written by the device itself instead of copied: a copy could not
    be captured in a CUDA graph.
    """
    if value.device == device or value.numel() != 1 or value.device.type != "cpu":
        return value.to(device)
    return torch.full(value.shape, value.item(), dtype=value.dtype, device=device)


def alpha_sigma(schedule: NoiseSchedule, t: float | Tensor, x: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """alpha and sigma at ``t``: floats for a float, tensors that broadcast over ``x`` [B, ...] for a tensor [B]."""
    if isinstance(t, Tensor):
        return per_sample(schedule.alpha(t).to(x), x), per_sample(schedule.sigma(t).to(x), x)
    return schedule.alpha(float(t)), schedule.sigma(float(t))


def prediction_to_epsilon(
    prediction: str, output: Tensor, x: Tensor, alpha: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """Convert a network output to epsilon.

    epsilon = (x - alpha x0) / sigma = sigma x + alpha v = -sigma score.

    Args:
        prediction: one of ``PREDICTIONS``.
        output, x: [B, ...].
        alpha, sigma: floats, or tensors broadcastable to ``x``.
    """
    if prediction == "epsilon":
        return output
    if prediction == "sample":
        return (x - alpha * output) / sigma
    if prediction == "v_prediction":
        return sigma * x + alpha * output
    return -sigma * output


def epsilon_scales(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(a, b) with epsilon = a x + b output, for sigma > 0; see :func:`prediction_to_epsilon`."""
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "sample":
        return 1.0 / sigma, -alpha / sigma
    return (sigma, alpha) if prediction == "v_prediction" else (0.0, -sigma)


def training_target(
    prediction: str, x0: Tensor, epsilon: Tensor, alpha: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """Training target of a network of this prediction type (``score`` networks are trained on epsilon)."""
    if prediction == "sample":
        return x0
    if prediction == "v_prediction":
        return alpha * epsilon - sigma * x0
    return epsilon


class Denoiser(Pretrained, nn.Module):
    """A diffusion network with its noise schedule, prediction type and time convention.

    Args:
        network: any module, called as ``network(x, time)`` or ``network(x, time, labels)``, that returns the shape of
            x. A result with an attribute ``sample`` (diffusers) or a tuple is unwrapped. If its attribute
            ``takes_host_time`` is true, a float time is passed on the host instead of on the device of x.
        schedule: the noise schedule it was trained with.
        prediction: "epsilon", "sample" (x0), "v_prediction" (alpha epsilon - sigma x0) or "score".
        time_input: the time that the network receives, a float32 tensor [B]: "time" (the schedule's t times
            ``time_scale``; for discrete schedules the integer step) or "half_log_snr".
        time_scale: factor on t, e.g. 1000 for a continuous schedule and a network trained on 0..999. The t of a
            discrete schedule already is such a step.
        integer_time: pass the time as int64 (embedding tables need it).
        num_classes: number of label classes, 0 for an unconditional network. Default: the network's own value, or None
            (unknown: labels are passed on unchanged) if it has none.

    Raises:
        ValueError: unknown ``prediction`` or ``time_input``; a bad ``time_scale``.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction: str = "epsilon",
        *,
        time_input: str = "time",
        time_scale: float = 1.0,
        integer_time: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(network):
            raise ValueError(f"network must be callable as network(x, time), got {type(network).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        self.network = network
        self.schedule = schedule
        self.prediction = check_choice("prediction", prediction, PREDICTIONS)
        self.time_input = check_choice("time_input", time_input, TIME_INPUTS)
        self.time_scale = check_number("time_scale", time_scale, 0.0, exclusive=True)
        last = schedule.t_max * self.time_scale
        if schedule.is_discrete and self.time_input == "time" and last > max(1000.0, schedule.t_max):
            warnings.warn(
                f"time_scale {self.time_scale:g} multiplies the steps 0..{schedule.t_max:g} of a discrete schedule, so "
                f"the network is called with times up to {last:g}; leave time_scale out for a network trained on steps",
                stacklevel=2,
            )
        self.integer_time = bool(integer_time)
        stated = getattr(network, "num_classes", None) if num_classes is None else num_classes
        self.num_classes = None if stated is None else check_integer("num_classes", stated, 0)

    def extra_repr(self) -> str:
        """The conventions, for ``print``."""
        factor = "" if self.time_scale == 1.0 else f" * {self.time_scale:g}"
        return f"{self.schedule}, prediction={self.prediction!r}, time_input={self.time_input!r}{factor}"

    @property
    def event_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample if the network has one, else None."""
        shape = getattr(self.network, "event_shape", None)
        return None if shape is None else tuple(shape)

    def forward(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's own output at schedule time ``t`` (float, or tensor [B]).

        Shapes: x [B, ...], labels None, [B] or [B, K]; returns [B, ...].
        """
        times = self.network_time(t)
        if not getattr(self.network, "takes_host_time", False):
            times = number_on(times, x.device)
        times = times.expand(x.shape[0])
        arguments = (x, times) if labels is None else (x, times, labels)
        try:
            output = self.network(*arguments)
        except (RuntimeError, TypeError, IndexError) as error:
            if type(error) not in (RuntimeError, TypeError, IndexError):
                raise  # Some errors, such as out of memory, have a type that callers look for.
            raise type(error)(f"{error}\n{self._call(arguments)}") from error
        if not isinstance(output, Tensor):
            output = output[0] if isinstance(output, tuple | list) and output else getattr(output, "sample", None)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            came = list(output.shape) if isinstance(output, Tensor) else "no tensor"
            raise ValueError(f"network must return a tensor of the shape of x, {list(x.shape)}, got {came}")
        return output

    def _call(self, arguments: tuple[Tensor, ...]) -> str:
        """How the network was called, for the message of an error inside it."""
        names = ("x", "time", "labels")
        shown = ", ".join(
            f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            for name, value in zip(names, arguments, strict=False)
        )
        # The denoiser has no other parameters: the network may be a plain function.
        found = sorted({str(p.dtype).removeprefix("torch.") for p in self.parameters() if p.is_floating_point()})
        return (
            f"denoiser.network was called as network({shown}); its parameters are {' and '.join(found) or 'none'}. It "
            "must take these: convert it with network.float(), pass labels only to a network that has them "
            "(num_classes=0 says that it has none), and data of the shape it was made for"
        )

    def network_time(self, t: float | Tensor) -> Tensor:
        """The time that the network receives for schedule time ``t``: a tensor of the same shape, float32 or int64."""
        times = torch.as_tensor(t, dtype=torch.float64, device="cpu" if not isinstance(t, Tensor) else t.device)
        times = self.schedule.half_log_snr(times) if self.time_input == "half_log_snr" else times * self.time_scale
        return times.round().long() if self.integer_time else times.to(torch.float32)

    def epsilon(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicted noise [B, ...] at schedule time ``t``; see :func:`prediction_to_epsilon`."""
        alpha, sigma = alpha_sigma(self.schedule, t, x)
        return prediction_to_epsilon(self.prediction, self(x, t, labels), x, alpha, sigma)

    def compile_for_sampling(
        self, table: SolverTable | None = None, *, precision: str = "fp32", **arguments: Any
    ) -> Denoiser:
        """This denoiser with its network compiled for sampling: the same calls at lower cost.

            fast = denoiser.compile_for_sampling(precision="bf16")
            samples = sample(fast, guidance, num=64)

        Args:
            table: the solver's table, whose times are precomputed. None: all times of a discrete schedule. Other times
                also work; each costs a little at its first call.
            precision, arguments: passed to the network's own method, see
                :meth:`tgdp_fast.SSSDECG.compile_for_sampling`. This precision overrides ``sample(precision=...)``.

        Returns:
            A new Denoiser in eval mode. It shares the parameters and detects changes to them. Saving it saves the
            original network.

        Raises:
            ValueError: the network has no such method, or its method raised it.
        """
        compile_network = getattr(self.network, "compile_for_sampling", None)
        if compile_network is None:
            raise ValueError(
                f"denoiser.network must have a method compile_for_sampling, got {type(self.network).__name__}; SSSDECG "
                "has one, other networks are sampled as they are"
            )
        times = np.empty(0)
        if table is not None:
            times = table.times.copy()
        elif self.schedule.num_train_steps is not None:
            times = np.arange(self.schedule.num_train_steps, dtype=np.float64)
        return Denoiser(
            compile_network(self.network_time(torch.from_numpy(times)), precision=precision, **arguments),
            self.schedule,
            self.prediction,
            time_input=self.time_input,
            time_scale=self.time_scale,
            integer_time=self.integer_time,
            num_classes=self.num_classes,
        ).eval()

    @property
    def _stored_network(self) -> nn.Module:
        """The network in checkpoints: this one, or the one that it was compiled from."""
        return uncompiled(self.network)

    def to_config(self) -> dict[str, Any]:
        """Everything but the weights, JSON-able.

        A network from outside this package has architecture None; pass it to :meth:`load` again.
        """
        network = self._stored_network
        ours = ((name, network.to_config()) for name, cls in ARCHITECTURES.items() if isinstance(network, cls))
        architecture, config = next(ours, (None, None))
        return {
            "architecture": architecture,
            "network": config,
            "schedule": self.schedule.to_config(),
            "prediction": self.prediction,
            "time_input": self.time_input,
            "time_scale": self.time_scale,
            "integer_time": self.integer_time,
            "num_classes": self.num_classes,
        }

    def to_checkpoint(self) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        """Kind, config and tensors of the checkpoint."""
        return "denoiser", self.to_config(), self._stored_network.state_dict()

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: nn.Module | None = None) -> Denoiser:
        """Read a checkpoint folder. Pass in a network from outside this package; its weights are loaded.

        Raises:
            CheckpointError: damaged, of another kind or architecture, or a network is needed and none was given.
            ValueError: ``network`` is a class.
        """
        config, tensors = load_checkpoint(path, "denoiser")
        return cls.from_parts(config, tensors, network, where=str(path))

    @classmethod
    def from_parts(
        cls, config: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module | None, where: str
    ) -> Denoiser:
        """The denoiser with a checkpoint's config and tensors; ``where`` names their origin in messages.

        Raises:
            CheckpointError, ValueError: as in :meth:`load`.
        """
        if isinstance(network, type):
            raise ValueError(
                f"network must be a module, got the class {network.__name__}; build it: network={network.__name__}(...)"
            )
        if network is None:
            architecture = config.get("architecture")
            if architecture is None:
                raise CheckpointError(
                    f"{where} holds the weights of a network that is not of this package; build that network and pass "
                    "it as network=..."
                )
            if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
                raise CheckpointError(
                    f"{where} holds a network of architecture {architecture!r}, known are "
                    f"{', '.join(sorted(ARCHITECTURES))}; build the network and pass it as network=..."
                )
            with described(where, architecture):
                settings, kind = config["network"], ARCHITECTURES[architecture]
                network = restored(lambda: kind(**settings), settings, tensors, where)
        else:
            load_state_dict_checked(network, tensors, where)
        with described(where, cls.__name__):
            return cls(
                network.eval(),
                NoiseSchedule.from_config(config["schedule"]),
                config["prediction"],
                time_input=config["time_input"],
                time_scale=config["time_scale"],
                integer_time=config["integer_time"],
                num_classes=config["num_classes"],
            )


def labels_for(model: Any, labels: Tensor | None) -> Tensor | None:
    """``labels``, or None for an unconditional model (``num_classes`` 0)."""
    return None if getattr(model, "num_classes", None) == 0 else labels
