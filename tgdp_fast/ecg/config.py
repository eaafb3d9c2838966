"""The settings of an ECG transfer: dataclasses, presets, and the TOML file that changes them.

A file names a preset and what differs from it::

    preset = "small"

    [data]
    source = "ptb-xl"
    target = "icbeb2018"

    [guidance]
    consistency = 1.0

    [guidance.training]
    steps = 20000
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.fit.config import GuidanceConfig, NetworkConfig, TrainingConfig
from tgdp_fast.fit.regularizers import Consistency, Cycle
from tgdp_fast.models.s4 import CAUCHY
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number, check_seed
from tgdp_fast.runtime.memory import check_memory
from tgdp_fast.runtime.optional import optional
from tgdp_fast.runtime.precision import PRECISIONS
from tgdp_fast.runtime.reading import read_bytes, refused
from tgdp_fast.sampling.config import SamplingConfig

#: Methods, in the order of tables and plots.
METHODS = ("source", "vanilla", "fine_tune", "tgdp")
#: Printed with every result of the preset smoke.
SMOKE = "preset smoke: shows that everything works; samples and numbers are not good"
PRIORS = ("standard", "gaussian", "empirical")
UNITS = ("mV", "standardized")
#: Spellings of earlier versions, which stay valid.
_OLD_SPELLINGS = {"standardised": "standardized"}
#: Entries of [sampling] that are written only where they differ from this.
UNSAID: dict[str, Any] = {"eta": None, "interval": None, "clamp": None, "backend": "auto"}
_FILE_BYTES = 2**16  # A hostile name of many parts costs the square of its length.
_ONE_RECORD = ("a record of 8 leads in float32", "keep less of each record")
_SMALLER = "choose a smaller network"
DOMAIN_CLASSIFIERS = ("features", "xresnet1d")

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; names the entry."""


@dataclass(frozen=True)
class Data:
    """The folders of records, and how the records are divided.

    Attributes:
        source, target: folders of records.
        rate: samples per second to which records are resampled.
        seconds: length that is kept of each record, from its start; shorter records are dropped.
        target_fraction: fraction of the target records that methods may see (0.1 in the paper); the others are used
            for tests only.
        least_target: the least number of target records that methods see, whatever ``target_fraction`` says.
        seed: of the division.
        on_problem: "skip" broken records and report them, or "raise" at the first.
    """

    source: str = ""
    target: str = ""
    rate: float = 100.0
    seconds: float = 10.0
    target_fraction: float = 0.1
    least_target: int = 8
    seed: int = 0
    on_problem: str = "skip"

    def __post_init__(self) -> None:
        check_number("rate", self.rate, 1.0)
        check_number("seconds", self.seconds, 0.1)
        check_number("target_fraction", self.target_fraction, 0.0, 1.0, exclusive=True)
        check_integer("least_target", self.least_target, 2)
        check_memory("rate and seconds", (self.rate, self.seconds), 32 * self.rate * self.seconds, *_ONE_RECORD)
        check_seed(self.seed)
        check_choice("on_problem", self.on_problem, ("skip", "raise"))


@dataclass(frozen=True)
class Backbone:
    """The SSSD-ECG network and its noise schedule; the defaults are the paper's (TGDP section 4.2).

    Attributes:
        checkpoint: a released SSSD-ECG checkpoint, or a denoiser saved by this package, to use instead of training
            one. Its architecture replaces the one here.
        checkpoint_units: units of its signals: "mV" for released checkpoints, or "standardized" by the source records
            given here. A model saved by ``tgdp-fast ecg fit`` brings its own standardization.
        cauchy: the Cauchy sum that a released file was trained with, "pair" or "half" (see
            :class:`tgdp_fast.models.SSSDECG`).
    """

    checkpoint: str = ""
    checkpoint_units: str = "mV"
    cauchy: str = "pair"
    num_res_layers: int = 36
    res_channels: int = 256
    d_state: int = 64
    step_features: int = 128
    step_embedding: int = 512
    label_dim: int = 128
    diffusion_steps: int = 200
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        for name in ("num_res_layers", "res_channels", "d_state", "step_features", "step_embedding", "label_dim"):
            check_integer(name, getattr(self, name), 1)
        units = _OLD_SPELLINGS.get(self.checkpoint_units, self.checkpoint_units)
        object.__setattr__(self, "checkpoint_units", check_choice("checkpoint_units", units, UNITS))
        check_choice("cauchy", self.cauchy, CAUCHY)
        check_integer("diffusion_steps", self.diffusion_steps, 2)
        steps = self.diffusion_steps
        check_memory("diffusion_steps", steps, 100 * steps, "the values of the schedule", "use fewer", share=1 / 16)
        # S4 and the convolutions of a block work on twice res_channels; weights, gradients and two moments of Adam.
        width, state = self.res_channels, self.d_state
        values = self.num_res_layers * (14 * width**2 + 12 * width * state) + (self.step_features + self.step_embedding)
        values += self.step_embedding**2 + width * self.label_dim
        sizes = (self.num_res_layers, width, state, self.step_features, self.step_embedding, self.label_dim)
        what = "weights, gradients and moments of a network of these sizes"
        check_memory("num_res_layers, res_channels, d_state and the widths", sizes, 16 * values, what, _SMALLER)
        check_memory("d_state", state, 48 * state**2, "the matrices that start the kernels", _SMALLER)
        self.schedule()

    def schedule(self) -> NoiseSchedule:
        """Linear betas."""
        return NoiseSchedule.from_betas(np.linspace(self.beta_start, self.beta_end, self.diffusion_steps))


