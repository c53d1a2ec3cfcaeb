"""Adversarial losses and the regularizers of a discriminator.

Losses are per logit, in its shape: a task masks and sums them, and the engine divides the sum by the term's count.
Whoever computes them gives fp32 logits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Hinge:
    """Lim and Ye 2017, "Geometric GAN"; VQGAN's and MAGVIT's discriminators learn by it."""

    @staticmethod
    def real(logits: Tensor) -> Tensor:
        """The discriminator's loss of what is real."""
        return F.relu(1 - logits)

    @staticmethod
    def fake(logits: Tensor) -> Tensor:
        """The discriminator's loss of what the model made."""
        return F.relu(1 + logits)

    @staticmethod
    def model(logits: Tensor) -> Tensor:
        """The model's loss of what it made."""
        return -logits


class NonSaturating:
    """Goodfellow et al. 2014, section 3: cross-entropy, where the model maximises log D rather than minimises
    log(1 - D)."""

    @staticmethod
    def real(logits: Tensor) -> Tensor:
        return F.softplus(-logits)

    @staticmethod
    def fake(logits: Tensor) -> Tensor:
        return F.softplus(logits)

    @staticmethod
    def model(logits: Tensor) -> Tensor:
        return F.softplus(-logits)


ADVERSARIAL_LOSSES = {"hinge": Hinge, "non_saturating": NonSaturating}


class LeCam(nn.Module):
    """LeCam regularization (Tseng et al. 2021, eq. 4), rectified and with averages free of their start as in the
    authors' code: logits of what is real stay below the average logit of what is fake, and the other way round.

    It has to be a part of the discriminator, so that its averages are saved with it. ``update`` moves them after an
    update of the discriminator; until the first one the penalty is 0.
    """

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("averages", torch.zeros(2))  # of real and of fake logits, as if there had been 0 before
        self.register_buffer("total", torch.zeros(()))  # the weight that all means together have in them

    def real(self, logits: Tensor) -> Tensor:
        """Per logit of what is real."""
        return self._begun * F.relu(logits - self.anchors[1]).square()

    def fake(self, logits: Tensor) -> Tensor:
        """Per logit of what the model made."""
        return self._begun * F.relu(self.anchors[0] - logits).square()

    @property
    def anchors(self) -> Tensor:
        """Average logits of what is real and of what is fake, ``(2,)``; a copy."""
        return self.averages / self.total.clamp_min(1e-12)

    @property
    def _begun(self) -> Tensor:
        return (self.total > 0).float()

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """With the mean logits of all ranks' batches, scalars that are equal on every rank: then so are the buffers,
        without being sent."""
        self.averages.lerp_(torch.stack([real, fake]).to(self.averages), 1 - self.decay)
        self.total.lerp_(torch.ones_like(self.total), 1 - self.decay)


def r1_penalty(judge: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Sum over the samples of the squared gradient norm of their logits' sum, at what is real (Mescheder et al. 2018,
    eq. 9), to be differentiated; a scalar.

    Its weight is gamma / 2; computed on every k-th update only, k * gamma / 2 (StyleGAN2's lazy regularization).
    """
    real = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(judge(real).sum(), real, create_graph=True)
    return gradient.square().sum()
