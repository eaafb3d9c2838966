"""Several processes under torchrun: the same results as one process, one writer, a state that any number resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tgdp_fast import Denoiser, NoiseSchedule, train_denoiser
from tgdp_fast.data.gaussians import paper_source, paper_target
from tgdp_fast.fit.config import GuidanceConfig, NetworkConfig, TrainingConfig
from tgdp_fast.fit.guidance import fit_guidance
from tgdp_fast.runtime import distributed
from tgdp_fast.runtime.checkpoint import load_checkpoint
from tgdp_fast.runtime.stages import Stages

SETTINGS = TrainingConfig(steps=12, batch_size=16, learning_rate=1e-3, ema_decay=0.9, warmup=2)
SHARED, LONE = {"width": 16, "depth": 2}, {"width": 8, "depth": 1}
# Rounding of sums of gradients in another order, through 12 steps of Adam: a few ulps a step at a rate of 1e-3, more
# where a gradient is near 0, for Adam divides by its size. The number of threads of a process decides that order too.
TOLERANCE = 2e-4

# Draws, trains and fits in every process; each says what it has, the first one saves.
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from tgdp_fast.runtime import distributed
from test_distributed import work
with distributed.process_group("cpu"):
    work(Path(sys.argv[1]))
"""


def flat(network: torch.nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).double().tolist()


def work(out: Path) -> None:
    """What is run with one process and with two."""
    source = paper_source().sample(200, seed=0).numpy()
    target = paper_target().sample(20, seed=1).numpy()
    denoiser = train_denoiser(source, **SHARED, settings=SETTINGS, state_dir=out / "state")
    config = GuidanceConfig(network=NetworkConfig(**SHARED), training=SETTINGS, diagnostics=False)
    fit = fit_guidance(source, target, config=config, denoiser=denoiser)
    stages = Stages(out / "stages")
    before = (distributed.rank(), distributed.size())

    def alone(state_dir: Path | None) -> Denoiser:
        assert (*before, distributed.size()) == (0, before[1], 1), "only the first process computes, as the only one"
        return train_denoiser(source, **LONE, settings=SETTINGS)

    for _ in range(2):
        lone = stages.run("lone", "signature", alone, Denoiser.save, Denoiser.load, alone=True)
        together = stages.run("both", "signature", lambda state_dir: denoiser, Denoiser.save, Denoiser.load)
    found = {
        "lone": flat(lone),
        "loaded": all(torch.equal(a, b) for a, b in zip(together.parameters(), denoiser.parameters(), strict=True)),
        "rank": distributed.rank(),
        "size": distributed.size(),
        "history": fit.history,
        "part": list(distributed.parts(5)[distributed.rank()]),
        "agreed": distributed.agreed(distributed.is_first()),
        "state_left": (out / "state").exists(),
        "weights": flat(denoiser) + flat(fit.guidance),
    }
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(found))


def run(out: Path, processes: int) -> list[dict]:
    out.mkdir()
    script = out / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(out)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    work(one)
    alone = json.loads((one / "rank0.json").read_text())
    first, second = run(tmp_path / "two", 2)
    assert (first["rank"], second["rank"], first["size"]) == (0, 1, 2)
    assert first["weights"] == second["weights"]  # Bitwise: both add up the same gradients.
    assert first["history"] == second["history"]
    assert np.abs(np.subtract(first["weights"], alone["weights"])).max() <= TOLERANCE
    assert np.allclose(first["history"], alone["history"], rtol=1e-3)
    assert first["lone"] == second["lone"]  # Bitwise: the second loads what the first has computed.
    assert np.abs(np.subtract(first["lone"], alone["lone"])).max() <= TOLERANCE
    assert first["loaded"]
    assert second["loaded"]
    assert sorted(first["part"] + second["part"]) == list(range(5))
    assert first["agreed"]
    assert second["agreed"]
    assert not first["state_left"]


@pytest.mark.parametrize("network", [SHARED, LONE])
def test_the_tolerance_tells_another_batch(network: dict[str, int]) -> None:
    """A process that trained on its half of the batches alone would be noticed."""
    source = paper_source().sample(200, seed=0).numpy()
    weights = []
    for size in (16, 8):
        settings = TrainingConfig(**{**vars(SETTINGS), "batch_size": size})
        weights.append(flat(train_denoiser(source, **network, settings=settings)))
    assert np.abs(np.subtract(*weights)).max() > 5 * TOLERANCE


def test_without_a_process_group_nothing_happens() -> None:
    loss = torch.tensor(2.0)
    assert distributed.average_gradients([], loss) is loss
    assert (distributed.rank(), distributed.size(), distributed.is_first()) == (0, 1, True)
    assert distributed.share(7) == slice(0, 7)
    assert distributed.parts(7) == [range(7)]
    assert not distributed.agreed(False)
    with distributed.process_group("cpu"):
        assert distributed.size() == 1


def test_a_batch_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(ValueError, match="batch_size must be a multiple of 3, the number of processes, got 16"):
        train_denoiser(np.zeros((8, 2), np.float32) + np.eye(8, 2, dtype=np.float32), settings=SETTINGS)


def test_the_state_of_one_process_is_kept_by_the_first_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted as another process, training leaves no state behind."""
    from tgdp_fast.fit import training

    real = training._Run.advance

    def interrupted(self: training._Run, loss: training.Loss) -> torch.Tensor:
        if self.step == 5:
            os.kill(os.getpid(), 2)
        return real(self, loss)

    monkeypatch.setattr(training._Run, "advance", interrupted)
    source = paper_source().sample(50, seed=0).numpy()
    for first in (True, False):
        monkeypatch.setattr(distributed, "is_first", lambda first=first: first)
        folder = tmp_path / str(first)
        with pytest.raises(KeyboardInterrupt):
            train_denoiser(source, NoiseSchedule.vp_linear(), width=8, depth=1, settings=SETTINGS, state_dir=folder)
        assert folder.exists() == first
        if first:
            assert load_checkpoint(folder, "training_state")[0]["step"] == 6