@dataclass(frozen=True)
class Classifier:
    """An xresnet1d that computes features, judges samples, and is the body of the domain classifier of signals."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    expansion: int = 4
    width: int = 64
    training: TrainingConfig = TrainingConfig(steps=5000, batch_size=128, learning_rate=1e-3, weight_decay=0.01)

    def __post_init__(self) -> None:
        counts = [check_integer("blocks entries", count, 1) for count in self.blocks]
        check_integer("expansion", self.expansion, 1)
        check_integer("width", self.width, 1)
        if not counts:
            raise ValueError("blocks must name at least one stage, got none")
        values = sum(counts) * self.width**2 * self.expansion
        what = "weights, gradients and moments of a network of these sizes"
        check_memory("blocks, width and expansion", (*counts, self.width, self.expansion), 16 * values, what, _SMALLER)


@dataclass(frozen=True)
class Guidance:
    """Density ratio and guidance network (TGDP Algorithms 1 to 4).

    Attributes:
        domain_classifier: the classifier of source against target on clean signals: an MLP on "features" of the
            frozen statement classifier, or an "xresnet1d" on the signals.
        conditional: whether this classifier and the guidance take labels (TGDP Theorem 3.3).
        loss, consistency, cycle, width, depth, alpha_power, time_distribution: see :class:`tgdp_fast.GuidanceConfig`.
            The default is Algorithm 4 with weights of our own. A time-dependent classifier ("logistic") memorizes a few
            records of 8,000 numbers each; regression on the calibrated ratio does not.
    """

    domain_classifier: str = "features"
    conditional: bool = True
    loss: str = "ratio_mse"
    consistency: float = 1.0
    cycle: float = 1.0
    width: int = 512
    depth: int = 4
    alpha_power: float = 2.0
    time_distribution: str = "uniform"
    training: TrainingConfig = TrainingConfig(steps=50_000, batch_size=128, learning_rate=2e-4, weight_decay=0.1)

    def __post_init__(self) -> None:
        check_choice("domain_classifier", self.domain_classifier, DOMAIN_CLASSIFIERS)
        self.fit_config("none", None)  # Checks the rest.

    def fit_config(self, stem: str, num_classes: int | None) -> GuidanceConfig:
        """What :func:`tgdp_fast.fit_guidance` is asked for, with this stem of the network."""
        return GuidanceConfig(
            loss=self.loss,
            regularizers=(Consistency(self.consistency), Cycle(self.cycle)),
            network=NetworkConfig(self.width, self.depth, self.alpha_power, stem),
            training=self.training,
            conditional=self.conditional,
            num_classes=num_classes,
            time_distribution=self.time_distribution,
            diagnostics=False,
        )


@dataclass(frozen=True)
class Sampling(SamplingConfig):
    """How samples are drawn: a :class:`tgdp_fast.sampling.config.SamplingConfig`, of how many and from where.

    Attributes:
        num: samples of each method.
        gradient_norm_limit: 0 for no limit.
        prior: where sampling starts: "standard" is N(0, I); "gaussian" and "empirical" are fitted to what the model
            was trained on, for TGDP to source records weighted with their ratios
            (see :mod:`tgdp_fast.diffusion.prior`).
        seed, batch_size: see :meth:`tgdp_fast.Sampler.draw`.
    """

    solver: str = "ddpm"
    steps: int = 200
    spacing: str = "uniform"
    num: int = 1000
    prior: str = "standard"
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_integer("num", self.num, 2)
        check_choice("prior", self.prior, PRIORS)
        check_choice("precision", self.precision, PRECISIONS)
        check_seed(self.seed)
        check_integer("batch_size", self.batch_size, 1)
        if self.gradient_norm_limit == 0:
            object.__setattr__(self, "gradient_norm_limit", None)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the entries of ``UNSAID`` that have their defaults."""
        values = {"num": self.num, **super().to_dict()}
        values["gradient_norm_limit"] = values["gradient_norm_limit"] or 0.0
        return {name: value for name, value in values.items() if name not in UNSAID or value != UNSAID[name]}


