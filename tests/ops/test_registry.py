"""Choice of the implementation: automatic, explicit, by context and by environment."""

from __future__ import annotations

import pickle
import threading
import types
import warnings

import pytest
import torch

import tgdp_fast.ops  # noqa: F401  (registers the operators)
from tgdp_fast.ops import _cuda, measured, registry
from tgdp_fast.ops.registry import BackendUnavailableError, backend_report, register, resolve, use_backend
from tgdp_fast.runtime import native


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("TGDP_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_registry", {k: dict(v) for k, v in registry._registry.items()})
    monkeypatch.setattr(registry, "_missing", dict(registry._missing))
    monkeypatch.setattr(registry, "_logged", set())


@pytest.fixture
def toy():
    """An operator with a reference, and a cpu implementation that refuses more than two rows."""
    register("toy", "reference", lambda x: x + 1)
    register("toy", "cpu", lambda x: x + 2, lambda x: f"{len(x)} rows are too many" if len(x) > 2 else None)
    return "toy"


def test_auto_takes_the_fastest_that_accepts(toy):
    assert resolve(toy, "auto", torch.zeros(2)).backend == "cpu"
    assert resolve(toy, "auto", torch.zeros(3)).backend == "reference"
    assert resolve(toy, "auto", torch.zeros(2, device="meta")).backend == "reference"
    assert resolve(toy, "auto", torch.zeros(2)).function(torch.zeros(2)).tolist() == [2.0, 2.0]


def test_auto_order_on_a_gpu(toy):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    x = torch.zeros(2).as_subclass(OnGpu)
    register(toy, "triton", lambda x: x + 3)
    assert resolve(toy, "auto", x).backend == "triton"
    register(toy, "cuda", lambda x: x + 4, lambda x: None)
    assert resolve(toy, "auto", x).backend == "cuda"
    with pytest.raises(BackendUnavailableError, match="it takes cpu tensors and the inputs are on cuda"):
        resolve(toy, "cpu", x)
    # The interpreter of Triton serves CPU tensors, when asked for by name.
    assert resolve(toy, "triton", torch.zeros(2)).backend == "triton"
    assert resolve(toy, "auto", torch.zeros(2)).backend == "cpu"


def test_explicit_choice_is_honoured_or_raises(toy):
    assert resolve(toy, "reference", torch.zeros(2)).backend == "reference"
    assert resolve(toy, "cpu", torch.zeros(2)).backend == "cpu"
    with pytest.raises(BackendUnavailableError, match="3 rows are too many") as caught:
        resolve(toy, "cpu", torch.zeros(3))
    assert (caught.value.operator, caught.value.backend) == ("toy", "cpu")
    with pytest.raises(BackendUnavailableError, match="no such implementation.*here: cpu, reference") as caught:
        resolve(toy, "cuda", torch.zeros(2))
    assert "no such implementation" in caught.value.reason
    assert caught.value.backend == "cuda"


def test_an_operator_may_say_why_it_has_no_implementation(toy):
    register(toy, "triton", lambda x: x, missing="the moon is not full")
    assert backend_report()[toy]["triton"] == "the moon is not full"
    with pytest.raises(BackendUnavailableError, match="the moon is not full"):
        resolve(toy, "triton", torch.zeros(2))


def test_auto_leaves_a_call_to_what_was_measured_to_be_faster(toy, monkeypatch):
    monkeypatch.setitem(registry._BACKENDS, "triton", registry.Backend("triton", None, ("cuda", "cpu")))
    register(toy, "triton", lambda x: x + 3, prefer=lambda x: ("cpu",) if len(x) < 4 else ("reference",))
    assert resolve(toy, "auto", torch.zeros(2)).backend == "cpu"
    # What is faster refuses three rows.
    assert resolve(toy, "auto", torch.zeros(3)).backend == "triton"
    # The first that yields to none of those that accept.
    assert resolve(toy, "auto", torch.zeros(4)).backend == "reference"
    assert resolve(toy, "triton", torch.zeros(2)).backend == "triton"
    with use_backend("triton"):
        assert resolve(toy, "auto", torch.zeros(4)).backend == "triton"


def network(batch, inputs, width, dtype):
    """Arguments of an MLP with four hidden layers, without data."""
    sizes = [inputs, *[width] * 4, 1]
    weights = [torch.empty(m, n, dtype=dtype, device="meta") for n, m in zip(sizes, sizes[1:], strict=False)]
    x = torch.empty(batch, inputs, dtype=dtype, device="meta")
    return x, weights[0].new_empty(width), weights, [w.new_empty(len(w)) for w in weights[1:]]


