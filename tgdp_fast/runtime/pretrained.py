"""Sharing models: checkpoint folders with a model card, in the format of the Hugging Face Hub, and reading from it.

The folder is the checkpoint of :mod:`tgdp_fast.runtime.checkpoint` (config.json, model.safetensors) with a README.md,
the model card. The Hub shows and searches the front matter of the card (YAML between two lines of dashes).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tgdp_fast.runtime.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    TENSOR_FILE,
    CheckpointError,
    checkpoint_exists,
    save_checkpoint,
)
from tgdp_fast.runtime.optional import optional

#: Marks a card that nobody has edited: each save rewrites it. A card without this line is kept.
GENERATED = "<!-- written by save_pretrained; remove this line to keep your own text -->"

Model = TypeVar("Model", bound="Pretrained")

# owner/name, or a name alone, as allowed by the Hub.
_REPOSITORY = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_WHAT = {
    "transfer_model": "A source diffusion model with guidance towards a target domain, and the units of the data.",
    "guidance": "A guidance network: the log density ratio of target to source at every noise level, and its gradient.",
    "denoiser": "A diffusion model: a network with its noise schedule, prediction type and time convention.",
}
_USE = {
    "transfer_model": "samples = model.sample(1000)  # in the units of the data",
    "guidance": "samples = tgdp_fast.sample(denoiser, model, num=1000)  # with the denoiser it was fitted for",
    "denoiser": "samples = tgdp_fast.sample(model, num=1000)",
}


class Pretrained:
    """``save``, ``save_pretrained``, ``from_pretrained`` of a class with ``load(path, ...)``, ``to_checkpoint()``."""

    def to_checkpoint(self) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        """Kind, config and tensors of the checkpoint, for :func:`tgdp_fast.runtime.checkpoint.save_checkpoint`.

        Raises:
            NotImplementedError: the class has no checkpoint.
        """
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint folder (config.json, model.safetensors), atomically; ``save_pretrained`` adds a card."""
        save_checkpoint(path, *self.to_checkpoint())

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, card: str | None = None, license: str | None = None
    ) -> None:
        """Write config.json, model.safetensors and README.md into ``folder``, atomically.

        The folder is replaced as a whole: a process killed at any moment leaves the old model or the new one. An
        edited README.md (without its line "written by save_pretrained") and a .gitattributes are kept.

        Args:
            folder: a new or empty folder, or one with a checkpoint of this package.
            card: text of README.md; default: a generated one.
            license: identifier of the weights' license for the generated card, such as "mit"; None omits it.

        Raises:
            CheckpointError: the folder holds something else; nothing has been written then.
            ValueError: a bad license identifier.
        """
        if license is not None and not (isinstance(license, str) and _LICENSE.fullmatch(license)):
            raise ValueError(f"license must be an identifier such as 'mit' or 'cc-by-4.0', got {license!r}")
        kind, config, tensors = self.to_checkpoint()
        if card is None and not _has_own_card(Path(folder)):
            card = model_card(type(self).__name__, kind, config, tensors, license)
        save_checkpoint(folder, kind, config, tensors, card=card)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder_or_repo_id: str | os.PathLike[str],
        *,
        hub: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> Model:
        """Read a folder of ``save_pretrained`` or ``save``; with ``hub=True`` a repository of the Hugging Face Hub.

        The network is used only with ``hub=True``. Weights are safetensors and never unpickled. Only config.json and
        model.safetensors of a repository are fetched.

        Args:
            folder_or_repo_id: the folder; with ``hub=True`` the repository, "owner/name".
            hub: read from the Hub (``pip install huggingface_hub``).
            revision, cache_dir, local_files_only: for the Hub: branch, tag or commit; folder for files; whether to use
                only files that are already there.
            arguments: of ``load``, such as ``network=`` for a network from outside this package.

        Raises:
            CheckpointError: missing, without config.json, of another library or another class, of a newer format,
                damaged, with tensors of other shapes; or not available from the Hub.
            ImportError: ``hub=True`` without huggingface_hub.
            ValueError: arguments of the Hub without ``hub=True``.
        """
        if hub:
            folder = _snapshot(folder_or_repo_id, revision, cache_dir, local_files_only)
        else:
            given = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
            names = [name for name, value in given.items() if value is not None]
            if names:
                raise ValueError(f"{', '.join(names)} are for the Hub; pass hub=True, or leave them out")
            folder = Path(folder_or_repo_id)
            if not checkpoint_exists(folder):
                raise CheckpointError(
                    f"{folder_or_repo_id} does not exist; expected a folder with {CONFIG_FILE} and {TENSOR_FILE}. If "
                    "it is a repository of the Hugging Face Hub, pass hub=True"
                )
        return cls.load(folder, **arguments)  # type: ignore[attr-defined]


