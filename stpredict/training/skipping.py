"""How a step is left out without a trace, at every ZeRO stage: no weight, moment, step count or buffer changes, and no
gradient is left for the next one."""

from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor, nn


class Skippable:
    """The update of a DeepSpeed engine of any ZeRO stage.

    ZeRO's optimizers skip a step, on all ranks, whose global gradient norm is not finite (of ZeRO-1 and 2 only if asked
    to); here they are also made to skip one because we say so. Stage 0 is torch's optimizer, which checks nothing.
    """

    def __init__(self, engine):
        self.engine = engine
        self.skip = False
        self.norm = 0.0
        self._nan = torch.full((), torch.nan, device=engine.device)
        self._checked = hasattr(engine.optimizer, "overflow")  # by DeepSpeed
        if self._checked:
            self._install(engine.optimizer)
        else:
            engine.clip_fp32_gradients = self._clip  # DeepSpeed's computes the norm again, and fails without gradients

    def step(self, skip: bool) -> bool:
        """The update that follows the last backward of a step, unless ``skip``, or its gradient is not finite. Returns
        whether it was made; ``norm`` is that of the gradient before clipping."""
        self.skip = skip
        if self._checked:
            self.engine.step()
            self.norm = float(self.engine.get_global_grad_norm())
            applied = self.engine.was_step_applied()
            if not applied and getattr(self.engine.optimizer, "cpu_offload", False):  # ZeRO-1 and 2
                # DeepSpeed keeps this sum, to which the next step would add its gradient.
                averaged = self.engine.optimizer.averaged_gradients
                averaged.update(dict.fromkeys(averaged))
            return applied
        if self.engine.torch_autocast_z0_gradscaler:  # fp16
            self.engine.torch_autocast_z0_gradscaler.unscale_(self.engine.optimizer)
        self._total = torch.nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None])
        self.norm = float(self._total)
        self.skip = skip or not isfinite(self.norm)
        if self.skip:
            self.engine.module.zero_grad(set_to_none=True)  # what has no gradient is not updated
        self.engine.step()
        return not self.skip

    def _clip(self) -> None:
        """What DeepSpeed calls in ``step`` where it is to clip."""
        torch.nn.utils.clip_grads_with_norm_(self._parameters(), self.engine.gradient_clipping(), self._total)

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.engine.module.parameters())

    def _install(self, optimizer) -> None:
        """Has ``optimizer`` ask us before an update (DeepSpeed 0.19)."""
        if hasattr(optimizer, "_overflow_check_and_loss_scale_update"):  # ZeRO-3
            check = optimizer._overflow_check_and_loss_scale_update

            def asked(update_scale: bool = True) -> bool:
                check(update_scale)
                optimizer.overflow = optimizer.overflow or self.skip
                return optimizer.overflow

            optimizer._overflow_check_and_loss_scale_update = asked
        elif hasattr(optimizer, "check_overflow"):  # ZeRO-1 and 2
            check, fp16 = optimizer.check_overflow, self.engine.fp16_enabled()

            def asked(partition_gradients: bool = True) -> None:
                optimizer.overflow = self.skip
                if fp16 and not self.skip:
                    check(partition_gradients)

            # In fp32 and bf16 the norm, computed anyhow, tells what `check` would read all gradients for.
            optimizer.check_grad_overflow = True
            optimizer.check_overflow = asked
        elif hasattr(optimizer, "get_grads_for_norm"):  # ZeRO-1 in bf16
            gradients = optimizer.get_grads_for_norm

            def asked(for_clipping: bool = False):
                return ([self._nan], {}) if self.skip else gradients(for_clipping)

            optimizer.get_grads_for_norm = asked
        else:
            raise TypeError(f"no way is known to skip a step of {type(optimizer).__name__}")


class Buffers:
    """The buffers of ``modules`` as they were at the beginning of a step: a forward pass that went wrong may have put
    what is not a number into running statistics or a codebook, for good."""

    def __init__(self, modules: Iterable[nn.Module]):
        parts = [module for whole in modules for module in whole.modules()]
        self._places = [
            (module, name)
            for module in parts
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        self._before: list[Tensor] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        self._before = [module._buffers[name] for module, name in self._places]
        if [buffer.shape for buffer in self._before] != [copy.shape for copy in self._copies]:
            self._copies = [torch.empty_like(buffer) for buffer in self._before]
        if self._copies:
            torch._foreach_copy_(self._copies, self._before)

    @torch.no_grad()
    def put_back(self) -> None:
        for (module, name), buffer, copy in zip(self._places, self._before, self._copies, strict=True):
            module._buffers[name] = buffer.copy_(copy)  # the module may have put a new tensor in its place
