"""Measure TGDP against fine-tuning on a diffusers pipeline, and draw the picture of docs/diffusers.md.

    python docs/images/guidance_or_fine_tuning.py docs/images

The source is a small UNet2DModel of all ten handwritten digits of scikit-learn (8 x 8); the target is 20 images of the
digits 4 and 7, drawn anew for each seed. Writes guidance_or_fine_tuning.json and .png, in about 7 minutes of one core.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import numpy as np
import torch
from torch.nn import functional

from tgdp_fast import Denoiser, NoiseSchedule, fit_guidance
from tgdp_fast.data.digits import DigitArrays, digit_judge, load_digits_arrays
from tgdp_fast.integrations.diffusers import guide

matplotlib.use("agg")
import matplotlib.pyplot as plt

DIGITS, GIVEN, SAMPLES, SHOWN = (4, 7), 20, 400, 14
SEEDS = (0, 1, 2)
SOURCE_STEPS, SAMPLING_STEPS = 700, 20


def make_unet() -> Any:
    """A U-Net of 8 x 8 images."""
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )


def train(unet: Any, images: torch.Tensor, learning_rate: float, *, steps: int = 0, seconds: float = 0.0) -> int:
    """The usual training of a diffusers model, for a number of steps or of seconds of one core; returns the steps."""
    noises = diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.train().parameters(), lr=learning_rate)
    begin, done = time.process_time(), 0
    while done < steps or time.process_time() - begin < seconds:
        x, times = images[torch.randint(len(images), (64,))], torch.randint(1000, (64,))
        noise = torch.randn_like(x)
        loss = functional.mse_loss(unet(noises.add_noise(x, noise, times), times).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        done += 1
    unet.eval()
    return done


def draw(pipeline: Any) -> np.ndarray:
    """[SAMPLES, 64] in [-1, 1]; the same noise for every method."""
    generator = torch.Generator().manual_seed(1)
    images = pipeline(
        batch_size=SAMPLES, num_inference_steps=SAMPLING_STEPS, generator=generator, output_type="pt"
    ).images
    return (2.0 * images - 1.0).reshape(SAMPLES, 64).numpy()


def nearest(images: np.ndarray, given: np.ndarray) -> float:
    """Median over ``images`` of the distance to the nearest given image."""
    return float(np.median(np.linalg.norm(images[:, None] - given[None], axis=2).min(axis=1)))


def methods_of(pipeline: Any, arrays: DigitArrays, seed: int) -> dict[str, tuple[np.ndarray, float]]:
    """Images and seconds of fitting, of one core, of each method for one draw of the target."""
    unet, schedule = pipeline.unet, NoiseSchedule.from_diffusers(diffusers.DDPMScheduler())
    source, target = (each.reshape(-1, 1, 8, 8) for each in (arrays.source, arrays.target))
    found = {"given": (arrays.target, 0.0), "unguided": (draw(pipeline), 0.0)}
    for name, denoiser in (("without denoiser", None), ("with denoiser", Denoiser(unet, schedule))):
        torch.manual_seed(seed)
        begin = time.process_time()
        fit = fit_guidance(source, target, schedule, denoiser=denoiser)
        seconds = time.process_time() - begin
        for scale in (1.0, 2.0):
            with guide(pipeline, fit.guidance, scale=scale):
                found[f"TGDP {name}, scale {scale:g}"] = (draw(pipeline), seconds)
    torch.manual_seed(seed)
    tuned = copy.deepcopy(unet)
    train(tuned, torch.from_numpy(target), 5e-4, seconds=seconds)
    pipeline.unet = tuned
    found["fine-tuning, equal time"] = (draw(pipeline), seconds)
    pipeline.unet = unet
    return found


def picture(rows: dict[str, np.ndarray], path: Path) -> None:
    """A row of images for each method."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(8.0, 0.62 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        padded = np.pad(images[:SHOWN].reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)), constant_values=1.0)
        axis.imshow(np.concatenate(padded, axis=1), cmap="gray_r", vmin=-1.0, vmax=1.0)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, format="png", facecolor="white")


def main(folder: Path) -> None:
    """Write the numbers and the picture."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    judge, unet = digit_judge(), make_unet()
    source = torch.from_numpy(load_digits_arrays(DIGITS, GIVEN).source.reshape(-1, 1, 8, 8))
    begin = time.process_time()
    train(unet, source, 2e-3, steps=SOURCE_STEPS // 2)
    train(unet, source, 4e-4, steps=SOURCE_STEPS - SOURCE_STEPS // 2)
    print(f"source model: {time.process_time() - begin:.0f} s", flush=True)
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    table: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        arrays = load_digits_arrays(DIGITS, GIVEN, seed=seed)
        held_out = arrays.held_out[np.isin(arrays.held_out_labels, DIGITS)]
        images = methods_of(pipeline, arrays, seed)
        if seed == SEEDS[0]:
            shown = {name: each for name, (each, _) in images.items() if "without" not in name}
            picture(shown, folder / "guidance_or_fine_tuning.png")
        for name, (each, seconds) in images.items():
            row = table.setdefault(name, {"right": [], "nearest_given": [], "seconds": []})
            row["right"].append(round(judge.fraction(each, DIGITS), 4))
            row["nearest_given"].append(round(nearest(each, arrays.target) / nearest(held_out, arrays.target), 3))
            row["seconds"].append(round(seconds, 1))
            print(seed, name, *(values[-1] for values in row.values()), flush=True)
        result = {
            "digits": DIGITS,
            "given": GIVEN,
            "samples": SAMPLES,
            "judge_accuracy": round(judge.accuracy, 4),
            "parameters": sum(each.numel() for each in unet.parameters()),
            "seeds": SEEDS[: seed + 1],
            "methods": table,
        }
        (folder / "guidance_or_fine_tuning.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
