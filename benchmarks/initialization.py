"""How the tokenizer's convolutions start: orthogonal map of the kept taps against PyTorch's default.

    .venv/bin/python -m benchmarks.initialization [--steps 100] [--seeds 3]

Trains the demo tokenizer on rendered moving digits from both starts, same data order and threads, in fp32, one process,
and prints the mean PSNR of 64 held-out clips for each seed.
"""

import argparse

import numpy as np
import torch
from torch import nn

from data_pipeline.config import MovingDigitsSource
from data_pipeline.sources import moving_digits
from data_pipeline.transforms import to_clip, to_video
from stpredict.config import load
from stpredict.evaluation.frame_metrics import frame_mse, frame_psnr
from stpredict.jobs.config import AnyJobConfig
from stpredict.layers.causal_conv import CausalConv3d
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    train, held_out = clips("train", 1000), clips("val", 64)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.steps} steps of {BATCH} clips")
    for seed in range(arguments.seeds):
        ours, default = (psnr_after(train, held_out, arguments.steps, seed, reset) for reset in (False, True))
        print(f"seed {seed}: orthogonal kept taps {ours:.2f} dB, PyTorch's default {default:.2f} dB", flush=True)


def clips(split: str, count: int) -> torch.Tensor:
    """Rendered clips, uint8 (count, t, h, w, 1)."""
    config = MovingDigitsSource(videos=count, validation_videos=count)
    images, _ = moving_digits.digit_images(config, split)
    frames = []
    for index in range(count):
        shown, positions = moving_digits.trajectories(config, split, index, len(images))
        frames.append(moving_digits.render(images[shown], positions, config.size))
    return torch.from_numpy(np.stack(frames))[..., None]


def psnr_after(train: torch.Tensor, held_out: torch.Tensor, steps: int, seed: int, pytorch_default: bool) -> float:
    """Mean PSNR in dB over held-out clips after ``steps`` of Adam on the squared error."""
    config = load(AnyJobConfig, "configs/tokenizers/demo.yaml")
    torch.manual_seed(seed)
    model = CausalCnnTokenizer(config.model)
    if pytorch_default:
        for module in model.modules():
            if isinstance(module, CausalConv3d):
                nn.Conv3d.reset_parameters(module)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        video = to_video(train[torch.randint(len(train), (BATCH,), generator=order)])
        loss = (model(video)[0] - video).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        made = to_clip(model(to_video(held_out))[0])
    return frame_psnr(frame_mse(made, held_out)).mean().item()


if __name__ == "__main__":
    main()
