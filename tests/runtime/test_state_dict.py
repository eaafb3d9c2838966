"""State dicts: names that wrappers change, what is stored and what is refused, sizes before anything is built."""

from __future__ import annotations

import argparse
import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tgdp_fast as tgdp
from tgdp_fast.integrations.released import GuidanceQt
from tgdp_fast.models import XResNet1d
from tgdp_fast.runtime.arrays import Standardizer
from tgdp_fast.runtime.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tgdp_fast.runtime.state_dict import _Sketch, load_state_dict_checked, unwrapped

SCHEDULE = tgdp.NoiseSchedule.vp_linear()


def network() -> tgdp.ScoreMLP:
    return tgdp.ScoreMLP((2,), width=8, depth=2)


def sssd_ecg() -> tgdp.SSSDECG:
    sizes = {"res_channels": 4, "skip_channels": 4, "num_res_layers": 1, "num_classes": 2, "label_dim": 4, "l_max": 16}
    return tgdp.SSSDECG(**sizes, step_dims=(4, 4, 4), d_state=4)


def guidance_qt() -> GuidanceQt:
    return GuidanceQt(in_channels=2, length=64, width=4, depth=2)


def same(found: nn.Module, expected: nn.Module) -> bool:
    a, b = found.state_dict(), expected.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Own(nn.Module):
    """A network from outside this package, with weight normalization of either kind."""

    def __init__(self, normalized: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.net = normalized(nn.Linear(3, 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        result: Tensor = self.net(torch.cat([x, time[:, None]], dim=1))
        return result


# ------------------------------------------------------------------------------------------------------ names


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "compiled parallel": lambda module: torch.compile(nn.DataParallel(module)),
    "parallel compiled": lambda module: nn.DataParallel(torch.compile(module)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_network_is_saved_as_the_network(tmp_path: Path, wrap: Callable[[nn.Module], Any]) -> None:
    inner = network()
    assert unwrapped(wrap(inner)) is inner
    tgdp.Denoiser(wrap(inner), SCHEDULE, time_input="half_log_snr").save(tmp_path / "m")
    assert same(tgdp.Denoiser.load(tmp_path / "m").network, inner)
    for other in (network(), wrap(network())):
        assert same(unwrapped(tgdp.Denoiser.load(tmp_path / "m", network=other).network), inner)


def test_a_compiled_layer_and_a_compiled_guidance_keep_their_names(tmp_path: Path) -> None:
    plain, guidance = network(), tgdp.GuidanceNetwork((2,), SCHEDULE, width=8, depth=2)
    part = copy.deepcopy(plain)
    part.layers[1] = torch.compile(part.layers[1])
    x, time = torch.randn(5, 2), torch.randn(5)
    torch.testing.assert_close(part(x, time), plain(x, time))
    denoiser = tgdp.Denoiser(part, SCHEDULE, time_input="half_log_snr")
    model = tgdp.TransferModel(denoiser, torch.compile(guidance), Standardizer.identity((2,)))
    model.save(tmp_path / "m")
    found = tgdp.TransferModel.load(tmp_path / "m")
    assert same(found.denoiser.network, plain)
    assert same(found.guidance, guidance)
    compiled = copy.deepcopy(guidance)
    compiled.layers[1] = torch.compile(compiled.layers[1])
    for a, b in zip(compiled(x, 0.5), guidance(x, 0.5), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "ema.module.model."])
def test_prefixes_of_files_are_left_out(tmp_path: Path, prefix: str) -> None:
    for name, made, load in (
        ("sssd.pkl", sssd_ecg(), lambda file: tgdp.SSSDECG.from_checkpoint(file, cauchy="pair")),
        ("qt.pt", guidance_qt(), lambda file: GuidanceQt.from_checkpoint(file, length=64)),
    ):
        state = {prefix + key: value for key, value in made.state_dict().items()}
        for entry in ("model_state_dict", "state_dict", "weights"):
            torch.save({entry: state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "iter": 3}, tmp_path / name)
            assert same(load(tmp_path / name), made)
    own = Own()
    config = tgdp.Denoiser(own, SCHEDULE).to_config()
    save_checkpoint(tmp_path / "own", "denoiser", config, {prefix + k: v for k, v in own.state_dict().items()})
    assert same(tgdp.Denoiser.load(tmp_path / "own", network=Own()).network, own)


def test_an_inner_module_may_be_called_module() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.weight = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))

    holder, other = Holder(), Holder()
    load_state_dict_checked(other, holder.state_dict(), "here")
    assert same(other, holder)
    with pytest.raises(CheckpointError, match="missing: weight"):
        load_state_dict_checked(other, {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}, "here")


@pytest.mark.parametrize("entries", [("model", "ema"), ("first", "second")])
def test_of_two_sets_of_weights_none_is_chosen(tmp_path: Path, entries: tuple[str, str]) -> None:
    state = sssd_ecg().state_dict()
    torch.save(dict.fromkeys(entries, state), tmp_path / "entries.pkl")
    torch.save({f"{one}.{name}": value for one in entries for name, value in state.items()}, tmp_path / "names.pkl")
    for file in ("entries.pkl", "names.pkl"):
        with pytest.raises(CheckpointError, match=f"(?s){entries[0]}.*{entries[1]}"):
            tgdp.SSSDECG.from_checkpoint(tmp_path / file, cauchy="pair")


def test_both_kinds_of_weight_normalization(tmp_path: Path) -> None:
    kinds = (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm)
    x, time = torch.randn(4, 2), torch.zeros(4)
    for saved in kinds:
        own = Own(saved)
        tgdp.Denoiser(own, SCHEDULE).save(tmp_path / "m")
        for read in kinds:
            found = tgdp.Denoiser.load(tmp_path / "m", network=Own(read)).network
            torch.testing.assert_close(found(x, time), own(x, time))
    state = sssd_ecg().state_dict()
    newer = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for name, value in state.items()
    }
    assert newer.keys() != state.keys()
    torch.save(newer, tmp_path / "x.pkl")
    found = tgdp.SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair").state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_one_of_two_tied_tensors_is_enough() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    module = Tied()
    load_state_dict_checked(module, {"a.weight": torch.ones(2, 2)}, "here")
    assert torch.equal(module.b.weight, torch.ones(2, 2))


