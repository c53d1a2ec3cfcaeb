"""What tokens cost a prior that learns from clips: its tokenizer's forward passes, inside every step."""

from dataclasses import dataclass

import torch

from data_pipeline.config import ClipConfig
from data_pipeline.transforms import to_video
from stpredict.estimates.gpus import Gpu
from stpredict.estimates.live_bytes import LiveBytes
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.config import TrainingConfig
from stpredict.training.flops import ShapesOnly, count_flops


@dataclass(frozen=True)
class Tokenizing:
    """``flops`` of one clip. ``together`` clips go through at once, in fp32; what is missing of the last ones is filled
    up. In bytes: the tokenizer's ``weights``, decoder included, the most that a ``forward`` pass makes beside them, and
    a ``clip`` as the stream gives it."""

    flops: float
    together: int
    weights: int
    forward: int
    clip: int

    def flops_of(self, micro_batch: int) -> float:
        return -(-micro_batch // self.together) * self.together * self.flops

    def seconds(self, training: TrainingConfig, ranks: int, gpu: Gpu, mfu: float) -> float:
        """Of a step, on each rank. Convolutions in fp32 compute in TF32 where there is such: torch's default."""
        times = training.accumulation_steps(ranks)
        flops = times * self.flops_of(training.batch_size // (ranks * times))
        return flops / ((gpu.tflops("tf32") or gpu.tflops("fp32")) * 1e12 * mfu)


def plan_tokenizing(model: CausalCnnConfig, clip: ClipConfig, together: int) -> Tokenizing:
    """From shapes alone. A GPU's kernels make the same tensors here: nothing is kept, and no autocast is on."""
    with torch.device("meta"):
        tokenizer = CausalCnnTokenizer(model)
        video = torch.empty(1, clip.channels, clip.frames, *clip.size)
    shapes = ShapesOnly(tokenizer)
    states = (*shapes.model.parameters(), *shapes.model.buffers())
    live = LiveBytes()
    with shapes.mode, torch.no_grad():  # as clips.clip_tokens has it
        clips = torch.empty(together, clip.frames, *clip.size, clip.channels, dtype=torch.uint8)
        live.ignore((*states, clips))
        with live:
            shapes.model.encode(to_video(clips))
    return Tokenizing(
        flops=count_flops(ShapesOnly(tokenizer.encoder), (video,), {}),
        together=together,
        weights=sum(tensor.nbytes for tensor in states),
        forward=live.peak,
        clip=clips.nbytes // together,
    )
