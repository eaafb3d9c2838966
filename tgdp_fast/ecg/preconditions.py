"""Checks before a long run of what would otherwise fail at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tgdp_fast.ecg.config import PRESETS, UNSAID, Config, to_dict

#: Settings that no result depends on.
_HARMLESS = ("device",)
#: Settings, or whole tables, that the model of ``ecg fit`` does not depend on.
_AFTER_THE_MODEL = ("methods", "vanilla.", "fine_tune.", "sampling.", "evaluation.")
#: Exceptions among them: the prior of guided samples, and the network that computes features.
_BEFORE_THE_MODEL = ("sampling.prior", "evaluation.classifier.")
_PATHS = ("data.source", "data.target", "backbone.checkpoint")
#: Settings that are written down only where they are not as here.
_UNSAID = {f"sampling.{name}": value for name, value in UNSAID.items()}
#: Values that earlier versions spelled otherwise: old, new.
_RENAMED = {"backbone.checkpoint_units": ("standardised", "standardized")}
_SHOWN = 5
#: Packages that evaluation imports at its end; neurokit2 needs pandas and matplotlib. Only some file formats need
#: wfdb, and reading them, which comes first, reports it.
MEASURING = ("scipy", "sklearn", "pandas", "matplotlib", "neurokit2")
#: Settings that evaluate the same samples again.
EVALUATED_ANEW = ("evaluation.bootstrap", "evaluation.seeds", "evaluation.plots")


def check_same_run(out: Path, config: Config, changeable: Sequence[str] = ()) -> None:
    """Refuse to replace the results in ``out``, or its model, by those of other settings.

    A folder without results and model accepts any settings: stages that a change does not affect are reused.

    Args:
        out: folder of the run.
        config: what is asked for now.
        changeable: settings that may differ.

    Raises:
        ValueError: names the settings, their old and their new values; or ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, new or of a run, got the file {out}")
    finished = (out / "results.json").is_file()
    if not finished and not (out / "model").is_dir():
        return
    try:
        before = dict(_flat(json.loads((out / "config.json").read_text())))
    except (OSError, ValueError, AttributeError):  # Not there, or damaged: nothing to compare with.
        return
    for name, (former, current) in _RENAMED.items():
        if before.get(name) == former:
            before[name] = current
    changes = []
    now, usual = (dict(_flat(json.loads(json.dumps(to_dict(each))))) for each in (config, PRESETS[config.preset]))
    for name in dict.fromkeys([*now, *_UNSAID]):
        # A setting that is newer than the run had its default value.
        old, new = (each.get(name, usual.get(name, _UNSAID.get(name))) for each in (before, now))
        same = old == new or (name in _PATHS and old and new and _same_place(Path(old), Path(new)))
        matters = finished or name.startswith(_BEFORE_THE_MODEL) or not name.startswith(_AFTER_THE_MODEL)
        if not same and matters and name not in (*_HARMLESS, *changeable):
            changes.append(f"{name} was {old!r}, now {new!r}")
    if changes:
        more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        kept = "results" if finished else "a model"
        raise ValueError(
            f"--out must be another folder, or one without {kept}: {out} has {kept} of other settings "
            f"({'; '.join(changes[:_SHOWN])}{more}); give another --out, or delete the folder to replace it"
        )


def _same_place(old: Path, new: Path) -> bool:
    """Whether both name one file or folder. One that is not there has moved, or was seen from another folder."""
    return old.resolve() == new.resolve() or (not old.exists() and old.name == new.resolve().name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings as ("data.rate", 100.0)."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
