"""Ablation study of modern_gpt.py: all of its ideas against all but one."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import modern_gpt
from comparison.curves import Theme, written
from comparison.runs import Row, Terms, TrainedRun
from comparison.table import Estimate, Result, Table, conditions, results_of

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

IDEAS = tuple(field.name for field in fields(modern_gpt.Config) if field.type is bool)
ALL = Row("modern_gpt", "nothing", "small")
WITHOUT_ANY = ALL._replace(new="all: gpt.py's model").changed(**dict.fromkeys(IDEAS, False))
EQUAL_STEPS = (
    ALL,
    *(ALL._replace(new=idea).changed(**{idea: False}) for idea in IDEAS),
    WITHOUT_ANY,
)
TENTHS = 10  # steps are counted in tenths: smaller differences in time cannot be measured reliably


def equal_seconds(step_times: dict[str, float], terms: Terms) -> tuple[Row, ...]:
    """The ablated models, trained for as many seconds as the model with all ideas.

    If that is the same number of steps, no second run is needed.
    """
    usual = terms.config(ALL)
    rows = []
    for row in EQUAL_STEPS if step_times else ():
        count = tenths(step_times, row.new)
        if count != TENTHS:
            names = ("max_iters", "eval_interval")
            steps = {name: max(1, usual[name] * count // TENTHS) for name in names}
            rows.append(row.changed(**steps))
    return tuple(rows)


def tenths(step_times: dict[str, float], left_out: str) -> int:
    """How many tenths of the usual steps fit into the usual time without an idea."""
    return round(TENTHS * step_times[ALL.new] / step_times[left_out])


@dataclass
class IdeaLine:
    """A model that lacks an idea, after equal steps and after equal seconds."""

    left_out: str
    parameters: int
    time: float | None  # of a step, relative to one with all ideas; None: not measured
    after_steps: Estimate
    after_seconds: Estimate | None  # None: these runs are missing
    increase_after_steps: Estimate | None = None  # over the loss with all ideas
    increase_after_seconds: Estimate | None = None


def idea_lines(results: Iterable[Result], step_times: dict[str, float]) -> list[IdeaLine]:
    groups: dict[tuple[str, bool], list[Result]] = {}  # by flags, and whether for equal seconds
    for result in results:
        flags, _, length = result.flags.partition(" --max-iters")
        groups.setdefault((flags, bool(length)), []).append(result)
    every = groups.get((ALL.flags, False), [])
    deviation = pooled_deviation(groups.values())
    lines = []
    for row in EQUAL_STEPS if every else ():
        runs = groups.get((row.flags, False))
        if not runs:
            continue
        as_many = step_times and tenths(step_times, row.new) == TENTHS
        longer = runs if as_many else groups.get((row.flags, True))
        line = IdeaLine(
            row.new,
            runs[0].parameters,
            step_times[row.new] / step_times[ALL.new] if step_times else None,
            estimate(runs),
            longer and estimate(longer),
        )
        if row != ALL:
            line.increase_after_steps = increase(runs, every, deviation)
            line.increase_after_seconds = longer and increase(longer, every, deviation)
        lines.append(line)
    return lines


class Ideas(NamedTuple):
    """What a comparison of ideas shows."""

    lines: list[IdeaLine]
    notes: list[str]


def compare_ideas(
    groups: dict[Row, list[TrainedRun]], step_times: dict[str, float]
) -> Ideas | None:
    """None if there are not even two models to compare."""
    lines = idea_lines(results_of(groups), step_times)
    return Ideas(lines, idea_notes(lines, groups)) if len(lines) > 1 else None


def losses(runs: list[Result]) -> list[float]:
    return [run.val_loss for run in runs]


def estimate(runs: list[Result]) -> Estimate:
    values = losses(runs)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.mean(values), deviation)


def pooled_deviation(groups: Iterable[list[Result]]) -> float | None:
    """The standard deviation over seeds, pooled over all groups, because each one is small."""
    groups = [losses(runs) for runs in groups if len(runs) > 1]
    if not groups:
        return None
    squares = sum((len(values) - 1) * statistics.variance(values) for values in groups)
    return math.sqrt(squares / sum(len(values) - 1 for values in groups))


def increase(runs: list[Result], every: list[Result], deviation: float | None) -> Estimate:
    """How much higher the loss is than with all ideas, and the standard error of that."""
    error = deviation and deviation * math.sqrt(1 / len(runs) + 1 / len(every))
    return Estimate(estimate(runs).value - estimate(every).value, error)


def idea_table(lines: list[IdeaLine]) -> Table:
    columns = {
        "left out": lambda line: line.left_out,
        "parameters": lambda line: f"{line.parameters:,}",
        "after equal steps": lambda line: line.after_steps,
        "increase, equal steps": lambda line: signed(line.increase_after_steps),
        "relative time": lambda line: f"{line.time:.2f}" if line.time else "",
        "after equal seconds": lambda line: line.after_seconds or "",
        "increase, equal seconds": lambda line: signed(line.increase_after_seconds),
    }
    return [list(columns)] + [[str(column(line)) for column in columns.values()] for line in lines]


def signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else ("" if estimate.value < 0 else "+") + str(estimate)


def idea_notes(lines: list[IdeaLine], groups: dict[Row, list[TrainedRun]]) -> list[str]:
    """What a reader must know of the table, and what it shows."""
    many = any(line.after_steps.uncertainty is not None for line in lines)
    steps = groups[ALL][0].config["max_iters"]
    return [
        conditions(groups),
        f"{ALL.command} takes {steps:,} steps. Each model without an idea is trained for the same "
        "number of steps and, in a second run, for the same time, to the nearest tenth of the "
        "steps. Relative time is time per step; timing alternates between models.",
        "Validation loss at a run's best evaluation"
        + ("; mean ± standard deviation. " if many else ". ")
        + "Increase: over the loss with all ideas"
        + ("; ± its standard error, from the standard deviation in all rows." if many else "."),
        "Sizes and learning rates were chosen for the model with all ideas and are the same in all "
        "rows. The increase is what an idea contributes on top of the others; the model without "
        "any of them would do better with its own learning rates.",
        *verdicts(lines),
    ]


def verdicts(lines: list[IdeaLine]) -> list[str]:
    """Which ideas made a difference, as far as several seeds can show."""
    lowered, raised, nothing = [], [], []
    for line in lines:
        increase = line.increase_after_seconds
        if line.left_out in IDEAS and increase and increase.uncertainty is not None:
            is_sure = abs(increase.value) > 2 * increase.uncertainty
            kind = nothing if not is_sure else lowered if increase.value > 0 else raised
            kind.append(line.left_out)
    endings = {
        "These lowered the loss after equal seconds by more than two standard errors": lowered,
        "These raised it": raised,
        "No difference shown at this size with these seeds": nothing,
    }
    return [f"{words}: {', '.join(ideas)}." for words, ideas in endings.items() if ideas]


def idea_picture(lines: list[IdeaLine], theme: Theme, format: str) -> bytes:
    """The loss that each idea saves: a dot for equal steps, a ring for equal seconds."""
    shown = [line for line in lines if line.increase_after_steps]
    with matplotlib.rc_context(theme.style()):
        figure = Figure(figsize=(7.6, 0.42 * len(shown) + 1.4), layout="constrained")
        draw(figure.subplots(), shown, theme)
        return written(figure, format)


def draw(panel: Axes, lines: list[IdeaLine], theme: Theme) -> None:
    color = theme.color("gpt")
    kinds = {
        "equal steps": ("increase_after_steps", -0.13, color),
        "equal seconds": ("increase_after_seconds", 0.13, theme.background),
    }
    for kind, (name, offset, inside) in kinds.items():
        points = {i: value for i, line in enumerate(lines) if (value := getattr(line, name))}
        panel.errorbar(
            [value.value for value in points.values()],
            [i + offset for i in points],
            xerr=[2 * (value.uncertainty or 0) for value in points.values()],
            fmt="o",
            color=color,
            markerfacecolor=inside,
            markersize=7,
            elinewidth=1.5,
            label=f"after {kind}",
            gid=kind.replace(" ", "-"),
        )
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    panel.axvline(0, color=theme.ink, linewidth=1)
    panel.set_yticks(range(len(lines)), [f"without {line.left_out}" for line in lines])
    panel.invert_yaxis()
    bars = "; bars: two standard errors" if lines[0].after_steps.uncertainty is not None else ""
    panel.set_xlabel(f"increase in validation loss\n(nats per character{bars})")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(length=0)
    panel.grid(axis="x", color=theme.faint, linewidth=0.6)
    panel.set_axisbelow(True)
