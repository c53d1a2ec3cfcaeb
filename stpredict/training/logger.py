"""Metrics of a run: metrics.jsonl and TensorBoard, and W&B if asked for, written by rank 0."""

import json
import sys

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from stpredict.run import Run, now, write_atomically
from stpredict.training.histograms import EDGES, Histogram
from stpredict.training.wandb_sink import WandbSink


class MetricsLogger:
    """One line of metrics.jsonl and the same scalars in TensorBoard; pictures in TensorBoard."""

    def __init__(self, run: Run, from_step: int, wandb: WandbSink | None = None):
        self.wandb = wandb
        # A killed run repeats the steps since its last checkpoint: what it logged of them goes, here and there.
        kept = [json.dumps(row) + "\n" for row in run.metrics() if row["step"] <= from_step]
        write_atomically(run.metrics_path, "".join(kept))
        self.file = run.metrics_path.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(run.tensorboard), purge_step=from_step + 1)

    def scalars(self, split: str, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, "split": split, "time": now(), **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{split}/{name}", value, step)
        if self.wandb:
            self.wandb.scalars(split, step, values)

    def picture(self, name: str, step: int, frames: np.ndarray) -> None:
        """``frames`` uint8 (t, h, w, 3), shown as a strip of about eight of them."""
        shown = frames[:: max(1, len(frames) // 8)]
        strip = np.concatenate(list(np.pad(shown, ((0, 0), (0, 0), (0, 8), (0, 0)), constant_values=255)), axis=1)
        self.tensorboard.add_image(name, strip, step, dataformats="HWC")
        if self.wandb:
            self.wandb.picture(name, step, strip)

    def histogram(self, name: str, step: int, histogram: Histogram) -> None:
        edges = [*EDGES.tolist(), sys.float_info.max]
        filled = [number for number, count in enumerate(histogram.counts) if count]
        shown = slice(max(0, filled[0] - 1), filled[-1] + 1)  # with the lower end of the first
        self.tensorboard.add_histogram_raw(
            name,
            histogram.least,
            histogram.most,
            histogram.elements,
            histogram.sum,
            histogram.sum_of_squares,
            edges[shown],
            histogram.counts[shown],
            step,
        )

    def flush(self) -> None:
        self.tensorboard.flush()

    def close(self) -> None:
        if self.wandb:
            self.wandb.close()
        self.tensorboard.close()
        self.file.close()
