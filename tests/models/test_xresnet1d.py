"""The ECG classifier: its architecture, its checkpoints, its training and use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tgdp_fast import TrainingConfig
from tgdp_fast.ecg.classifier import features, predict, train_ecg_classifier
from tgdp_fast.metrics import macro_auc
from tgdp_fast.models import XResNet1d
from tgdp_fast.runtime.checkpoint import CheckpointError, save_checkpoint

SMALL: dict[str, Any] = {"blocks": (1, 1), "expansion": 1, "width": 8, "stem_width": 8, "hidden": 8, "dropout": 0.1}
SETTINGS = TrainingConfig(steps=60, batch_size=16, learning_rate=1e-2, ema_decay=0.9, warmup=5)


def small(leads: int = 3, classes: int = 2, **changes: Any) -> XResNet1d:
    torch.manual_seed(1)
    return XResNet1d(leads, classes, **(SMALL | changes)).eval()


def records(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise [count, 3, 83] with a wave in lead 0 for class 0 and a bump in lead 2 for class 1, and the classes."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, (count, 2))
    x = 0.3 * random.standard_normal((count, 3, 83))
    time = np.arange(83)
    x[:, 0] += y[:, :1] * np.sin(2 * np.pi * (time / 12 + random.uniform(size=(count, 1))))
    x[:, 2] += y[:, 1:] * 3 * np.exp(-(((time - random.uniform(20, 60, (count, 1))) / 6) ** 2))
    return x.astype(np.float32), y


def test_the_default_is_xresnet1d50() -> None:
    """Layers counted from the description: stem 3, blocks 3 x 16, short cuts where channels change, head 2 linear."""
    network = XResNet1d(12, 9).eval()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv1d)]
    assert len(convolutions) == 3 + 3 * (3 + 4 + 6 + 3) + 1  # All stages have 256 channels: one projection.
    assert [m.out_channels for m in convolutions[:3]] == [32, 32, 64]
    assert sum(m.stride == (2,) for m in convolutions) == 1 + 3
    assert {m.kernel_size for m in convolutions} == {(1,), (5,)}
    assert network.num_features == 512
    stem = 12 * 32 * 5 + 32 * 32 * 5 + 32 * 64 * 5 + 2 * (32 + 32 + 64)
    first = 64 * 64 + 64 * 64 * 5 + 64 * 256 + 64 * 256 + 2 * (64 + 64 + 256 + 256)
    other = 256 * 64 + 64 * 64 * 5 + 64 * 256 + 2 * (64 + 64 + 256)
    head = 2 * 512 + 512 * 128 + 128 + 2 * 128 + 128 * 9 + 9
    assert sum(p.numel() for p in network.parameters()) == stem + first + 15 * other + head
    with torch.no_grad():
        assert network(torch.randn(2, 12, 1000)).shape == (2, 9)


@pytest.mark.parametrize(("expansion", "length"), [(1, 83), (4, 50), (2, 7)])
def test_features_are_maxima_and_means_of_the_last_stage(expansion: int, length: int) -> None:
    network = small(expansion=expansion)
    x = torch.randn(5, 3, length)
    with torch.no_grad():
        last = network.stages(network.stem(x))
        # Stride 2 in the stem, its pooling, and the second stage, each rounding up.
        expected = length
        for _ in range(3):
            expected = -(-expected // 2)
        assert last.shape == (5, 8 * expansion, expected)
        found = network.features(x)
        assert torch.equal(found, torch.cat([last.max(dim=2).values, last.mean(dim=2)], dim=1))
        assert torch.equal(network(x), network.head(found))


def test_blocks_start_as_their_short_cuts() -> None:
    """The last scale of each block is zero, and its shift 1e-3 (He et al., section 3.1 sets the scale alone)."""
    network = small(blocks=(2,))
    x = torch.rand(2, 8, 20)
    with torch.no_grad():
        assert torch.allclose(network.stages[1](x), x + 1e-3, atol=1e-6)


def test_checkpoints(tmp_path: Path) -> None:
    network = small(kernel_size=3, dropout=0.1)
    network.save(tmp_path / "c")
    again = XResNet1d.load(tmp_path / "c")
    x = torch.randn(3, 3, 40)
    assert torch.equal(again(x), network(x))
    assert again.to_config() == network.to_config() == XResNet1d.from_config(network.to_config()).to_config()
    save_checkpoint(tmp_path / "d", "denoiser", {}, {})
    with pytest.raises(CheckpointError, match="of kind 'denoiser', expected 'classifier'"):
        XResNet1d.load(tmp_path / "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, "blocks must name at least one stage"),
        ({"blocks": (1, 0)}, "blocks entries must be an integer >= 1"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_bad_architectures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3, L\], got \[2, 4, 9\]"):
        small()(torch.zeros(2, 4, 9))


def test_training_learns_and_predicts(tmp_path: Path) -> None:
    """Better than chance by far on new records; the standard error of an AUC of 200 records is below 0.04."""
    x, y = records(150)
    network = train_ecg_classifier(x, y, architecture=SMALL, settings=SETTINGS, seed=3, state_dir=tmp_path / "state")
    assert not network.training
    assert not (tmp_path / "state").exists()
    new, truth = records(200, seed=1)
    probabilities = predict(network, new, batch_size=64)
    assert probabilities.shape == (200, 2)
    assert probabilities.dtype == np.float32
    assert macro_auc(truth, probabilities).per_class.min() > 0.85
    # Nothing depends on the batches, and calibrated probabilities average to the share of records.
    assert np.allclose(probabilities, predict(network, new, batch_size=7), atol=1e-5)
    assert np.allclose(probabilities.mean(axis=0), 0.5, atol=0.15)
    found = features(network, new[:9], batch_size=4)
    assert found.shape == (9, network.num_features)
    with torch.no_grad():
        assert np.allclose(network.head(torch.from_numpy(found)).sigmoid(), probabilities[:9], atol=1e-5)


def test_training_is_reproducible_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tgdp_fast.fit.training as training

    x, y = records(30)

    def train(state: str | None = None) -> XResNet1d:
        return train_ecg_classifier(
            x, y, architecture=SMALL, settings=SETTINGS, seed=2, state_dir=state and tmp_path / state
        )

    before = torch.get_rng_state()
    whole = train()
    assert torch.equal(torch.get_rng_state(), before)
    real, steps = training._Run.advance, 0

    def advance(self: Any, loss: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 31:
            self.save(tmp_path / "state")
            raise KeyboardInterrupt
        return real(self, loss)

    monkeypatch.setattr(training._Run, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        train("state")
    resumed = train("state")
    assert steps == 31 + 30
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_running_statistics_belong_to_the_averaged_weights() -> None:
    """In one pass over all records the means of the first layer are those of its outputs."""
    x, y = records(32)
    network = train_ecg_classifier(x, y, architecture=SMALL, settings=TrainingConfig(steps=3, batch_size=32, warmup=1))
    convolution, norm = network.stem[0][0], network.stem[0][1]
    with torch.no_grad():
        outputs = convolution(torch.from_numpy(x))
    assert torch.allclose(norm.running_mean, outputs.mean(dim=(0, 2)), atol=1e-5)
    assert torch.allclose(norm.running_var, outputs.transpose(0, 1).flatten(1).var(dim=1), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((4, 83), np.float32)}, r"x must have shape \[N, leads, L\], got \[4, 83\]"),
        ({"y": np.zeros(4, int)}, r"y must be multi-hot rows \[N, K\]"),
        ({"y": np.zeros((3, 2))}, "y holds 3 labels for 4 samples"),
        ({"settings": TrainingConfig(batch_size=1)}, "settings.batch_size must be at least 2"),
        ({"network": small(4)}, "network must take 3 leads and give 2 statements, it has 4 and 2"),
        ({"network": small(), "architecture": SMALL}, "network and architecture were both given"),
    ],
)
def test_bad_training(changes: dict[str, Any], message: str) -> None:
    x, y = records(4)
    with pytest.raises(ValueError, match=message):
        train_ecg_classifier(**({"x": x, "y": y} | changes))