@pytest.mark.parametrize(
    ("dtype", "batch", "inputs", "width", "alone", "replayed"),
    [
        # The fastest of the committed H200 result for a call by itself, and in a CUDA graph.
        (torch.bfloat16, 256, 2, 128, "cuda", "triton"),
        (torch.bfloat16, 4096, 2, 128, "cuda", "triton"),
        (torch.bfloat16, 4096, 2, 512, "reference", "triton"),
        (torch.bfloat16, 65536, 2, 512, "triton", "triton"),
        (torch.bfloat16, 256, 3904, 512, "reference", "triton"),
        (torch.float32, 4096, 2, 128, "cuda", "cuda"),
        (torch.float32, 4096, 2, 256, "cuda", "reference"),
        (torch.float32, 4096, 2, 512, "reference", "reference"),
        (torch.float32, 65536, 2, 128, "reference", "reference"),
        (torch.float32, 256, 3904, 512, "reference", "reference"),
    ],
)
def test_the_choice_of_an_mlp_on_a_gpu_is_what_was_measured(dtype, batch, inputs, width, alone, replayed):
    yields = {"cuda": measured.preferred_to_cuda_mlp, "triton": measured.preferred_to_triton_mlp}
    call = network(batch, inputs, width, dtype)

    def choice():
        for name, function in yields.items():
            if not function(*call):
                return name
        return "reference"

    assert choice() == alone
    with measured.capturing():
        assert choice() == replayed


def test_large_runs_are_left_to_the_loop():
    for dtype, samples in ((torch.bfloat16, 51_000), (torch.float32, 12_700)):  # products: 4e10 and 1e10
        networks = [network(1, 2, 512, dtype)[2]]
        assert sum(weight.numel() for weight in networks[0]) == 787_968
        assert not measured.loop_is_faster(samples - 400, networks)
        assert measured.loop_is_faster(samples, networks)
        assert measured.loop_is_faster(samples // 2, networks * 2)


def test_the_error_survives_pickling(toy):
    with pytest.raises(BackendUnavailableError) as caught:
        resolve(toy, "cuda", torch.zeros(2))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert (copy.operator, copy.backend, copy.reason) == ("toy", "cuda", caught.value.reason)


def test_context_and_environment_change_auto_only(toy, monkeypatch):
    x = torch.zeros(2)
    monkeypatch.setenv("TGDP_BACKEND", "reference")
    assert resolve(toy, "auto", x).backend == "reference"
    assert resolve(toy, "cpu", x).backend == "cpu"
    with use_backend("cpu"):
        assert resolve(toy, "auto", x).backend == "cpu"
        assert resolve(toy, "reference", x).backend == "reference"
        with use_backend("auto"):
            assert resolve(toy, "auto", torch.zeros(3)).backend == "reference"
        with pytest.raises(BackendUnavailableError):
            resolve(toy, "auto", torch.zeros(3))
    assert resolve(toy, "auto", x).backend == "reference"
    monkeypatch.setenv("TGDP_BACKEND", "")
    assert resolve(toy, "auto", x).backend == "cpu"


def test_context_ends_after_an_exception(toy):
    def fail():
        with use_backend("reference"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert resolve(toy, "auto", torch.zeros(2)).backend == "cpu"


def test_context_is_local_to_the_thread(toy):
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolve(toy, "auto", torch.zeros(2)).backend))
        thread.start()
        thread.join()
        assert resolve(toy, "auto", torch.zeros(2)).backend == "reference"
    assert seen == ["cpu"]


def test_unknown_names(toy, monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of.*got 'cudo' .did you mean 'cuda'"):
        resolve(toy, "cudo", torch.zeros(2))
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="operator must be one of"):
        resolve("toi", "auto", torch.zeros(2))
    monkeypatch.setenv("TGDP_BACKEND", "fast")
    with pytest.raises(ValueError, match="environment variable TGDP_BACKEND must be one of.*'fast'"):
        resolve(toy, "auto", torch.zeros(2))


def test_register_checks(toy):
    with pytest.raises(ValueError, match="already has a 'cpu' implementation"):
        register(toy, "cpu", lambda x: x)
    with pytest.raises(ValueError, match="backend must be one of"):
        register(toy, "auto", lambda x: x)


def test_what_auto_takes_and_passes_over_is_logged_once(toy, caplog):
    register(toy, "triton", lambda x: x)
    register("bare", "cpu", lambda x: x, missing="it was not built")
    register("bare", "reference", lambda x: x)
    with caplog.at_level("INFO", logger="tgdp_fast.ops.registry"), use_backend("auto"):
        for _ in range(3):
            resolve(toy, "auto", torch.zeros(5))
            resolve(toy, "auto", torch.zeros(1))
            resolve("bare", "auto", torch.zeros(1, dtype=torch.float64))
    assert [record.getMessage() for record in caplog.records] == [
        "operator toy does not use backend cpu: 5 rows are too many",
        "operator toy uses backend reference on cpu tensors",
        "operator toy uses backend cpu on cpu tensors",
        "operator bare does not use backend cpu: it was not built",
        "operator bare uses backend reference on cpu tensors",
    ]


