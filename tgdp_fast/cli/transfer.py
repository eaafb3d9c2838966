"""The commands for arrays: ``transfer``, from two of them to samples, and ``sample``, from a saved model."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from tgdp_fast.cli.arguments import add_command, add_quiet, warn, with_flags
from tgdp_fast.cli.ecg import check_model_folder
from tgdp_fast.diffusion.solvers import SOLVERS, SPACINGS
from tgdp_fast.fit.losses import LOSSES
from tgdp_fast.fit.regularizers import REGULARIZERS
from tgdp_fast.runtime.checks import check_device, check_integer, check_seed
from tgdp_fast.runtime.memory import check_memory

#: Exit status of ``transfer`` if its diagnostics say that the source does not reach the target.
OUT_OF_REACH = 3
#: Where samples go without --out. Whoever writes --out samples.npy gives another object, and means it.
SAMPLES = Path("samples.npy")


def add_parsers(commands: Any) -> None:
    """Add the commands."""
    command = add_command(commands, "transfer", transfer, kept=_kept_by_transfer)
    command.add_argument("--source", type=Path, required=True, help="source samples, .npy or .npz, [M, ...]")
    command.add_argument("--target", type=Path, required=True, help="target samples, .npy or .npz, [N, ...]")
    command.add_argument(
        "--source-labels", type=Path, help="class indices [M] or rows [M, K]; needs the other two files of labels"
    )
    command.add_argument("--target-labels", type=Path, help="class indices [N] or rows [N, K]")
    command.add_argument("--save", type=Path, help="folder to save the fitted model as, for the command sample")
    command.add_argument(
        "--denoiser", type=Path, help="saved model whose source denoiser to use instead of training one"
    )
    command.add_argument("--train-steps", type=int, help="training steps of the source denoiser (2000)")
    command.add_argument("--loss", default="logistic", help=f"{', '.join(LOSSES)} (%(default)s)")
    for name, kind in REGULARIZERS.items():
        flag, term = f"--{name.replace('_', '-')}", name.replace("_", " ")
        command.add_argument(flag, type=float, help=f"weight of the {term} term ({kind.default:g})")
    _sampling(command)

    command = add_command(commands, "sample", sample, kept=_kept_by_sample)
    command.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder written by transfer --save")
    _sampling(command)


def _sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--num", type=int, required=True, help="samples to draw")
    command.add_argument("--out", type=Path, default=SAMPLES, help=".npy to write them to (%(default)s)")
    command.add_argument(
        "--labels",
        type=Path,
        help="one class index for all samples, or a .npy with one for each (conditional models only)",
    )
    command.add_argument("--solver", default="dpmpp_2m", help=f"{', '.join(SOLVERS)} (%(default)s)")
    command.add_argument("--steps", type=int, default=25, help="solver steps (%(default)s)")
    command.add_argument("--spacing", default="logsnr", help=f"{', '.join(SPACINGS)} (%(default)s)")
    command.add_argument("--scale", type=float, default=1.0, help="guidance scale; 1 is exact (%(default)s)")
    command.add_argument(
        "--gradient-norm-limit", type=float, help="limit of the guidance per sample, in units of epsilon (no limit)"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of everything random; the same seed gives the same samples (%(default)s)"
    )
    command.add_argument(
        "--batch-size",
        type=int,
        help="samples in flight; bounds memory (as many as have 2 million values, at most 8192)",
    )
    command.add_argument("--precision", default="fp32", help="fp32, bf16x3, bf16 or fp16 (%(default)s)")
    command.add_argument(
        "--backend",
        default="auto",
        help="auto, reference, cpu, triton or cuda, as far as tgdp-fast info lists them (%(default)s: the fastest)",
    )
    command.add_argument("--device", help="cpu, cuda, ... (default: cpu)")
    add_quiet(command)


def _kept_by_transfer(options: argparse.Namespace) -> list[Path]:
    return [_work(options.out), *_kept_by_sample(options)]


def _kept_by_sample(options: argparse.Namespace) -> list[Path]:
    return [options.out.with_name(options.out.name + ".partial")]


def _work(out: Path) -> Path:
    return out.with_name(out.name + ".work")


def transfer(options: argparse.Namespace) -> int | None:
    """Two arrays in, target samples out.

    The exit status is 3 if the diagnostics say not to use the samples because the source does not reach the target;
    they are written all the same.
    """
    from tgdp_fast.diffusion.denoiser import Denoiser
    from tgdp_fast.fit.model import TransferModel
    from tgdp_fast.runtime.arrays import CheckedArray, load_array
    from tgdp_fast.runtime.checkpoint import check_replaceable, checkpoint_kind
    from tgdp_fast.runtime.stages import owned
    from tgdp_fast.sampling.blocks import BlockFile

    _check_sampling(options)
    config = _guidance_config(options)
    if options.train_steps is not None:
        check_integer("--train-steps", options.train_steps, 1)
    if options.save is not None:
        _check_folder("--save", options.save)
        _named("--save", check_replaceable, options.save)
    source = CheckedArray.samples("--source", load_array(options.source, "--source"), keep_exact=True)
    event_shape = source.values.shape[1:]
    target = CheckedArray.samples(
        "--target", load_array(options.target, "--target"), event_shape=event_shape, keep_exact=True
    )
    denoiser: Denoiser | TransferModel | None = None
    if options.denoiser is not None:
        kind = _named("--denoiser", checkpoint_kind, options.denoiser)
        load = TransferModel.load if kind == "transfer_model" else Denoiser.load
        denoiser = _named("--denoiser", load, options.denoiser)
        _move(denoiser, options.device)
    labels = _transfer_labels(options, source, target, denoiser)
    with owned(_work(options.out)), BlockFile(options.out).owned():  # Refused now, and not after the training.
        return _transfer(options, config, source, target, denoiser, labels)


def _transfer(
    options: argparse.Namespace, config: Any, source: Any, target: Any, denoiser: Any, labels: dict[str, Any]
) -> int | None:
    from tgdp_fast.fit.config import TrainingConfig
    from tgdp_fast.fit.diagnostics import TransferDiagnostics
    from tgdp_fast.fit.model import TransferModel
    from tgdp_fast.runtime.stages import Stages

    work = _work(options.out)
    if not options.quiet:
        print(f"finished stages and, every 30 s, training states go to {work} until the end", file=sys.stderr)
    model = TransferModel.fit(
        source,
        target,
        config,
        source_labels=labels["source_labels"],
        target_labels=labels["target_labels"],
        denoiser=denoiser,
        denoiser_training=None if options.train_steps is None else TrainingConfig(steps=options.train_steps),
        work_dir=work,
        seed=options.seed,
        device=options.device,
        progress=not options.quiet,
    )
    report = TransferDiagnostics(**model.diagnostics)
    warn(report.warnings)
    print(report.summary(), flush=True)
    if options.save is not None:
        model.save(options.save)
        print(f"model saved in {options.save}")
    _draw(model, options, None if labels["labels"] is None else labels["labels"].values)
    Stages(work).remove("denoiser", "guidance")
    return None if report.within_reach else OUT_OF_REACH


def _guidance_config(options: argparse.Namespace) -> Any:
    """The loss and the regularizers that the command line names."""
    from tgdp_fast.fit.config import GuidanceConfig

    given = {name: getattr(options, name) for name in REGULARIZERS}
    regularizers = [
        _flagged(options, kind, weight=kind.default if given[name] is None else given[name])
        for name, kind in REGULARIZERS.items()
    ]
    return _flagged(options, GuidanceConfig, loss=options.loss, regularizers=regularizers)


def _transfer_labels(options: argparse.Namespace, source: Any, target: Any, denoiser: Any) -> dict[str, Any]:
    """Labels of the source, of the target and of the samples to draw, checked: all three or none."""
    from tgdp_fast.fit.data import TransferArrays
    from tgdp_fast.runtime.arrays import CheckedArray, load_array

    labels: dict[str, Any] = {}
    for name, count in (("source_labels", len(source)), ("target_labels", len(target)), ("labels", options.num)):
        path = getattr(options, name)
        flag = "--" + name.replace("_", "-")
        found = None if path is None else _labels(path, count) if name == "labels" else load_array(path, flag)
        labels[name] = None if found is None else CheckedArray.labels(flag, found, count)
    given = [name for name, value in labels.items() if value is not None]
    if given and len(given) < 3:
        raise ValueError(
            "--source-labels, --target-labels and --labels (of the samples to draw) belong together; got only "
            + ", ".join("--" + name.replace("_", "-") for name in given)
        )
    stated = getattr(denoiser, "denoiser", denoiser)  # that of a whole model
    if stated is not None and stated.num_classes and not given:
        raise ValueError(
            "--source-labels, --target-labels and --labels must be given: --denoiser is conditional on "
            f"{stated.num_classes} classes"
        )
    if given:
        arrays = TransferArrays.check(source, target, labels["source_labels"], labels["target_labels"], denoiser=stated)
        CheckedArray.labels("--labels", labels["labels"], options.num, arrays.num_classes)
    return labels


def sample(options: argparse.Namespace) -> None:
    """Samples from a saved model."""
    from tgdp_fast.fit.model import TransferModel
    from tgdp_fast.runtime.arrays import check_labels

    _check_sampling(options)
    check_model_folder(options.model)
    model = _named("MODEL_DIR", TransferModel.load, options.model)
    classes, labels = model.guidance.num_classes, None
    if options.labels is None and classes:
        if "ecg" in model.config:
            raise ValueError(
                f"MODEL_DIR: {options.model} is a model of ECGs; draw records of named statements with tgdp-fast ecg "
                f"sample {options.model} --num {options.num} --statements NORM --out DIR, or arrays with --labels"
            )
        raise ValueError(
            f"--labels must be given: {options.model} is conditional on {classes} classes; write one class (0 to "
            f"{classes - 1}) for all, or save one class index for each of the {options.num} samples as .npy"
        )
    if options.labels is not None:
        if not classes:
            raise ValueError(f"--labels must be left out: {options.model} was fitted without labels")
        labels = check_labels("--labels", _labels(options.labels, options.num), options.num, classes)
    _repeat_warnings(model, options)
    if options.out is SAMPLES and SAMPLES.exists():
        _check_own(model, options, labels)
    _draw(model, options, labels)


def _repeat_warnings(model: Any, options: argparse.Namespace) -> None:
    """What was said when the model was fitted. Unguided samples are those of the source, which no diagnostics judge."""
    from tgdp_fast.ecg.config import SMOKE

    if options.scale:
        warn(model.diagnostics.get("warnings", []))
    if model.config.get("ecg", {}).get("preset") == "smoke":
        warn([SMOKE])


def _check_own(model: Any, options: argparse.Namespace, labels: Any) -> None:
    """Refuse to write over a file that nobody named, unless the same command has written it."""
    from tgdp_fast.runtime.arrays import load_array

    try:
        held = load_array(SAMPLES, "--out")
    except ValueError:  # Something else, or damaged: somebody's all the same.
        held = None
    _move(model, options.device)
    config, drawing = _sampling_config(options), {"seed": options.seed, "batch_size": options.batch_size}
    if held is None or not model.reproduces(held, options.num, config, labels=labels, **drawing):
        raise ValueError(
            f"--out must be given: {SAMPLES}, the default, is there already and holds something else; give another "
            f"file, or --out {SAMPLES} to replace it"
        )


def _draw(model: Any, options: argparse.Namespace, labels: Any) -> None:
    from tgdp_fast.fit.model import OutOfReachWarning

    _move(model, options.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfReachWarning)  # Said already, with all others.
        drawn = model.sample_to_file(
            options.out,
            options.num,
            _sampling_config(options),
            labels=labels,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=not options.quiet,
        )
    print(f"{len(drawn)} samples of shape {tuple(drawn.shape[1:])} written to {options.out}")


def _sampling_config(options: argparse.Namespace) -> Any:
    """How to sample, as the command line says."""
    from tgdp_fast.sampling.config import SamplingConfig

    names = [entry.name for entry in fields(SamplingConfig) if entry.name in options]
    return _flagged(options, SamplingConfig, **{name: getattr(options, name) for name in names})


def _flagged(options: argparse.Namespace, function: Callable[..., Any], **arguments: Any) -> Any:
    """``function(**arguments)``, with the flag in its message instead of the argument."""
    try:
        return function(**arguments)
    except ValueError as error:
        raise ValueError(with_flags(str(error), options, {})) from None


def _labels(given: Path, count: int) -> Any:
    """Labels of the samples to draw: one class for all, or a file."""
    import numpy as np

    from tgdp_fast.runtime.arrays import load_array

    if re.fullmatch(r"-?\d+", str(given)):
        try:
            return np.full(count, int(str(given)), np.int64)
        except OverflowError:
            raise ValueError(f"--labels must be a class index or a file, got {given}") from None
    return load_array(given, "--labels")


def _move(model: Any, device: str | None) -> None:
    """Move a denoiser, or a model's networks, to ``device``."""
    if device is not None:
        for network in (getattr(model, "denoiser", model), getattr(model, "guidance", None)):
            if network is not None:
                network.to(device)


