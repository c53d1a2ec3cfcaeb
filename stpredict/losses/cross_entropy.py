"""Cross-entropy of a linear head over many codes, a chunk of tokens at a time.

The fp32 logits of 10,240 tokens over 64,000 codes take 2.6 GB, their gradient as much again. Here they exist for one
chunk at a time, and are computed again in the backward pass. torch.nn.functional.linear_cross_entropy does it in chunks
too, but tells nothing but the loss; whether the likeliest code was right would take the head's products once more.
"""

import torch
from torch import Tensor, nn

# As many for every batch, so that memory grows evenly with it: 10,240 tokens x 64,000 codes, 164 MB in fp32 each.
CHUNKS = 16


class Head(nn.Linear):
    """Logits ``(..., v)``, or, given ``targets``, what they are worth. As a module of its own, whose weight ZeRO-3
    gathers for its forward and backward pass."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """With ``targets`` (...) int64: cross-entropy in nats and whether the likeliest code is right, fp32 ``(...)``.
        ``x``: (..., d)."""
        if targets is None:
            return super().forward(x)
        loss, right = _CrossEntropy.apply(x.reshape(-1, x.shape[-1]), self.weight, targets.reshape(-1))
        return loss.view(targets.shape), right.view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    """``x`` (n, d), ``weight`` (v, d), ``targets`` (n). Products are computed in the type of ``x`` and ``weight``, or
    of autocast; softmax in fp32, or fp64."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        device = x.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        low, chunks = weight.to(ctx.dtype), min(CHUNKS, len(x))
        losses, sums, right = [], [], []
        with torch.autocast(device, enabled=False):
            for part, of_part in zip(x.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
                logits = _wide(part.to(ctx.dtype) @ low.T)
                sums.append(logits.logsumexp(1))
                losses.append(sums[-1] - logits.gather(1, of_part[:, None])[:, 0])
                right.append((logits.argmax(1) == of_part).to(logits.dtype))
        loss, right = torch.cat(losses), torch.cat(right)
        ctx.save_for_backward(x, weight, targets, torch.cat(sums))
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, targets, sums = ctx.saved_tensors
        low, chunks = weight.to(ctx.dtype), min(CHUNKS, len(x))
        of_x, of_weight = torch.empty_like(x), torch.zeros_like(weight)
        with torch.autocast(x.device.type, enabled=False):
            several = (tensor.tensor_split(chunks) for tensor in (x, targets, sums, gradient, of_x))
            for part, of_part, of_sums, of_loss, to in zip(*several, strict=True):
                part, of_part = part.to(ctx.dtype), of_part[:, None]
                # d loss / d logits = softmax(logits) - one-hot(target)
                of_logits = _wide(part @ low.T).sub_(of_sums[:, None]).exp_()
                of_logits.scatter_add_(1, of_part, torch.full_like(of_part, -1, dtype=of_logits.dtype))
                of_logits = of_logits.mul_(of_loss[:, None]).to(ctx.dtype)
                to.copy_(of_logits @ low)
                if of_weight.dtype == ctx.dtype:
                    of_weight.addmm_(of_logits.T, part)
                else:
                    of_weight += of_logits.T @ part
        return of_x, of_weight, None


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
