"""Files that somebody made on purpose, and settings that no machine can hold: a name and what reads it.

Each function writes its file into an empty folder and reads it. The names begin with the format.
"""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats import (
    LOADERS,
    TOML,
    Payload,
    bench,
    models,
    places_of,
    read_all_records,
    read_bench,
    read_released,
    read_samples,
    samples,
    sssd_ecg,
    stamp,
    write_ptbxl_small,
)

import tgdp_fast as tgdp
from tgdp_fast.cli.main import main as command
from tgdp_fast.ecg.config import load_config

HOSTILE: dict[str, Callable[[Path], Any]] = {}


def hostile(name: str) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    def add(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        assert name not in HOSTILE
        HOSTILE[name] = function
        return function

    return add


# ------------------------------------------------------------------------------------------------- .npy, .npz


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    text = header.encode("utf-8")
    size = len(text) if length is None else length
    packed = struct.pack("<H", size % 65536) if version == b"\x01\x00" else struct.pack("<I", size)
    return b"\x93NUMPY" + version + packed + text + data


def shaped(shape: str, dtype: str = "'<f4'") -> str:
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n"


DATA = samples().astype("<f4").tobytes()
NPY = {
    **{
        f"rows {name}": npy(shaped(f"({number}, 3)"), DATA)
        for name, number in (
            ("2^33", 2**33),
            ("2^62", 2**62),
            ("2^64", 2**64),
            ("10^400", 10**400),
            ("negative", -1),
            ("True", True),
            ("1.5", 1.5),
        )
    },
    "void items of a gigabyte": npy(shaped("(2,)", "'V1000000000'"), DATA),
    "texts of a gigabyte": npy(shaped("(2,)", "'U250000000'"), DATA),
    "unclosed header": npy("{'descr': '<f4', 'shape': (3", DATA),
    "header of 20,000 characters": npy(shaped("(40, 3)") + " " * 20_000, DATA, b"\x02\x00"),
    "header nested 9,000 deep": npy("(" * 4500 + ")" * 4500, DATA),
    "header of 4 GB": npy(shaped("(40, 3)"), DATA, b"\x02\x00", 2**32 - 1),
    "version 9": npy(shaped("(40, 3)"), DATA, b"\x09\x00"),
    "objects": npy(shaped("(2,)", "'|O'"), pickle.dumps([1, 2])),
    "records with objects": npy(shaped("(2,)", "[('a', '|O')]"), DATA),
    "records": npy(shaped("(2,)", "[('a', '<f4')]"), DATA),
    "dates": npy(shaped("(2,)", "'<M8[s]'"), DATA),
    "no shape": npy("{'descr': '<f4', 'fortran_order': False}", DATA),
    "more keys": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': 1}", DATA),
    "a dtype of lists": npy(shaped("(2,)", "[[[]]]"), DATA),
    "an unknown dtype": npy(shaped("(2,)", "'<q99'"), DATA),
    "a number as dtype": npy(shaped("(2,)", "7"), DATA),
    "a shape that is a list": npy(shaped("[40, 3]"), DATA),
    "a shape of texts": npy(shaped("('a', 3)"), DATA),
    "100 dimensions": npy(shaped("(" + "1, " * 100 + ")"), DATA),
    "dimensions with 0": npy(shaped("(0, 9223372036854775807, 3)"), DATA),
    "code as header": npy("__import__('os').getcwd()", DATA),
    "header not in UTF-8": b"\x93NUMPY\x03\x00" + struct.pack("<I", 4) + b"\xff\xfe\xff\xfe" + DATA,
    "a long number": npy(shaped("(" + "9" * 5000 + ",)"), DATA),
    "only the magic": b"\x93NUMPY",
    "nothing": b"",
    "zeros": bytes(1000),
}
for title, content in NPY.items():

    @hostile(f"npy: {title}")
    def _npy(folder: Path, content: bytes = content) -> None:
        (folder / "x.npy").write_bytes(content)
        read_samples(folder / "x.npy")


for protocol in range(6):

    @hostile(f"npy: pickle of protocol {protocol}")
    def _pickle(folder: Path, protocol: int = protocol) -> None:
        (folder / "x.npy").write_bytes(pickle.dumps(Payload(folder / "exploded"), protocol=protocol))
        read_samples(folder / "x.npy")


@hostile("npy: 8 GB without content")
def _sparse(folder: Path) -> None:
    with open(folder / "x.npy", "wb") as file:
        file.write(npy(shaped("(1000000000, 2)")))
        file.truncate(8 * 10**9 + 200)
    read_samples(folder / "x.npy")


def archive(folder: Path, members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(folder / "x.npz", "w", how) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return folder / "x.npz"


GOOD = npy(shaped("(40, 3)"), DATA)
NPZ: dict[str, dict[str, bytes]] = {
    "no array": {},
    "two arrays": {"a.npy": GOOD, "b.npy": GOOD},
    "a thousand arrays": {f"{number}.npy": b"" for number in range(1000)},
    "a text": {"readme.txt": b"hello"},
    "an empty member": {"a.npy": b""},
    "another folder": {"../../a.npy": GOOD},
    "a folder": {"a/": b""},
    "objects": {"a.npy": NPY["objects"]},
    "2^33 rows": {"a.npy": NPY["rows 2^33"]},
    "void items of a gigabyte": {"a.npy": NPY["void items of a gigabyte"]},
    "an unclosed header": {"a.npy": NPY["unclosed header"]},
}
for title, members in NPZ.items():

    @hostile(f"npz: {title}")
    def _npz(folder: Path, members: dict[str, bytes] = members) -> None:
        read_samples(archive(folder, members))


# Offset and new bytes in the entry of the central directory and in the member's own header.
ENTRIES = {"encrypted": (8, 6, b"\x01\x00"), "compressed in an unknown way": (10, 8, b"\x63\x00")}
for title, (central, local, new) in ENTRIES.items():

    @hostile(f"npz: {title}")
    def _flag(folder: Path, central: int = central, local: int = local, new: bytes = new) -> None:
        file = archive(folder, {"a.npy": GOOD})
        content = bytearray(file.read_bytes())
        for start, offset in ((content.index(b"PK\x01\x02"), central), (0, local)):
            content[start + offset : start + offset + 2] = new
        file.write_bytes(content)
        read_samples(file)


@hostile("npz: damaged deflate")
def _deflate(folder: Path) -> None:
    file = archive(folder, {"a.npy": GOOD})
    content = bytearray(file.read_bytes())
    content[60:80] = bytes(20)
    file.write_bytes(content)
    read_samples(file)


@hostile("npz: unpacks to a thousand times its size")
def _bomb(folder: Path) -> None:
    rows = 100 * 2**20 // 4
    with (
        zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy(shaped(f"({4 * rows}, 1)")))
        for _ in range(4):
            member.write(bytes(4 * rows))
    read_samples(folder / "x.npz")


@hostile("npz: a directory that says less than there is")
def _less(folder: Path) -> None:
    file = archive(folder, {"a.npy": GOOD}, zipfile.ZIP_STORED)
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 100, 100)
    file.write_bytes(content)
    read_samples(file)


@hostile("npy: a link to itself")
def _loop(folder: Path) -> None:
    (folder / "x.npy").symlink_to(folder / "x.npy")
    read_samples(folder / "x.npy")


@hostile("npy: a link to a device without end")
def _device(folder: Path) -> None:
    (folder / "x.npy").symlink_to("/dev/zero")
    read_samples(folder / "x.npy")


# ------------------------------------------------------------------------------------------------ checkpoints


def _set(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for part in path[:-1]:
        value = value[part]
    value[path[-1]] = new


def _edited(folder: Path, name: str, path: tuple[Any, ...], new: Any) -> None:
    models(folder)
    header = json.loads((folder / name / "config.json").read_bytes())
    _set(header, path, new)
    (folder / name / "config.json").write_text(json.dumps(header))
    LOADERS[name](folder / name)


EDITS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "denoiser": places_of("config network", "event_shape width depth num_classes")
    + places_of("config", "architecture network schedule prediction time_input time_scale integer_time num_classes")
    + places_of("config schedule", "kind beta_min beta_max t_min t_max"),
    "guidance": places_of("config", "event_shape schedule width depth num_classes alpha_power stem"),
    "classifier": places_of(
        "config", "in_channels num_classes blocks expansion width kernel_size stem_width hidden dropout"
    ),
    "sssd": places_of(
        "config network",
        "in_channels out_channels res_channels skip_channels num_res_layers step_dims num_classes label_dim l_max "
        "d_state cauchy",
    )
    + places_of("config schedule", "alphas_cumprod"),
    "model": places_of("config", "denoiser guidance diagnostics config")
    + places_of("", "kind format_version tensors config"),
}
for model, paths in EDITS.items():
    for path in paths:
        for title, new in (
            ("20,000", 20_000),
            ("2^40", 2**40),
            ("10^400", 10**400),
            ("a list", [[2]]),
            ("nothing", None),
        ):
            HOSTILE[f"config: {model} {'.'.join(path)} {title}"] = partial(_edited, name=model, path=path, new=new)

TEXTS = {
    "nested 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "nested 100,000 objects deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not UTF-8": b"\xff\xfe{}",
    "not finite": b'{"format": NaN}',
    "a number of 9,000 digits": b'{"format": ' + b"9" * 9000 + b"}",
    "a list": b"[]",
    "nothing": b"",
    "a text": b'"tgdp_fast"',
}
for title, content in TEXTS.items():

    @hostile(f"config: {title}")
    def _text(folder: Path, content: bytes = content) -> None:
        models(folder)
        (folder / "denoiser/config.json").write_bytes(content)
        tgdp.Denoiser.load(folder / "denoiser")

    @hostile(f"bench: {title}")
    def _bench_text(folder: Path, content: bytes = content) -> None:
        (folder / "b.json").write_bytes(content)
        read_bench(folder / "b.json")


@hostile("config: 4 GB without content")
def _sparse_config(folder: Path) -> None:
    models(folder)
    with open(folder / "denoiser/config.json", "r+b") as file:
        file.truncate(4 * 10**9)
    tgdp.Denoiser.load(folder / "denoiser")


def _tensors(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    models(folder)
    file = folder / "denoiser/model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    new = edit(header)
    text = new if isinstance(new, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    stamp(folder / "denoiser")
    tgdp.Denoiser.load(folder / "denoiser")


for entry, values in {
    "dtype": ("F64", "I64", "C64", "F8_E4M3", "BOOL", "X", 7, None, "F4"),
    "shape": ([2**40], [0], [0, 2**60], [-1], [], "x", None, [1] * 1000, [2**64]),
    "data_offsets": ([0, 2**62], [2**63, 2**64], [5, 2], [0, 0], [], "x", None, [-4, 0]),
}.items():
    for value in values:

        @hostile(f"safetensors: {entry} {str(value)[:40]}")
        def _entry(folder: Path, entry: str = entry, value: Any = value) -> None:
            _tensors(folder, lambda header: header["head.weight"].update({entry: value}))


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no tensor": lambda header: header.clear(),
    "one is missing": lambda header: header.pop("head.weight"),
    "two of one place": lambda header: header.update(x=header["head.weight"]),
    "a list": lambda header: b"[]",
    "nested 100,000 deep": lambda header: TEXTS["nested 100,000 deep"],
    "not UTF-8": lambda header: b"\xff" * 100,
    "a name with a null": lambda header: header.update({"a\x00b": header.pop("head.weight")}),
    "metadata of numbers": lambda header: header.update(__metadata__={"a": 1}),
}
for title, edit in HEADERS.items():
    HOSTILE[f"safetensors: {title}"] = partial(_tensors, edit=edit)


@hostile("safetensors: a header of 2^60 bytes")
def _long_header(folder: Path) -> None:
    models(folder)
    (folder / "denoiser/model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    stamp(folder / "denoiser")
    tgdp.Denoiser.load(folder / "denoiser")


# ------------------------------------------------------------------------------------------------- torch.save


def state() -> dict[str, Any]:
    return dict(sssd_ecg().state_dict())


def _with(name: str, value: Any) -> dict[str, Any]:
    return {**state(), name: value}


FIRST, GAIN = "init_conv.0.conv.weight_v", "init_conv.0.conv.weight_g"
SAVED: dict[str, Callable[[], Any]] = {
    "a namespace beside": lambda: {"model_state_dict": state(), "args": argparse.Namespace(lr=1e-3)},
    "NumPy numbers beside": lambda: {
        "model_state_dict": state(),
        "loss": np.float32(1),
        "step": np.int64(2),
        "k": np.bool_(1),
    },
    "a NumPy text beside": lambda: {"model_state_dict": state(), "name": np.str_("x")},
    "a NumPy array beside": lambda: {"model_state_dict": state(), "mean": np.zeros(3)},
    "lists beside": lambda: {"model_state_dict": OrderedDict(state()), "history": [1.0, {"a": "b"}], "name": "run"},
    "a list": lambda: [state()],
    "a tensor": lambda: torch.zeros(3),
    "a number": lambda: 3,
    "names that are numbers": lambda: {0: torch.zeros(3)},
    "a number among the tensors": lambda: _with("epoch", 3),
    "two sets": lambda: {"model": state(), "ema": state()},
    "two prefixes": lambda: {f"{one}.{name}": value for one in ("model", "ema") for name, value in state().items()},
    "many prefixes": lambda: {f"model.module._orig_mod.{name}": value for name, value in state().items()},
    "a sparse tensor": lambda: _with(FIRST, torch.eye(4).to_sparse()),
    "a sparse tensor by rows": lambda: _with(FIRST, torch.eye(4).to_sparse_csr()),
    "a quantized tensor": lambda: _with(FIRST, torch.quantize_per_tensor(torch.ones(4, 8, 1), 0.1, 0, torch.qint8)),
    "a tensor without values": lambda: _with(FIRST, torch.empty(4, 8, 1, device="meta")),
    "a repeated tensor of 1 TB": lambda: _with(FIRST, torch.zeros(1, 1, 1).expand(2**20, 2**18, 1)),
    "an empty tensor of 2^40 rows": lambda: _with(FIRST, torch.zeros(2**40, 0, 1)),
    "another number of dimensions": lambda: _with(FIRST, torch.zeros(3)),
    "complex": lambda: _with(FIRST, torch.zeros(4, 8, 1, dtype=torch.complex64)),
    "one tensor missing": lambda: {name: value for name, value in state().items() if name != GAIN},
    "a module": lambda: torch.nn.Linear(2, 2),
    "a dtype": lambda: torch.float32,
}
for title, make in SAVED.items():
    for zipped in (True, False):

        @hostile(f"torch: {title}{'' if zipped else ', older format'}")
        def _saved(folder: Path, make: Callable[[], Any] = make, zipped: bool = zipped) -> None:
            torch.save(make(), folder / "sssd.pkl", _use_new_zipfile_serialization=zipped)
            read_released(folder / "sssd.pkl")


@hostile("torch: code")
def _code(folder: Path) -> None:
    torch.save(_with("x", Payload(folder / "exploded")), folder / "sssd.pkl")
    read_released(folder / "sssd.pkl")


@hostile("torch: compressed")
def _compressed(folder: Path) -> None:
    torch.save({"x": torch.zeros(10**7)}, folder / "plain.pkl")
    with (
        zipfile.ZipFile(folder / "plain.pkl") as plain,
        zipfile.ZipFile(folder / "sssd.pkl", "w", zipfile.ZIP_DEFLATED) as file,
    ):
        for name in plain.namelist():
            file.writestr(name, plain.read(name))
    read_released(folder / "sssd.pkl")


# ----------------------------------------------------------------------------------------------- TOML, benches


def _toml(folder: Path, content: bytes) -> None:
    (folder / "c.toml").write_bytes(content)
    load_config(folder / "c.toml")


SECTIONS = {
    "data": "rate seconds target_fraction least_target",
    "backbone": "num_res_layers res_channels d_state step_features step_embedding label_dim diffusion_steps beta_end",
    "source": "batch_size learning_rate warmup",
    "guidance": "width depth alpha_power",
    "sampling": "num steps scale gradient_norm_limit clamp solver",
    "evaluation": "bootstrap seeds plots",
    "evaluation.classifier": "blocks expansion width",
}
for section, names in SECTIONS.items():
    for name in names.split():
        for value in ("1" + "0" * 12, "1" + "0" * 400, "-1", "nan", "[[]]"):
            text = f"[{section}]\n{name} = {value}\n".encode()
            HOSTILE[f"toml: {section}.{name} = {value[:14]}{len(value)}"] = partial(_toml, content=text)
for title, content in {
    "nested 100,000 deep": b"a = " + b"[" * 100_000,
    "a name of 100,000 parts": b"a." * 100_000 + b"a = 1",
    "tables nested 100,000 deep": b"a = " + b"{a = " * 100_000,
    "not UTF-8": b"\xff\xfe",
    "a null": b"a\x00 = 1",
    "unclosed": TOML.encode()[:-3],
    "an unknown entry": b"[data]\nsorce = 1\n",
    "a table for an entry": b"[data.rate]\na = 1\n",
    "an entry for a table": b"data = 3\n",
    "a date": b"[data]\nrate = 1979-05-27\n",
    "2 MB": b"#" * 2_100_000,
    "a list for the preset": b"preset = ['smoke']\n",
    "a number of 9,000 digits": b"[data]\nrate = " + b"9" * 9000 + b"\n",
}.items():
    HOSTILE[f"toml: {title}"] = partial(_toml, content=content)


def _row(folder: Path, name: str, value: Any) -> None:
    content = json.loads(bench())
    content["rows"][0][name] = value
    (folder / "b.json").write_text(json.dumps(content))
    read_bench(folder / "b.json")


for name in ("case", "provider", "dtype", "median_s", "p20_s", "peak_bytes", "floor_fraction", "max_error"):
    for value in (0, 10**400, "x", None, [1], float("nan")):
        HOSTILE[f"bench: {name} {str(value)[:9]}"] = partial(_row, name=name, value=value)


# --------------------------------------------------------------------------------------------------- WFDB


def _record(folder: Path, line: int, old: str, new: str) -> None:
    write_ptbxl_small(folder)
    file = folder / "records100/00000/00001_lr.hea"
    lines = file.read_text().split("\n")
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new, 1)
    file.write_text("\n".join(lines))
    read_all_records(folder)


for title, (line, old, new) in {
    "rate 1e308": (0, " 12 100 ", " 12 1e308 "),
    "rate 0": (0, " 12 100 ", " 12 0 "),
    "rate nan": (0, " 12 100 ", " 12 nan "),
    "rate of 400 digits": (0, " 12 100 ", f" 12 {'9' * 400} "),
    "10^12 samples": (0, " 100 100", f" 100 {10**12}"),
    "10^400 samples": (0, " 100 100", f" 100 {10**400}"),
    "2^40 signals": (0, " 12 ", f" {2**40} "),
    "another folder": (0, "00001_lr", "../../00001_lr"),
    "a file elsewhere": (1, "00001_lr.dat", "/etc/passwd"),
    "baseline of 400 digits": (1, "(0)", f"({'9' * 400})"),
    "gain 0": (1, "1000.0", "0"),
    "gain nan": (1, "1000.0", "nan"),
    "gain 1e-320": (1, "1000.0", "1e-320"),
    "format 999": (1, " 16 ", " 999 "),
    "format of 400 digits": (1, " 16 ", f" {'9' * 400} "),
    "skew of 2^40": (1, " 16 ", f" 16:{2**40} "),
    "offset of 2^62": (1, " 16 ", f" 16+{2**62} "),
    "first value of 400 digits": (1, " 16 0 ", f" 16 {'9' * 400} "),
}.items():
    HOSTILE[f"hea: {title}"] = partial(_record, line=line, old=old, new=new)


@hostile("dat: a gigabyte without content")
def _sparse_dat(folder: Path) -> None:
    write_ptbxl_small(folder)
    with open(folder / "records100/00000/00001_lr.dat", "r+b") as file:
        file.truncate(10**9)
    header = folder / "records100/00000/00001_lr.hea"
    header.write_text(header.read_text().replace(" 100 100\n", " 100 0\n", 1))
    read_all_records(folder)


# ------------------------------------------------------------------------------------------------ the commands


def _command(folder: Path, arguments: tuple[str, ...]) -> None:
    models(folder)
    np.save(folder / "x.npy", samples())
    (folder / "loop.npy").symlink_to(folder / "loop.npy")
    (folder / "unclosed.npy").write_bytes(NPY["unclosed header"])
    places = {"MODEL": folder / "model", "OUT": folder / "o.npy", "X": folder / "x.npy", "LOOP": folder / "loop.npy"}
    places["UNCLOSED"] = folder / "unclosed.npy"
    status = command([str(places.get(one, one)) for one in arguments])
    if status != 0:
        raise ValueError(f"exit status {status}")


SAMPLE = ("sample", "MODEL", "--quiet", "--out", "OUT", "--num")
TRANSFER = ("transfer", "--quiet", "--out", "OUT", "--num", "5", "--target", "X", "--source")
for arguments in (
    (*SAMPLE, str(10**12)),
    (*SAMPLE, str(2**70)),
    (*SAMPLE, "5", "--steps", str(10**8)),
    (*SAMPLE, "5", "--steps", str(10**30)),
    (*SAMPLE, "5", "--scale", "1e400"),
    (*SAMPLE, "5", "--labels", "LOOP"),
    (*SAMPLE, "5", "--batch-size", str(2**70)),
    (*TRANSFER, "LOOP"),
    (*TRANSFER, "UNCLOSED"),
):
    HOSTILE[f"command: {' '.join(arguments)}"] = partial(_command, arguments=arguments)
