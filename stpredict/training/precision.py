"""Which floating-point type to compute in, in which to add up gradients, and the scale of an fp16 loss."""

import torch
from torch.amp.grad_scaler import OptState

from data_pipeline.errors import UsageError
from stpredict.training.config import TrainingConfig

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES = {name: dtype for dtype, name in NAMES.items()}
BYTES = {name: dtype.itemsize for name, dtype in TYPES.items()}  # of one element


def cpu_bf16_is_real() -> bool:
    """Whether this CPU multiplies bf16 itself. Where it does not, a bf16 convolution is 30 times slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_fp16_is_real() -> bool:
    """As DeepSpeed asks."""
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def resolve_precision(training: TrainingConfig, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on CUDA and on CPUs whose bf16 is real, else fp32; the others are what they say.

    UsageError where the device has no such type, or gradients are to be added up in one that does not go with it.
    """
    name = training.precision
    if name == "auto":
        name = "bf16" if device.type == "cuda" or cpu_bf16_is_real() else "fp32"
    if name == "fp16" and device.type == "cpu" and not cpu_fp16_is_real():
        raise UsageError("training.precision fp16: this CPU does not compute in fp16; use bf16, fp32 or auto")
    _check_accumulation(training.accumulation_dtype, name, training.zero_stage)
    return TYPES[name]


def _check_accumulation(accumulation: str, precision: str, zero_stage: int) -> None:
    if accumulation == "fp32":
        return
    where = f"training.accumulation_dtype {accumulation}"
    if accumulation != precision:
        use = precision if precision == "fp32" else f"fp32 or {precision}"
        raise UsageError(f"{where} does not go with training.precision {precision}; use {use}")
    if zero_stage == 0:
        raise UsageError(f"{where}: ZeRO-0 has fp32 weights, and their gradients are fp32; use zero_stage 1, 2 or 3")


class GradScaler(torch.amp.GradScaler):
    """torch's, whose gradients may be unscaled before DeepSpeed, which clips them, asks for it."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        if self._per_optimizer_states[id(optimizer)]["stage"] is not OptState.UNSCALED:
            super().unscale_(optimizer)


class LossScale:
    """What the loss is multiplied by, so that small gradients survive in fp16: halved by overflows, each of which makes
    its step void, and doubled after many steps without.

    The state is the same at every ZeRO stage: ``scale``, ``steps`` since the last overflow and, where DeepSpeed scales
    (ZeRO 1 to 3), ``hysteresis``: the next overflow but ``hysteresis`` - 1 halves the scale.
    """

    def __init__(self, engine):
        self._scaler = engine.torch_autocast_z0_gradscaler or engine.optimizer.loss_scaler

    def state(self) -> dict[str, float]:
        if isinstance(self._scaler, torch.amp.GradScaler):
            return {"scale": self._scaler.get_scale(), "steps": self._scaler.state_dict()["_growth_tracker"]}
        steps = self._scaler.cur_iter - self._scaler.last_overflow_iter - 1
        return {"scale": self._scaler.cur_scale, "steps": steps, "hysteresis": self._scaler.cur_hysteresis}

    @property
    def scale(self) -> float:
        return self.state()["scale"]

    def lowered_since(self, before: dict[str, float]) -> bool:
        """Whether an overflow has lowered the scale or its ``hysteresis`` since ``state`` was ``before``."""
        now = self.state()
        return any(now[name] < before[name] for name in ("scale", "hysteresis") if name in now)

    def restore(self, state: dict[str, float]) -> None:
        steps = int(state["steps"])
        if isinstance(self._scaler, torch.amp.GradScaler):
            steps %= self._scaler.get_growth_interval()
            state = {"scale": state["scale"], "_growth_tracker": steps}
            self._scaler.load_state_dict(self._scaler.state_dict() | state)
        else:
            self._scaler.cur_scale = state["scale"]
            self._scaler.cur_iter, self._scaler.last_overflow_iter = steps, -1
            self._scaler.cur_hysteresis = int(state.get("hysteresis", self._scaler.cur_hysteresis))
