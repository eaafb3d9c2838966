"""The benchmarks: what is wrong is not timed, the arithmetic of the timing, files, reports, and the commands."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tgdp_fast.cli.main import main
from tgdp_fast.lab import accuracy, cases, validate
from tgdp_fast.lab.benchmark import floors, report, runner
from tgdp_fast.lab.cases import ecg_guidance, fit_step, guided_step, mlp, sampling, sssd_ecg, sssd_ecg_peers
from tgdp_fast.lab.cases.case import Case, InaccurateError, place
from tgdp_fast.ops import registry
from tgdp_fast.ops.mlp import _reference_value_and_grad
from tgdp_fast.runtime.precision import PRECISIONS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FLOORS = floors.Floors({2**20: 1e10, 2**30: 1e9}, {"fp32": 1e11, "bf16": 2e11})
QUICK = runner.Options(seconds=0.01, least_rounds=2, most_rounds=3, providers=("peer", "reference"))


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the registry, so that a test may add to it."""
    monkeypatch.setattr(registry, "_registry", {k: dict(v) for k, v in registry._registry.items()})


@pytest.fixture
def quick_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "measure_floors", lambda device, seconds: FLOORS)


def silent(_: str) -> None:
    pass


def wrong_mlp(factor: float) -> Any:
    def forward(*call: Any, **keywords: Any) -> Any:
        value, gradient, saved = _reference_value_and_grad(*call, **keywords)
        return value, factor * gradient, saved

    return forward


# the numeric gate -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_wrong_provider_is_not_timed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._BACKENDS, "cuda", registry.Backend("cuda", "cpu", ("cuda",)))
    registry.register("mlp_value_and_grad", "cuda", wrong_mlp(factor))
    timed = []
    real = runner.interleave
    monkeypatch.setattr(runner, "interleave", lambda entries, options: (timed.extend(entries), real(entries, options)))
    options = runner.Options(seconds=0.01, least_rounds=2, most_rounds=2, providers=("reference", "cuda"))
    lines: list[str] = []
    case = mlp.case(33, 5, 16)
    case.precisions = ("fp32",)
    rows = runner.run_case(case, options, FLOORS, lines.append)
    assert [(row["provider"], row["median_s"] is None) for row in rows] == [("reference", False), ("cuda", True)]
    assert all(rows[1][key] is None for key in ("median_s", "p20_s", "p80_s", "peak_bytes", "floor_fraction"))
    if math.isfinite(factor):
        assert rows[1]["max_error"] == pytest.approx(0.01, rel=0.01)
    assert [entry.provider for entry in timed] == ["reference"]
    assert any("cuda in fp32 is wrong" in line for line in lines)
    assert "| failed " in report.table(rows)


@pytest.mark.usefixtures("own_registry")
def test_a_provider_that_raises_costs_no_other_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("no such kernel")

    monkeypatch.setitem(registry._BACKENDS, "cuda", registry.Backend("cuda", "cpu", ("cuda",)))
    registry.register("mlp_value_and_grad", "cuda", broken)
    lines: list[str] = []
    options = runner.Options(seconds=0.01, least_rounds=1, most_rounds=1, providers=("reference", "cuda"))
    rows = runner.run_case(mlp.case(3, 2, 8), options, FLOORS, lines.append)
    assert [row["median_s"] is None for row in rows] == [False, False, True, True]
    assert "TypeError: no such kernel" in lines[0]


def test_error_is_relative_to_the_largest_entry_of_each_output() -> None:
    exact = [torch.tensor([[4.0, 0.0]], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)]
    error = accuracy.error_of([torch.tensor([[4.0, 0.4]]), torch.tensor([0.5])], exact)
    assert error.maximum == pytest.approx(0.25)  # of 1, not of 0.25: a value may cancel
    assert error.mean == pytest.approx((0.1 + 0.0 + 0.25) / 3)
    assert accuracy.error_of([exact[0], exact[1][:0]], exact).maximum == math.inf
    assert accuracy.error_of([exact[0], torch.tensor([math.nan])], exact).maximum == math.inf
    assert accuracy.error_of([torch.empty(0, 3)], [torch.empty(0, 3, dtype=torch.float64)]) == (0.0, 0.0)