# ----------------------------------------------------------------------------------------- beside the weights


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        {"loss": np.float64(0.125), "step": np.int64(3), "best": np.bool_(True), "half": np.float16(1)},
        {"args": argparse.Namespace(lr=1e-3, names=["a"])},
        {"name": "run", "history": [1.0, {"a": (1, 2)}], "more": OrderedDict(a=None)},
    ],
)
def test_plain_values_beside_the_weights(tmp_path: Path, beside: dict[str, Any], zipped: bool) -> None:
    made = sssd_ecg()
    state = {"model_state_dict": made.state_dict(), **beside}
    torch.save(state, tmp_path / "x.pkl", _use_new_zipfile_serialization=zipped)
    assert same(tgdp.SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair"), made)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(3), r"an object of numpy\.ndarray.*torch\.from_numpy"),
        (Path("x"), r"an object of pathlib\.\w+Path, .*save its weights alone"),
    ],
)
def test_other_objects_are_named(tmp_path: Path, value: Any, message: str) -> None:
    torch.save({"model_state_dict": sssd_ecg().state_dict(), "x": value}, tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match=message):
        tgdp.SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair")


# ---------------------------------------------------------------------------------------------------- tensors


COMPLEX, LONG = torch.tensor([1 + 2j, 3 - 4j]), torch.arange(100.0)
STORED = {
    "conjugate": (COMPLEX.conj(), torch.tensor([1 - 2j, 3 + 4j])),
    "negative": (COMPLEX.conj().imag, torch.tensor([-2.0, 4.0])),
    "strided": (LONG[::30], torch.tensor([0.0, 30, 60, 90])),
    "view": (LONG[97:], torch.tensor([97.0, 98, 99])),
    "repeated": (torch.ones(1).expand(3), torch.ones(3)),
    "transposed": (torch.tensor([[1.0, 2], [3, 4]]).T, torch.tensor([[1.0, 3], [2, 4]])),
    "number": (torch.tensor(3.0), torch.tensor(3.0)),
    "empty": (torch.zeros(0, 3), torch.zeros(0, 3)),
}


