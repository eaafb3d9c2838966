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
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np

from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SOLVERS, SPACINGS
from tgdp_fast.fit.density_ratio import RATIO_LOSSES
from tgdp_fast.fit.training import TIME_DISTRIBUTIONS, Optimisation
from tgdp_fast.models.s4 import CAUCHY
from tgdp_fast.runtime.checks import check_choice, check_integer, check_number, check_seed
from tgdp_fast.runtime.precision import PRECISIONS

#: In the order of tables and plots.
METHODS = ("source", "vanilla", "fine_tune", "tgdp")
#: What is said of every result of the preset smoke.
SMOKE = "preset smoke: shows that everything works; samples and numbers are not good"
PRIORS = ("standard", "gaussian", "empirical")
UNITS = ("mV", "standardised")
DOMAIN_CLASSIFIERS = ("features", "xresnet1d")

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; names the entry."""


@dataclass(frozen=True)
class Data:
    """What is read, and how it is divided.

    Attributes:
        source, target: folders of records.
        rate: samples per second to which records are resampled.
        seconds: kept of each record, from its start; shorter ones are dropped.
        target_fraction: of the target's records that methods may see (the paper: 0.1); a record of the rest is never
            trained on, it tests. In cases where that leaves fewer than ``least_target``, so many are taken.
        least_target: see there.
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
        check_seed(self.seed)
        check_choice("on_problem", self.on_problem, ("skip", "raise"))


@dataclass(frozen=True)
class Backbone:
    """The SSSD-ECG network and its noise schedule; the defaults are the paper's (TGDP section 4.2).

    Attributes:
        checkpoint: a released SSSD-ECG checkpoint, or a denoiser saved by this package, in the place of training. Its
            architecture replaces the one here.
        checkpoint_units: of the signals that it works on: "mV", as released ones do, or "standardised" by the source
            records given here. A model that ``tgdp-fast ecg fit`` has saved brings its own standardisation.
        cauchy: which sum of kernels a released file was trained with, "pair" or "half" (see
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
        check_choice("checkpoint_units", self.checkpoint_units, UNITS)
        check_choice("cauchy", self.cauchy, CAUCHY)
        check_integer("diffusion_steps", self.diffusion_steps, 2)
        self.schedule()

    def schedule(self) -> NoiseSchedule:
        """Linear betas."""
        return NoiseSchedule.from_betas(np.linspace(self.beta_start, self.beta_end, self.diffusion_steps))


@dataclass(frozen=True)
class Classifier:
    """An xresnet1d of statements: its features, its use as a judge of samples, and the domain classifier's body."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    expansion: int = 4
    width: int = 64
    training: Optimisation = field(
        default_factory=lambda: Optimisation(steps=5000, batch_size=128, learning_rate=1e-3, weight_decay=0.01)
    )