def test_the_limit_is_twice_eagers_error_and_a_few_roundings() -> None:
    eager_error, unit = accuracy.Error(1e-6, 1e-7), 2.0**-24
    limit = 2e-6 + accuracy.ROUNDINGS * unit
    assert accuracy.unit_roundoff(torch.float32) == unit
    assert accuracy.within(accuracy.Error(0.999 * limit, 0.0), eager_error, torch.float32)
    assert not accuracy.within(accuracy.Error(1.001 * limit, 0.0), eager_error, torch.float32)
    mean = 2e-7 + accuracy.ROUNDINGS * unit / 4
    assert not accuracy.within(accuracy.Error(1.001 * mean, 1.001 * mean), eager_error, torch.float32)


# timing -----------------------------------------------------------------------------------------------------


def test_percentiles_interpolate() -> None:
    assert runner.percentiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert runner.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_rounds_are_interleaved_in_changing_order_after_a_warm_up() -> None:
    now, calls = 0.0, []

    def entry(name: str, seconds: float) -> runner.Entry:
        def call() -> list[torch.Tensor]:
            nonlocal now
            now += seconds
            calls.append(name)
            return []

        return runner.Entry(name, "fp32", call, 0.0, 0)

    entries = [entry("a", 0.5), entry("b", 0.25), entry("c", 0.125)]
    options = runner.Options(seconds=1e9, least_rounds=2, most_rounds=8)
    runner.interleave(entries, options, clock=lambda: now)
    assert [e.seconds for e in entries] == [[0.5] * 8, [0.25] * 8, [0.125] * 8]
    assert calls[:3] == ["a", "b", "c"]  # The warm-up.
    rounds = ["".join(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert len(rounds) == 8
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1

    short = entry("d", 1e-4)
    runner.interleave([short], options, clock=lambda: now)
    assert 10 <= short.loops <= 20  # At least a millisecond at a time,
    assert short.seconds == pytest.approx([1e-4] * 8)  # and stated per call.


def test_rounds_end_when_the_time_is_spent() -> None:
    now = 0.0

    def call() -> list[torch.Tensor]:
        nonlocal now
        now += 1.0
        return []

    entry = runner.Entry("a", "fp32", call, 0.0, 0)
    runner.interleave([entry], runner.Options(seconds=5.0, least_rounds=2), clock=lambda: now)
    assert len(entry.seconds) == 6
    slow = runner.Entry("a", "fp32", call, 0.0, 0)
    runner.interleave([slow], runner.Options(seconds=0.5, least_rounds=3), clock=lambda: now)
    assert len(slow.seconds) == 3


def test_peak_memory_counts_what_lives_at_one_moment(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.ones(250_000)

    def call() -> list[torch.Tensor]:
        y = x + 1.0  # 1 MB
        del y
        y = (x + 1.0) * 2.0  # 2 MB
        return [y.sum()]

    peak = runner.peak_memory(call, CPU)
    assert peak is not None
    assert 2_000_000 <= peak < 2_001_000
    assert capfd.readouterr().err == ""


def test_floor_takes_the_bandwidth_of_a_copy_as_large() -> None:
    assert FLOORS.bandwidth(100.0) == 1e10
    assert FLOORS.bandwidth(2**20 + 1) == 1e9
    assert FLOORS.bandwidth(2**40) == 1e9
    assert FLOORS.seconds(1e6, 1e6, "fp32") == pytest.approx(1e-4)
    assert FLOORS.seconds(1e3, 1e9, "bf16") == pytest.approx(5e-3)


def test_measured_floors_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "COPIES", (2**16, 2**18))
    monkeypatch.setattr(floors, "MATMULS", ((64, 64, 64),))
    monkeypatch.setattr(floors, "MLP", (64, 64))
    measured = floors.measure_floors(CPU, 0.001)
    assert set(measured.copy) == {2**16, 2**18}
    assert set(measured.matmul) == {"fp32", "bf16"}
    assert all(1e6 < rate < 1e15 for rate in (*measured.copy.values(), *measured.matmul.values()))


# cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        guided_step.case(4),
        guided_step.case(4, noise=True),
        mlp.case(1, 2, 16),
        mlp.case(600, 3, 16),
        fit_step.case(16, consistency=False, batch=64),
        fit_step.case(16, consistency=True, batch=64),
        sampling.trajectory_case(65, 16),
        sampling.case(700, 16),
    ],
    ids=lambda case: case.name,
)
def test_every_kind_of_case(case: Case) -> None:
    lines: list[str] = []
    options = runner.Options(
        seconds=0.01, least_rounds=1, most_rounds=1, providers=("peer", "reference", "cpu", "auto")
    )
    rows = runner.run_case(case, options, FLOORS, lines.append)
    assert {(row["provider"], row["dtype"]) for row in rows} >= {
        (provider, dtype) for provider in ("peer", "reference") for dtype in case.precisions
    }
    for row in rows:
        assert tuple(row) == runner.KEYS
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"], (row, lines)
        assert row["peak_bytes"] > 0
        assert row["floor_fraction"] > 0
        assert 0 <= row["max_error"] < 0.05
        assert row["case"] == case.name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(guided_step.case(4), marks=pytest.mark.slow(ci=False)),
        pytest.param(fit_step.case(8, consistency=True, batch=16), marks=pytest.mark.slow(ci=True)),
    ],
)
def test_compiled_provider(case: Case) -> None:
    case.precisions = ("fp32",)
    lines: list[str] = []
    options = runner.Options(seconds=0.01, least_rounds=1, most_rounds=1, providers=("compile",))
    (row,) = runner.run_case(case, options, FLOORS, lines.append)
    if row["median_s"] is None and "compiler" in " ".join(lines).lower():
        pytest.skip("no working C++ compiler")
    assert row["median_s"] is not None, lines