def _named(argument: str, function: Callable[..., Any], *values: Any) -> Any:
    """``function(*values)``, with the argument in front of its message."""
    try:
        return function(*values)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def _check_sampling(options: argparse.Namespace) -> None:
    """Refuse bad sampling options before anything is read or trained."""
    check_integer("--num", options.num, 1)
    check_memory("--num", options.num, 4 * options.num, "samples of one number", "draw fewer")
    check_seed(options.seed, "--seed")
    if options.batch_size is not None:
        check_integer("--batch-size", options.batch_size, 1)
    _sampling_config(options)
    if options.device is not None:
        check_device(options.device, "--device")
    if options.out.suffix != ".npy" or options.out.is_dir():
        raise ValueError(f"--out must be a file that ends in .npy, got {options.out}")
    _check_folder("--out", options.out)
    _check_overwriting(options)
    _check_backend(options)


def _check_folder(argument: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{argument} must lie in an existing folder, got {path}; create {path.parent} first")


def _check_overwriting(options: argparse.Namespace) -> None:
    """Refuse to write over what is read."""
    from tgdp_fast.runtime.files import real_path

    out = real_path(options.out)
    for name in ("source", "target", "source_labels", "target_labels", "labels"):
        path = getattr(options, name, None)
        if path is not None and real_path(path) == out:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--out must be another file than {flag}, which it would overwrite; got {options.out}")
    folders = {"--denoiser": "denoiser", "--save": "save", "MODEL_DIR": "model"}
    given = {flag: getattr(options, name, None) for flag, name in folders.items()}
    for flag, folder in given.items():
        if folder is not None and real_path(folder) in (out, *out.parents):
            raise ValueError(f"--out must lie outside the model folder {flag} {folder}, got {options.out}")
    save, denoiser = given["--save"], given["--denoiser"]
    if save is not None and denoiser is not None and real_path(save) == real_path(denoiser):
        raise ValueError(f"--save must be another folder than --denoiser, which it would replace; got {save}")


def _check_backend(options: argparse.Namespace) -> None:
    """Draw one sample of small models where a backend is demanded: it may be missing, or refuse the device."""
    from tgdp_fast.diffusion.denoiser import Denoiser
    from tgdp_fast.diffusion.guidance import GuidanceNetwork
    from tgdp_fast.diffusion.schedule import NoiseSchedule
    from tgdp_fast.models import ScoreMLP
    from tgdp_fast.ops.registry import requested_backend
    from tgdp_fast.sampling.sampler import sample

    if requested_backend(options.backend) == "auto":
        return
    schedule, device = NoiseSchedule.vp_linear(), options.device or "cpu"
    denoiser = Denoiser(ScoreMLP((2,), 8, 1), schedule).to(device)
    guidance = GuidanceNetwork((2,), schedule).to(device)
    sample(denoiser, guidance, num=1, steps=1, precision=options.precision, backend=options.backend)
