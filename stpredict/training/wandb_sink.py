"""The same scalars and pictures in Weights & Biases, beside metrics.jsonl and TensorBoard. Written by rank 0."""

import importlib.util
from secrets import token_hex
from typing import Any

import numpy as np

from data_pipeline.errors import UsageError, UserError
from stpredict.run import Run, write_atomically
from stpredict.training.config import WandbConfig

OFFLINE = "training.wandb.mode=offline writes to the run directory, to be sent later with `wandb sync`"


def check_wandb(config: WandbConfig) -> None:
    """UsageError where W&B is not installed, or not whole, or its server is asked for and nobody has logged in."""
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder of that name, which W&B leaves where it is used, is no package
        raise UsageError("training.wandb: W&B is not installed; pip install 'stpredict[wandb]', or leave that key out")
    try:
        import wandb
    except ImportError as error:
        raise UsageError(f"training.wandb: W&B cannot be imported ({error}); pip install 'stpredict[wandb]'") from error
    if config.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UsageError(f"training.wandb: not logged in; run `wandb login`, or set WANDB_API_KEY; {OFFLINE}")


class WandbSink:
    """A run of W&B whose id is kept in RUN/wandb/id: a training that continues goes on writing to the same one.

    W&B's own step only grows, while a training killed repeats steps since its last checkpoint. So the step is a value
    like others, and the axis that W&B draws them over.
    """

    def __init__(self, run: Run, config: WandbConfig, settings: dict[str, Any]):
        import wandb

        self._wandb = wandb
        id_path = run.path / "wandb" / "id"
        if not id_path.is_file():
            id_path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(id_path, token_hex(8))
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or run.path.resolve().name,
                group=config.group,
                tags=config.tags,
                mode=config.mode,
                dir=str(run.path),
                id=id_path.read_text(),
                resume="allow",
                config=settings,
                settings=wandb.Settings(silent=True, console="off"),  # the log has its files; signals are ours
            )
        except wandb.Error as error:
            raise UserError(f"training.wandb: {error}; {OFFLINE}") from error
        self._run.define_metric("*", step_metric="step")

    def scalars(self, split: str, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **{f"{split}/{name}": value for name, value in values.items()}})

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        """``picture`` uint8 (h, w, 3)."""
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self) -> None:
        """When it returns all is on disk, or sent: W&B's own process, which writes it, has ended."""
        self._run.finish()
        self._wandb.teardown()
