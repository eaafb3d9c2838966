"""The formats that the package reads: a small valid file of each, how to change it, and how it is read."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ecg_files import write_icbeb, write_ptbxl
from mutations import of_bytes, of_json, of_text

import tgdp_fast as tgdp
from tgdp_fast.diffusion.prior import EmpiricalPrior
from tgdp_fast.ecg.config import load_config
from tgdp_fast.ecg.records.folder import open_ecg_folder
from tgdp_fast.ecg.records.inspection import inspect_ecg_folder
from tgdp_fast.integrations.released import GuidanceQt
from tgdp_fast.lab.benchmark import report
from tgdp_fast.lab.benchmark.runner import KEYS
from tgdp_fast.models import XResNet1d
from tgdp_fast.runtime.arrays import Standardizer, check_samples, load_array

TOML = """preset = "smoke"
methods = ["tgdp", "source"]
[data]
rate = 100.0
seconds = 10.0
[backbone]
num_res_layers = 2
res_channels = 16
d_state = 16
diffusion_steps = 200
[source]
steps = 500
batch_size = 8
learning_rate = 3e-3
[guidance]
width = 128
depth = 4
[guidance.training]
steps = 200
[sampling]
num = 64
steps = 10
solver = "dpmpp_2m"
interval = [0.1, 0.9]
[evaluation]
bootstrap = 100
[evaluation.classifier]
blocks = [1, 1]
width = 16
"""


@dataclass(frozen=True)
class Format:
    """One file of a folder that a reader takes.

    Attributes:
        make: writes a valid folder.
        file: the file that is changed, in the folder.
        change: the changed content.
        read: reads the folder.
        after: repairs what would hide the change from the reader, such as a digest.
    """

    make: Callable[[Path], None]
    file: str
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], Any]
    after: Callable[[Path], None] = lambda folder: None


def text_change(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return of_bytes(content, chance)
    text = content.decode()
    for _ in range(chance.choice((1, 1, 2, 4))):
        text = of_text(text, chance)
    return text.encode()


def once(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """``make`` called once; later folders get the same files."""

    @lru_cache
    def files() -> dict[Path, bytes]:
        with tempfile.TemporaryDirectory() as place:
            make(Path(place))
            return {one.relative_to(place): one.read_bytes() for one in Path(place).rglob("*") if one.is_file()}

    def write(folder: Path) -> None:
        for name, content in files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return write


def samples() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((40, 3))


def read_samples(file: Path) -> None:
    Standardizer.fit(check_samples("source", load_array(file, "source")))


@once
def models(folder: Path) -> None:
    """A model of every class that has a checkpoint, in one folder each."""
    torch.manual_seed(0)
    schedule = tgdp.NoiseSchedule.vp_linear()
    denoiser = tgdp.Denoiser(tgdp.ScoreMLP((3,), 8, 2), schedule, time_input="half_log_snr")
    guidance = tgdp.GuidanceNetwork((3,), schedule, width=8, depth=2)
    prior = EmpiricalPrior(samples())
    denoiser.save(folder / "denoiser")
    guidance.save(folder / "guidance")
    XResNet1d(8, 3, blocks=(1, 1), expansion=1, width=4, stem_width=4, hidden=4).save(folder / "classifier")
    prior.save(folder / "prior")
    sssd = tgdp.Denoiser(sssd_ecg(), tgdp.NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 10)))
    sssd.save(folder / "sssd")
    tgdp.TransferModel(denoiser, guidance, Standardizer.fit(samples()), prior=prior).save(folder / "model")


def sssd_ecg() -> Any:
    return tgdp.SSSDECG(
        res_channels=4,
        skip_channels=4,
        num_res_layers=1,
        step_dims=(4, 4, 4),
        num_classes=2,
        label_dim=4,
        l_max=16,
        d_state=4,
    )


LOADERS: dict[str, Callable[[Path], Any]] = {
    "denoiser": tgdp.Denoiser.load,
    "guidance": tgdp.GuidanceNetwork.from_pretrained,
    "classifier": XResNet1d.load,
    "prior": EmpiricalPrior.load,
    "sssd": tgdp.Denoiser.from_pretrained,
    "model": tgdp.TransferModel.load,
}


def stamp(folder: Path) -> None:
    """The size and the digest of the tensors, in the settings: as somebody writes them who wants them read."""
    content = (folder / "model.safetensors").read_bytes()
    header = json.loads((folder / "config.json").read_bytes())
    header["tensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "config.json").write_text(json.dumps(header))


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def released(folder: Path, *, payload: bool = False) -> None:
    """Files of torch.save, as training scripts write them."""
    extra = {"bomb": Payload(folder.parent / "exploded")} if payload else {"iter": 3, "loss": np.float64(0.5)}
    for name, network in (("sssd.pkl", sssd_ecg()), ("qt.pt", GuidanceQt(in_channels=2, length=64, width=4, depth=1))):
        state = {f"module.{key}": value for key, value in network.state_dict().items()}
        torch.save({"model_state_dict": state, **extra}, folder / name)
        torch.save({"model_state_dict": state, **extra}, folder / f"old_{name}", _use_new_zipfile_serialization=False)


def read_released(file: Path) -> None:
    if "sssd" in file.name:
        tgdp.SSSDECG.from_checkpoint(file, cauchy="pair")
    else:
        GuidanceQt.from_checkpoint(file, length=64)


def bench() -> bytes:
    row = dict.fromkeys(KEYS, 0.5) | {"case": "mlp/batch4", "provider": "reference", "dtype": "fp32", "shape": [4, 2]}
    environment = {"cpu": "a cpu", "cuda": None, "torch_threads": 1, "cpu_count": 2, "torch": "2", "commit": "0"}
    return json.dumps({"environment": environment, "rows": [row, {**row, "provider": "cpu"}]}).encode()


def read_bench(file: Path) -> None:
    result = report.load(file)
    report.markdown({"a": result})
    report.summary(result["rows"])


def places_of(section: str, names: str) -> tuple[tuple[str, ...], ...]:
    """Paths of entries of a section, both as words."""
    return tuple((*section.split(), name) for name in names.split())


def read_records(folder: Path) -> None:
    inspect_ecg_folder(open_ecg_folder(folder), 1.0, read=True)


def read_all_records(folder: Path) -> None:
    """One damaged record is listed and does not keep the reader from the others."""
    try:
        read_records(folder)
    except ValueError as error:
        raise AssertionError(f"the whole folder was refused: {error}") from error


def _in(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content()) and None


def _saved(save: Callable[..., None], name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        buffer = io.BytesIO()
        save(buffer, samples())
        (folder / name).write_bytes(buffer.getvalue())

    return make


def formats() -> dict[str, Format]:
    """By name; several of one kind count together: the name before the slash."""
    found = {
        "npy": Format(_saved(np.save, "x.npy"), "x.npy", of_bytes, lambda f: read_samples(f / "x.npy")),
        "npz": Format(_saved(np.savez_compressed, "x.npz"), "x.npz", of_bytes, lambda f: read_samples(f / "x.npz")),
        "npz/stored": Format(_saved(np.savez, "x.npz"), "x.npz", of_bytes, lambda f: read_samples(f / "x.npz")),
        "toml": Format(_in("c.toml", TOML.encode), "c.toml", text_change, lambda f: load_config(f / "c.toml")),
        "bench": Format(_in("b.json", bench), "b.json", of_json, lambda f: read_bench(f / "b.json")),
        "hea": Format(write_ptbxl_small, "records100/00000/00001_lr.hea", text_change, read_all_records),
        "table/ptbxl": Format(write_ptbxl_small, "ptbxl_database.csv", text_change, read_records),
        "table/icbeb": Format(write_icbeb_small, "REFERENCE.csv", text_change, read_records),
        "mat/4": Format(write_icbeb_small, "A0001.mat", of_bytes, read_all_records),
        "mat/5": Format(write_icbeb_small, "A0002.mat", of_bytes, read_all_records),
        "dat": Format(write_ptbxl_small, "records100/00000/00001_lr.dat", of_bytes, read_all_records),
    }
    for name, load in LOADERS.items():

        def read(folder, load=load, name=name):
            return load(folder / name)

        found[f"config/{name}"] = Format(models, f"{name}/config.json", of_json, read)

        def fix(folder, name=name):
            return stamp(folder / name)

        found[f"safetensors/{name}"] = Format(models, f"{name}/model.safetensors", of_bytes, read, fix)
    for name in ("sssd.pkl", "old_sssd.pkl", "qt.pt", "old_qt.pt"):

        def read(folder, name=name):
            return read_released(folder / name)

        found[f"torch/{name}"] = Format(released, name, of_bytes, read)
        found[f"torch/{name} with code"] = Format(lambda folder: released(folder, payload=True), name, of_bytes, read)
    return found


@once
def write_ptbxl_small(folder: Path) -> None:
    write_ptbxl(folder, 2)


@once
def write_icbeb_small(folder: Path) -> None:
    write_icbeb(folder, (600, 600))


def fresh(folder: Path) -> Path:
    """An empty folder there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
