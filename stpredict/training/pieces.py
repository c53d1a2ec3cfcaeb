"""A training state as named ranges of flat tensors: what this rank holds of it, whatever the ZeRO stage.

Keys are MODULE/KIND/NAME, for example ``model/exp_avg/blocks.0.attention.weight``. The kinds are ``weight`` (fp32
where DeepSpeed keeps masters), the optimizer's moments, ``ema`` and ``buffer``. A checkpoint holds each key's whole
tensor, in as many pieces as ranks held it; any other split can be filled from it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` and following of the flattened tensor ``key``, whose whole shape is ``shape``.

    ``tensor`` is a 1-D view of the state itself: writing to it sets the state. ``replicated``: every rank holds the
    whole tensor.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor
    replicated: bool

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    @property
    def kind(self) -> str:
        return self.key.split("/", 2)[1]

    @property
    def name(self) -> str:
        return self.key.split("/", 2)[2]


class Held:
    """What this rank holds of one module and of its optimizer's state.

    ``engine`` is the DeepSpeed engine that trains ``model``, of any ZeRO stage; without one, every rank holds the
    whole module, and ``optimizer`` is torch's.
    """

    def __init__(self, module: str, model: nn.Module, optimizer: Optimizer, engine=None):
        self.module, self.model, self.optimizer, self.engine = module, model, optimizer, engine
        self.stage = engine.zero_optimization_stage() if engine is not None else 0

    def pieces(self) -> list[Piece]:
        """Views of the state as it is now: a module may put a new tensor in a buffer's place."""
        found = []
        for name, parameter, flat, offset, start, count in self._trained():
            tensors = {"weight": flat.detach(), **_moments(self.optimizer, flat)}
            for kind, tensor in tensors.items():
                part = tensor.view(-1)[offset : offset + count]
                found.append(self._piece(kind, name, _shape(parameter), start, part, replicated=self.stage == 0))
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                found.append(self._frozen(name, parameter))
        persistent = self.model.state_dict().keys()
        for name, buffer in self.model.named_buffers():
            if name in persistent:
                whole = buffer.detach().view(-1)
                found.append(self._piece("buffer", name, tuple(buffer.shape), 0, whole, replicated=True))
        return [piece for piece in found if piece.tensor.numel()]

    def trained_weights(self) -> list[Piece]:
        """The weights among the pieces that the optimizer changes."""
        trained = {name for name, *_ in self._trained()}
        return [piece for piece in self.pieces() if piece.kind == "weight" and piece.name in trained]

    def steps(self) -> dict[str, int]:
        """Name → updates made, for every parameter of which the optimizer updates a piece on this rank."""
        return {name: int(self.optimizer.state[flat].get("step", 0)) for name, _, flat, *_ in self._trained()}

    def set_steps(self, steps: dict[str, int]) -> None:
        for name, _, flat, *_ in self._trained():
            state = self.optimizer.state[flat]
            if "step" not in state:  # SGD counts none
                continue
            if torch.is_tensor(state["step"]):
                state["step"].fill_(steps[name])
            else:  # DeepSpeedCPUAdam counts in an int
                state["step"] = steps[name]

    def refresh(self) -> None:
        """Makes what the model computes with equal to the fp32 masters, after those were set. On all ranks."""
        if self.stage in (1, 2):
            self.engine.optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer = self.engine.optimizer
            optimizer.checkpoint_event_prologue()  # what the last forward pass has gathered, and kept, would stay
            for _, parameter, flat, offset, *_ in self._trained():
                parameter.ds_tensor.data.copy_(flat.detach()[offset : offset + parameter.partition_numel()])
            optimizer.checkpoint_event_epilogue()  # small ones are gathered for good

    def _trained(self) -> Iterator[tuple[str, nn.Parameter, Tensor, int, int, int]]:
        """Of each trained parameter: name, itself, the fp32 tensor that the optimizer updates here, where in that the
        parameter's piece stands, where in the flattened parameter the piece begins, and its elements."""
        named = self.model.named_parameters()
        match self.stage:
            case 0:
                for name, parameter in named:
                    if parameter.requires_grad:
                        yield name, parameter, parameter, 0, 0, parameter.numel()
            case 1 | 2:  # a group of parameters is one flat tensor, of which a rank holds a contiguous part
                for name, parameter in named:
                    mapping = parameter._hp_mapping if parameter.requires_grad else None
                    if mapping is not None:
                        flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
                        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                        yield name, parameter, flat, here.start, there.start, here.numel
            case 3:  # a rank holds an equal part of each parameter, the last ones padded
                names = {parameter: name for name, parameter in named}
                optimizer = self.engine.optimizer
                for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
                    offset = 0
                    for parameter in group:
                        yield names[parameter], parameter, flat, offset, *_zero3_range(parameter)
                        offset += parameter.partition_numel()

    def _frozen(self, name: str, parameter: nn.Parameter) -> Piece:
        if self.stage < 3:
            return self._piece("weight", name, _shape(parameter), 0, parameter.detach().view(-1), replicated=True)
        start, count = _zero3_range(parameter)
        part = parameter.ds_tensor.detach().view(-1)[:count]
        return self._piece("weight", name, _shape(parameter), start, part, replicated=False)

    def _piece(self, kind: str, name: str, shape: tuple[int, ...], start: int, tensor: Tensor, replicated: bool):
        return Piece(f"{self.module}/{kind}/{name}", shape, start, tensor, replicated)