@pytest.mark.usefixtures("own_registry")
def test_a_backend_is_a_provider_only_where_it_runs() -> None:
    registry.register("mlp_value_and_grad", "triton", _reference_value_and_grad)
    assert "triton" in mlp.case(1, 2, 8).providers()
    assert "triton" not in guided_step.case(4).providers()
    lines: list[str] = []
    options = runner.Options(seconds=0.01, least_rounds=1, most_rounds=1, providers=("triton",))
    assert runner.run_case(fit_step.case(8, consistency=False, batch=8), options, FLOORS, lines.append) == []
    assert "no triton" in lines[0]


def test_a_case_that_does_not_fit_into_memory_is_left_out() -> None:
    case, lines = guided_step.case(4), []
    case.memory = 1e18
    assert runner.run_case(case, QUICK, FLOORS, lines.append) == []
    assert "left out, needs about 931322574.6 GiB" in lines[0]


@pytest.mark.slow(ci=True)
def test_the_denoiser_of_sssd_ecg() -> None:
    case, lines = sssd_ecg.case(1, 4, 2), []
    case.rounds = 2
    options = runner.Options(seconds=10.0, least_rounds=5, most_rounds=9)
    rows = runner.run_case(case, options, FLOORS, lines.append)
    if any("compiler" in line.lower() for line in lines):
        pytest.skip("no working C++ compiler")
    assert [(row["provider"], row["dtype"]) for row in rows] == [
        ("published", "fp32"),
        *[(provider, dtype) for provider in ("strong", "reference", "sampling") for dtype in ("fp32", "bf16")],
    ]
    assert all(row["median_s"] > 0 for row in rows)
    errors = {(row["provider"], row["dtype"]): row["max_error"] for row in rows}
    assert all((error < 1e-5) == (dtype == "fp32") for (_, dtype), error in errors.items())
    assert lines == ["sssd_ecg/blocks1-width4-batch2: no published in bf16: released code computes in float32"]


def test_the_ways_to_compute_sssd_ecg_agree() -> None:
    network = sssd_ecg_peers.random_network(2, 8, 0)
    x, steps, labels = torch.randn(2, 8, 1000), torch.tensor([3.0, 150.0]), torch.rand(2, 71)
    with torch.inference_mode():
        expected = network(x, steps, labels)
        for other in (sssd_ecg_peers.published(network), sssd_ecg_peers.StrongSSSDECG(network, compiled=False)):
            torch.testing.assert_close(other(x, steps, labels), expected, rtol=1e-4, atol=1e-5)
    published = sssd_ecg_peers.published(network)
    assert not any(module.training for module in network.modules())
    assert all(a is b for a, b in zip(published.parameters(), network.parameters(), strict=True))


def test_floor_work_follows_the_formulas() -> None:
    step = guided_step.case(4).work("bf16")  # one history slot
    assert step == (1e4 * 2 * 7, 1e4 * 15, "fp32")
    weights = 3 * 8 + 3 * 64 + 8
    assert mlp.case(10, 3, 8).work("fp32") == (4.0 * (10 * 7 + weights + 32), 40.0 * weights, "fp32")
    assert sampling.case(10, 8).work("fp32")[1] == 25 * 10 * (2 * (2 * 8 + 3 * 64 + 16) + 4 * (2 * 8 + 3 * 64 + 8))