@dataclass(frozen=True)
class Evaluation:
    """How samples are evaluated.

    Attributes:
        classifier: trained on samples and tested on real records; another one, trained on source records, computes
            features.
        bootstrap: number of bootstrap samples of the test records behind an interval.
        seeds: number of classifiers trained on each set of samples; their mean score is used.
        plots: number of samples shown of each method.
    """

    classifier: Classifier = Classifier()
    bootstrap: int = 1000
    seeds: int = 1
    plots: int = 3

    def __post_init__(self) -> None:
        check_integer("bootstrap", self.bootstrap, 10)
        check_memory("bootstrap", self.bootstrap, 8 * self.bootstrap, "the scores", "use fewer", share=1 / 16)
        check_integer("seeds", self.seeds, 1)
        check_integer("plots", self.plots, 1)


@dataclass(frozen=True)
class Config:
    """A whole run. ``source``, ``vanilla`` and ``fine_tune`` are the training of the three denoisers."""

    preset: str = "paper"
    methods: tuple[str, ...] = METHODS
    seed: int = 0
    device: str = "cpu"
    data: Data = Data()
    backbone: Backbone = Backbone()
    source: TrainingConfig = TrainingConfig(steps=100_000, batch_size=8, learning_rate=2e-4, ema_decay=0.9999)
    vanilla: TrainingConfig = TrainingConfig(steps=100_000, batch_size=8, learning_rate=2e-4, ema_decay=0.9999)
    fine_tune: TrainingConfig = TrainingConfig(steps=50_000, batch_size=8, learning_rate=2e-5, ema_decay=0.9999)
    guidance: Guidance = Guidance()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        for method in self.methods:
            check_choice("methods", method, METHODS)
        if "tgdp" not in self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be different ones of {', '.join(METHODS)}, tgdp among them")
        check_seed(self.seed)
        record = math.ceil(32 * self.data.rate * self.data.seconds)
        check_memory("sampling.num", self.sampling.num, self.sampling.num * record, "records of 8 leads", "draw fewer")


_SMALL_CLASSIFIER = Classifier(
    (1, 1, 1, 1), 1, 32, TrainingConfig(steps=600, batch_size=64, learning_rate=2e-3, weight_decay=0.01, ema_decay=0.99)
)
_SMOKE_CLASSIFIER = Classifier(
    (1, 1, 1, 1), 1, 16, TrainingConfig(steps=80, batch_size=32, learning_rate=3e-3, weight_decay=0.01, ema_decay=0.95)
)

#: ``paper``: TGDP section 4.2 (rates decay, where the paper's are constant). ``small``: hours on a CPU, minutes on a
#: GPU. ``smoke``: minutes on two cores, to see that everything works; its samples are not good.
PRESETS: dict[str, Config] = {
    "paper": Config(),
    "small": Config(
        preset="small",
        backbone=Backbone(
            num_res_layers=8, res_channels=64, d_state=32, step_features=64, step_embedding=256, label_dim=64
        ),
        source=TrainingConfig(steps=20_000, batch_size=16, learning_rate=1e-3, ema_decay=0.999),
        vanilla=TrainingConfig(steps=10_000, batch_size=16, learning_rate=1e-3, ema_decay=0.999),
        fine_tune=TrainingConfig(steps=3_000, batch_size=16, learning_rate=1e-4, ema_decay=0.995),
        guidance=Guidance(
            loss="poisson",
            cycle=0.0,
            width=256,
            training=TrainingConfig(steps=5000, batch_size=64, learning_rate=1e-3, weight_decay=0.1, ema_decay=0.998),
        ),
        sampling=Sampling(num=400, solver="dpmpp_2m", steps=20, spacing="logsnr", prior="gaussian"),
        evaluation=Evaluation(_SMALL_CLASSIFIER),
    ),
    "smoke": Config(
        preset="smoke",
        data=Data(target_fraction=0.5),
        backbone=Backbone(
            num_res_layers=2, res_channels=16, d_state=16, step_features=32, step_embedding=64, label_dim=16
        ),
        source=TrainingConfig(steps=500, batch_size=8, learning_rate=3e-3, ema_decay=0.99),
        vanilla=TrainingConfig(steps=200, batch_size=8, learning_rate=3e-3, ema_decay=0.98),
        fine_tune=TrainingConfig(steps=100, batch_size=8, learning_rate=5e-4, ema_decay=0.95),
        guidance=Guidance(
            loss="poisson",
            consistency=0.0,
            cycle=0.0,
            width=128,
            training=TrainingConfig(steps=200, batch_size=32, learning_rate=2e-3, weight_decay=1.0, ema_decay=0.98),
        ),
        sampling=Sampling(num=64, solver="dpmpp_2m", steps=10, spacing="logsnr", prior="gaussian", batch_size=16),
        evaluation=Evaluation(_SMOKE_CLASSIFIER, bootstrap=100, plots=2),
    ),
}


