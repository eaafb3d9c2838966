"""Any solver of this package as a scheduler of diffusers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tgdp_fast.diffusion.denoiser import alpha_sigma, epsilon_scales, training_target
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SOLVERS, SPACINGS, SolverTable, solver_table
from tgdp_fast.integrations.diffusers.guide import PREDICTION_TYPES
from tgdp_fast.ops import SolverStep, guided_step
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number, check_seed

#: Grids that diffusers defines (Lin et al., 2024, arXiv 2305.08891, table 2), with the meaning of its DDPM and DDIM.
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
#: The keys of a config that state a model's noise and prediction.
_NOISE_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
#: Keys with which other schedulers choose their solver and grid, as ``solver`` and ``spacing`` do here.
_SOLVER_KEYS = frozenset(
    (
        "algorithm_type", "corrector_order", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final",
        "flow_shift", "lambda_min_clipped", "lower_order_final", "noise_sampler_seed", "predict_x0", "predictor_order",
        "sample_max_value", "set_alpha_to_one", "skip_prk_steps", "solver_order", "solver_p", "solver_type", "tau_func",
        "tensor_format", "time_shift_type", "timestep_spacing", "variance_type",
    )
)  # fmt: skip
#: The values that other keys may have, besides None; where none is named, False.
_HARMLESS = {
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "predict_epsilon": True,
    "snr_shift_scale": 1.0,
    "timestep_type": "discrete",
}


@dataclass
class TableSchedulerOutput(BaseOutput):
    """The result of :meth:`TableScheduler.step`.

    Attributes:
        prev_sample: [B, ...], the state after the evaluation.
        pred_original_sample: [B, ...], the clean sample predicted by it.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class TableScheduler(SchedulerMixin, ConfigMixin):
    """The solvers of :func:`tgdp_fast.solver_table` as a diffusers scheduler, each step one fused operator::

        pipeline.scheduler = TableScheduler.from_config(pipeline.scheduler.config, solver="unipc_2")

    The state is the variance-preserving x, so ``init_noise_sigma`` is 1 and ``scale_model_input`` does nothing; the
    last step goes to clean data. It accepts any prediction type, shape and dtype; for half precision, sums and history
    are in float32.

    The noise of stochastic solvers comes from the first source that applies:

    1. ``generator`` of :meth:`step` (one, or one per sample): its stream, drawn as diffusers' DDPMScheduler does;
    2. after :meth:`set_seed`: this package's counter noise, which depends only on seed, sample index and evaluation;
    3. torch's global stream.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: as in
            diffusers' DDPMScheduler. With a rescaled schedule the last alphas_cumprod is not 0 but 2^-24, as in its
            DPMSolverMultistepScheduler, or half the previous one if that is less.
        prediction_type: "epsilon", "sample" or "v_prediction". Channels of a learned variance are ignored.
        solver: a name in ``tgdp_fast.SOLVERS``.
        spacing: of the timesteps: "logsnr", "uniform" or "karras" of this package, or "leading", "linspace" or
            "trailing" as diffusers' DDPM and DDIM define them. Its DPM-Solver, UniPC, ... define them differently: pass
            ``set_timesteps(timesteps=...)`` to compare.
        steps_offset: of "leading".
        eta: of the solvers ddim and euler_ancestral; None for their default. If it is None, ddim uses the ``eta`` that
            a pipeline passes to :meth:`step`.
        clip_sample: whether to clamp predicted clean samples to ``clip_sample_range`` either side of 0; the noise is
            recomputed from them (diffusers' ``use_clipped_model_output``).
        thresholding: must be False. It exists so that a config that requests it is refused, not ignored.

    Raises:
        ValueError: an unknown name, a bad number, ``thresholding``, or ``trained_betas`` of another number than
            ``num_train_timesteps``.
    """

    _compatibles = [each.name for each in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        solver: str = "dpmpp_2m",
        spacing: str = "logsnr",
        steps_offset: int = 0,
        eta: float | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        rescale_betas_zero_snr: bool = False,
        thresholding: bool = False,
    ) -> None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("solver", solver, SOLVERS)
        check_choice("spacing", spacing, (*SPACINGS, *TIMESTEP_SPACINGS))
        if thresholding:
            raise ValueError("thresholding must be False: no table has it; use clip_sample, or a diffusers scheduler")
        check_number("clip_sample_range", clip_sample_range, 0.0, exclusive=True)
        if trained_betas is not None and len(trained_betas) != num_train_timesteps:
            raise ValueError(
                f"trained_betas must have num_train_timesteps = {num_train_timesteps} entries, got {len(trained_betas)}"
            )
        # diffusers' own betas and grids, by the scheduler that defines them.
        self._grids = _ddpm_scheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self.betas = self._grids.betas
        self.alphas_cumprod = self._grids.alphas_cumprod
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = min(2.0**-24, 0.5 * float(self.alphas_cumprod[-2]))
        self.schedule = NoiseSchedule.from_alphas_cumprod(self.alphas_cumprod)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, device="cpu")
        self._seed: int | None = None
        self._first_index = 0
        self._whole = self._table(times=[self.schedule.t_max])
        self._running: SolverTable | None = None  # the part of the table from the start of the run
        self._rows = _rows(self._whole)  # its row at each call of step
        self._first = 0
        self._begin_index: int | None = None
        self._evaluation = 0
        self._history: Tensor | None = None

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The scheduler for the model of another one, ``from_config(pipeline.scheduler.config, solver="unipc_2")``.

        Betas and prediction type are always those of the other scheduler, also where they are defaults of its class.
        For the rest diffusers' rule holds: values that were stated, such as ``clip_sample=True``, are taken, defaults
        of its class are not. Its solver and ``timestep_spacing`` are replaced by ``solver`` and ``spacing``.

        Args:
            config: of a scheduler, or its JSON file's dictionary; as in diffusers also a folder or repository with it.
            return_unused_kwargs: as in diffusers.
            kwargs: arguments of the class, and entries of ``config`` to be replaced.

        Raises:
            ValueError: a config of another kind of model or noise (flow matching, EDM, consistency models, a shifted
                SNR, continuous timesteps), of noise levels that no ``spacing`` gives (Karras, exponential or beta
                sigmas), or with a key that is unknown.
        """
        if isinstance(config, str | os.PathLike):
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        if isinstance(config, Mapping):
            of_scheduler = isinstance(config, FrozenDict) or "_class_name" in config or "_use_default_values" in config
            stated = _stated(cls, config)
            replaced = {name: kwargs.pop(name) for name in list(kwargs) if name in stated}
            config, stated = {**config, **replaced}, {**stated, **replaced}
            _check_config(cls, stated, _NOISE_KEYS[:4] if of_scheduler else ())
            defaults = {*config.get("_use_default_values", ())} - {*_NOISE_KEYS, *replaced}
            noise = {name: stated[name] for name in _NOISE_KEYS if name in stated}
            config = {**config, **noise, "_use_default_values": list(defaults)}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def order(self) -> int:
        """Entries of ``timesteps`` per solver step, the last step apart, by which pipelines count."""
        return SOLVERS[self.config.solver].evaluations

    @property
    def table(self) -> SolverTable:
        """The table in use."""
        return self._whole

    @property
    def step_index(self) -> int | None:
        """Number of the next evaluation; None before the first."""
        return None if self._running is None else self._first + self._evaluation

    @property
    def begin_index(self) -> int | None:
        """First evaluation of a run; None: that of its first timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this evaluation, as pipelines that begin with an image do."""
        self._begin_index = check_integer("begin_index", begin_index, 0)

    def set_seed(self, seed: int | None, first_index: int = 0) -> None:
        """Draw counter noise from now on; sample i of a batch has index ``first_index + i``. None turns it off.

        Batches of one set of samples need index ranges that do not overlap.

        Raises:
            ValueError: a seed outside 0 .. 2^64 - 1 or a negative index.
        """
        self._seed = None if seed is None else check_seed(seed)
        self._first_index = check_integer("first_index", first_index, 0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the grid and discard the previous run.

        Args:
            num_inference_steps: number of solver steps. ``self.timesteps`` gets one entry per evaluation of the model:
                ``2 num_inference_steps - 1`` if a step takes two. A step between neighboring timesteps has none inside
                for a second evaluation; its timestep stands twice all the same, and the first of the two calls changes
                nothing, so that step k begins at entry 2 k, where pipelines that begin with an image look for it.
            device: of ``timesteps``.
            timesteps: the grid itself, strictly decreasing integers, instead of a number.

        Raises:
            ValueError: neither or both given, more steps than timesteps exist, an unusable grid.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"either num_inference_steps or timesteps must be given, got {num_inference_steps!r} and {timesteps!r}"
            )
        if timesteps is not None:
            table = self._table(times=[float(each) for each in timesteps])
        elif self.config.spacing in TIMESTEP_SPACINGS:
            steps = check_integer("num_inference_steps", num_inference_steps, 1)
            self._grids.register_to_config(timestep_spacing=self.config.spacing, steps_offset=self.config.steps_offset)
            self._grids.set_timesteps(steps)
            # Rounding may give "trailing" one time too many, -1: diffusers adds up a floating-point ratio.
            table = self._table(times=self._grids.timesteps.tolist()[:steps])
        else:
            table = self._table(steps=num_inference_steps, spacing=self.config.spacing)
        self.num_inference_steps = table.steps
        self.timesteps = torch.from_numpy(table.times[_rows(table)].astype(np.int64)).to(device)
        self._reset(table)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """``sample`` unchanged: the state is the model's input."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> TableSchedulerOutput | tuple[Tensor, Tensor | None]:
        """One evaluation of the solver.

        Args:
            model_output: [B, ...], the model's prediction at ``timestep``, guided or not.
            timestep: the entry of ``timesteps``, in their order; the first may be any that begins a solver step.
            sample: [B, ...], the state.
            eta: see the class.
            use_clipped_model_output: accepted because DDIMPipeline passes it; clipping always recomputes the noise.
            generator: of the noise of stochastic solvers.
            variance_noise: [B, ...], the noise itself.
            return_dict: False for the pair (prev_sample, pred_original_sample).

        Raises:
            ValueError: a step after the last, a first timestep that begins no step, shapes that do not match.
        """
        if self._running is None:
            self._start(timestep, eta)
        table, rows, call = self._running, self._rows, self._evaluation
        if table is None or call >= len(rows):
            raise ValueError(f"the run of {len(self.timesteps)} evaluations is over; call set_timesteps for another")
        k = int(rows[call])
        idle = k in rows[call + 1 : call + 2]
        if model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        precision = torch.float64 if sample.dtype == torch.float64 else torch.float32
        x = sample.to(precision)
        alpha, sigma = float(table.alpha[k]), float(table.sigma[k])
        of_x, of_output = epsilon_scales(self.config.prediction_type, alpha, sigma)
        epsilon = of_output * model_output.to(precision)
        if of_x != 0.0:
            epsilon = epsilon + of_x * x
        noise_scale = float(table.noise_scale[k])
        counted = generator is None and variance_noise is None and self._seed is not None
        indices = torch.arange(self._first_index, self._first_index + len(x), device=x.device) if counted else None
        after, history, x0 = guided_step(
            x,
            epsilon,
            None,
            self._history,
            step=SolverStep(
                table.matrix[k],
                noise_scale=noise_scale if counted else 0.0,
                alpha=alpha,
                sigma=sigma,
                clamp=self._clamp(),
            ),
            seed=self._seed or 0,
            sample_index=indices,
            evaluation=self._first + call + 1,
        )
        if idle:
            after = x
        else:
            self._history = history
        if noise_scale > 0.0 and not counted:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
                )
            after = after + noise_scale * variance_noise.to(precision)
        self._evaluation += 1
        after, x0 = after.to(sample.dtype), x0.to(sample.dtype)
        return TableSchedulerOutput(after, x0) if return_dict else (after, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise. Shapes: original_samples, noise [B, ...]; timesteps [B] or []; returns [B, ...]."""
        alpha, sigma = alpha_sigma(self.schedule, timesteps.to(original_samples.device), original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x_0, the target of v_prediction. Shapes as in :meth:`add_noise`, with x_0 first."""
        alpha, sigma = alpha_sigma(self.schedule, timesteps.to(sample.device), sample)
        return training_target("v_prediction", sample, noise, alpha, sigma)

    def _clamp(self) -> tuple[float, float] | None:
        reach = float(self.config.clip_sample_range)
        return (-reach, reach) if self.config.clip_sample else None

    def _table(self, eta: float | None = None, **grid: Any) -> SolverTable:
        eta = self.config.eta if eta is None else eta
        return solver_table(self.config.solver, self.schedule, eta=eta, **grid)

    def _reset(self, whole: SolverTable) -> None:
        self._whole, self._running, self._history = whole, None, None
        self._first, self._begin_index, self._evaluation = 0, None, 0

    def _start(self, timestep: int | Tensor, eta: float | None) -> None:
        """Begin a run at a timestep. A multistep solver always begins with its first-order step."""
        whole, rows = self._whole, _rows(self._whole)
        begins_step = np.concatenate([[True], whole.ends_step[:-1]])
        begins = np.flatnonzero(begins_step[rows] & (np.diff(rows, prepend=-1) > 0))
        times = whole.times[rows[begins]]
        index = self._begin_index
        if index is None:
            index = next((int(k) for k, time in zip(begins, times, strict=True) if time == float(timestep)), -1)
        if index not in begins:
            raise ValueError(
                f"timestep must be one with which a solver step begins, {times.astype(int).tolist()}, "
                f"got {float(timestep):g} (begin_index {self._begin_index}); call set_timesteps first"
            )
        own_eta = eta if self.config.solver == "ddim" and self.config.eta is None else None
        self._first = index
        self._running = whole
        if index > 0 or own_eta is not None:
            self._running = self._table(eta=own_eta, times=times[begins >= index])
        self._rows = _rows(self._running)


def _ddpm_scheduler(**arguments: Any) -> DDPMScheduler:
    try:
        return DDPMScheduler(**arguments)
    except NotImplementedError as error:
        raise ValueError(f"beta_schedule must be one of diffusers' DDPMScheduler: {error}") from error


def _rows(table: SolverTable) -> np.ndarray:
    """The table's row at each call of :meth:`TableScheduler.step`: twice where a step takes one evaluation, not two."""
    two = SOLVERS[table.solver].evaluations == 2
    single = np.concatenate([[True], table.ends_step[:-1]]) & table.ends_step & (np.arange(table.nfe) < table.nfe - 1)
    return np.repeat(np.arange(table.nfe), 1 + (two & single))


def _stated(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says, with the defaults of the class that it names, if any."""
    name = config.get("_class_name")
    named = cls if name == cls.__name__ else getattr(diffusers, name, None) if isinstance(name, str) else None
    parameters = inspect.signature(named).parameters.values() if named is not None else ()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {**defaults, **config}


def _check_config(cls: type, stated: Mapping[str, Any], required: Sequence[str]) -> None:
    """ValueError, naming keys and class, unless betas and prediction type alone tell a model's noise."""
    known = {*inspect.signature(cls).parameters, *_SOLVER_KEYS}
    wrong = {
        name: value
        for name, value in stated.items()
        if not (name.startswith("_") or name in known or value is None)
        and not (np.ndim(value) == 0 and value == _HARMLESS.get(name, False))
    }
    scheduler = stated.get("_class_name", "a scheduler")
    if wrong:
        listed = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ValueError(
            "config must be that of a scheduler whose betas and prediction_type tell all about its model's noise, got "
            f"{scheduler} with {listed}; keep diffusers' scheduler, or, if the model does not depend on it, turn it "
            f"off in the call: {next(iter(wrong))}=None"
        )
    missing = [name for name in required if name not in stated]
    if missing:
        raise ValueError(
            f"config must state the betas of the model, got {scheduler} without {', '.join(missing)}; build it from "
            "the config of the scheduler that the model was trained with"
        )