@pytest.mark.parametrize("name", STORED)
def test_values_are_stored_whatever_their_memory(tmp_path: Path, name: str) -> None:
    given, expected = STORED[name]
    save_checkpoint(tmp_path / "m", "x", {}, {"a": given, "b": LONG, "c": given})
    found = load_checkpoint(tmp_path / "m")[1]
    for key in ("a", "c"):
        assert found[key].dtype == expected.dtype
        assert torch.equal(found[key], expected)


def test_eight_bit_floats_are_stored(tmp_path: Path) -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        save_checkpoint(tmp_path / "m", "x", {}, {"a": torch.tensor([0.5, -2.0]).to(dtype)})
        found = load_checkpoint(tmp_path / "m")[1]["a"]
        assert found.dtype == dtype
        assert found.float().tolist() == [0.5, -2.0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: torch.empty(3, device="meta"), "without values, on the meta device"),
        (lambda: torch.eye(2).to_sparse_csr(), "torch.sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "torch.qint8"),
        (lambda: torch.zeros(2, dtype=torch.complex128), "torch.complex128"),
        (lambda: 3, "int"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, value: Callable[[], Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tensors\['a'\] must be a dense torch.Tensor, got.*{message}"):
        save_checkpoint(tmp_path / "m", "x", {}, {"a": value()})
    assert not (tmp_path / "m").exists()


def test_a_module_without_values_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    for empty in (module, nn.LazyLinear(2)):
        with pytest.raises(CheckpointError, match="have no values yet"):
            load_state_dict_checked(empty, nn.Linear(2, 2).state_dict(), "here")


def test_numbers_of_a_higher_kind_are_refused() -> None:
    module = nn.Module()
    module.register_buffer("count", torch.tensor([1, 2]))
    for value in (torch.tensor([1.5, 2.0]), torch.tensor([1j, 2.0])):
        with pytest.raises(CheckpointError, match="other numbers: count torch"):
            load_state_dict_checked(module, {"count": value}, "here")
    load_state_dict_checked(module, {"count": torch.tensor([3, 4], dtype=torch.int8)}, "here")
    assert module.count.tolist() == [3, 4]


# ------------------------------------------------------------------------------------------------------ sizes


SKETCHED: dict[str, Callable[[], nn.Module]] = {
    "ScoreMLP": network,
    "GuidanceNetwork": lambda: tgdp.GuidanceNetwork((2, 40), SCHEDULE, width=8, depth=2, stem="ecg"),
    "SSSDECG": sssd_ecg,
    "XResNet1d": lambda: XResNet1d(8, 3, blocks=(1, 1), expansion=2, width=4, stem_width=4, hidden=4),
    "GuidanceQt": guidance_qt,
}


@pytest.mark.parametrize("build", SKETCHED.values(), ids=SKETCHED)
def test_a_sketch_has_the_names_and_shapes_of_the_module(build: Callable[[], nn.Module]) -> None:
    def described(module: nn.Module) -> dict[str, tuple[Any, ...]]:
        return {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()}

    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.device("meta"), _Sketch(100_000):
        sketch = build()
    assert torch.equal(torch.get_rng_state(), state), "a sketch draws no random numbers"
    assert all(value.is_meta for value in sketch.state_dict().values())
    assert described(sketch) == described(build())


@pytest.mark.parametrize(
    ("name", "value"), [("width", 20_000), ("width", 2**40), ("depth", 10**6), ("depth", 2**40), ("depth", 900)]
)
def test_sizes_are_compared_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    tgdp.Denoiser(network(), SCHEDULE, time_input="half_log_snr").save(tmp_path / "m")
    header = json.loads((tmp_path / "m" / "config.json").read_text())
    header["config"]["network"][name] = value
    (tmp_path / "m" / "config.json").write_text(json.dumps(header))
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        result = real(*args, **kwargs)
        assert result.is_meta or result.numel() < 10_000, "memory for the wrong size"
        return result

    monkeypatch.setattr(torch, "empty", empty)
    for load in (tgdp.Denoiser.load, tgdp.Denoiser.from_pretrained):
        with pytest.raises(CheckpointError, match="another architecture|far more layers"):
            load(tmp_path / "m")
