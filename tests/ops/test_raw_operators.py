"""The native operators called past the public functions, with arguments that are wrong: an error, never a crash."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native import needs_extension, run_with
from torch import Tensor

pytestmark = needs_extension

REFUSALS = (ValueError, RuntimeError, IndexError, TypeError, NotImplementedError, OverflowError, MemoryError)
LARGE = 2**63 - 1


def calls() -> dict[str, tuple[Any, ...]]:
    """A call of every operator that the extension serves."""
    torch.manual_seed(0)
    randn, ops = torch.randn, torch.ops.tgdp_fast
    x, bias = randn(5, 3), randn(16)
    weights, biases = [randn(16, 3), randn(8, 16), randn(1, 8)], [randn(8), randn(1)]
    kept = [randn(5, 16), randn(5, 8)]
    needed = [True] * 7
    rows, points = 8, 64
    packed, scales = ops.pack_long_convolution(randn(rows, points, 2, dtype=torch.float64), False)
    half, half_scales = ops.pack_long_convolution(randn(rows, points, 2, dtype=torch.float64), True)
    layer = [packed, scales, randn(rows, rows), randn(rows), randn(rows), randn(rows)]
    table = randn(3, 6 + 2 * 3, dtype=torch.float64)
    score, score_biases = [randn(16, 3), randn(3, 16)], [randn(3)]
    key = (1, 2, 3)
    return {
        "mlp_value_and_grad": (x, bias, weights, biases, True, False),
        "mlp_forward": (x, bias, [*weights[:-1], randn(4, 8)], [biases[0], randn(4)], True),
        "mlp_backward": (randn(5, 1), x, bias, weights, kept, needed),
        "mlp_value_and_grad_backward": (randn(5), randn(5, 3), x, randn(5, 16), weights, kept, needed, False),
        "trajectory": (
            *(x, score, score_biases, randn(3, 16), None, weights, biases, randn(3, 16), randn(5, 16), table, 1),
            *([-1.0, 1.0], 0.5, 7, torch.arange(5), False),
        ),
        "guided_step": (
            *(x, randn(5, 3), randn(5, 3), randn(1, 5, 3), [1.0, 0.5, 0.25, 0.0, 0.5, 0.5], 0.5, 1.0, 0.8, 0.6),
            *([-1.0, 1.0], *key[:2], torch.arange(5), key[2]),
        ),
        "pack_long_convolution": (randn(rows, points, 2, dtype=torch.float64), True),
        "long_convolution": (randn(2, rows, 40), half, half_scales, True),
        "residual_block_": (
            *(randn(2, 8, 40), randn(2, 3, rows), randn(1, rows), randn(rows, 12), layer, 1e-5, list(layer), 1e-5),
            *(randn(8, 4), randn(8)),
        ),
        "normal_range": (torch.arange(5), 7, 3, 11, *key),
    }


def other_tensors(tensor: Tensor, choose: random.Random) -> Tensor:
    """The tensor with another shape, dtype, layout or device."""
    sizes = list(tensor.shape)
    axis = choose.randrange(max(tensor.ndim, 1))
    with_size = [*sizes[:axis], choose.choice((0, 1, 2, 17, 1000)), *sizes[axis + 1 :]]
    others: tuple[Callable[[], Tensor], ...] = (
        lambda: tensor.to(choose.choice((torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool))),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.new_zeros(with_size),
        lambda: tensor.new_zeros(()),
        lambda: tensor.new_zeros(0),
        lambda: tensor.unsqueeze(0),
        lambda: tensor.flatten(),
        lambda: tensor.transpose(0, -1) if tensor.ndim else tensor,
        lambda: tensor.new_zeros(()).expand(sizes),
        lambda: torch.cat([tensor, tensor], -1)[..., ::2] if tensor.ndim else tensor,
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        lambda: torch.full_like(tensor, choose.choice((math.nan, math.inf, -math.inf)), dtype=torch.float32),
        lambda: tensor[:0],
        lambda: torch.full_like(tensor, choose.choice((-1, 127)), dtype=tensor.dtype),
    )
    return choose.choice(others)()


def other(value: Any, choose: random.Random) -> Any:
    """Another value in the place of an argument."""
    if isinstance(value, Tensor):
        return other_tensors(value, choose)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return choose.choice((-1, 0, 1, value + 1, 2**31, 2**32, 2**34, 2**34 + 1, 2**62, LARGE, -LARGE - 1))
    if isinstance(value, float):
        return choose.choice((0.0, -1.0, 1e300, math.nan, math.inf, -math.inf))
    if isinstance(value, list):
        changed = list(value)
        place = choose.randrange(len(changed))
        kind = choose.randrange(5)
        if kind == 0:
            return []
        if kind == 1:
            del changed[place]
        elif kind == 2:
            changed.insert(place, changed[place])
        else:
            changed[place] = other(changed[place], choose)
        return changed
    return choose.choice((None, torch.zeros(5, 16), torch.zeros(0), torch.zeros(())))


def fuzz(number: int, seed: int) -> None:
    """Call operators with one to three arguments changed. Standard error tells which call came last."""
    choose = random.Random(seed)
    refused = dict.fromkeys(calls(), 0)
    for i in range(number):
        name, arguments = choose.choice(list(calls().items()))
        changed = list(arguments)
        try:
            for place in choose.sample(range(len(changed)), choose.choice((1, 1, 2, 3))):
                changed[place] = other(changed[place], choose)
        except REFUSALS:  # this tensor has no such other form
            continue
        if name == "normal_range" and 2**20 < changed[3] < 2**35:
            continue  # may be right, and is large
        shown = [f"{v.dtype} {list(v.shape)}" if isinstance(v, Tensor) else v for v in changed]
        print(i, name, shown, file=sys.stderr, flush=True)
        try:
            getattr(torch.ops.tgdp_fast, name)(*changed)
        except REFUSALS:
            refused[name] += 1
    assert all(refused.values()) or number < 200, refused


CODE = """
import faulthandler, warnings
faulthandler.enable()
warnings.simplefilter("ignore")
import tgdp_fast.ops
from test_raw_operators import fuzz
fuzz({number}, {seed})
print("done")
"""


@pytest.mark.parametrize(
    ("number", "seed"),
    [(400, 0), pytest.param(4000, 1, marks=pytest.mark.slow), pytest.param(4000, 2, marks=pytest.mark.slow)],
)
def test_wrong_arguments_are_refused_and_crash_nothing(number: int, seed: int) -> None:
    assert run_with(CODE.format(number=number, seed=seed)) == "done\n"


def test_the_calls_are_right_before_they_are_changed() -> None:
    for name, arguments in calls().items():
        getattr(torch.ops.tgdp_fast, name)(*arguments)


@pytest.mark.parametrize(
    ("num_elements", "first", "count"),
    [
        (7, LARGE, 7),
        (7, 35, 1),
        (7, 30, 6),
        (7, -1, 2),
        (7, 2, -1),
        (0, LARGE, LARGE),
        (0, 0, 1),
        (2**34, LARGE, LARGE),
    ],
)
def test_normals_outside_of_the_samples(num_elements: int, first: int, count: int) -> None:
    with pytest.raises(ValueError, match="elements outside of the samples"):
        torch.ops.tgdp_fast.normal_range(torch.arange(5), num_elements, first, count, 1, 2, 3)


def test_normals_at_the_end_of_the_samples() -> None:
    normals = torch.ops.tgdp_fast.normal_range
    assert normals(torch.arange(5), 0, 0, 0, 1, 2, 3).shape == (0,)
    assert normals(torch.arange(5), 7, 35, 0, 1, 2, 3).shape == (0,)
    assert torch.equal(normals(torch.arange(5), 7, 30, 5, 1, 2, 3), normals(torch.arange(5), 7, 0, 35, 1, 2, 3)[30:])
    # Of 5 samples of 2^34 numbers, the last ones.
    last = normals(torch.arange(5), 2**34, 5 * 2**34 - 3, 3, 1, 2, 3)
    assert torch.equal(last, normals(torch.tensor([4]), 2**34, 2**34 - 3, 3, 1, 2, 3))


def test_a_trajectory_without_weights_or_with_a_long_history() -> None:
    arguments = list(calls()["trajectory"])
    for changes, text in (({1: []}, "weights must be"), ({1: [], 2: []}, "weights must be"), ({10: 2**62}, "table")):
        changed = [changes.get(place, value) for place, value in enumerate(arguments)]
        with pytest.raises(ValueError, match=text):
            torch.ops.tgdp_fast.trajectory(*changed)


def test_each_row_of_an_expanded_first_bias_has_a_gradient() -> None:
    """A row that stands for all of them is another thing: its stride is 0 too."""
    cotangent, x, bias, *others = calls()["mlp_backward"]
    whole = torch.ops.tgdp_fast.mlp_backward(cotangent, x, bias.expand(5, 16).contiguous(), *others)
    expanded = torch.ops.tgdp_fast.mlp_backward(cotangent, x, bias.expand(5, 16), *others)
    assert all(torch.equal(a, b) for a, b in zip(whole, expanded, strict=True))


def test_a_loaded_library_brings_its_fakes() -> None:
    """No operator's module need be imported for torch to know what the operators return."""
    code = """
import sys
from tgdp_fast.runtime import native
from test_raw_operators import calls
from torch.library import opcheck
import torch
assert "tgdp_fast.ops" not in sys.modules
for name, arguments in calls().items():
    opcheck(getattr(torch.ops.tgdp_fast, name).default, arguments)
    print(name)
"""
    assert run_with(code).split() == list(calls())