def test_a_backend_that_is_passed_over_for_speed_is_logged(monkeypatch, caplog):
    monkeypatch.setitem(registry._BACKENDS, "triton", registry.Backend("triton", None, ("cuda", "cpu")))
    register("swift", "triton", lambda x: x, prefer=lambda x: ("cuda", "reference"))
    register("swift", "reference", lambda x: x)
    with caplog.at_level("INFO", logger="tgdp_fast.ops.registry"):
        assert resolve("swift", "auto", torch.zeros(1)).backend == "reference"
    assert caplog.messages == [
        "operator swift does not use backend triton: reference was measured to be faster",
        "operator swift uses backend reference on cpu tensors",
    ]


@pytest.fixture
def bare():
    """An operator whose kernels were not installed, neither the CPU's nor those of a GPU."""
    register("bare", "reference", lambda x: x)
    register("bare", "cpu", lambda x: x, missing="the compiler failed; run `make`")
    register("bare", "cuda", lambda x: x, missing="no toolkit")
    register("bare", "triton", lambda x: x, missing="no Triton")
    return "bare"


def in_threads(function, number):
    threads = [threading.Thread(target=function) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_an_installation_without_kernels_warns_once(bare):
    def calls():
        for _ in range(20):
            resolve(bare, "auto", torch.zeros(2))

    with pytest.warns(UserWarning, match=r"plain PyTorch on this cpu.*: the compiler failed; run `make`") as caught:
        in_threads(calls, 16)
    assert len(caught) == 1
    assert "TGDP_BACKEND=reference" in str(caught[0].message)


def test_a_gpu_without_kernels_warns_as_well(bare):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    with pytest.warns(UserWarning, match="plain PyTorch on this cuda.*: no toolkit; no Triton"):
        resolve(bare, "auto", torch.zeros(1).as_subclass(OnGpu))


def test_nobody_is_warned_who_chose_or_whom_no_kernel_would_serve(bare, toy, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(bare, "reference", torch.zeros(1))
        with use_backend("reference"):
            resolve(bare, "auto", torch.zeros(1))
        monkeypatch.setenv("TGDP_BACKEND", "reference")
        resolve(bare, "auto", torch.zeros(1))
        monkeypatch.delenv("TGDP_BACKEND")
        resolve(bare, "auto", torch.zeros(1, dtype=torch.float64))
        resolve(toy, "auto", torch.zeros(5))  # too many rows for a kernel that is there
        resolve("gated_activation", "auto", torch.zeros(1))  # it has no kernels anywhere
    with pytest.warns(UserWarning, match="plain PyTorch"):
        resolve(bare, "auto", torch.zeros(1))


def test_report_covers_every_operator_and_backend(toy):
    report = backend_report()
    assert report["toy"]["cpu"] == report["toy"]["reference"] == "available"
    assert "no such implementation" in report["toy"]["cuda"]
    assert {"guided_step", "mlp_value_and_grad", "mlp_value_and_grad_backward"} <= set(report)
    assert all(set(row) == {"cuda", "triton", "cpu", "reference"} for row in report.values())
    assert all(row["reference"] == "available" for row in report.values())


def test_dispatch_is_traceable(toy):
    compiled = torch.compile(lambda x: resolve(toy, "auto", x).function(x), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [2.0, 2.0]
    torch._dynamo.reset()
    with use_backend("reference"):
        compiled = torch.compile(lambda x: resolve(toy, "auto", x).function(x), fullgraph=True, backend="eager")
        assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),  # machine code serves later minor versions
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0", (10, 3), True),
        ("10.0a", (10, 3), False),
        ("10.3f", (10, 3), True),
        ("10.0", (12, 0), False),
        ("12.0+PTX", (12, 1), True),
        ("12.0+PTX", (13, 0), True),  # compiled when it is loaded
        ("12.0+PTX", (10, 0), False),
        ("Hopper", (9, 0), True),  # a name: whoever gave it knows
    ],
)
def test_the_cards_that_an_architecture_runs_on(built, capability, runs):
    assert _cuda._runs_on(built, capability) == runs


def test_auto_takes_triton_on_a_card_that_cuda_was_not_built_for(monkeypatch):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    x = torch.zeros(1).as_subclass(OnGpu)
    card = types.SimpleNamespace(major=12, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(native, "CUDA_ARCHITECTURES", ("8.0", "9.0a", "10.0"))
    for backend, unsupported in (("cuda", _cuda.unsupported_device), ("triton", None), ("reference", None)):
        register("new", backend, lambda x: x, unsupported)
    assert resolve("new", "auto", x).backend == "triton"
    text = (
        r"built for compute capability 8.0, 9.0a, 10.0, and cuda:0 has 12.0; run `TORCH_CUDA_ARCH_LIST=12.0 pip install"
    )
    with pytest.raises(BackendUnavailableError, match=text):
        resolve("new", "cuda", x)
    for architectures in (("8.0", "12.0"), ("8.0", "9.0+PTX"), ()):  # a build that does not say serves as before
        monkeypatch.setattr(native, "CUDA_ARCHITECTURES", architectures)
        assert resolve("new", "auto", x).backend == "cuda"
    card.major = 7
    assert resolve("new", "auto", x).backend == "triton"
