"""The table of a comparison: from the best evaluation of each run to a line per stage."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from comparison.runs import ROWS, STAGES, Row, TrainedRun


class Result(NamedTuple):
    """The result of one run: a row of the comparison's losses.csv."""

    stage: str
    flags: str
    seed: int
    parameters: int
    step: int  # of its best evaluation, like the two losses
    train_loss: float
    val_loss: float
    tokens: int  # of the whole run, like the seconds
    seconds: float


def results_of(groups: dict[Row, list[TrainedRun]]) -> list[Result]:
    return [
        Result(
            row.stage,
            row.flags,
            run.seed,
            run.parameters,
            *(run.best[name] for name in ("step", "train_loss", "val_loss")),
            *(run.rows[-1][name] for name in ("tokens", "seconds")),
        )
        for row, runs in groups.items()
        for run in runs
    ]


def results_csv(results: list[Result]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([Result._fields, *results])
    return text.getvalue().encode("utf-8")


def read_results(path: Path) -> list[Result]:
    """What results_csv wrote."""
    types = Result.__annotations__.values()
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Result(*(kind(cell) for kind, cell in zip(types, row, strict=True))) for row in rows]


class Estimate(NamedTuple):
    """A number and its uncertainty, which one run alone cannot show."""

    value: float
    uncertainty: float | None

    def __str__(self) -> str:
        uncertainty = "" if self.uncertainty is None else f" ± {self.uncertainty:.3f}"
        return f"{self.value:.3f}{uncertainty}"


@dataclass
class Line:
    """A stage or a variant: the mean over its runs."""

    row: Row
    seeds: list[int]
    losses: list[float]
    parameters: int
    train_loss: float
    seconds: float
    speed: float  # characters per second
    before: Row | None = None  # the stage that it improves on
    improvement: Estimate | None = None

    @property
    def loss(self) -> Estimate:
        """Mean and standard deviation of the validation losses."""
        return Estimate(
            statistics.mean(self.losses),
            statistics.stdev(self.losses) if len(self.losses) > 1 else None,
        )

    @property
    def skips(self) -> bool:
        """Whether `before` is not the stage just before, or has another preset."""
        if not self.before:
            return False
        presets = {self.row.preset, self.before.preset} - {""}
        distance = STAGES.index(self.row.stage) - STAGES.index(self.before.stage)
        return distance != 1 or len(presets) > 1


def lines_of(results: Iterable[Result]) -> list[Line]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.stage, result.flags), []).append(result)
    lines: list[Line] = []
    for row in ROWS:
        if runs := groups.get((row.stage, row.flags)):
            line = Line(
                row,
                seeds=[run.seed for run in runs],
                losses=[run.val_loss for run in runs],
                parameters=runs[0].parameters,
                train_loss=statistics.mean(run.train_loss for run in runs),
                seconds=statistics.mean(run.seconds for run in runs),
                speed=sum(run.tokens for run in runs) / max(1e-9, sum(run.seconds for run in runs)),
            )
            if before := stage_before(row, lines):
                line.before = before.row
                line.improvement = improvement(before.losses, line.losses)
            lines.append(line)
    return lines


def stage_before(row: Row, lines: list[Line]) -> Line | None:
    """What a stage is compared with, and each of its variants too."""
    others = [each for each in lines if each.row.stage != row.stage]
    stages = [each for each in others if not each.row.is_variant]
    alike = [each for each in stages if each.row.preset == row.preset]
    return (alike or stages or [None])[-1]


def improvement(before: list[float], after: list[float]) -> Estimate:
    """The difference of two means, and its standard error if all runs are independent."""
    difference = statistics.mean(before) - statistics.mean(after)
    if min(len(before), len(after)) < 2:
        return Estimate(difference, None)
    variances = (statistics.variance(losses) / len(losses) for losses in (before, after))
    return Estimate(difference, math.sqrt(sum(variances)))