def model_card(
    name: str, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], license: str | None = None
) -> str:
    """Text of a model card: front matter, description, how to load it, settings and diagnostics.

    Args:
        name: of the class.
        kind, config, tensors: of the checkpoint.
        license: identifier for the front matter.
    """
    # The config of a transfer model contains that of a denoiser; that of a guidance network has no architecture.
    foreign = config.get("denoiser", config).get("architecture", "") is None
    network = ", network=your_network" if foreign else ""
    front = ["library_name: tgdp_fast", *([f"license: {license}"] if license else []), "tags:"]
    front += [f"- {tag}" for tag in ("tgdp_fast", "diffusion", "transfer-learning", kind.replace("_", "-"))]
    numbers = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        "---",
        *front,
        "---",
        "",
        GENERATED,
        "",
        f"# {name}",
        "",
        f"{_WHAT.get(kind, 'A model of tgdp_fast.')} {numbers:,} numbers.",
        "",
        "```python",
        "import tgdp_fast",
        "",
        f'model = tgdp_fast.{name}.from_pretrained("FOLDER"{network})  # or ("OWNER/NAME", hub=True{network})',
        _USE.get(kind, ""),
        "```",
        "",
    ]
    facts = _facts(config)
    if facts:
        lines += ["| setting | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts), ""]
    diagnostics = config.get("diagnostics") or {}
    scalars = [(key, value) for key, value in diagnostics.items() if isinstance(value, int | float)]
    if scalars:
        lines += ["Diagnostics of the fit:", "", "| measure | value |", "| --- | --- |"]
        lines += [f"| {key} | {value:.6g} |" for key, value in scalars] + [""]
    for warning in diagnostics.get("warnings", ()):
        lines += [f"> {' '.join(str(warning).split())}", ""]
    lines += [
        "Method: Transfer Guided Diffusion Process (Ouyang, Xie, Zha, Cheng, NeurIPS 2024), "
        "https://arxiv.org/abs/2405.16876.",
        "",
    ]
    return "\n".join(lines)


def _facts(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings that fit into one line of a table, by their path; a discrete schedule by its length."""
    facts: list[tuple[str, str]] = []
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path == "diagnostics" or value is None:
            continue
        if isinstance(value, Mapping):
            facts += _facts(value, f"{path}.")
        elif isinstance(value, list) and len(value) > 8:
            facts.append((path, f"{len(value)} values"))
        else:
            facts.append((path, json.dumps(value).replace("|", "\\|")))
    return facts


def _has_own_card(folder: Path) -> bool:
    card = folder / CARD_FILE
    return card.is_file() and GENERATED not in card.read_text(encoding="utf-8", errors="replace")


def _snapshot(
    repo_id: str | os.PathLike[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    if not isinstance(repo_id, str) or not _REPOSITORY.fullmatch(repo_id):
        raise CheckpointError(
            f"{repo_id!r} is not a repository of the Hugging Face Hub, expected 'owner/name'; "
            "without hub=True a folder is read"
        )
    hub = optional("huggingface_hub", "from_pretrained(hub=True) needs")
    try:
        folder = hub.snapshot_download(
            repo_id=repo_id,
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[CONFIG_FILE, TENSOR_FILE],
        )
    except Exception as error:  # Errors of the network have many types, from several libraries.
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise CheckpointError(
            f"{repo_id} could not be had from the Hugging Face Hub ({type(error).__name__}: {reason}); check the name, "
            "the revision and the connection, and log in for a private repository"
        ) from error
    return Path(folder)
