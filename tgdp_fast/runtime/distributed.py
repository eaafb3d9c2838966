"""Several processes, started by torchrun, that work as one: they share each batch, and the samples to draw.

Every process draws the full batch from the same generator and uses its share of the rows; gradients are averaged. A run
of several processes therefore equals that of one, up to rounding, and its state can be resumed with another number of
processes. Without a process group everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: How long processes wait for each other: one may have hours of work that the others do not share.
_PATIENCE = timedelta(days=7)

_is_alone: ContextVar[bool] = ContextVar("tgdp_fast_is_alone", default=False)


def rank() -> int:
    """Index of this process, 0 for the first or only one."""
    return dist.get_rank() if _together() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _together() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if _together():
        dist.barrier()


def agreed(value: bool) -> bool:
    """The value of the first process."""
    if not _together():
        return value
    said = torch.tensor([value], dtype=torch.uint8, device=_device())
    dist.broadcast(said, 0)
    return bool(said.item())


def share(count: int) -> slice:
    """This process's rows of a batch of ``count``; all processes must get equally many.

    Raises:
        ValueError: ``count`` is not a multiple of the number of processes.
    """
    if count % size():
        raise ValueError(f"batch_size must be a multiple of {size()}, the number of processes, got {count}")
    return slice(rank() * (count // size()), (rank() + 1) * (count // size()))


def parts(count: int) -> list[range]:
    """Indices of ``count`` items for each process, divided as equally as possible."""
    bounds = [index * count // size() for index in range(size() + 1)]
    return [range(first, stop) for first, stop in zip(bounds, bounds[1:], strict=False)]


def average_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Average the gradients in place over all processes, and the loss; return the loss."""
    if not _together():
        return loss
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([loss.detach().reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
    dist.all_reduce(flat)
    flat /= size()
    mean, *parts = flat.split([1, *(gradient.numel() for gradient in gradients)])
    for gradient, average in zip(gradients, parts, strict=True):
        gradient.copy_(average.view_as(gradient))
    return mean[0]


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process acts as the only one, for work that the others wait for or have done."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


@contextmanager
def process_group(device: str | torch.device) -> Iterator[None]:
    """The process group described by torchrun's environment, inside the block; nothing outside torchrun.

    Args:
        device: of the tensors. The CPU uses gloo; CUDA uses NCCL, and each process uses the GPU of its LOCAL_RANK.
    """
    if _together() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _together() -> bool:
    return not _is_alone.get() and dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
