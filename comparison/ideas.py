"""What each idea of modern_gpt.py buys: all of them against all but one."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, get_args

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparison.curves import Theme, written
from comparison.runs import Rung, Terms, TrainedRun
from comparison.table import Estimate, Result, Table, conditions, results_of
from modern_gpt import Idea

IDEAS = get_args(Idea)
ALL = Rung("modern_gpt", "--preset small", "nothing")
EQUAL_STEPS = (
    ALL,
    *(Rung(ALL.stage, f"{ALL.flags} --without {idea}", idea) for idea in IDEAS),
    Rung(ALL.stage, f"{ALL.flags} --without all", "all: gpt.py's model"),
)
SHARES = 10  # steps are counted in tenths: smaller differences in time are hardly to be measured


def equal_seconds(step_times: dict[str, float], terms: Terms) -> tuple[Rung, ...]:
    """What goes without an idea for as long, not for as many steps, as all ideas take.

    Where that is the same number of steps, the same run serves.
    """
    usual = terms.config(ALL)
    rungs = []
    for rung in EQUAL_STEPS if step_times else ():
        share = shares(step_times, rung.new)
        steps, interval = (
            max(1, usual[name] * share // SHARES) for name in ("max_iters", "eval_interval")
        )
        if steps != usual["max_iters"]:
            flags = f"{rung.flags} --max-iters {steps} --eval-interval {interval}"
            rungs.append(Rung(rung.stage, flags, rung.new))
    return tuple(rungs)


def shares(step_times: dict[str, float], left_out: str) -> int:
    """How many tenths of the usual steps fit into the usual time without an idea."""
    return round(SHARES * step_times[ALL.new] / step_times[left_out])


@dataclass
class IdeaLine:
    """A model that lacks an idea, after equal steps and after equal seconds."""

    left_out: str
    parameters: int
    time: float | None  # of a step, as a share of that with all ideas; None: not measured
    after_steps: Estimate
    after_seconds: Estimate | None  # None: these runs are missing
    more_after_steps: Estimate | None = None  # than with all ideas
    more_after_seconds: Estimate | None = None


def idea_lines(results: Iterable[Result], step_times: dict[str, float]) -> list[IdeaLine]:
    groups: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        without, _, length = result.flags.removeprefix(ALL.flags).partition(" --max-iters")
        groups.setdefault((without.strip(), bool(length)), []).append(result)
    every = groups.get(("", False), [])
    spread = common_spread(groups.values())
    lines = []
    for rung in EQUAL_STEPS if every else ():
        without = rung.flags.removeprefix(ALL.flags).strip()
        runs = groups.get((without, False))
        if not runs:
            continue
        as_many = step_times and shares(step_times, rung.new) == SHARES
        longer = runs if as_many else groups.get((without, True))
        line = IdeaLine(
            rung.new,
            runs[0].parameters,
            step_times[rung.new] / step_times[ALL.new] if step_times else None,
            estimate(runs),
            longer and estimate(longer),
        )
        if rung != ALL:
            line.more_after_steps = more(runs, every, spread)
            line.more_after_seconds = longer and more(longer, every, spread)
        lines.append(line)
    return lines


class Ideas(NamedTuple):
    """What a comparison of ideas shows."""

    lines: list[IdeaLine]
    notes: list[str]


def compare_ideas(
    groups: dict[Rung, list[TrainedRun]], step_times: dict[str, float]
) -> Ideas | None:
    """Nothing where there are not even two models to compare."""
    lines = idea_lines(results_of(groups), step_times)
    return Ideas(lines, idea_notes(lines, groups)) if len(lines) > 1 else None


def losses(runs: list[Result]) -> list[float]:
    return [run.val_loss for run in runs]


def estimate(runs: list[Result]) -> Estimate:
    values = losses(runs)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.mean(values), spread)


def common_spread(groups: Iterable[list[Result]]) -> float | None:
    """The standard deviation among seeds, from all groups: a single one is too small to tell it."""
    groups = [losses(runs) for runs in groups if len(runs) > 1]
    if not groups:
        return None
    squares = sum((len(values) - 1) * statistics.variance(values) for values in groups)
    return math.sqrt(squares / sum(len(values) - 1 for values in groups))


def more(runs: list[Result], every: list[Result], spread: float | None) -> Estimate:
    """How much higher the loss is than with all ideas, and the standard error of that."""
    error = spread and spread * math.sqrt(1 / len(runs) + 1 / len(every))
    return Estimate(estimate(runs).value - estimate(every).value, error)


def idea_table(lines: list[IdeaLine]) -> Table:
    columns = {
        "left out": lambda line: line.left_out,
        "parameters": lambda line: f"{line.parameters:,}",
        "after equal steps": lambda line: line.after_steps,
        "more, equal steps": lambda line: signed(line.more_after_steps),
        "relative time": lambda line: f"{line.time:.2f}" if line.time else "",
        "after equal seconds": lambda line: line.after_seconds or "",
        "more, equal seconds": lambda line: signed(line.more_after_seconds),
    }
    return [list(columns)] + [[str(column(line)) for column in columns.values()] for line in lines]


def signed(more: Estimate | None) -> str:
    return "" if more is None else ("" if more.value < 0 else "+") + str(more)


def idea_notes(lines: list[IdeaLine], groups: dict[Rung, list[TrainedRun]]) -> list[str]:
    """What a reader must know of the table, and what it says."""
    many = any(line.after_steps.uncertainty is not None for line in lines)
    steps = groups[ALL][0].config["max_iters"]
    return [
        conditions(groups),
        f"{ALL.command} takes {steps:,} steps; without an idea it takes as many, or goes on for as "
        f"many seconds, counted in {SHARES}ths of the steps. Relative time: of a step, all of them "
        "measured in turns.",
        "Validation loss at a run's best evaluation"
        + ("; mean ± standard deviation. " if many else ". ")
        + "More: than with all ideas"
        + ("; ± its standard error, from the spread of all rows together." if many else "."),
        "All rows are held against the same runs with all ideas. Sizes and rates were chosen for "
        "those, and stay: an idea is worth here what it adds to the others, and the model without "
        "all of them would do better with rates of its own.",
        *verdicts(lines),
    ]


def verdicts(lines: list[IdeaLine]) -> list[str]:
    """Which ideas bought something, as far as several seeds can tell."""
    lowered, raised, nothing = [], [], []
    for line in lines:
        more = line.more_after_seconds
        if line.left_out in IDEAS and more and more.uncertainty is not None:
            sure = abs(more.value) > 2 * more.uncertainty
            kind = nothing if not sure else lowered if more.value > 0 else raised
            kind.append(line.left_out)
    endings = {
        "These lowered the loss after equal seconds, by two standard errors or more": lowered,
        "These raised it": raised,
        "These bought nothing at this size that these seeds can show": nothing,
    }
    return [f"{words}: {', '.join(ideas)}." for words, ideas in endings.items() if ideas]


def idea_picture(lines: list[IdeaLine], theme: Theme, format: str) -> bytes:
    """What is lost without each idea: a dot for equal steps, a ring for equal seconds."""
    shown = [line for line in lines if line.more_after_steps]
    with matplotlib.rc_context(theme.style()):
        figure = Figure(figsize=(7.6, 0.42 * len(shown) + 1.4), layout="constrained")
        draw(figure.subplots(), shown, theme)
        return written(figure, format)


def draw(panel: Axes, lines: list[IdeaLine], theme: Theme) -> None:
    kinds = {
        "equal steps": ("more_after_steps", -0.13, theme.colour("gpt")),
        "equal seconds": ("more_after_seconds", 0.13, theme.background),
    }
    colour = theme.colour("gpt")
    for kind, (name, offset, inside) in kinds.items():
        points = {i: value for i, line in enumerate(lines) if (value := getattr(line, name))}
        panel.errorbar(
            [value.value for value in points.values()],
            [i + offset for i in points],
            xerr=[2 * (value.uncertainty or 0) for value in points.values()],
            fmt="o",
            color=colour,
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
    panel.set_xlabel(f"more validation loss than with all ideas\n(nats per character{bars})")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(length=0)
    panel.grid(axis="x", color=theme.faint, linewidth=0.6)
    panel.set_axisbelow(True)