@dataclass(frozen=True)
class Guidance:
    """Density ratio and guidance network (TGDP Algorithms 1 to 4).

    Attributes:
        domain_classifier: what tells source from target on clean signals: a perceptron on "features" of the frozen
            statement classifier, or an "xresnet1d" on the signals.
        conditional: whether it and the guidance take labels (TGDP Theorem 3.3).
        loss, consistency, cycle, width, depth, alpha_power, time_distribution: see :func:`tgdp_fast.fit_guidance`. The
            default is Algorithm 4; the weights of its terms are ours. A time-dependent classifier ("logistic") tells
            8,000 numbers of few records apart by heart, and h with it; regression on the calibrated ratio does not.
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
    training: Optimisation = field(
        default_factory=lambda: Optimisation(steps=50_000, batch_size=128, learning_rate=2e-4, weight_decay=0.1)
    )

    def __post_init__(self) -> None:
        check_choice("domain_classifier", self.domain_classifier, DOMAIN_CLASSIFIERS)
        check_choice("loss", self.loss, RATIO_LOSSES)
        check_number("consistency", self.consistency, 0.0)
        check_number("cycle", self.cycle, 0.0)
        check_choice("time_distribution", self.time_distribution, TIME_DISTRIBUTIONS)


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn; see :func:`tgdp_fast.sample`.

    Attributes:
        num: samples of each method.
        prior: where sampling starts: "standard" is N(0, I); "gaussian" and "empirical" are fitted to what the model
            was trained on, for TGDP to source records weighted with their ratios
            (see :mod:`tgdp_fast.diffusion.prior`).
    """

    num: int = 1000
    solver: str = "ddpm"
    steps: int = 200
    spacing: str = "uniform"
    scale: float = 1.0
    gradient_norm_limit: float = 0.0
    prior: str = "standard"
    precision: str = "fp32"
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_integer("num", self.num, 2)
        check_choice("solver", self.solver, SOLVERS)
        check_integer("steps", self.steps, 1)
        check_choice("spacing", self.spacing, SPACINGS)
        check_number("scale", self.scale)
        check_number("gradient_norm_limit", self.gradient_norm_limit, 0.0)
        check_choice("prior", self.prior, PRIORS)
        check_choice("precision", self.precision, PRECISIONS)
        check_seed(self.seed)
        check_integer("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class Evaluation:
    """What samples are judged by.

    Attributes:
        classifier: trained on samples, tested on real records; and on source records, for features.
        bootstrap: resamplings of the test records behind an interval.
        seeds: classifiers trained on each set of samples; figures are their means.
        plots: samples shown of each method.
    """

    classifier: Classifier = field(default_factory=Classifier)
    bootstrap: int = 1000
    seeds: int = 1
    plots: int = 3

    def __post_init__(self) -> None:
        check_integer("bootstrap", self.bootstrap, 10)
        check_integer("seeds", self.seeds, 1)
        check_integer("plots", self.plots, 1)


@dataclass(frozen=True)
class Config:
    """A whole run. ``source``, ``vanilla`` and ``fine_tune`` are the training of the three denoisers."""

    preset: str = "paper"
    methods: tuple[str, ...] = METHODS
    seed: int = 0
    device: str = "cpu"
    data: Data = field(default_factory=Data)
    backbone: Backbone = field(default_factory=Backbone)
    source: Optimisation = field(
        default_factory=lambda: Optimisation(steps=100_000, batch_size=8, learning_rate=2e-4, ema_decay=0.9999)
    )
    vanilla: Optimisation = field(
        default_factory=lambda: Optimisation(steps=100_000, batch_size=8, learning_rate=2e-4, ema_decay=0.9999)
    )
    fine_tune: Optimisation = field(
        default_factory=lambda: Optimisation(steps=50_000, batch_size=8, learning_rate=2e-5, ema_decay=0.9999)
    )
    guidance: Guidance = field(default_factory=Guidance)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        for method in self.methods:
            check_choice("methods", method, METHODS)
        if "tgdp" not in self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be different ones of {', '.join(METHODS)}, tgdp among them")
        check_seed(self.seed)


_SMALL_CLASSIFIER = Classifier(
    (1, 1, 1, 1), 1, 32, Optimisation(steps=600, batch_size=64, learning_rate=2e-3, weight_decay=0.01, ema_decay=0.99)
)
_SMOKE_CLASSIFIER = Classifier(
    (1, 1, 1, 1), 1, 16, Optimisation(steps=80, batch_size=32, learning_rate=3e-3, weight_decay=0.01, ema_decay=0.95)
)

#: ``paper``: TGDP section 4.2 (rates decay, where the paper's are constant). ``small``: hours on a processor, minutes
#: on a GPU. ``smoke``: minutes on two cores, to see that everything works; its samples are not good.
PRESETS: dict[str, Config] = {
    "paper": Config(),
    "small": Config(
        preset="small",
        backbone=Backbone(
            num_res_layers=8, res_channels=64, d_state=32, step_features=64, step_embedding=256, label_dim=64
        ),
        source=Optimisation(steps=20_000, batch_size=16, learning_rate=1e-3, ema_decay=0.999),
        vanilla=Optimisation(steps=10_000, batch_size=16, learning_rate=1e-3, ema_decay=0.999),
        fine_tune=Optimisation(steps=3_000, batch_size=16, learning_rate=1e-4, ema_decay=0.995),
        guidance=Guidance(
            loss="poisson",
            cycle=0.0,
            width=256,
            training=Optimisation(steps=5000, batch_size=64, learning_rate=1e-3, weight_decay=0.1, ema_decay=0.998),
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
        source=Optimisation(steps=500, batch_size=8, learning_rate=3e-3, ema_decay=0.99),
        vanilla=Optimisation(steps=200, batch_size=8, learning_rate=3e-3, ema_decay=0.98),
        fine_tune=Optimisation(steps=100, batch_size=8, learning_rate=5e-4, ema_decay=0.95),
        guidance=Guidance(
            loss="poisson",
            consistency=0.0,
            cycle=0.0,
            width=128,
            training=Optimisation(steps=200, batch_size=32, learning_rate=2e-3, weight_decay=1.0, ema_decay=0.98),
        ),
        sampling=Sampling(num=64, solver="dpmpp_2m", steps=10, spacing="logsnr", prior="gaussian", batch_size=16),
        evaluation=Evaluation(_SMOKE_CLASSIFIER, bootstrap=100, plots=2),
    ),
}


def load_config(path: str | os.PathLike[str] | None, **changes: Any) -> Config:
    """A configuration from a TOML file, or a preset.

    Args:
        path: the file; None stands for an empty one. Folders in it are relative to its own.
        changes: "preset" of a file that names none, and entries as ``section__name`` or ``name`` that win over the
            file; None leaves an entry alone.

    Raises:
        ConfigError: no such file, no TOML, an unknown entry or preset, a value that cannot be.
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
    """JSON-able, as in a TOML file."""
    return dataclasses.asdict(config)


def _read(path: Path) -> dict[str, Any]:
    try:
        # In the standard library from Python 3.11 on; tomli is the same as a package.
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise ImportError(
            "a configuration file needs tomli on this Python, which is not installed; run: pip install 'tgdp_fast[ecg]'"
        ) from None
    try:
        with open(path, "rb") as file:
            return dict(toml.load(file))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except toml.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML file: {error}") from None


def _changed(base: T, given: Mapping[str, Any], prefix: str) -> T:
    """``base``, a dataclass, with the entries of ``given``; checks names and kinds."""
    assert is_dataclass(base)
    kinds = get_type_hints(type(base))
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
            values[name] = _converted(full, value, kinds[name])
    try:
        result: T = dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ValueError as error:
        # The checks name the entry; say in which table.
        raise ValueError(f"{prefix}.{error}" if prefix and not str(error).startswith(prefix) else str(error)) from None
    return result


def _converted(name: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if getattr(kind, "__origin__", None) is tuple:
        (item, *_) = get_args(kind)
        if isinstance(value, list | tuple) and all(type(entry) is item for entry in value):
            return tuple(value)
        raise ValueError(f"{name} must be a list of {item.__name__}, got {value!r}")
    if type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value
