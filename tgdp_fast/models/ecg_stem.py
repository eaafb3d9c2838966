"""The stem of the paper's guidance network for electrocardiograms: two linear convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ECGStem(nn.Module):
    """Two strided convolutions without activations: an affine map, so its gradient is a transpose.

    x [B, channels, L] -> features [B, 16 * L''], with kernel 10 and stride 2 in both (L = 1000 gives 3,904). This is
    the stem of the guidance network in the paper's ECG experiment (TGDP section 4.2).
    """

    def __init__(self, event_shape: tuple[int, ...], channels: int = 16, kernel: int = 10, stride: int = 2) -> None:
        super().__init__()
        if len(event_shape) != 2:
            raise ValueError(f"event_shape must be (leads, length) for the stem 'ecg', got {event_shape}")
        leads, length = event_shape
        self.lengths = [length]
        for _ in range(2):
            self.lengths.append((self.lengths[-1] - kernel) // stride + 1)
        if self.lengths[-1] < 1:
            raise ValueError(f"event_shape length must be at least {kernel + stride * (kernel - 1)}, got {length}")
        self.stride = stride
        self.conv1 = nn.Conv1d(leads, channels, kernel, stride, dtype=torch.float32)
        self.conv2 = nn.Conv1d(channels, channels, kernel, stride, dtype=torch.float32)
        self.num_features = channels * self.lengths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, leads, L] -> features [B, num_features]."""
        result: Tensor = self.conv2(self.conv1(x)).flatten(1)
        return result

    def transpose(self, cotangent: Tensor) -> Tensor:
        """Gradient in the features [B, num_features] -> gradient in x [B, leads, L]; differentiable like
        ``forward``.
        """
        gradient = cotangent.unflatten(1, (-1, self.lengths[2]))
        for layer, inner, outer in ((self.conv2, 2, 1), (self.conv1, 1, 0)):
            reached = (self.lengths[inner] - 1) * self.stride + layer.kernel_size[0]
            gradient = functional.conv_transpose1d(
                gradient, layer.weight, stride=self.stride, output_padding=self.lengths[outer] - reached
            )
        return gradient
