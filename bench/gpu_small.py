"""Every operator once on small shapes on the GPU, for a memory checker: each backend that is there, odd sizes."""

from __future__ import annotations

import torch

from tgdp_fast.lab.cases.guided_step import step_inputs
from tgdp_fast.lab.cases.mlp import mlp_inputs
from tgdp_fast.lab.cases.residual_block import residual_block_inputs
from tgdp_fast.lab.cases.trajectory import trajectory_inputs
from tgdp_fast.ops import (
    BackendUnavailableError,
    SolverStep,
    guided_step,
    long_convolution,
    mlp_forward,
    mlp_value_and_grad,
    prepare_long_convolution,
    residual_block_,
    trajectory,
)


def main() -> None:
    device = torch.device("cuda")
    for backend in ("cuda", "triton"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            served = []
            for name, call in calls(device, dtype, backend):
                try:
                    call()
                except BackendUnavailableError:
                    continue
                served.append(name)
            torch.cuda.synchronize()
            print(backend, dtype, "served", ", ".join(served) or "nothing")


def calls(device: torch.device, dtype: torch.dtype, backend: str):
    tensors = step_inputs((37, 13), 1, dtype, device)
    inputs = mlp_inputs(70, 5, (48, 33), dtype, device, bias_rows="per sample")
    wide = mlp_inputs(33, 2, (128, 128), dtype, device)

    def derivative(function):
        leaves = inputs.map(lambda tensor: tensor.detach().requires_grad_())
        outputs = function(*leaves, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves.flat(), [torch.ones_like(output) for output in outputs])

    yield (
        "guided_step",
        lambda: guided_step(
            *tensors,
            step=SolverStep([[0.9, 0.1, 0.2], [0.0, 0.0, 1.0]], 0.3, 0.5, 0.8, 0.6, (-1.0, 1.0)),
            seed=1,
            evaluation=2,
            backend=backend,
        ),
    )
    yield "mlp_value_and_grad", lambda: mlp_value_and_grad(*wide, backend=backend)
    yield "its derivative", lambda: derivative(mlp_value_and_grad)
    samples = trajectory_inputs((70, 5), (48, 33), (40, 20, 30), dtype, device, sample_bias=True, limits=True)
    yield "trajectory", lambda: trajectory(*samples, seed=1, backend=backend)
    # Transforms of every size, blocks that are not full.
    for batch, channels, length in ((3, 5, 129), (2, 3, 500), (3, 2, 999)):
        taps = torch.randn(channels, 2 * length - 1, device=device) * length**-0.5
        prepared = prepare_long_convolution(taps, dtype, backend=backend)
        u = torch.randn(batch, channels, length, device=device).to(dtype)
        yield f"long_convolution {length}", lambda u=u, p=prepared: long_convolution(u, p, backend=backend)
    block = residual_block_inputs((3, 34, 20, 129), dtype, device, steps="per sample")
    yield "residual_block_", lambda: residual_block_(*block, backend=backend)
    yield "mlp_forward", lambda: derivative(mlp_forward)


if __name__ == "__main__":
    main()
