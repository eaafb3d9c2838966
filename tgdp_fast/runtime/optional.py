"""Packages that only some functions need: imported where they are used, with a message that names what to install."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

#: Names for pip of packages that are imported by another one.
_INSTALLED_AS = {"sklearn": "scikit-learn"}


def optional(module: str, purpose: str) -> Any:
    """Import a module of a package that this one does not require.

    Args:
        module: its name, such as "sklearn.metrics".
        purpose: subject and verb of the message, such as "the area under the ROC curve needs".

    Returns:
        The module.

    Raises:
        ImportError: it cannot be imported; says why, and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, absent = package_of(module), missing_package(error, module)
        # A package may be there and lack one that it needs itself, or not fit another one.
        why = "is not installed" if absent == package else f"cannot be imported ({error})"
        raise ImportError(f"{purpose} {package}, which {why}; run: pip install {absent or package}") from error


def require(modules: Sequence[str], purpose: str) -> None:
    """Import modules that are needed later.

    Raises:
        ImportError: names all packages that are missing, and how to install them.
    """
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(missing_package(error, module) or package_of(module))
    if missing:
        names = list(dict.fromkeys(missing))
        raise ImportError(f"{purpose} {', '.join(names)}, not installed here; run: pip install {' '.join(names)}")


def package_of(module: str) -> str:
    """The package that brings a module, as pip names it."""
    top = module.split(".")[0]
    return _INSTALLED_AS.get(top, top)


def missing_package(error: ImportError, module: str) -> str | None:
    """The package without which the import of a module failed, as pip names it; None if a package is there but broken.

    Often that is a package which the imported one needs itself.
    """
    if isinstance(error, ModuleNotFoundError):
        return package_of(error.name or module)
    return None
