"""The clips that a trained tokenizer is used on, and their tokens: the same whether cached or made on the fly."""

from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.config import ClipChanges, ClipConfig, ClipDataConfig
from data_pipeline.transforms import to_video
from stpredict.config import validate
from stpredict.exports import TokenizerExport
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import WHOLE, TilingConfig, TokenizedClipDataConfig


def clip_for(changes: ClipChanges, clip: ClipConfig, export: TokenizerExport, where: str) -> ClipConfig:
    """``clip`` with ``changes``. UsageError where that is no clip, or the tokenizer cannot take such."""
    changed = validate(ClipConfig, clip.model_dump() | changes.model_dump(exclude_none=True), where)
    export.model.check_clip(changed, where)
    return changed


def clips_for(data: TokenizedClipDataConfig, tokenizer: Path, export: TokenizerExport) -> ClipDataConfig:
    """``data`` with its clip filled in from what the tokenizer was trained on. Raises what ``clip_for`` raises."""
    clip = clip_for(data.clip, export.clip, export, f"data.clip, for {tokenizer}")
    fields = {name: getattr(data, name) for name in TokenizedClipDataConfig.model_fields}
    return ClipDataConfig(**{**fields, "clip": clip})


@torch.no_grad()
def clip_tokens(tokenizer: CausalCnnTokenizer, clips: Tensor, batch_size: int, tiling: TilingConfig = WHOLE) -> Tensor:
    """Clips uint8 ``(b, t, h, w, c)`` to token ids ``(b, t', h', w')`` int64, in fp32, on the device of ``clips``.

    Every forward pass takes ``batch_size`` clips, the last filled up with repetitions: kernels are chosen by shape,
    and a value that one rounds differently may fall on the other side of a code's border. So a clip has the same
    tokens whatever it is encoded with.
    """
    tokenizer.to(clips.device)
    full = -(-len(clips) // batch_size) * batch_size
    rows = torch.arange(full, device=clips.device).clamp(max=len(clips) - 1)
    with torch.autocast(clips.device.type, enabled=False):
        tokens = [tokenizer.encode(to_video(clips[part]), tiling) for part in rows.split(batch_size)]
    return torch.cat(tokens)[: len(clips)]
