"""The table of a comparison: a row for runs that differ only in their seed."""

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from comparison.runs import TrainedRun

from tabulate import tabulate


class Estimate(NamedTuple):
    """A number and its uncertainty, which a single run cannot show."""

    value: float
    error: float | None = None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.3f}"
        value = f"{self.value:.3f}".replace("-", "−")
        return ("0.000" if value == "−0.000" else value) + error

    @property
    def is_clear(self) -> bool:
        """Whether it differs from 0 by more than two standard errors."""
        return self.error is not None and abs(self.value) > 2 * self.error


@dataclass
class Row:
    """Runs that differ only in their seed."""

    runs: list[TrainedRun]
    name: str  # its command, without the flags that all rows have in common
    baseline: "Row | None" = None  # what its improvement is measured against
    is_variant: bool = False  # another version of the stage above, not a stage of its own
    ensemble_loss: float | None = None  # of the averaged predictions of its runs

    @property
    def stage(self) -> str:
        return self.runs[0].stage

    @property
    def preset(self) -> str:
        return next((each for each in self.runs[0].flags if each.startswith("--preset")), "")

    @property
    def finished(self) -> list[TrainedRun]:
        return [run for run in self.runs if run.is_finished]

    @property
    def losses(self) -> dict[int, float]:
        """The best validation loss of each seed; of unfinished runs only if there are no others."""
        return {run.seed: run.best["val_loss"] for run in self.finished or self.runs}

    @property
    def loss(self) -> Estimate:
        return over_seeds([*self.losses.values()])

    @property
    def final_loss(self) -> Estimate:
        """The loss at the end of training, which involves no selection of an evaluation."""
        return over_seeds([run.rows[-1]["val_loss"] for run in self.finished or self.runs])

    @property
    def improvement(self) -> Estimate | None:
        """How much lower the loss is than the baseline's, paired by seed."""
        if not (self.baseline and self.finished and self.baseline.finished):
            return None
        before, after = self.baseline.losses, self.losses
        pairs = [before[seed] - after[seed] for seed in sorted(before.keys() & after.keys())]
        if not pairs:
            return None
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if pairs[1:] else None
        return Estimate(statistics.mean(pairs), error)

    @property
    def step_time(self) -> float:
        """Seconds per step, with evaluations, where training was fastest: other work slows it."""
        pairs = [pair for run in self.runs for pair in itertools.pairwise(run.rows)]
        return min(
            ((b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs),
            default=math.nan,
        )

    def mean(self, value: Callable[[TrainedRun], float]) -> float:
        return statistics.mean(map(value, self.runs))


def over_seeds(losses: list[float]) -> Estimate:
    """Mean and standard deviation."""
    return Estimate(statistics.mean(losses), statistics.stdev(losses) if losses[1:] else None)


def rows_of(runs: Iterable[TrainedRun]) -> list[Row]:
    """Group runs that differ only in their seed, in the order in which they come."""
    groups: dict[tuple, list[TrainedRun]] = {}
    for run in runs:
        group = groups.setdefault(run.key, [])
        if run.seed not in [other.seed for other in group]:  # a run listed twice counts once
            group.append(run)
    common = common_flags(group[0] for group in groups.values())
    return [
        Row(runs, " ".join([key[0], *(each for each in runs[0].flags if each not in common)]))
        for key, runs in groups.items()
    ]


def common_flags(runs: Iterable[TrainedRun]) -> list[str]:
    """The flags that all runs have in common, except for a preset."""
    runs = list(runs)
    flags = [each for each in runs[0].flags if not each.startswith("--preset")] if runs[1:] else []
    return [each for each in flags if all(each in run.flags for run in runs)]


Table = list[list[str]]  # the headings, then the rows
TEXT_COLUMNS = ("run", "device", "dtype")  # the others hold numbers


def table(rows: list[Row], entropy: float | None = None) -> Table:
    """Leaves out columns in which all rows are equal; `entropy` is the text's, if it is known."""
    over_first = all(row.baseline is rows[0] for row in rows[1:])
    unit = rows[0].step_time or math.nan if over_first else 0.001
    columns: dict[str, Callable[[Row], object]] = {
        "run": lambda row: row.name,
        "validation loss": lambda row: row.loss if row.finished else progress(row),
        "improvement": lambda row: row.improvement or "",
        "bits per character": lambda row: f"{row.loss.value / math.log(2):.3f}",
        "final loss": lambda row: row.final_loss,
        "ensemble loss": lambda row: f"{row.ensemble_loss:.3f}" if row.ensemble_loss else "",
        "relative time" if over_first else "ms per step": lambda row: f"{row.step_time / unit:.2f}",
        "train loss": lambda row: f"{row.mean(lambda run: run.best['train_loss']):.3f}",
        "parameters": lambda row: f"{row.runs[0].about['parameters']:,}",
        "seconds to train": lambda row: f"{row.mean(lambda run: run.rows[-1]['seconds']):,.1f}",
        "device": lambda row: row.runs[0].about["device"],
        "dtype": lambda row: row.runs[0].about["dtype"],
    }
    if entropy:
        columns["above the entropy"] = lambda row: f"{row.loss.value - entropy:.3f}"
    cells = {name: [str(column(row)) for row in rows] for name, column in columns.items()}
    always = ("run", "validation loss")
    shown = [name for name in cells if name in always or len({*cells[name]}) > 1]
    return [shown, *map(list, zip(*(cells[name] for name in shown), strict=True))]


def progress(row: Row) -> str:
    run = row.runs[0]
    doing = "training" if run.is_training else "stopped"
    return f"{row.loss} ({doing}, step {run.rows[-1]['step']:,} of {run.config['max_iters']:,})"


def notes(rows: list[Row]) -> list[str]:
    """What a reader needs to know about the table."""
    runs = [run for row in rows for run in row.runs]
    seeds = {row.name: ", ".join(map(str, row.losses)) for row in rows}
    most = max(seeds.values(), key=[*seeds.values()].count)
    others = [f"{name} {has}" for name, has in seeds.items() if has != most]
    baselines = {row.baseline.name for row in rows if row.improvement}
    over = f"over {[*baselines][0]}" if len(baselines) == 1 else "over the previous stage"
    unclear = [row.name for row in rows if (x := row.improvement) and x.error and not x.is_clear]
    unfinished = [
        f"{run.folder} (step {run.rows[-1]['step']})" for run in runs if not run.is_finished
    ]
    pytorch = ", ".join(sorted({run.about["versions"]["torch"] for run in runs}))
    flags = "".join(f", {each}" for each in common_flags(row.runs[0] for row in rows))
    remarks = {
        f"Trained on {runs[0].about['corpus']['name']} with PyTorch {pytorch}{flags}": True,
        f"Seeds: {'; '.join([most, *others])}": True,
        "Validation loss: nats per character over the whole validation split, at the best "
        "evaluation; ± standard deviation over the seeds": True,
        f"Improvement: {over}; ± standard error over pairs with the same seed": baselines,
        "Final loss: at the end of training": True,
        "Ensemble loss: of the averaged predictions of all seeds": any(
            row.ensemble_loss for row in rows
        ),
        f"No difference shown (below two standard errors): {', '.join(unclear)}": unclear,
        f"Unfinished, used only where a row has no other runs: {', '.join(unfinished)}": unfinished,
    }
    return [f"{remark}." for remark, applies in remarks.items() if applies]


def as_csv(table: Table) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue().encode("utf-8")


def as_markdown(table: Table) -> str:
    headings, *rows = table
    return layout([headings, *([f"`{row[0]}`", *row[1:]] for row in rows)], "pipe") + "\n"


def as_text(table: Table, width: int) -> str:
    """For a terminal: columns that do not fit are left out, the last first."""
    while True:
        headings, *rows = table
        text = layout([[each.replace(" ", "\n") for each in headings], *rows], "simple")
        if len(table[0]) <= 3 or max(map(len, text.splitlines())) <= width:
            return text + "\n"
        table = [row[:-1] for row in table]


def layout(table: Table, form: str) -> str:
    sides = ["left" if heading in TEXT_COLUMNS else "right" for heading in table[0]]
    return tabulate(table[1:], table[0], form, colalign=sides, disable_numparse=True)


FIELDS = ("stage", "flags", "seed", "parameters", "step", "train_loss", "val_loss", "final_loss")


def results_csv(rows: list[Row]) -> bytes:
    """A line for each run: the losses at its best evaluation, then the values at its end."""
    lines = [[*FIELDS, "tokens", "seconds"]]
    for run in (run for row in rows for run in row.finished):
        own = [run.stage, " ".join(run.flags), run.seed, run.about["parameters"]]
        best = [run.best[name] for name in ("step", "train_loss", "val_loss")]
        last = [run.rows[-1][name] for name in ("val_loss", "tokens", "seconds")]
        lines.append([*own, *best, *last])
    return as_csv(lines)
