"""SSSD-ECG: the structured state space diffusion model of electrocardiograms, loaded from the released checkpoints.

    x = relu(conv1x1(signal))
    each block:  h = S4Block_1(conv3(x + fc_t(step embedding))) + fc_label(label embedding)
                 h = S4Block_2(h);   o = tanh(first half of h) * sigmoid(second half)
                 x = (x + res_conv(o)) / sqrt 2;   skip = skip + skip_conv(o)
    prediction = conv1x1(relu(conv1x1(skip / sqrt(number of blocks))))

Sources: Alcaraz & Strodthoff, "Diffusion-based Conditional ECG Generation with Structured State Space Models",
Computers in Biology and Medicine 163, 2023, arXiv 2301.08227; the residual network of Kong et al.,
"DiffWave", ICLR 2021, arXiv 2009.09761 (section 3); S4 in :mod:`tgdp_fast.models.s4`. Names of parameters and buffers
are those of the released checkpoints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tgdp_fast.models.s4 import CAUCHY
from tgdp_fast.models.sssd_ecg.compiled import CompiledSSSDECG, Times
from tgdp_fast.models.sssd_ecg.layers import SSSDECGModules
from tgdp_fast.runtime.checkpoint import CheckpointError
from tgdp_fast.runtime.checks import check_choice
from tgdp_fast.runtime.state_dict import read_state_dict, restored

_FIRST = "init_conv.0.conv.weight_v"
_BLOCKS = "residual_layer.residual_blocks."


class SSSDECG(SSSDECGModules):
    """The SSSD-ECG network. The defaults are the paper's: PTB-XL, 8 leads at 100 Hz for 10 s, 71 statements.

    ``Denoiser(network, NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 200)))`` is the paper's model: it takes the
    index of the diffusion step, 0 .. 199, and predicts epsilon. That schedule does not end in pure noise:
    :mod:`tgdp_fast.diffusion.prior` explains where to start.

    Args:
        in_channels, out_channels: channels (leads) of the signal and of the prediction.
        res_channels, skip_channels: width of the residual stream and of the skip sum. S4 works on 2 res_channels.
        num_res_layers: number of residual blocks, with two S4 layers each.
        step_dims: widths of the diffusion step's features (even, at least 4), of the hidden layer and of the embedding.
        num_classes: number of label classes; 0 for an unconditional network.
        label_dim: width of the label embedding.
        l_max: number of taps of the S4 kernels, the longest signal.
        d_state: state size of S4, even.
        cauchy: "pair" or "half", the function behind the S4 kernels; see :class:`tgdp_fast.models.s4.NPLRKernel`.

    Shapes: ``forward(x [B, in_channels, L], time [B], labels=None) -> [B, out_channels, L]``, in the dtype of x, for
    any L in 1 .. l_max (see :class:`tgdp_fast.models.s4.S4Layer`). time is the diffusion step, of any real dtype.
    labels are class indices [B] or rows [B, num_classes], soft or multi-hot: the weights of a sum of class embeddings.

    Parameters and x are float32, or both float64 (``.double()``), which is the reference for everything faster. For
    matmuls in 16 bits use torch.autocast. S4 kernels are recomputed in training and kept in eval mode without
    gradients: see :class:`tgdp_fast.models.s4.S4Kernel`.

    Raises:
        ValueError: an argument out of range; x of another shape; labels missing, unexpected or of another shape.
    """

    @property
    def event_shape(self) -> tuple[int, int]:
        """Shape of one sample of full length: (in_channels, l_max)."""
        return self.in_channels, self.l_max

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "res_channels": self.res_channels,
            "skip_channels": self.skip_channels,
            "num_res_layers": self.num_res_layers,
            "step_dims": list(self.step_dims),
            "num_classes": self.num_classes,
            "label_dim": self.label_dim,
            "l_max": self.l_max,
            "d_state": self.d_state,
            "cauchy": self.cauchy,
        }

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], *, cauchy: str, config: Mapping[str, Any] | None = None
    ) -> SSSDECG:
        """Load a file written by the SSSD-ECG training code, or a safetensors file with the same tensors.

        Sizes follow from the tensors. (``Denoiser.load`` reads checkpoint folders of this package.)

        Args:
            path: a file of ``torch.save`` with the state dict, alone or as the entry "model_state_dict", or a
                ``.safetensors`` file with it. Only tensors are unpickled (``weights_only=True``).
            cauchy: the kernels that the checkpoint was trained on. The file does not contain this, and the wrong ones
                change the prediction by a third. "pair" if training had the CUDA extension or PyKeOps; "half" if its
                log says "Falling back on slow Cauchy kernel", as with the unchanged SSSD-ECG repository.
            config: constructor arguments that the file must match, such as ``{"num_res_layers": 36}``. Otherwise a file
                that lacks whole blocks at its end would be read as a smaller network.

        Returns:
            The network in float32, on the CPU, in eval mode.

        Raises:
            CheckpointError: the file cannot be read, or a tensor is missing, unknown or of another shape; the message
                names the first ones, with expected and found shapes.
            ValueError: an unknown ``cauchy``; an unknown key or a bad value in ``config``.
        """
        check_choice("cauchy", cauchy, CAUCHY)
        tensors = read_state_dict(path, anchor=_FIRST)
        sizes = config_from_state_dict(tensors, path)
        for name in config or {}:
            check_choice("config's keys", name, sizes)
        settings = {**sizes, **(config or {}), "cauchy": cauchy}
        return restored(lambda: cls(**settings), settings, tensors, path).eval()

    def compile_for_sampling(
        self,
        schedule_or_table: Times = None,
        *,
        precision: str = "fp32",
        length: int | None = None,
    ) -> CompiledSSSDECG:
        """A network with the same call, for sampling: each call omits everything that does not depend on the signal.

        S4 kernels, normalized weights and the biases of the diffusion steps are computed here once, in float64, from
        the current parameters. At the paper's size this takes one core ten to fifteen seconds.
        :mod:`tgdp_fast.models.sssd_ecg.compiled` has the list. The result replaces this network:
        ``Denoiser(network.compile_for_sampling(schedule), schedule)``, or shorter
        :meth:`tgdp_fast.Denoiser.compile_for_sampling`.

        Compile after loading, ``.eval()`` and ``.to(device)``. The result refuses to run after a parameter was
        replaced, moved, converted or changed in place; compile again then. (Changes that PyTorch does not count, such
        as those through ``.data``, are not detected.) Its calls wait for each other, because they share buffers.

        Args:
            schedule_or_table: the diffusion steps to expect: those of a discrete schedule, the times of a solver's
                table, or the steps themselves [K]. The biases of any other step are computed at its first call,
                which takes a fraction of a call's time at full size. None: no step is expected.
            precision: of the factors of the blocks' matmuls, "fp32", "bf16" or "fp16". Everything else is float32, sums
                are accumulated in float32, and autocast has no effect. If the CPU has no matmul for the type (float16
                on any CPU), only the weights are rounded and the matmul is in float32, as fast as "fp32".
            length: the longest signal; default l_max. The cost of long convolutions is that of this length. The kept
                tensors are in the format of the backend that would be chosen now; compile again to use another one.

        Returns:
            A module that shares this network's parameters and also keeps its own tensors: at the paper's size 300 MB of
            spectra and 150 MB of weights, half of that in 16 bits.

        Raises:
            ValueError: training mode; a continuous schedule; a bad precision or length.
        """
        return CompiledSSSDECG(self, schedule_or_table, precision=precision, length=length)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.in_channels or not 1 <= x.shape[2] <= self.l_max:
            raise ValueError(
                f"x must have shape [B, {self.in_channels}, L] with L in 1..{self.l_max}, got {tuple(x.shape)}"
            )
        label_embedding = self.embed_labels(labels)
        h = self.init_conv(x).to(x.dtype)
        h = self.residual_layer(h, time, label_embedding)
        return self.final_conv(h).to(x.dtype)


def config_from_state_dict(tensors: Mapping[str, Tensor], where: str | os.PathLike[str]) -> dict[str, Any]:
    """Constructor arguments of :class:`SSSDECG`, except ``cauchy``, derived from the shapes of a state dict.

    Raises:
        CheckpointError: a tensor that determines a size is missing, or has another number of dimensions.
    """

    def shape(name: str, expected: str) -> torch.Size:
        found = tensors[name].shape if name in tensors else None
        if found is None or len(found) != expected.count(",") + 1 or 0 in found:
            came = "is missing" if found is None else f"has shape {list(found)}"
            raise CheckpointError(f"{where} is no checkpoint of SSSDECG: {name} {came}, expected [{expected}]")
        return found

    first = shape(_FIRST, "res_channels, in_channels, 1")
    last = shape("final_conv.2.conv.weight", "out_channels, skip_channels, 1")
    hidden = shape("residual_layer.fc_t1.weight", "hidden, features")
    output = shape("residual_layer.fc_t2.weight", "embedding, hidden")
    kernel = f"{_BLOCKS}0.S41.s4_layer.kernel.kernel."
    c = shape(f"{kernel}C", "2, 2 res_channels, d_state / 2, 2")
    shape(f"{kernel}omega", "l_max // 2 + 1, 2")
    labels = shape("embedding.weight", "num_classes, label_dim") if "embedding.weight" in tensors else (0, 1)
    indices = {name[len(_BLOCKS) :].split(".")[0] for name in tensors if name.startswith(_BLOCKS)}
    return {
        "in_channels": first[1],
        "out_channels": last[0],
        "res_channels": first[0],
        "skip_channels": last[1],
        # A gap leads to missing tensors for the blocks in it.
        "num_res_layers": len(indices),
        "step_dims": (hidden[1], hidden[0], output[0]),
        "num_classes": labels[0],
        "label_dim": labels[1],
        "l_max": _length_of_nodes(tensors[f"{kernel}omega"]),
        "d_state": 2 * c[2],
    }


def _length_of_nodes(omega: Tensor) -> int:
    """The length L with these L // 2 + 1 nodes [.., 2]: of the two possible ones, the even one ends at -1."""
    odd = 2 * omega.shape[0] - 1
    ends_at_minus_one = abs(float(omega[-1, 1])) < 0.5 * math.sin(math.pi / odd) and float(omega[-1, 0]) < 0
    return odd - 1 if ends_at_minus_one else odd