def test_names_are_unique_and_selected_by_part_or_pattern() -> None:
    everything = cases.all_cases()
    names = [case.name for case in everything]
    assert len(set(names)) == len(names)
    assert set(report.SUMMARY) <= set(names)
    assert {case.name for case in cases.select(everything, ["guided_step/"])} == {
        f"guided_step/1e{i}" for i in range(4, 9)
    }
    assert [case.name for case in cases.select(everything, ["*batch16-*width128"], quick=True)] == [
        "mlp_value_and_grad/batch16-input2-width128"
    ]
    with pytest.raises(ValueError, match=r"got 'nothing'; cases: guided_step/1e4, "):
        cases.select(everything, ["nothing"])


def test_float64_eager_step_is_the_operators_own() -> None:
    inputs = guided_step.step_inputs((4, 3), 1, torch.float64, CPU)
    step = {"matrix": [[0.9, 0.1, -0.3], [1.25, 0.0, -0.75]], "guidance_weight": 0.6, "alpha": 0.8, "sigma": 0.6}
    general, special = (
        guided_step.eager_step(*inputs, **step),
        guided_step.eager_multistep(inputs.x, inputs.epsilon, inputs.gradient, inputs.history[0], **step),
    )
    for a, b in zip(general, special, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# files and commands -----------------------------------------------------------------------------------------


def bench(*words: str) -> int:
    return main(["bench", *words])


@pytest.mark.usefixtures("quick_floors")
def test_bench_writes_a_file_that_becomes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "one.json", tmp_path / "two.json"
    words = [
        "--quick",
        "--only",
        "guided_step/1e4",
        "batch16-",
        "--providers",
        "peer",
        "reference",
        "--seconds",
        "0.05",
    ]
    threads = torch.get_num_threads()
    try:
        assert bench(*words, "--json", str(first), "--threads", "1") == 0
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "guided_step/1e4" in shown
    content = json.loads(first.read_text())
    assert set(content) == {"environment", "rows"}
    assert {"cpu", "instruction_sets", "torch_threads", "torch", "commit", "floors", "load_average_before"} <= set(
        content["environment"]
    )
    assert content["environment"]["torch_threads"] == 1
    assert [tuple(row) for row in content["rows"]] == [runner.KEYS] * 10
    content["rows"][0]["median_s"] = None
    second.write_text(json.dumps(content))

    out = tmp_path / "report"
    assert main(["bench-report", str(first), str(second), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "## one" in text
    assert "## two" in text
    assert "| failed " in text
    assert "1.00x" in text
    assert (out / "report.md").read_text().strip() in text
    pytest.importorskip("matplotlib")
    assert {path.name for path in out.iterdir()} == {"report.md", "guided_step.png", "mlp_value_and_grad.png"}


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.json").write_text("{}")
    for words, message in [
        (["bench", "--only", "sampler"], "cases: guided_step/1e4, guided_step/1e5"),
        (
            ["bench", "--providers", "pear"],
            "--providers must be one of auto, compile, cpu, cuda, peer, published, reference, ",
        ),
        (["bench", "--threads", "0"], "--threads must be an integer >= 1"),
        (["bench", "--seconds", "0"], "--seconds must be"),
        (["bench", "--device", "tpu9"], "--device must be one that torch has here"),
        (["bench", "--json", str(tmp_path / "no" / "x.json")], "--json must lie in an existing folder"),
        (["bench-report", str(tmp_path / "missing.json")], "missing.json"),
        (["bench-report", str(tmp_path / "empty.json")], "is no result of tgdp-fast bench"),
        (["validate", "--backend", "gpu"], "--backend must be one of cpu, cuda, reference, triton"),
    ]:
        assert main(words) in (1, 2)
        error = capsys.readouterr().err
        assert error.startswith("tgdp-fast: error: ")
        assert message in error


@pytest.mark.usefixtures("quick_floors")
def test_an_interrupt_keeps_the_finished_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = runner.run_case

    def once(case: Case, *rest: Any) -> Any:
        if case.name != "guided_step/1e4":
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(runner, "run_case", once)
    file = tmp_path / "x.json"
    words = ["--only", "guided_step", "--providers", "reference", "--seconds", "0.01", "--json", str(file)]
    assert bench(*words) == 130
    assert len(json.loads(file.read_text())["rows"]) == 3
    captured = capsys.readouterr()
    assert "guided_step/1e4" in captured.out
    assert f"interrupted after 3 rows; {file} holds them" in captured.err


def test_listing_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--list", "--only", "fit_step") == 0
    assert len(capsys.readouterr().out.split()) == 4


def test_pytest_benchmark_runs_the_same_cases(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    chosen = ["-k", "guided_step/1e4-fp32 and not compile", "--benchmark-max-time=0.01", "-n", "0"]
    if not _has_xdist():
        chosen = chosen[:-2]
    # Benchmarks are off under a parallel run, also one that this test is part of.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command + chosen, cwd=ROOT, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[2-9] passed", done.stdout)


def _has_xdist() -> bool:
    try:
        import xdist  # noqa: F401
    except ImportError:
        return False
    return True


# validate ---------------------------------------------------------------------------------------------------


def test_validate_passes_and_covers_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "v.json"
    assert main(["validate", "--json", str(file)]) == 0
    assert re.search(r"\d+ checks, 0 failed", capsys.readouterr().out)
    content = json.loads(file.read_text())
    assert all(tuple(row) == validate.KEYS for row in content["rows"])
    report_here = registry.backend_report()
    expected = {(o, b) for o, states in report_here.items() for b, state in states.items() if state == "available"}
    assert {(row["operator"], row["backend"]) for row in content["rows"]} == expected
    assert {row["dtype"] for row in content["rows"]} == set(PRECISIONS)


def test_every_operator_has_checks() -> None:
    assert set(cases.CHECKS) == set(registry.backend_report())


@pytest.mark.usefixtures("own_registry")
def test_validate_catches_a_wrong_operator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = registry.Implementation("mlp_value_and_grad", "reference", wrong_mlp(1.0 + 3e-6))
    monkeypatch.setitem(registry._registry["mlp_value_and_grad"], "reference", record)
    assert main(["validate", "--backend", "reference"]) == 1
    failed = [
        line for line in capsys.readouterr().out.splitlines() if line.endswith("| failed  |") or "| failed" in line
    ]
    assert len(failed) >= 8
    assert all("mlp_value_and_grad" in line and "fp32" in line for line in failed)


@pytest.mark.usefixtures("own_registry")
def test_validate_reports_refusals_and_operators_without_checks() -> None:
    registry.register(
        "mlp_value_and_grad", "triton", _reference_value_and_grad, lambda x, *_: "no" if x.shape[0] == 1 else None
    )
    registry.register("another", "triton", _reference_value_and_grad)
    rows = validate.validate("triton")
    refused = [row for row in rows if row["verdict"] == "refused: no"]
    assert {row["shape"].split("]")[0] for row in refused} == {"[1, 2", "[1, 1", "[1, 7"}
    assert [row["operator"] for row in validate.failures(rows)] == ["another"]


@pytest.mark.parametrize("layout", ["contiguous", "strided", "misaligned"])
def test_layouts_hold_the_values(layout: str) -> None:
    tensor = torch.arange(12.0).reshape(2, 3, 2)
    placed = place(tensor, layout)
    assert torch.equal(placed, tensor)
    assert placed.is_contiguous() == (layout != "strided")
    assert (placed.storage_offset() == 1) == (layout == "misaligned")


# what the README and docs/performance.md quote -------------------------------------------------------------


#: Of the table of a GPU in docs/performance.md: cases, providers and the dtype.
GPU_TIMES = (
    (
        "guided_step/1e8",
        "mlp_value_and_grad/batch4096-input2-width128",
        "mlp_value_and_grad/batch4096-input2-width512",
        "mlp_value_and_grad/batch65536-input2-width512",
        "long_convolution/64",
        "residual_block/64",
        "trajectory/samples256-width128",
        "trajectory/samples10000-width128",
    ),
    ("peer", "reference+graph", "compile+graph", "cuda", "cuda+graph", "triton+graph"),
    "bf16",
)


#: Of the README's table of sampling times: lines, and columns.
README_CASES = {
    "256 samples, width 128": "sampling/samples256-width128",
    "10,000 samples, width 128": "sampling/samples10000-width128",
    "10,000 samples, width 512": "sampling/samples10000-width512",
}
README_PROVIDERS = (("peer", "fp32"), ("reference", "fp32"), ("cpu", "fp32"), ("cpu", "bf16"))


def test_readme_quotes_times_of_sampling() -> None:
    readme = (ROOT / "README.md").read_text()
    name = re.search(r"\[file\]\(bench/results/(cpu-amd-epyc-2core\.json)\)", readme)
    assert name
    rows = report.load(ROOT / "bench" / "results" / name[1])["rows"]
    medians = {(row["case"], row["provider"], row["dtype"]): row["median_s"] for row in rows}
    quoted = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if "width " in line]
    wanted = [
        [label, *(report._seconds(medians[(case, *provider)]) for provider in README_PROVIDERS)]
        for label, case in README_CASES.items()
    ]
    assert [cells for cells in quoted if cells[0] in README_CASES] == wanted


def test_a_page_quotes_the_result_of_a_gpu() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    name = re.search(r"\[an H200\]\(\.\./bench/results/([\w.-]+\.json)\)", page)
    assert name
    result = report.load(ROOT / "bench" / "results" / name[1])
    assert report.times(result["rows"], *GPU_TIMES) in page
    assert result["environment"]["cuda"]["device"] == "NVIDIA H200"
    assert name[1] in (ROOT / "tgdp_fast" / "ops" / "measured.py").read_text()


def test_a_page_quotes_a_committed_result() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    name = re.search(r"\[one result file\]\(\.\./bench/results/([\w.-]+\.json)\)", page)
    assert name
    result = report.load(ROOT / "bench" / "results" / name[1])
    assert report.summary(result["rows"]) in page
    assert result["environment"]["cpu"] in page
    assert f"threads: {result['environment']['torch_threads']} of {result['environment']['cpu_count']}" in page
    assert re.fullmatch("[0-9a-f]{7,40}", result["environment"]["commit"])  # of a clean checkout


def test_speeds_are_relative_to_the_reference_in_fp32() -> None:
    def row(provider: str, dtype: str, median: float | None) -> dict[str, Any]:
        return dict.fromkeys(runner.KEYS) | {"case": "a/b", "provider": provider, "dtype": dtype, "median_s": median}

    rows = [
        row("reference", "fp32", 2.0),
        row("reference", "bf16", 1.0),
        row("cpu", "fp32", 0.1),
        row("cpu", "bf16", None),
    ]
    assert [report.speed(r, rows) for r in rows] == pytest.approx([1.0, 2.0, 20.0, None])
    line = report.summary(rows, ("a/b",)).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["`a/b`", "1.00x / 2.00x", "20.0x / failed"]


def test_on_a_gpu_every_provider_comes_captured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    names = mlp.case(1, 2, 8).providers(gpu)
    assert names[:4] == ("peer", "peer+graph", "reference", "reference+graph")
    assert not any("graph" in name for name in fit_step.case(8, consistency=False).providers(gpu))
    assert not any("graph" in name for name in mlp.case(1, 2, 8).providers())
    runner.Options(providers=("reference+graph",))
    with pytest.raises(ValueError, match="--providers must be one of auto"):
        runner.Options(providers=("graph",))


@pytest.mark.parametrize("consistency", [False, True])
def test_a_step_of_the_ecg_guidance_is_the_same_in_all_ways(consistency: bool) -> None:
    lines: list[str] = []
    case = ecg_guidance.case(consistency=consistency, blocks=1, channels=4, batch=2)
    rows = runner.run_case(case, runner.Options(seconds=0.01, least_rounds=1, most_rounds=1), FLOORS, lines.append)
    assert [row["provider"] for row in rows] == ["published", "reference", "auto"], lines
    assert all(0 <= row["max_error"] < 1e-5 and row["median_s"] > 0 for row in rows)
    # The gate notices another ratio.
    problem = ecg_guidance.problem_of(1, 4, 2, CPU)
    other = ecg_guidance.setup(problem._replace(log_ratio=problem.log_ratio + 1.0), consistency)
    with pytest.raises(InaccurateError):
        ecg_guidance.setup(problem, consistency).check("reference", other.call("reference"))


def test_the_precisions_asked_for() -> None:
    options = runner.Options(
        seconds=0.01, least_rounds=1, most_rounds=1, providers=("reference",), precisions=("bf16", "fp32")
    )
    rows = runner.run_case(mlp.case(5, 2, 8), options, FLOORS, lambda line: None)
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    with pytest.raises(ValueError, match="--precisions must be one of bf16, fp16, fp32; got 'float'"):
        runner.Options(precisions=("float",))


def test_a_recording_that_gives_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    value = torch.zeros(3)
    monkeypatch.setattr(runner.sampling_loop, "capture", lambda function, inputs: (lambda: None, function()))
    assert torch.equal(runner.replayed(lambda: [value])()[0], value)
    monkeypatch.setattr(runner.sampling_loop, "capture", lambda function, inputs: (lambda: None, (value + 1,)))
    with pytest.raises(RuntimeError, match="something else"):
        runner.replayed(lambda: [value])
