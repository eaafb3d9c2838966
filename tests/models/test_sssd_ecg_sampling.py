"""SSSD-ECG compiled for sampling against the network in float64, each folding by itself, and what it refuses."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from native import needs_extension
from test_loop import NothingFromTheHost
from test_sssd_ecg import MEDIUM, TINY, arguments, randomised, relative

from tgdp_fast import SSSDECG, Denoiser, GuidanceNetwork, GuidedDenoiser, NoiseSchedule, ScoreMLP, sample, solver_table
from tgdp_fast.lab.benchmark.runner import peak_memory
from tgdp_fast.models.sssd_ecg import compiled as sssd_ecg_sampling
from tgdp_fast.models.sssd_ecg.compiled import CompiledSSSDECG, step_bias
from tgdp_fast.ops import BackendUnavailableError, use_backend
from tgdp_fast.sampling import sampler as sampling

SCHEDULE = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 200))
#: The network's float32 is within this of float64 (see test_sssd_ecg), and here less is rounded.
FP32 = 3e-6


def compiled(network, **keywords):
    return network.compile_for_sampling(SCHEDULE, **keywords)


def exact(network, x, steps, labels):
    reference = copy.deepcopy(network).double()
    with torch.no_grad():
        return reference(x.double(), steps, None if labels is None else labels.double())


# the whole --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cauchy", ["pair", "half"])
@pytest.mark.parametrize("config", [TINY, {**TINY, "l_max": 51}, MEDIUM], ids=["tiny", "odd", "medium"])
def test_matches_the_network_in_float64(config, cauchy):
    network = randomised(**config, cauchy=cauchy)
    fast = compiled(network)
    assert (fast.event_shape, fast.num_classes) == (network.event_shape, network.num_classes)
    for length in (network.l_max, 33, 3, 2, 1):
        call = arguments(network, 3, length)
        found = fast(*call)
        assert (found.dtype, found.requires_grad, found.is_contiguous()) == (torch.float32, False, True)
        assert relative(found, exact(network, *call)) < FP32


@pytest.mark.parametrize(
    ("precision", "limit"),
    # Factors are rounded by half a unit, 2^-9 and 2^-12, at four products in a block: an error of 2 units for each of
    # the four blocks' contributions, which the skip sum averages.
    [("bf16", 1e-2), ("fp16", 1.25e-3)],
)
def test_16_bits_stay_within_their_rounding(precision, limit):
    network = randomised(**MEDIUM)
    call = arguments(network, 2)
    found = compiled(network, precision=precision)(*call)
    error = relative(found, exact(network, *call))
    assert found.dtype == torch.float32
    assert FP32 < error < limit


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 3e-2), ("fp16", 4e-3)])
def test_as_many_blocks_as_in_the_paper(precision, limit):
    network = randomised(res_channels=16, skip_channels=16, num_res_layers=36, l_max=128, d_state=16)
    call = arguments(network, 2)
    assert relative(compiled(network, precision=precision)(*call), exact(network, *call)) < limit


def test_float16_saturates():
    network = randomised(**TINY)
    with torch.no_grad():
        network.init_conv[0].get_submodule("conv").bias.fill_(1e6)
    call = arguments(network)
    assert compiled(network, precision="fp16")(*call).isfinite().all()


def test_unconditional_and_other_dtypes():
    network = randomised(**{**TINY, "num_classes": 0})
    x, steps, _ = arguments(network)
    fast = compiled(network)
    expected = exact(network, x, steps, None)
    assert relative(fast(x, steps), expected) < FP32
    assert relative(fast(x.double(), steps.long()), expected) < FP32
    assert fast(x.double(), steps).dtype == torch.float64
    assert fast(x.to(torch.bfloat16), steps).dtype == torch.bfloat16
    assert fast(x[:0], steps[:0]).shape == (0, 2, 50)
    # A source in float64 gives the same tables.
    assert relative(compiled(copy.deepcopy(network).double())(x, steps), expected) < FP32


def test_autocast_has_no_effect():
    network = randomised(**TINY)
    call = arguments(network)
    fast = compiled(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(*call), fast(*call))
        assert relative(fast(*call), exact(network, *call)) < FP32


def test_a_signal_shorter_than_the_spectra():
    network = randomised(**TINY)
    fast = compiled(network, length=20)
    assert fast.event_shape == (3, 20)
    for length in (20, 7):
        call = arguments(network, length=length)
        assert relative(fast(*call), exact(network, *call)) < FP32
    with pytest.raises(ValueError, match=r"L in 1\.\.20, got \(2, 3, 21\); for longer signals compile with a larger"):
        fast(*arguments(network, length=21))


# the parts --------------------------------------------------------------------------------------------------


def test_step_bias_is_what_the_embedding_adds():
    network = randomised(**TINY).double()
    steps = torch.tensor([0.0, 3.5, 199.0])
    rows = step_bias(network, steps)
    assert rows.shape == (3, 2, 3, 16)
    assert rows.dtype == torch.float32
    for k, block in enumerate(network.residual_layer.residual_blocks):
        convolution = block.conv_layer.conv
        shift = block.fc_t(network.residual_layer.embed_step(steps))[:, :, None]
        for length in (1, 2, 3, 6):
            x = torch.randn(3, 8, length, dtype=torch.float64)
            with torch.no_grad():
                expected = convolution(x + shift)
                plain = convolution(x) - convolution.bias[:, None]
            whole, first, last = rows[:, k].double().unbind(1)
            plain += whole[..., None]
            plain[..., 0] -= first
            plain[..., -1] -= last
            assert (plain - expected).abs().max() < 1e-6


def test_times_outside_the_table():
    network = randomised(**TINY)
    x, _, labels = arguments(network, 3)
    fast = network.compile_for_sampling([5.0, 7.0])
    for steps in (torch.tensor([5, 7, 5]), torch.tensor([5.0, 6.0, 7.25]), torch.tensor([1000.5])):
        assert relative(fast(x, steps, labels), exact(network, x, steps, labels)) < FP32
    kept = fast._step_rows
    assert list(kept) == [5.0, 7.0, 6.0, 7.25, 1000.5]
    assert torch.equal(fast(x, torch.tensor([6.0]), labels), compiled(network)(x, torch.tensor([6.0]), labels))
    for value in range(100, 300):
        fast(x[:, :, :1], torch.tensor([float(value)]), labels)
    assert len(kept) <= 2 + sssd_ecg_sampling._KEPT_TIMES
    assert 5.0 in kept
    without = network.compile_for_sampling()
    assert relative(without(x, torch.tensor([6.0]), labels), exact(network, x, torch.tensor([6.0]), labels)) < FP32


def test_one_time_for_all_is_one_row(monkeypatch):
    network = randomised(**TINY)
    fast = compiled(network)
    x, _, labels = arguments(network, 3)
    asked = []
    real = CompiledSSSDECG._step_biases
    monkeypatch.setattr(CompiledSSSDECG, "_step_biases", lambda self, time: asked.append(len(time)) or real(self, time))
    one = torch.tensor([3.0])
    expected = fast(x, one, labels)
    for steps in (one.expand(3), torch.full((3,), 3), torch.tensor(3)):
        assert torch.equal(fast(x, steps, labels), expected)
    assert asked == [1] * 4
    fast(x, torch.tensor([3.0, 3.0, 4.0]), labels)
    assert asked[4:] == [3]


def test_compiling_leaves_the_network_as_it_is():
    network = randomised(**TINY)
    x, steps, labels = arguments(network)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        expected = network(x, steps, labels)
        kept = network.residual_layer.residual_blocks[0].S41.s4_layer.kernel._kept
        fast = compiled(network)
        fast(x, steps, labels)
        assert network.residual_layer.residual_blocks[0].S41.s4_layer.kernel._kept is kept
        assert torch.equal(network(x, steps, labels), expected)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    # What is of the network's own size is its own: nothing but the source is in a state dict.
    assert set(fast.state_dict()) == {f"source.{name}" for name in state}


def test_what_tables_are_made_of():
    network = randomised(**TINY)
    table = solver_table("dpm_solver_2s", SCHEDULE, 5)
    assert list(network.compile_for_sampling(table)._step_rows) == sorted(set(table.times))
    assert list(compiled(network)._step_rows) == list(range(200))
    assert list(network.compile_for_sampling(torch.tensor([3, 1]))._step_rows) == [1.0, 3.0]
    with pytest.raises(ValueError, match="schedule must be discrete, .* got a continuous one; pass the solver's table"):
        network.compile_for_sampling(NoiseSchedule.vp_linear())
    with pytest.raises(ValueError, match=r"finite diffusion steps, of shape \[K\], got shape \(1, 2\)"):
        network.compile_for_sampling([[1.0, 2.0]])
    with pytest.raises(ValueError, match="schedule_or_table must be a NoiseSchedule, .* got str"):
        network.compile_for_sampling("ddpm")


def test_labels():
    network = randomised(**TINY)
    fast = compiled(network)
    x, steps, _ = arguments(network, 3)
    multi_hot = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    for labels in (torch.rand(3, 4), multi_hot, multi_hot.bool(), torch.tensor([0, 3, 2]), torch.tensor([2])):
        with torch.no_grad():
            expected = network(x, steps, labels)
        assert relative(fast(x, steps, labels), expected) < FP32
    with pytest.raises(ValueError, match="labels are required: this network is conditional on 4 classes"):
        fast(x, steps)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3, got values from 4 to 4"):
        fast(x, steps, torch.tensor([1, 4, 2]))
    with pytest.raises(ValueError, match="labels must have 3 rows, one per sample of x, got 2"):
        fast(x, steps, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="this network is unconditional"):
        compiled(randomised(**{**TINY, "num_classes": 0}))(x, steps, torch.tensor([1]))


@pytest.mark.parametrize("inference", [False, True])
def test_labels_are_embedded_once_and_again_when_they_change(inference, monkeypatch):
    network = randomised(**TINY)
    fast = compiled(network)
    counted = []
    real = SSSDECG.embed_labels
    monkeypatch.setattr(SSSDECG, "embed_labels", lambda self, labels: counted.append(1) or real(self, labels))
    x, steps, _ = arguments(network, 1)
    with torch.inference_mode(inference):
        labels = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        first = fast(x, steps, labels)
        assert torch.equal(fast(x, steps, labels), first)
        # Changes of tensors of inference mode are not counted: they are embedded each time.
        assert len(counted) == (2 if inference else 1)
        labels[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
        assert relative(fast(x, steps, labels), network(x, steps, labels).detach()) < FP32
        assert relative(fast(x, steps, labels), first) > 1e-3


# batches and memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [250, 33])
def test_bits_of_a_sample_do_not_depend_on_its_batch(precision, length, monkeypatch):
    network = randomised(**MEDIUM)
    x, steps, labels = arguments(network, 7, length)
    whole = compiled(network, precision=precision)(x, steps, labels)
    monkeypatch.setattr(sssd_ecg_sampling, "_STATE_BYTES", 4 * 128 * length * 3)
    fast = compiled(network, precision=precision)
    for rows in (slice(0, 7), slice(2, 7), slice(3, 4)):
        assert torch.equal(fast(x[rows], steps[rows], labels[rows]), whole[rows])
    assert fast._workspace.samples == 3


def test_memory_does_not_grow_with_the_batch():
    network = randomised(**TINY)
    fast = compiled(network)
    x, steps, labels = arguments(network, 2)
    fast(x, steps, labels)
    small = fast._workspace
    fast(x.repeat(600, 1, 1), steps.repeat(600), labels.repeat(600, 1))
    large = fast._workspace
    assert small.samples == 2
    assert large.samples <= sssd_ecg_sampling._STATE_BYTES // (4 * 15 * 50)
    fast(x.repeat(9000, 1, 1), steps[:1], labels[:1])
    most = fast._workspace
    fast(x.repeat(10000, 1, 1), steps[:1], labels[:1])
    assert fast._workspace is most
    assert most.state.nbytes <= sssd_ecg_sampling._STATE_BYTES
    fast(x, steps, labels)
    assert fast._workspace is most  # a last, smaller batch does not shrink it


def test_peak_memory_of_a_call_is_that_of_its_blocks_of_samples(monkeypatch):
    monkeypatch.setattr(sssd_ecg_sampling, "_STATE_BYTES", 2**20)
    network = randomised(**MEDIUM | {"num_res_layers": 1})
    fast = compiled(network)
    x, _, labels = arguments(network, 128)
    steps, peaks = torch.tensor([7.0]), []
    for batch in (64, 128):
        call = (x[:batch], steps, labels[:batch])
        fast(*call)  # keeps the labels and the buffers
        peaks.append(peak_memory(lambda call=call: [fast(*call)], torch.device("cpu")))
    assert peaks[1] - peaks[0] <= 64 * 8 * 250 * 4 + 1000  # the result


def test_results_survive_the_next_call():
    network = randomised(**TINY)
    fast = compiled(network)
    x, steps, labels = arguments(network)
    first = fast(x, steps, labels)
    kept, input_kept = first.clone(), x.clone()
    second = fast(2 * x, steps, labels)
    assert torch.equal(first, kept)
    assert torch.equal(x, input_kept)
    assert not torch.equal(first, second)
    buffers = {value.data_ptr() for value in vars(fast._workspace).values() if isinstance(value, torch.Tensor)}
    assert first.untyped_storage().data_ptr() not in buffers


def test_nothing_is_read_that_was_not_written(poisoned):
    network = randomised(**TINY)
    for length in (50, 1):
        call = arguments(network, length=length)
        assert relative(compiled(network)(*call), exact(network, *call)) < FP32


def test_calls_in_and_outside_inference_mode():
    network = randomised(**TINY)
    call = arguments(network)
    with torch.inference_mode():
        fast = compiled(network)
        first = fast(*call)
    assert torch.equal(fast(*call), first)
    with torch.no_grad():
        assert torch.equal(fast(*call), first)


# refusals ---------------------------------------------------------------------------------------------------


def test_refuses_training_and_gradients():
    network = SSSDECG(**TINY)
    with pytest.raises(ValueError, match=r"network must be in eval mode .* call network\.eval\(\) first"):
        compiled(network)
    network = randomised(**TINY)
    fast = compiled(network)
    x, steps, labels = arguments(network)
    with pytest.raises(ValueError, match="x must not require a gradient"):
        fast(x.clone().requires_grad_(), steps, labels)
    with torch.no_grad():
        fast(x.clone().requires_grad_(), steps, labels)
    for module in (network, fast):
        module.train()
        with pytest.raises(RuntimeError, match=r"it is in training mode; call \.eval\(\)"):
            fast(x, steps, labels)
        module.eval()
    fast(x, steps, labels)


def test_errors_of_arguments():
    network = randomised(**TINY)
    fast = compiled(network)
    x, steps, labels = arguments(network)
    for shape in [(2, 3), (2, 4, 50), (2, 3, 51), (2, 3, 0)]:
        with pytest.raises(ValueError, match=r"x must have shape \[B, 3, L\] with L in 1\.\.50, got"):
            fast(torch.zeros(shape), steps, labels)
    with pytest.raises(ValueError, match=r"time must have shape \[2\] or \[1\]"):
        fast(x, torch.zeros(3), labels)
    with pytest.raises(ValueError, match="x must be on cpu, where the network was compiled, got meta"):
        fast(x.to("meta"), steps, labels)
    with pytest.raises(ValueError, match="precision must be one of bf16, fp16, fp32; got 'fp8'"):
        compiled(network, precision="fp8")
    with pytest.raises(ValueError, match="length must be at most 50, the network's l_max, got 51"):
        compiled(network, length=51)
    with pytest.raises(ValueError, match="length must be an integer >= 1, got 0"):
        compiled(network, length=0)


def replaced(network):
    network.embedding.weight = torch.nn.Parameter(network.embedding.weight.detach().clone())


def loaded(network):
    network.load_state_dict({name: value + 0 for name, value in network.state_dict().items()})


def stepped(network):
    network.final_conv[2].get_submodule("conv").bias.grad = torch.ones(2)
    torch.optim.SGD(network.parameters(), lr=0.1).step()


def buffer_changed(network):
    network.residual_layer.residual_blocks[1].S42.s4_layer.kernel.kernel.omega.mul_(1.0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (replaced, "embedding.weight"),
        (loaded, ".*"),
        (stepped, r"final_conv\.2\.conv\.bias"),
        (buffer_changed, r"residual_layer\.residual_blocks\.1\.S42\.s4_layer\.kernel\.kernel\.omega"),
        (lambda network: network.double(), ".*"),
        (lambda network: network.to("meta"), ".*"),
    ],
)
def test_notices_changes_of_the_network(change, name):
    network = randomised(**TINY)
    fast = compiled(network)
    call = arguments(network)
    fast(*call)
    change(network)
    message = f"{name} of the network was changed or moved since it was compiled; call network.compile_for_sampling"
    with pytest.raises(RuntimeError, match=message):
        fast(*call)
    with pytest.raises(RuntimeError, match=message):
        copy.deepcopy(fast)


@needs_extension
def test_taps_are_kept_where_they_are_read():
    network = randomised(**TINY)
    call = arguments(network)
    with use_backend("reference"):
        kept = compiled(network)
        assert relative(kept(*call), exact(network, *call)) < FP32
    assert not kept._blocks[0].first.filters.taps.is_meta
    dropped = compiled(network)
    assert dropped._blocks[0].first.filters.taps.is_meta
    with use_backend("reference"), pytest.raises(BackendUnavailableError, match="the taps were dropped"):
        dropped(*call)


def test_copies_are_of_their_own():
    network = randomised(**TINY)
    fast = compiled(network, precision="bf16")
    call = arguments(network)
    expected = fast(*call)
    other = copy.deepcopy(fast)
    stream = io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    for copied in (other, torch.load(stream, weights_only=False)):
        assert torch.equal(copied(*call), expected)
        assert copied._workspace is not fast._workspace
    with torch.no_grad():
        network.embedding.weight.add_(1.0)
    assert torch.equal(other(*call), expected)


# sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m", "heun", "dpm_solver_2s"])
def test_samples_are_those_of_the_network(solver):
    network = randomised(**TINY | {"out_channels": 3})
    denoiser = Denoiser(network, SCHEDULE)
    fast = denoiser.compile_for_sampling(solver_table(solver, SCHEDULE, 6))
    labels = torch.rand(5, 4)
    for extra in ({}, {"guidance": GuidanceNetwork((3, 50), SCHEDULE, width=8, depth=2).eval(), "scale": 0.5}):
        keywords = {"num": 5, "labels": labels, "solver": solver, "steps": 6, "seed": 1, "batch_size": 2, **extra}
        expected = sample(denoiser, **keywords)
        # Errors of 1e-6 of epsilon grow with the solver's coefficients, by less than a hundred.
        torch.testing.assert_close(sample(fast, **keywords), expected, rtol=1e-4, atol=1e-4)
    # A table by hand, or none.
    by_hand = Denoiser(network.compile_for_sampling(SCHEDULE, precision="bf16"), SCHEDULE)
    keywords = {"num": 5, "labels": labels, "solver": solver, "steps": 6, "seed": 1}
    assert relative(sample(by_hand, **keywords), sample(denoiser, **keywords)) < 0.02


def test_a_denoiser_compiles_with_its_own_times():
    network = randomised(**TINY | {"out_channels": 3})
    denoiser = Denoiser(network, NoiseSchedule.vp_linear(), "v_prediction", time_scale=1000.0)
    table = solver_table("dpmpp_2m", denoiser.schedule, 4)
    fast = denoiser.compile_for_sampling(table, precision="fp32")
    assert isinstance(fast.network, CompiledSSSDECG)
    assert (fast.prediction, fast.time_scale, fast.num_classes, fast.event_shape) == (
        "v_prediction",
        1000.0,
        4,
        (3, 50),
    )
    x, labels = torch.randn(2, 3, 50), torch.rand(2, 4)
    for t in table.times:
        fast(x, float(t), labels)
    assert len(fast.network._step_rows) == table.nfe  # none was missing
    times = torch.tensor([0.3, 0.7])
    assert relative(fast(x, times, labels), denoiser(x, times, labels).detach()) < FP32
    assert math.isfinite(GuidedDenoiser(fast).epsilon(x, 0.5, labels).sum().item())
    assert not denoiser.compile_for_sampling().network._step_rows
    assert len(Denoiser(network, SCHEDULE).compile_for_sampling().network._step_rows) == 200
    with pytest.raises(ValueError, match="must have a method compile_for_sampling, got ScoreMLP"):
        Denoiser(ScoreMLP((2,)), SCHEDULE).compile_for_sampling()


def test_saving_saves_the_network(tmp_path):
    network = randomised(**TINY | {"out_channels": 3})
    denoiser = Denoiser(network, SCHEDULE).compile_for_sampling(precision="bf16")
    denoiser.save(tmp_path / "checkpoint")
    loaded = Denoiser.load(tmp_path / "checkpoint")
    assert isinstance(loaded.network, SSSDECG)
    call = arguments(network)
    with torch.no_grad():
        assert torch.equal(loaded.network(*call), network(*call))


def test_files_of_samples_tell_the_precisions_apart():
    network = randomised(**TINY | {"out_channels": 3})
    denoisers = [Denoiser(network, SCHEDULE)]
    denoisers += [denoisers[0].compile_for_sampling(precision=precision) for precision in ("fp32", "bf16")]
    assert len({sampling._signature({"denoiser": denoiser}) for denoiser in denoisers}) == 3


# without a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_calls_touch_nothing_of_the_host(precision):
    """What a recording in a CUDA graph needs, on the meta device: no copies between host and device, no values read."""
    network = randomised(**TINY | {"out_channels": 3}).to("meta")
    denoiser = Denoiser(network, SCHEDULE).compile_for_sampling(precision=precision)
    x, labels = torch.empty(70, 3, 50, device="meta"), torch.empty(70, 4, device="meta")
    with torch.inference_mode(), NothingFromTheHost() as seen:
        assert denoiser.epsilon(x, 7.0, labels).device.type == "meta"
        assert seen.calls > 50
        calls = seen.calls
        denoiser.network(x, torch.empty(70, device="meta"), labels)
        assert seen.calls > calls + 50


def test_a_recording_computes_its_labels_and_leaves_nothing_behind(monkeypatch):
    network = randomised(**TINY)
    fast = compiled(network)
    x, steps, labels = arguments(network)
    fast(x, steps, labels)
    kept = fast._labels
    monkeypatch.setattr(sssd_ecg_sampling, "_capturing", lambda device: True)
    counted = []
    real = SSSDECG.embed_labels
    monkeypatch.setattr(SSSDECG, "embed_labels", lambda self, labels: counted.append(1) or real(self, labels))
    found = fast(x, torch.tensor([0.25]), labels)
    assert counted
    assert relative(found, exact(network, x, torch.tensor([0.25]), labels)) < FP32
    assert 0.25 not in fast._step_rows
    assert fast._labels is kept
