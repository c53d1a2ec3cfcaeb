"""Ending a training that validation says is no longer getting better. Torch-free."""

from math import isnan

from pydantic import BaseModel, ConfigDict

from stpredict.training.config import EarlyStoppingConfig


class Waiting(BaseModel):
    """Of ``metric``: the ``best`` value so far, the step it was validated at, and the validations since. A part of
    every checkpoint, so that a resumed training stops where an uninterrupted one does."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    metric: str
    mode: str
    best: float | None = None
    step: int = 0
    since: int = 0


class EarlyStopping:
    """Told every validation, it says when ``config.patience`` of them in a row were not better than the best before by
    more than ``config.min_delta``. A value that is no number is never better."""

    def __init__(self, config: EarlyStoppingConfig):
        self.config = config
        self.waiting = Waiting(metric=config.metric, mode=config.mode)

    def go_on_from(self, waiting: Waiting | None) -> None:
        """What a checkpoint says; it begins anew where that was about another metric, or none."""
        anew = Waiting(metric=self.config.metric, mode=self.config.mode)
        same = waiting is not None and (waiting.metric, waiting.mode) == (anew.metric, anew.mode)
        self.waiting = waiting.model_copy() if same else anew

    def judge(self, step: int, metrics: dict[str, float]) -> None:
        value, now = metrics[self.config.metric], self.waiting
        gain = None if now.best is None else (value - now.best) * (1 if now.mode == "max" else -1)
        if not isnan(value) and (gain is None or gain > self.config.min_delta):
            self.waiting = now.model_copy(update={"best": value, "step": step, "since": 0})
        else:
            self.waiting = now.model_copy(update={"since": now.since + 1})

    @property
    def over(self) -> bool:
        return self.waiting.since >= self.config.patience

    @property
    def reason(self) -> str:
        now = self.waiting
        delta = f" by more than {self.config.min_delta:g}" if self.config.min_delta else ""
        best = "no value at all" if now.best is None else f"none better than {now.best:.4g} of step {now.step}{delta}"
        return f"{now.metric} of the last {now.since} validations: {best}"
