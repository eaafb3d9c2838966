"""Names, shapes and files of released SSSD-ECG checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_sssd_ecg import BLOCKS, KERNEL, TINY, arguments, randomised, relative

from tgdp_fast import SSSDECG, CheckpointError

BUFFERS = ("B", "P", "Q", "log_dt", "omega", "w", "z")

# names ------------------------------------------------------------------------------------------------------


def paper_state():
    """Names and shapes of the released checkpoint."""

    def weight_norm(prefix, out, inputs, size=1):
        return {f"{prefix}bias": (out,), f"{prefix}weight_g": (out, 1, 1), f"{prefix}weight_v": (out, inputs, size)}

    def dense(prefix, out, inputs):
        return {f"{prefix}weight": (out, inputs), f"{prefix}bias": (out,)}

    state = {
        **weight_norm("init_conv.0.conv.", 256, 8),
        "embedding.weight": (71, 128),
        **dense("residual_layer.fc_t1.", 512, 128),
        **dense("residual_layer.fc_t2.", 512, 512),
        **weight_norm("final_conv.0.conv.", 256, 256),
        "final_conv.2.conv.weight": (8, 256, 1),
        "final_conv.2.conv.bias": (8,),
    }
    for n in range(36):
        block = f"residual_layer.residual_blocks.{n}."
        state |= dense(f"{block}fc_t.", 256, 512) | weight_norm(f"{block}conv_layer.conv.", 512, 256, 3)
        state |= weight_norm(f"{block}res_conv.", 256, 256) | weight_norm(f"{block}skip_conv.", 256, 256)
        state |= dense(f"{block}fc_label.", 512, 128)
        for name in (f"{block}S41.", f"{block}S42."):
            state |= {
                f"{name}norm_layer.weight": (512,),
                f"{name}norm_layer.bias": (512,),
                f"{name}s4_layer.D": (1, 512),
            }
            state |= {
                f"{name}s4_layer.output_linear.weight": (512, 512),
                f"{name}s4_layer.output_linear.bias": (512, 1),
            }
            kernel = f"{name}s4_layer.kernel.kernel."
            state |= {f"{kernel}C": (2, 512, 32, 2), f"{kernel}w": (512, 32, 2), f"{kernel}log_dt": (512,)}
            state |= {f"{kernel}{each}": (1, 512, 32, 2) for each in "BPQ"}
            state |= {f"{kernel}{each}": (501, 2) for each in ("omega", "z")}
    return state


def test_names_and_shapes_of_the_released_checkpoint():
    with torch.device("meta"):
        network = SSSDECG()
    state = network.state_dict()
    assert len(state) == 1417
    assert {name: tuple(value.shape) for name, value in state.items()} == paper_state()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {value.device.type for value in state.values()} == {"meta"}
    assert sum(parameter.numel() for parameter in network.parameters()) == 50_202_504
    assert sum(buffer.numel() for buffer in network.buffers()) == 9_618_336
    assert {name.rsplit(".", 1)[1] for name, _ in network.named_buffers()} == set(BUFFERS)
    assert network.to_config() == SSSDECG(num_res_layers=1).to_config() | {"num_res_layers": 36}
    assert network.event_shape == (8, 1000)
    json.dumps(network.to_config())


# released files ---------------------------------------------------------------------------------------------


def write(file, network, how):
    state = network.state_dict()
    if how == "safetensors":
        save_file(state, file)
    elif how == "bare":
        torch.save(state, file)
    else:
        optimiser = torch.optim.Adam(network.parameters())
        content = {"model_state_dict": state, "optimizer_state_dict": optimiser.state_dict()}
        torch.save(content, file, _use_new_zipfile_serialization=how == "released")
    return file


@pytest.mark.parametrize("how", ["released", "legacy", "bare", "safetensors"])
def test_files_are_loaded(tmp_path: Path, how):
    network = randomised(**TINY)
    file = write(tmp_path / "100000.pkl", network, how)
    loaded = SSSDECG.from_checkpoint(file, cauchy="pair")
    assert not loaded.training
    assert loaded.to_config() == network.to_config()
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    call = arguments(network)
    with torch.no_grad():
        assert torch.equal(loaded(*call), network(*call))
        half = SSSDECG.from_checkpoint(str(file), cauchy="half", config={"num_res_layers": 2, "step_dims": [10, 6, 9]})
        assert half.cauchy == "half"
        assert relative(half(*call), network(*call)) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 0, "label_dim": 1},
        {"num_res_layers": 11},
        *({"l_max": length} for length in (1, 2, 3, 4, 5, 999)),
    ],
)
def test_sizes_are_read_off_the_tensors(tmp_path: Path, changes):
    network = SSSDECG(**{**TINY, **changes})
    loaded = SSSDECG.from_checkpoint(write(tmp_path / "x", network, "safetensors"), cauchy="pair")
    assert loaded.to_config() == network.to_config()


def test_other_dtypes_are_converted(tmp_path: Path):
    network = randomised(**TINY)
    state = {name: value.double() for name, value in network.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "x.pkl")
    loaded = SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


def test_the_sums_must_be_chosen(tmp_path: Path):
    file = write(tmp_path / "x.pkl", SSSDECG(**TINY), "released")
    with pytest.raises(TypeError, match="cauchy"):
        SSSDECG.from_checkpoint(file)
    with pytest.raises(ValueError, match="cauchy must be one of half, pair; got 'both'"):
        SSSDECG.from_checkpoint(file, cauchy="both")


def remove(*parts):
    return lambda state: [state.pop(name) for name in list(state) if any(part in name for part in parts)]


def put(name, shape):
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("init_conv.0.conv.weight_v"), r"init_conv\.0\.conv\.weight_v is missing, expected \[res_channels, in"),
        (remove("fc_t2.weight"), r"residual_layer\.fc_t2\.weight is missing, expected \[embedding, hidden\]"),
        (
            remove(BLOCKS),
            r"blocks\.0\.S41\.s4_layer\.kernel\.kernel\.C is missing, expected \[2, 2 res_channels, d_state",
        ),
        (put("final_conv.2.conv.weight", (2, 7)), r"final_conv\.2\.conv\.weight has shape \[2, 7\], expected \[out_ch"),
        (put(f"{KERNEL}omega", (0, 2)), r"omega has shape \[0, 2\], expected \[l_max // 2 \+ 1, 2\]"),
        (remove("blocks.1.S42.s4_layer.D"), r"\(missing: residual_layer\.residual_blocks\.1\.S42\.s4_layer\.D\)"),
        (remove("embedding.weight"), r"unexpected: residual_layer\.residual_blocks\.0\.fc_label\.weight"),
        (put("extra", (1,)), r"\(unexpected: extra\)"),
        (put(f"{BLOCKS}1.fc_t.bias", (9,)), r"other shape: residual.*blocks\.1\.fc_t\.bias \[9\], expected \[8\]"),
        # Kernels over the past alone.
        (
            put(f"{KERNEL}C", (1, 16, 3, 2)),
            r"S41\.s4_layer\.kernel\.kernel\.C \[1, 16, 3, 2\], expected \[2, 16, 3, 2\]",
        ),
        (put(f"{KERNEL}omega", (31, 2)), r"S41\.s4_layer\.kernel\.kernel\.z \[26, 2\], expected \[31, 2\]"),
        (lambda state: state.update(note="text"), r"the entry 'note' is of type str, expected torch\.Tensor"),
    ],
)
def test_a_wrong_checkpoint_names_what_differs(tmp_path: Path, change, message):
    state = dict(SSSDECG(**TINY).state_dict())
    change(state)
    torch.save({"model_state_dict": state}, tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match=message) as caught:
        SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair")
    assert "x.pkl" in str(caught.value)


def test_expected_sizes_can_be_insisted_on(tmp_path: Path):
    network = SSSDECG(**TINY)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith(f"{BLOCKS}1.")}
    torch.save({"model_state_dict": state}, tmp_path / "x.pkl")
    assert SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair").num_res_layers == 1
    with pytest.raises(CheckpointError, match=r"missing: residual_layer\.residual_blocks\.1\.fc_t\.weight"):
        SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair", config={"num_res_layers": 2})
    with pytest.raises(CheckpointError, match=r"embedding\.weight \[4, 5\], expected \[71, 5\]"):
        SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair", config={"num_classes": 71})
    with pytest.raises(ValueError, match=r"config's keys must be one of .*did you mean 'num_res_layers'"):
        SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair", config={"num_layers": 2})
    with pytest.raises(ValueError, match="num_res_layers must be an integer >= 1, got 0"):
        SSSDECG.from_checkpoint(tmp_path / "x.pkl", cauchy="pair", config={"num_res_layers": 0})


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_damaged_and_dangerous_files(tmp_path: Path):
    network, fuse = SSSDECG(**TINY), tmp_path / "exploded"
    for how in ("released", "legacy", "safetensors"):
        content = write(tmp_path / "whole", network, how).read_bytes()
        for length in (100, len(content) // 2, len(content) - 8):
            (tmp_path / "part.pkl").write_bytes(content[:length])
            with pytest.raises(CheckpointError, match=r"part\.pkl is damaged, truncated, or holds something else"):
                SSSDECG.from_checkpoint(tmp_path / "part.pkl", cauchy="pair")
    for zipped in (True, False):
        state = {"model_state_dict": network.state_dict(), "bomb": Bomb(fuse)}
        torch.save(state, tmp_path / "bomb.pkl", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"bomb\.pkl .*holds something else than tensors"):
            SSSDECG.from_checkpoint(tmp_path / "bomb.pkl", cauchy="pair")
    assert not fuse.exists()
    torch.save([torch.zeros(1)], tmp_path / "list.pkl")
    with pytest.raises(CheckpointError, match="must hold a state dict, alone or as 'model_state_dict', got list"):
        SSSDECG.from_checkpoint(tmp_path / "list.pkl", cauchy="pair")
    with pytest.raises(CheckpointError, match="absent does not exist"):
        SSSDECG.from_checkpoint(tmp_path / "absent", cauchy="pair")
    with pytest.raises(CheckpointError, match=r"is a folder; Denoiser\.load reads checkpoint folders"):
        SSSDECG.from_checkpoint(tmp_path, cauchy="pair")


@pytest.mark.slow(ci=True)
def test_round_trip_at_full_size(tmp_path: Path):
    """1,417 tensors through both kinds of file, without a forward pass."""
    network = SSSDECG()
    released = SSSDECG.from_checkpoint(write(tmp_path / "x.pkl", network, "bare"), cauchy="half")
    assert released.to_config() == {**network.to_config(), "cauchy": "half"}
    again = SSSDECG.from_checkpoint(write(tmp_path / "x.safetensors", released, "safetensors"), cauchy="pair")
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
