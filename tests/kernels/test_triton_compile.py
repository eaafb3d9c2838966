"""Every Triton kernel that ships, compiled for every architecture without a GPU: it fits, and is what was meant."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from triton_binaries import (
    SHARED_MEMORY,
    compile_amd,
    compile_nvidia,
    kernel_modules,
    shipped,
    why_not,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_the_modules_are_found():
    assert {"guided_step", "long_convolution"} <= set(kernel_modules())
    assert "launching" not in kernel_modules()


def test_names_are_unique():
    names = [compilation.name for module in kernel_modules() for compilation in shipped(module)]
    assert len(set(names)) == len(names)


# The slopes of all layers stay in registers, of which a thread of an AMD GPU has as many but half as many threads share
# a row: they spill, and are correct. It is laid out for NVIDIA's GPUs.
SPILLS_ON_AMD = ("small_value_and_grad/",)

# There, accumulators come from a memory of their own, a row for each thread: of 64 positions, some 30 numbers wait for
# their sums over the channels; of a convolution whose u has another row stride, 4.
SPILLS = {
    100: ("mixture/block-bf16", "mixture/block-fp16", "long_convolution/block-fp32", "long_convolution/fp32"),
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


def test_sizes_of_one_compile():
    # A launch makes a constant of an integer argument that is 1.
    by_name = {compilation.name: compilation for compilation in shipped("guided_step")}
    for name in ("guided_step/ancestral, two elements", "guided_step/multistep"):
        compilation = by_name[name]
        place = (list(compilation.signature).index("elements"),)
        changed = replace(
            compilation,
            signature=compilation.signature | {"elements": "constexpr"},
            constants=compilation.constants | {place: 1},
            divisible=tuple(other for other in compilation.divisible if other != place),
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