def load_config(path: str | os.PathLike[str] | None, **changes: Any) -> Config:
    """A configuration from a TOML file, or a preset.

    Args:
        path: the file; None stands for an empty one. Folders in it are relative to its own.
        changes: "preset" where the file names none, and entries as ``section__name`` or ``name``, which override the
            file; None changes nothing.

    Raises:
        ConfigError: the file cannot be read or is no TOML; an unknown entry or preset; a bad value.
    """
    given: dict[str, Any] = {}
    if path is not None:
        given = _read(Path(path))
        for name in ("source", "target"):
            place = given.get("data", {}).get(name) if isinstance(given.get("data"), dict) else None
            if isinstance(place, str) and place:
                given["data"][name] = str(Path(path).parent / place)
        checkpoint = given.get("backbone", {}).get("checkpoint") if isinstance(given.get("backbone"), dict) else None
        if isinstance(checkpoint, str) and checkpoint:
            given["backbone"]["checkpoint"] = str(Path(path).parent / checkpoint)
    preset = given.pop("preset", changes.pop("preset", None) or "smoke")
    for name, value in changes.items():
        if value is not None:
            section, _, entry = name.rpartition("__")
            (given.setdefault(section, {}) if section else given)[entry] = value
    where = "the configuration" if path is None else str(path)
    try:
        base = PRESETS[check_choice("preset", preset, PRESETS)]
        return _changed(base, given, "")
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration, or a section of it, JSON-able and as in a TOML file."""
    if isinstance(config, SamplingConfig):
        return config.to_dict()
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    return {name: to_dict(value) if is_dataclass(value) else value for name, value in values.items()}


def _read(path: Path) -> dict[str, Any]:
    # In the standard library from Python 3.11 on; tomli is the same as a package.
    toml = optional("tomllib" if sys.version_info >= (3, 11) else "tomli", "on Python 3.10 a configuration file needs")
    try:
        content = read_bytes(path, _FILE_BYTES, ConfigError, "a configuration")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    with refused(ConfigError, f"{path} is no TOML file"):
        return dict(toml.loads(content.decode("utf-8").replace("\r\n", "\n")))


def _changed(base: T, given: Mapping[str, Any], prefix: str) -> T:
    """``base``, a dataclass, with the entries of ``given``; checks names and kinds."""
    assert is_dataclass(base)
    known = [entry.name for entry in fields(base)]
    values: dict[str, Any] = {}
    for name, value in given.items():
        check_choice("entry" if not prefix else f"entry of [{prefix}]", name, known)
        current, full = getattr(base, name), f"{prefix}.{name}" if prefix else name
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ValueError(f"{full} must be a table, written as [{full}], got {value!r}")
            values[name] = _changed(current, value, full)
        else:
            values[name] = _converted(full, value, current)
    try:
        result: T = dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ValueError as error:
        # The checks name the entry; say in which table.
        raise ValueError(f"{prefix}.{error}" if prefix and not str(error).startswith(prefix) else str(error)) from None
    return result


def _converted(name: str, value: Any, current: Any) -> Any:
    """``value`` as what stands in its place is; the section itself checks what may be None."""
    if current is None:
        return tuple(value) if isinstance(value, list) else value
    if isinstance(current, float) and type(value) is int:
        return check_number(name, value)
    if isinstance(current, tuple):
        item = type(current[0])
        if isinstance(value, list | tuple) and all(type(entry) is item for entry in value):
            return tuple(value)
        raise ValueError(f"{name} must be a list of {item.__name__}, got {value!r}")
    if type(value) is not type(current):
        raise ValueError(f"{name} must be of type {type(current).__name__}, got {value!r}")
    return value
