"""Every candidate of every Triton kernel in the interpreter: as accurate as the default, and safe to launch again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_gated_activation import draw
from test_guided_step import COMMON, MATRICES, inputs
from test_mlp_native import double, network
from tolerances import assert_no_worse_than_eager, of_perceptron_backward
from triton_interpreter import compiled, interpreted, run_interpreted

from tgdp_fast.kernels import autotuning
from tgdp_fast.ops import gated_activation, guided_step
from tgdp_fast.ops._dispatch import lookup

pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MOST_CANDIDATES = 6


@compiled
def test_in_the_interpreter():
    assert run_interpreted("test_triton_autotuning.py") > 10


@compiled
@pytest.mark.slow(ci=False)
def test_all_in_the_interpreter():
    assert run_interpreted("test_triton_autotuning.py", "--run-slow=all") > 30


def with_each_candidate(call, seen):
    """Results of the call, every launch done twice with its first candidate, then its second, as far as any has one.

    Adds the candidates to ``seen``.
    """
    number, most = 0, 1

    def policy(run, candidates):
        nonlocal most
        most = max(most, len(candidates))
        choice = candidates[min(number, len(candidates) - 1)]
        seen.add(tuple(choice))
        run(choice)
        return run(choice)

    while number < most:
        with autotuning.deciding(policy):
            result = call()
        yield result
        number += 1
    assert most <= MOST_CANDIDATES


def flat(tensors):
    """The tensors of nested lists and tuples, None left out."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [] if tensors is None else [tensor for item in tensors for tensor in flat(item)]


def copies(*arguments):
    return [tensor.clone() for tensor in flat(arguments)]


def check_candidates(operator, tolerance, *call, **keywords):
    """Each candidate against float64, with the error that the reference has; and the inputs are what they were."""
    reference, ours = lookup(operator, "reference").function, lookup(operator, "triton").function
    exact = flat(reference(*(argument if argument is None else double(argument)[0] for argument in call), **keywords))
    eager = flat(reference(*call, **keywords))
    before = copies(*call)
    seen = set()
    for got in with_each_candidate(partial(ours, *call, **keywords), seen):
        assert_no_worse_than_eager(flat(got), eager, exact, tolerance)
        assert all(torch.equal(a, b) for a, b in zip(flat(call), before, strict=True))
    return seen


def both_ways(sizes, batch, dtype):
    """The candidates seen by both perceptron operators and their derivatives."""
    x, first_bias, weights, biases = call = network(sizes, batch, dtype, per_sample=False)
    tolerance, needs = of_perceptron_backward(sizes, batch, dtype), (True,) * (2 * len(weights) + 1)
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for operator, cotangents in (
        ("mlp_value_and_grad", (torch.randn(batch, generator=generator), torch.randn(x.shape, generator=generator))),
        ("perceptron", (torch.randn(batch, 1, generator=generator),)),
    ):
        seen |= check_candidates(operator, tolerance, *call, save_pre_activations=True)
        kept = list(lookup(operator, "reference").function(*call, save_pre_activations=True)[-1])
        given = [cotangent.to(dtype) for cotangent in cotangents]
        arguments = (*given, x, first_bias, weights, kept)
        seen |= check_candidates(operator + "_backward", tolerance, *arguments, needs_grad=needs)
    return seen


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("sizes", "batch", "dtype"),
    [
        ((17, 70), 13, torch.float32),
        ((3, 129), 13, torch.bfloat16),
        ((3, 129), 40, torch.bfloat16),
        ((3, 129), 40, torch.float32),
        ((2, 40, 33), 20, torch.bfloat16),
    ],
)
def test_layers(sizes, batch, dtype):
    # Few rows, more, and in 16 bits a small network.
    assert len(both_ways(sizes, batch, dtype)) >= 4


@interpreted
@pytest.mark.slow(ci=False)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        *[((1, 1), 1), ((21, 33, 50), 0), ((17, 70), 13), ((3, 129), 40), ((2, 40, 33), 20)],
        *[((70, 150, 130), 140), ((2, 128, 128, 128, 128), 65), ((3, 16), 1100)],
    ],
)
def test_further_layers(sizes, batch, dtype):
    both_ways(sizes, batch, dtype)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(2, 2050), (3, 1366), (3, 1001)])
def test_guided_step_is_the_same_to_the_bit(shape):
    # Noise by groups, by pairs and by elements; samples shorter than a program and longer.
    call = [tensor.to(dtype) for tensor, dtype in zip(inputs(1, shape), (*DTYPES, torch.float32), strict=True)]
    keywords = COMMON | {"matrix": MATRICES[1], "clamp": (-1.0, 1.0), "backend": "triton"}
    expected, before = guided_step(*call, **keywords), copies(call)
    seen = set()
    for got in with_each_candidate(partial(guided_step, *call, **keywords), seen):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(call, before, strict=True))
    assert len(seen) >= 4


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(2, 6, 683), (3, 2, 2100), (2, 10, 7)])
def test_gate_is_the_same_to_the_bit(shape):
    x = draw(*shape)
    for bias in (None, draw(shape[1]), draw(*shape[:2])):
        expected, before = gated_activation(x, bias, backend="triton"), copies(x)
        seen = set()
        for got in with_each_candidate(partial(gated_activation, x, bias, backend="triton"), seen):
            assert torch.equal(got, expected)
            assert torch.equal(x, before[0])
        assert len(seen) > 1
