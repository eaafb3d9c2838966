"""Folders of electrocardiograms as the data sets have them, small and made up; and where the real ones may lie."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tgdp_fast.ecg.records.leads import TWELVE_LEADS, twelve_leads_digital
from tgdp_fast.ecg.records.synthetic import synthetic_ecg

ROOT = Path(__file__).resolve().parent.parent
PTBXL_LEADS = tuple(name.upper() for name in TWELVE_LEADS)


def real_data(name: str) -> Path:
    """A folder of real records: ``$TGDP_FAST_ECG/NAME``, or ``shared/data/ecg/NAME`` in or beside the checkout."""
    places = [ROOT / "shared" / "data" / "ecg", ROOT.parent / "shared" / "data" / "ecg"]
    if "TGDP_FAST_ECG" in os.environ:
        places = [Path(os.environ["TGDP_FAST_ECG"])]
    for place in places:
        if (place / name).is_dir():
            return place / name
    pytest.skip(f"no real records ({name}) here; TGDP_FAST_ECG names their folder")


def write_record(
    folder: Path,
    name: str,
    values: np.ndarray,
    leads: Sequence[str],
    rate: float = 100,
    comments: Sequence[str] = ("Age: 50",),
    checksums: bool = True,
) -> Path:
    """A record as PTB-XL has them, of ``values`` [samples, leads] int16; returns its header."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = values.astype(np.int64).sum(axis=0) % 65536
    lines = [f"{name} {len(leads)} {rate:g} {len(values)}"]
    for column, lead in enumerate(leads):
        checked = f"{values[0, column]} {sums[column]} 0 {lead}" if checksums else ""
        lines.append(f"{name}.dat 16 1000.0(0)/mV 16 0 {checked}".rstrip())
    (folder / f"{name}.hea").write_text("\n".join([*lines, *(f"# {text}" for text in comments), ""]))
    values.astype("<i2").tofile(folder / f"{name}.dat")
    return folder / f"{name}.hea"


def twelve(seed: int, length: int, rate: float = 100) -> np.ndarray:
    """Samples [length, 12] int16 of a made-up record, 1000 units/mV."""
    return twelve_leads_digital(synthetic_ecg(1, length, rate=rate, seed=seed))[0].T


def write_table(path: Path, rows: Sequence[dict[str, object]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_ptbxl(folder: Path, count: int = 4, *, seconds: float = 1.0, rates: Sequence[int] = (100,)) -> Path:
    """PTB-XL with ``count`` records of ``count // 2`` patients, folds 1, 2, ..., 10, 1, ... by patient."""
    labels = ("{'NORM': 100.0, 'SR': 0.0}", "{'AFIB': 15.0}", "{'PVC': 50.0, 'LVH': 35.0}", "{}")
    rows = []
    for number in range(1, count + 1):
        patient = (number - 1) // 2
        row: dict[str, object] = {
            "ecg_id": number,
            "patient_id": f"{patient + 1000}.0",
            "age": 300.0 if number == 1 else 40.0 + number,
            "sex": number % 2,
            "scp_codes": labels[(number - 1) % 4],
            "strat_fold": patient % 10 + 1,
        }
        for column, short, rate in (("filename_lr", "lr", 100), ("filename_hr", "hr", 500)):
            relative = f"records{rate}/00000/{number:05d}_{short}"
            row[column] = relative
            if rate in rates:
                path = folder / relative
                write_record(path.parent, path.name, twelve(number, round(seconds * rate), rate), PTBXL_LEADS, rate)
        rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "ptbxl_database.csv", rows)
    return folder


def write_icbeb(folder: Path, lengths: Sequence[int] = (700, 650, 1200, 300)) -> Path:
    """ICBEB2018: records with an even number in the original form, the others in that of the Challenge."""
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, length in enumerate(lengths, 1):
        name, values = f"A{number:04d}", twelve(number, length, 500)
        rows.append({"Recording": name, "First_label": number, "Second_label": "", "Third_label": ""})
        if number % 2 == 0:
            parts = {"sex": "Male", "age": 60.0 + number, "data": values.T / 1000.0}
            savemat(folder / f"{name}.mat", {"ECG": parts})
            continue
        header = write_record(folder, name, values, TWELVE_LEADS, 500, ("Age: 74", "Sex: Female", "Dx: 426783006"))
        savemat(folder / f"{name}.mat", {"val": np.asfortranarray(values.T)}, format="4")
        (folder / f"{name}.dat").unlink()
        text = header.read_text().replace(f"{name}.dat 16 1000.0(0)/mV", f"{name}.mat 16+24 1000/mV")
        header.write_text(text.replace("# ", "#"))
    rows[0]["Second_label"] = 7
    write_table(folder / "REFERENCE.csv", rows)
    return folder


def write_converted_icbeb(folder: Path, count: int = 3, rates: Sequence[int] = (500, 100)) -> Path:
    """ICBEB2018 as the conversion of the PTB-XL benchmark leaves it."""
    rows = []
    for number in range(1, count + 1):
        rows.append(
            {
                "": number - 1,
                "ecg_id": number,
                "filename": f"A{number + 10:04d}",
                "validation": False,
                "age": 50 + number,
                "sex": 1,
                "scp_codes": "{'VPC': 100, 'AFIB': 100}" if number == 1 else "{'NORM': 100}",
                "patient_id": number,
                "strat_fold": number % 10 + 1,
            }
        )
        for rate in rates:
            write_record(folder / f"records{rate}", str(number), twelve(number, rate, rate), PTBXL_LEADS, rate)
    write_table(folder / "icbeb_database.csv", rows)
    return folder


# Small enough for a test, with every part of a real run.
TINY = """
preset = "smoke"
[data]
source = "ptbxl"
target = "icbeb"
seconds = 1.2
least_target = 4
[backbone]
num_res_layers = 1
res_channels = 4
d_state = 4
step_features = 8
step_embedding = 8
label_dim = 4
diffusion_steps = 20
[source]
steps = 4
[vanilla]
steps = 3
[fine_tune]
steps = 3
[guidance]
width = 8
depth = 2
[guidance.training]
steps = 4
batch_size = 8
[sampling]
num = 6
steps = 3
batch_size = 4
[evaluation]
bootstrap = 10
plots = 1
[evaluation.classifier]
blocks = [1, 1]
width = 8
[evaluation.classifier.training]
steps = 3
batch_size = 4
"""


def make_folders(place: Path) -> Path:
    """Both folders and a configuration; returns the latter."""
    write_ptbxl(place / "ptbxl", 12, seconds=1.2)
    write_icbeb(place / "icbeb", [700] * 8)
    labels = [
        {"Recording": f"A{n:04d}", "First_label": 1 + n % 2, "Second_label": "", "Third_label": ""} for n in range(1, 9)
    ]
    write_table(place / "icbeb" / "REFERENCE.csv", labels)
    config = place / "tiny.toml"
    config.write_text(TINY)
    return config
