"""A run's progress: its step, losses and time so far."""

import math
import time
from typing import Any

from trainer.distributed import World

import torch
from torch import Tensor

COLUMNS = {"step": "d", "train_loss": ".6f", "val_loss": ".6f"}  # with their formats
COLUMNS |= {"learning_rate": ".6g", "tokens": "d", "seconds": ".2f"}
LINE = "step {step:5}   train {train_loss:.4f}   validation {val_loss:.4f}   {seconds:7.1f} s"


class History:
    """The step, the rows of losses.csv, and the losses since the last row."""

    def __init__(self) -> None:
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.loss_sum, self.loss_count = 0.0, 0.0  # over the batches since the last row
        self.started, self.seconds = time.perf_counter(), 0.0  # seconds: of earlier sessions
        self.last_loss = math.nan
        self.pending: list[tuple[int, float, Tensor]] = []  # step, fraction of its batch, loss

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("step", "rows", "loss_sum", "loss_count")}
        return state | {"seconds": time.perf_counter() - self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.started = time.perf_counter() - self.seconds

    @property
    def best(self) -> dict[str, float]:
        return min(self.rows, key=lambda row: row["val_loss"])

    def collect(self, world: World) -> tuple[int, float] | None:
        """Read the pending losses; return the step and loss of the first that is not finite."""
        if not self.pending:
            return None
        steps, fractions, losses = zip(*self.pending, strict=True)
        self.pending = []
        losses = (world.all_reduce(torch.stack(losses).cpu()) / world.size).tolist()
        for step, fraction, loss in zip(steps, fractions, losses, strict=True):
            if not math.isfinite(loss):
                return step, loss
            self.loss_sum += fraction * loss
            self.loss_count += fraction
        self.last_loss = losses[-1]
        return None

    def add_row(self, train_loss: float, val_loss: float, rate: float, tokens: int) -> None:
        row = {"step": self.step, "train_loss": train_loss, "val_loss": val_loss}
        row |= {"learning_rate": rate, "tokens": tokens}
        self.rows.append(row | {"seconds": time.perf_counter() - self.started})
        self.loss_sum, self.loss_count = 0.0, 0.0

    def last_line(self) -> str:
        is_best = len(self.rows) > 1 and self.rows[-1] is self.best
        return LINE.format(**self.rows[-1]) + ("  *" if is_best else "")


def losses_csv(rows: list[dict[str, float]]) -> bytes:
    lines = [COLUMNS, *([format(row[name], how) for name, how in COLUMNS.items()] for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines).encode("utf-8")
