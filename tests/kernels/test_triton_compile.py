"""Every Triton kernel that ships, compiled for every architecture without a GPU: it fits, and is what was meant."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from triton_binaries import (
    SHARED_MEMORY,
    candidates,
    compile_amd,
    compile_nvidia,
    kernel_modules,
    shipped,
    why_not,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_the_modules_are_found():
    assert {"guided_step", "gated_activation"} <= set(kernel_modules())
    assert "compilation" not in kernel_modules()


def test_names_and_work_are_stated():
    everything = [compilation for module in kernel_modules() for compilation in shipped(module)]
    names = [compilation.name for compilation in everything]
    assert len(set(names)) == len(names)
    for compilation in everything:
        assert compilation.programs > 0, compilation.name
        assert compilation.bytes > 0, compilation.name
        assert compilation.flops > 0, compilation.name


# The slopes of all layers stay in registers, of which a thread of an AMD GPU has as many but half as many threads share
# a row: they spill, and are correct. It is laid out for NVIDIA's GPUs.
SPILLS_ON_AMD = ("fused_value_and_grad/",)

# There, accumulators come from a memory of their own, a row for each thread: of 64 positions, some 30 numbers wait for
# their sums over the channels; of a convolution whose u has another row stride, 4.
# Long sums of float32 in parts: a few addresses of the outer loop, which runs once for 256 products, and of one tile a
# number of its end.
IN_PARTS = ("weight_gradient/mlp-fp32", "weight_gradient/perceptron-fp32", "layer_down/mlp-fp32-2-128-65536")
SPILLS = {
    80: IN_PARTS,
    86: IN_PARTS,
    100: (
        *IN_PARTS,
        "mixture/block-bf16",
        "mixture/block-fp16",
        "long_convolution/block-fp32",
        "long_convolution/fp32",
    ),
}


MOST_SPILLED = 128  # bytes of a thread
CONSTRAINTS = Path(__file__).resolve().parents[2] / ".ci" / "constraints.txt"
# The lists above are those of the Triton that the constraints name; another one may spill a little elsewhere.
LISTED = f"triton=={version('triton')}\n" in CONSTRAINTS.read_text() if why_not() is None else False


def _check(compilation, capability):
    binary = compile_nvidia(compilation, capability)
    about = f"{compilation.name} on sm_{capability}"
    assert f".target sm_{capability}" in binary.ptx, about
    assert binary.shared <= SHARED_MEMORY[capability], about
    assert binary.spilled == 0 or compilation.name.startswith(SPILLS.get(capability, ())) or not LISTED, about
    assert binary.spilled <= MOST_SPILLED, about
    assert 0 < binary.registers <= 255, about
    assert binary.tensor_cores or not compilation.tensor_cores, about
    assert binary.doubles == [], about


def _check_amd(compilation):
    assembly = compile_amd(compilation)
    assert ".amdhsa_kernel" in assembly, compilation.name
    (spilled,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    assert int(spilled) == 0 or compilation.name.startswith(SPILLS_ON_AMD), compilation.name


@pytest.mark.parametrize("module", kernel_modules())
def test_first_of_each_module_compiles(module):
    _check(shipped(module)[0], 90)
    _check_amd(shipped(module)[0])


# In CI all for Hopper, and of the others every ninth, another one for each; for AMD's one every ninth as well.
@pytest.mark.parametrize(
    ("capability", "start", "stride"),
    [
        pytest.param(90, 0, 1, marks=pytest.mark.slow(ci=True)),
        *[pytest.param(other, 1 + i, 9, marks=pytest.mark.slow(ci=True)) for i, other in enumerate((80, 86, 100))],
        *[pytest.param(other, 0, 1, marks=pytest.mark.slow(ci=False)) for other in (80, 86, 100)],
    ],
)
@pytest.mark.parametrize("module", kernel_modules())
def test_those_that_ship_compile_for_nvidia(module, capability, start, stride):
    for compilation in shipped(module)[start::stride]:
        _check(compilation, capability)


@pytest.mark.parametrize(
    "stride", [pytest.param(9, marks=pytest.mark.slow(ci=True)), pytest.param(1, marks=pytest.mark.slow(ci=False))]
)
@pytest.mark.parametrize("module", kernel_modules())
def test_those_that_ship_compile_for_amd(module, stride):
    for compilation in shipped(module)[::stride]:
        _check_amd(compilation)


def configuration(compilation):
    return (
        compilation.name.split("/")[0],
        compilation.signature,
        compilation.constants,
        compilation.divisible,
        compilation.num_warps,
        compilation.num_stages,
    )


@pytest.mark.parametrize("module", kernel_modules())
def test_what_ships_is_among_the_candidates_and_these_are_few(module):
    everything, defaults = list(map(configuration, candidates(module))), list(map(configuration, shipped(module)))
    assert all(default in everything for default in defaults)
    assert len(defaults) < len(everything) <= 6 * len(defaults)


@pytest.mark.parametrize("module", kernel_modules())
def test_candidates_of_the_first_of_each_module_compile(module):
    # On the architecture with the least shared memory.
    for compilation in candidates(module)[:4]:
        _check(compilation, 86)


# Every 50th, others for each architecture.
@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("module", kernel_modules())
def test_some_candidates_compile(module, capability):
    for compilation in candidates(module)[list(SHARED_MEMORY).index(capability) :: 50]:
        _check(compilation, capability)


@pytest.mark.slow(ci=False)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("module", kernel_modules())
def test_all_candidates_compile(module, capability):
    for compilation in candidates(module):
        _check(compilation, capability)


def test_sizes_of_one_compile():
    # A launch makes a constant of an integer argument that is 1.
    by_name = {c.name: c for module in ("guided_step", "gated_activation") for c in shipped(module)}
    for name, sizes in (
        ("guided_step/ancestral, two elements", ("elements",)),
        ("guided_step/multistep", ("elements",)),
        ("gated_activation/odd", ("half", "tiles")),
    ):
        compilation = by_name[name]
        ones = dict.fromkeys(sizes, 1)
        changed = replace(
            compilation,
            signature=compilation.signature | dict.fromkeys(sizes, "constexpr"),
            constants=compilation.constants | ones,
            divisible=tuple(argument for argument in compilation.divisible if argument not in sizes),
        )
        _check(changed, 90)


def test_what_is_read_from_a_binary_is_there():
    # Each number against a kernel that is known to have it: shared memory, spills, float64 and matrix instructions.
    from triton_compile_kernels import product, spilling, widened

    binary = compile_nvidia(product(), 80)
    assert binary.tensor_cores
    assert binary.shared >= 2 * 64 * 64 * 2
    assert binary.spilled == 0
    assert compile_nvidia(spilling(), 80).spilled > 0
    assert compile_nvidia(widened(), 80).doubles


def test_noise_angle_is_rounded_before_it_is_used():
    # tgdp_fast/ops/noise.py, step 5: the compiler must keep the product with 2 pi apart from the sums that follow.
    ancestral = next(c for c in shipped("guided_step") if c.name == "guided_step/ancestral")
    binary = compile_nvidia(ancestral, 80)
    assert binary.ptx.count("0f40C90FDB, 0f00000000;") == binary.ptx.count("0f40C90FDB") > 0


def test_rows_of_four_are_moved_at_once():
    # Sixteen bytes an access for float32, and no way through shared memory where dtypes are mixed.
    for name, width in (("guided_step/ancestral", "v4.b32"), ("guided_step/multistep", "v2.b32")):
        compilation = next(c for c in shipped("guided_step") if c.name == name)
        binary = compile_nvidia(compilation, 80)
        assert f"ld.global.{width}" in binary.ptx
        assert "st.global.v4.b32" in binary.ptx
        assert binary.shared == 0
