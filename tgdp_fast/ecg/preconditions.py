"""What would go wrong at the end of a long run, found before its beginning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tgdp_fast.ecg.config import Config, to_dict

#: Names for pip of packages that are imported by another one.
_INSTALLED_AS = {"sklearn": "scikit-learn"}
#: Settings that leave every result as it is.
_HARMLESS = ("device",)
#: Settings, or whole tables, that the model of ``ecg fit`` does not depend on.
_AFTER_THE_MODEL = ("methods", "vanilla.", "fine_tune.", "sampling.", "evaluation.")
#: But these among them: where guided samples start, and what makes features.
_BEFORE_THE_MODEL = ("sampling.prior", "evaluation.classifier.")
_PATHS = ("data.source", "data.target", "backbone.checkpoint")
_SHOWN = 5
#: What evaluation imports at its end: neurokit2 needs pandas and matplotlib. wfdb is needed by some forms of files
#: alone, and reading, which comes first, says so.
MEASURING = ("scipy", "sklearn", "pandas", "matplotlib", "neurokit2")
#: Settings that judge samples anew without drawing others.
EVALUATED_ANEW = ("evaluation.bootstrap", "evaluation.seeds", "evaluation.plots")


def check_packages(names: Sequence[str]) -> None:
    """Import packages that are needed later.

    Raises:
        ImportError: names all that are missing.
    """
    missing = []
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            # Often what it imports itself is what is missing.
            missing.append(_INSTALLED_AS.get(part := (error.name or name).split(".")[0], part))
    if missing:
        raise ImportError(
            f"this run needs {', '.join(dict.fromkeys(missing))}, not installed here; run: pip install "
            "'tgdp_fast[ecg]' (in a checkout: pip install --no-build-isolation -e '.[ecg]')"
        )


def check_same_run(out: Path, config: Config, changeable: Sequence[str] = ()) -> None:
    """Refuse to replace the results in ``out``, or its model, by those of other settings.

    A folder that has neither may go on with any: stages that a change does not concern are used as they are.

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
    changes = []
    for name, new in _flat(json.loads(json.dumps(to_dict(config)))):
        old = before.get(name, new)  # A setting that is newer than the run had its default value.
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