class Ema:
    """Exponential moving average of the trained weights, in fp32, sharded as they are written.

    After n updates the average is ``decay**n * first + sum_i (1 - decay) * decay**(n - i) * weight_i``.

    ``weights`` are those that this rank owns.
    """

    def __init__(self, weights: Sequence[Piece], decay: float):
        self.decay = decay
        self._weights = [piece.tensor for piece in weights]
        self._averages = [torch.empty_like(weight, dtype=torch.float32) for weight in self._weights]
        self.pieces = [
            replace(piece, key=piece.key.replace("/weight/", "/ema/", 1), tensor=average, replicated=False)
            for piece, average in zip(weights, self._averages, strict=True)
        ]

    @torch.no_grad()
    def start(self) -> None:
        """Begins at the weights as they are now."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def swap(self) -> None:
        """The averages are the weights, and the weights are kept where the averages were; again, and both are back to
        the bit. Needs room for one tensor more."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            assert weight.dtype == average.dtype, "rounded, a weight would not come back"
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def update(self) -> None:
        if self._averages:  # a rank may hold nothing but padding
            torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)


def owned(pieces: Iterable[Piece], rank: int, size: int) -> list[Piece]:
    """Those of this rank's ``pieces`` that it alone writes: over all ranks, each element of the state once.

    Replicated tensors are dealt whole, the largest first, each to the rank that has least so far.
    """
    pieces = list(pieces)
    mine = [piece for piece in pieces if not piece.replicated]
    return mine + [piece for piece, owner in dealt(pieces, size) if owner == rank]


def dealt(pieces: Iterable[Piece], size: int) -> list[tuple[Piece, int]]:
    """The replicated ones of ``pieces``, each with the rank that owns it: on all ranks the same."""
    load, found = [0] * size, []
    for piece in sorted((p for p in pieces if p.replicated), key=lambda p: (-p.tensor.nbytes, p.key)):
        least = load.index(min(load))
        load[least] += piece.tensor.nbytes
        found.append((piece, least))
    return found


def make_contiguous(model: nn.Module) -> None:
    """Puts the elements of every parameter and buffer in the order of its axes, of which pieces are views. In place:
    for models in channels-last memory, before an optimizer or an engine takes them."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _zero3_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Where this rank's part begins in the flattened parameter, and how many elements of it are not padding."""
    length = parameter.partition_numel()
    start = dist.get_rank(parameter.ds_process_group) * length
    return start, max(0, min(length, parameter.ds_numel - start))


def _moments(optimizer: Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of ``tensor`` that has its shape; made, as its first step would, where it is not there."""
    state = optimizer.state[tensor]
    if not state and not isinstance(optimizer, torch.optim.SGD):  # without momentum, SGD keeps nothing
        if isinstance(optimizer, torch.optim.Adam):
            device = tensor.device if optimizer.defaults["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        else:
            state["step"] = 0
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False)
    return {kind: value for kind, value in state.items() if torch.is_tensor(value) and value.shape == tensor.shape}


def elements(parameter: Tensor) -> int:
    """Of the whole parameter, also where DeepSpeed has split it among the ranks."""
    return getattr(parameter, "ds_numel", parameter.numel())
