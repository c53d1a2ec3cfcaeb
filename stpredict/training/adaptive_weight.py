"""VQGAN's adaptive weight of the adversarial loss (Esser et al. 2021, eq. 7), at every ZeRO stage.

lambda = |grad_W rec| / (|grad_W adv| + 1e-4), between 0 and 1e4, W being the weight of the model's last layer, rec the
loss by ``task.weights`` and adv the one by ``task.adversarial_weights``, before those (with several terms, their mean
by these weights).

DeepSpeed lets nobody differentiate by its parameters in between. So the task gets the model's outputs with the graph
cut off; both losses are differentiated by those, once each; the gradients by W follow from a copy of the last layer and
the input that it had; and what goes back through the model, in one backward, is the weighted sum of both.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stpredict.training.ranks import Ranks
from stpredict.training.task import Forward, Task

EPSILON, LARGEST = 1e-4, 1e4
LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Call:
    """Of one forward: the outputs that need a gradient, what the task got in their place, which of them are the last
    layer's, and that layer's input."""

    outputs: list[Tensor]
    ends: list[Tensor]
    last: list[int]
    input: Tensor


class AdaptiveWeight:
    """To be built before DeepSpeed takes the model. ValueError where ``task.last_layer`` is not what it has to be."""

    def __init__(self, task: Task, ranks: Ranks, accumulation: int):
        last = task.last_layer
        if not isinstance(last, LINEAR) or not isinstance(last.weight, nn.Parameter) or not last.weight.requires_grad:
            raise ValueError(
                f"training.discriminator.adaptive_weight needs {type(task).__name__}.last_layer, a linear layer or "
                f"convolution of the model whose weight is trained; it is {last!r}"
            )
        self.scale = sum(task.adversarial_weights.values())
        if self.scale <= 0:
            raise ValueError(f"training.discriminator.adaptive_weight: {type(task).__name__}.adversarial_weights are 0")
        self.ranks, self.accumulation = ranks, accumulation
        # By its weight, a linear layer's gradient depends on its input alone: the copy needs no values, which ZeRO-3
        # would have to gather.
        blank = {id(p): nn.Parameter(torch.zeros(getattr(p, "ds_shape", p.shape))) for p in last.parameters()}
        self.layer = copy.deepcopy(last, blank).to(ranks.device)
        self.checked = False
        self.last: list[int] | None = None  # which of the model's outputs are this layer's
        self.weights: list[Tensor] = []  # of the last step's micro-batches
        self._calls: list[tuple[Tensor, Tensor]] | None = None  # inputs and outputs, while a forward is watched
        last.register_forward_hook(self._note)

    def cut(self, forward: Forward) -> "CutForward":
        """``forward`` of the model, for one ``training_step``."""
        return CutForward(self, forward)

    def combined(self, made: "CutForward", rec: Tensor, adversarial: Tensor) -> Tensor:
        """Goes back through the model as ``rec + lambda * adversarial``: it has that gradient, not that value."""
        ends = [end for call in made.calls for end in call.ends]
        if not self.checked:
            _refuse_other_paths((rec, adversarial), ends)
            self.checked = True
        # They may share a part of the graph.
        by_rec = _gradients(rec, ends, retain_graph=True)
        by_adversarial = _gradients(adversarial, ends)
        weight = self._weight(made.calls, by_rec, by_adversarial)
        self.weights.append(weight)
        outputs = (output for call in made.calls for output in call.outputs)
        return sum(
            (output.float() * (one + weight * other)).sum()
            for output, one, other in zip(outputs, by_rec, by_adversarial, strict=True)
        )

    def _weight(self, calls: list[Call], by_rec: Sequence[Tensor], by_adversarial: Sequence[Tensor]) -> Tensor:
        """Of this micro-batch over all ranks."""
        by_weight = torch.zeros(2, *self.layer.weight.shape, device=self.ranks.device)
        start = 0
        for call in calls:
            with torch.enable_grad():
                output = self.layer(call.input)
            for place, gradients in enumerate((by_rec, by_adversarial)):
                gradient = sum(gradients[start + index] for index in call.last)
                by_weight[place] += torch.autograd.grad(output, self.layer.weight, gradient, retain_graph=True)[0]
            start += len(call.ends)
        torch.distributed.all_reduce(by_weight)
        # A micro-batch has its share of the step's gradient, to which epsilon is to be compared.
        rec, adversarial = by_weight.flatten(1).norm(dim=1) * self.accumulation
        return (rec / (adversarial / self.scale + EPSILON)).clamp(0, LARGEST)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._calls is not None:
            self._calls.append((inputs[0].detach().float(), output.detach()))


class CutForward:
    """Calls the model and returns its outputs as ends of the graph, in fp32."""

    def __init__(self, adaptive: AdaptiveWeight, forward: Forward):
        self.adaptive, self.forward = adaptive, forward
        self.calls: list[Call] = []

    def __call__(self, *arguments, **named) -> object:
        self.adaptive._calls = noted = []
        returned = self.forward(*arguments, **named)
        self.adaptive._calls = None
        flat, structure = pytree.tree_flatten(returned)
        places = [place for place, value in enumerate(flat) if torch.is_tensor(value) and value.requires_grad]
        outputs = [flat[place] for place in places]
        ends = [output.detach().float().requires_grad_() for output in outputs]
        self.calls.append(Call(outputs, ends, self._last(noted, outputs), noted[0][0]))
        for place, end in zip(places, ends, strict=True):
            flat[place] = end
        return pytree.tree_unflatten(flat, structure)

    def _last(self, noted: list[tuple[Tensor, Tensor]], outputs: list[Tensor]) -> list[int]:
        """Which of the outputs are the last layer's. Compared in the first forward only: that waits for a GPU."""
        last = self.adaptive.last
        if len(noted) == 1 and last is None:
            made = noted[0][1]
            last = [n for n, output in enumerate(outputs) if _are_equal(output, made)]
            if made.isfinite().all():  # else this step is skipped, and outputs that are all NaN look alike
                self.adaptive.last = last
        if len(noted) != 1 or not last:
            raise ValueError(
                "training.discriminator.adaptive_weight: the model has to call its last_layer once and return what "
                f"comes out of it unchanged; it called it {len(noted)} times"
                + (", and what came out is not among what it returned" if noted else "")
            )
        return last


def _are_equal(output: Tensor, made: Tensor) -> bool:
    """To the bit, but that NaN is NaN."""
    same = output.shape == made.shape and output.dtype == made.dtype
    return same and torch.allclose(output, made, rtol=0, atol=0, equal_nan=True)


def _gradients(loss: Tensor, ends: list[Tensor], retain_graph: bool = False) -> list[Tensor]:
    """By each of ``ends``; zeros where the loss does not depend on it."""
    return list(torch.autograd.grad(loss, ends, retain_graph=retain_graph, allow_unused=True, materialize_grads=True))


def _refuse_other_paths(losses: Sequence[Tensor], ends: list[Tensor]) -> None:
    """ValueError where a loss reaches a parameter without passing ``ends``: that gradient would be lost."""
    known = {id(end) for end in ends}
    queue, met = [loss.grad_fn for loss in losses], set()
    while queue:
        node = queue.pop()
        if node is None or node in met:
            continue
        met.add(node)
        variable = getattr(node, "variable", None)  # of a leaf of the graph
        if variable is not None and id(variable) not in known:
            raise ValueError(
                f"training.discriminator.adaptive_weight: a loss depends on a tensor of shape {tuple(variable.shape)} "
                "that needs a gradient and is no output of the model; have the model return what the loss needs"
            )
        queue += [following for following, _ in node.next_functions]