Table = list[list[str]]  # the headings, then a row for each line
TEXT_COLUMNS = ("run", "what is new", "left out")  # the others hold numbers
DROPPED_FIRST = (
    *("what is new", "characters per second", "bits per character", "train loss", "parameters"),
    *("seconds to train", "relative time", "after equal steps"),
)


def table(lines: list[Line], entropy: float | None = None) -> Table:
    """`entropy` is that of the text, if it is known."""
    columns: dict[str, Callable[[Line], object]] = {
        "run": lambda line: line.row.command,
        "what is new": lambda line: line.row.new,
        "parameters": lambda line: f"{line.parameters:,}",
        "validation loss": lambda line: line.loss,
        "improvement": lambda line: line.improvement or "",
        "train loss": lambda line: f"{line.train_loss:.3f}",
        "bits per character": lambda line: f"{line.loss.value / math.log(2):.3f}",
        "seconds to train": lambda line: f"{line.seconds:,.1f}",
        "characters per second": lambda line: f"{line.speed:,.0f}",
    }
    if entropy:
        columns["above the entropy"] = lambda line: f"{line.loss.value - entropy:.3f}"
    return [list(columns)] + [[str(column(line)) for column in columns.values()] for line in lines]


def conditions(groups: dict[Row, list[TrainedRun]]) -> str:
    """How the runs were made, and which of them lack a seed."""
    runs = [run for runs in groups.values() for run in runs]
    seeds = {row.name: ", ".join(str(run.seed) for run in runs) for row, runs in groups.items()}
    most = max(seeds.values(), key=list(seeds.values()).count)
    others = "".join(f"; {name}: {has}" for name, has in seeds.items() if has != most)
    word = "seeds" if "," in most else "seed"
    pytorch = ", ".join(sorted({run.torch for run in runs}))
    dtypes = ", ".join(sorted({run.dtype for run in runs}))
    return (
        f"Trained on {runs[0].corpus} with PyTorch {pytorch} on {runs[0].device}, in {dtypes}; "
        f"{word} {most}{others}."
    )


def notes(lines: list[Line], groups: dict[Row, list[TrainedRun]]) -> list[str]:
    """What a reader must know of the table, a sentence or two at a time."""
    many = any(line.loss.uncertainty for line in lines)
    skips = [f"; {each.row.name} over {each.before.name}" for each in lines if each.skips]
    return [
        conditions(groups),
        "Validation loss: nats per character over the whole validation split, at a run's best "
        f"evaluation{'; mean ± standard deviation over the seeds' if many else ''}. Train loss: "
        "over the batches just before it.",
        f"Improvement: over the stage before, for variants too{''.join(dict.fromkeys(skips))}"
        f"{'; ± the standard error of the difference' if many else ''}.",
        "Seconds include evaluations but not start-up. Runs that compare.py trains in parallel "
        "share the CPU cores and, for the small stages, the GPU.",
    ]


def as_markdown(table: Table) -> str:
    headings, *rows = table
    rule = ["---" if heading in TEXT_COLUMNS else "---:" for heading in headings]
    if headings[0] == "run":
        rows = [[f"`{row[0]}`", *row[1:]] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, rule, *rows]) + "\n"


def as_text(table: Table, width: int) -> str:
    """For a terminal: drops columns that do not fit, the least important first."""
    for heading in DROPPED_FIRST:
        if heading not in table[0]:
            continue
        if len(text_lines(table)[0]) <= width:
            break
        i = table[0].index(heading)
        table = [row[:i] + row[i + 1 :] for row in table]
    return "\n".join(line.rstrip() for line in text_lines(table)) + "\n"


def text_lines(table: Table) -> list[str]:
    """All equally long; headings of numbers have one word per line."""
    height = max(len(heading.split()) for heading in table[0])
    columns = []
    for heading, *cells in zip(*table, strict=True):
        is_text = heading in TEXT_COLUMNS
        words = [heading] if is_text else heading.split()
        cells = [""] * (height - len(words)) + words + cells
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in cells])
    lines = ["  ".join(row) for row in zip(*columns, strict=True)]
    return [*lines[:height], "-" * len(lines[0]), *lines[height:]]
