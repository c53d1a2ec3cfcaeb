"""An adversarial task small enough to write out by hand; ``toy.py`` runs it where a trial has ``adversarial``.

The discriminator judges entry by entry. What is real it judges everywhere, what is made only where the mask is 1: the
two have other counts, which also differ from one micro-batch to the next.
"""

import torch
from torch import Tensor, nn

from stpredict.losses.adversarial import ADVERSARIAL_LOSSES, LeCam, r1_penalty
from stpredict.training.task import Batch
from tests.distributed.toy import WIDTH, ToyTask

R1 = 0.2  # gamma


class Model(nn.Module):
    """Returns its last layer's output, and how large its hidden units are: a term that does not pass the last layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.register_buffer("mark", torch.zeros(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return {"made": self.last(hidden), "effort": hidden.square().sum(1)}


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.lecam = LeCam(decay=0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class AdversarialToy(ToyTask):
    """``lecam`` is that term's weight; ``r1_every``: the penalty is computed on every so many updates, 0 for never."""

    def __init__(self, loss: str, lecam: float = 0.0, r1_every: int = 0, fault: str | None = None, poison=None):
        self.model, self.discriminator = Model(), Discriminator()
        self.poison, self.quarantined = poison or {}, {}
        self.last_layer = self.model.first if fault == "last_layer" else self.model.last
        self.loss, self.lecam, self.r1_every, self.fault = ADVERSARIAL_LOSSES[loss], lecam, r1_every, fault
        self.weights = {"l2": 1.0, "effort": 0.05}
        self.adversarial_weights = {"deceived": 0.5}
        self.discriminator_weights = {"real": 1.0, "fake": 1.0, "lecam_real": lecam, "lecam_fake": lecam}
        self.discriminator_weights["r1"] = r1_every * R1 / 2

    def layers(self) -> list[nn.Module]:
        return [self.model.first, self.model.last]

    def counts(self, batch: Batch) -> dict[str, float]:
        samples, made = float(len(batch["x"])), float(batch["mask"].sum())
        everywhere = samples * WIDTH
        return {
            **{"l2": made, "effort": samples, "deceived": made, "fake": made, "lecam_fake": made, "logit_fake": made},
            **{"real": everywhere, "lecam_real": everywhere, "logit_real": everywhere, "r1": samples},
        }

    def training_step(self, forward, batch: Batch) -> dict[str, Tensor]:
        output = forward(batch["x"])
        batch["made"] = made = output["made"].float()
        error = (made - batch["y"]) * batch["mask"]
        sums = {"l2": error.square().sum(), "effort": output["effort"].float().sum()}
        if self.fault == "parameter":
            sums["effort"] = sums["effort"] + self.model.first.bias.square().sum()
        return sums

    def adversarial_step(self, judge, batch: Batch) -> dict[str, Tensor]:
        return {"deceived": (self.loss.model(judge(batch["made"])) * batch["mask"]).sum()}

    def discriminator_step(self, forward, batch: Batch, update: int) -> dict[str, Tensor]:
        real, fake = forward(torch.cat([batch["y"], batch["made"]])).chunk(2)
        lecam, mask = self.discriminator.lecam, batch["mask"]
        sums = {"real": self.loss.real(real).sum(), "fake": (self.loss.fake(fake) * mask).sum()}
        sums |= {"logit_real": real.sum(), "logit_fake": (fake * mask).sum()}
        if self.lecam:
            sums |= {"lecam_real": lecam.real(real).sum(), "lecam_fake": (lecam.fake(fake) * mask).sum()}
        if self.r1_every and update % self.r1_every == 0:
            sums["r1"] = r1_penalty(forward, batch["y"])
        return sums

    def discriminator_updated(self, means: dict[str, Tensor]) -> None:
        self.discriminator.lecam.update(means["logit_real"], means["logit_fake"])

    def validation_step(self, forward, batch: Batch) -> dict[str, Tensor]:
        return {**self.training_step(forward, batch), "entries": batch["mask"].sum()}
