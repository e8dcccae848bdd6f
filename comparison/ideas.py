"""What each idea of modern_gpt.py buys: all of them against all but one."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, get_args

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparison.curves import Theme, written
from comparison.runs import Found, Rung, Terms, TrainedRun
from comparison.table import Estimate, Result, Table, gain, results_of
from modern_gpt import Idea

IDEAS = get_args(Idea)
ALL = Rung("modern_gpt", "--preset small", "nothing")
EQUAL_STEPS = (
    ALL,
    *(Rung(ALL.stage, f"{ALL.flags} --without {idea}", idea) for idea in IDEAS),
    Rung(ALL.stage, f"{ALL.flags} --without all", "all: gpt.py's model"),
)
SHARES = 10  # steps are counted in tenths: so a run fits again although no two last alike


def equal_seconds(found: Found, terms: Terms) -> tuple[Rung, ...]:
    """What goes without an idea for as long, not for as many steps, as all ideas take.

    Where that is the same number of steps, the same run serves.
    """
    seconds = {
        rung: statistics.median(run.rows[-1]["seconds"] for run in runs)
        for rung, runs in found.by_rung(EQUAL_STEPS).items()
    }
    usual = terms.config(ALL)
    rungs = []
    for rung in EQUAL_STEPS:
        if rung not in seconds or ALL not in seconds:
            continue
        share = round(SHARES * seconds[ALL] / max(1e-9, seconds[rung]))
        steps, interval = (
            max(1, usual[name] * share // SHARES) for name in ("max_iters", "eval_interval")
        )
        if steps != usual["max_iters"]:
            flags = f"{rung.flags} --max-iters {steps} --eval-interval {interval}"
            rungs.append(Rung(rung.stage, flags, rung.new))
    return tuple(rungs)


@dataclass
class IdeaLine:
    """A model that lacks an idea, after equal steps and after equal seconds."""

    left_out: str
    parameters: int
    time: float  # that as many steps take, as a share of that of all ideas
    after_steps: Estimate
    after_seconds: Estimate
    more_after_steps: Estimate | None = None  # than with all ideas
    more_after_seconds: Estimate | None = None


def idea_lines(results: Iterable[Result]) -> list[IdeaLine]:
    groups: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        without, _, length = result.flags.removeprefix(ALL.flags).partition(" --max-iters")
        groups.setdefault((without.strip(), bool(length)), []).append(result)
    every = groups.get(("", False), [])
    lines = []
    for rung in EQUAL_STEPS if every else ():
        without = rung.flags.removeprefix(ALL.flags).strip()
        runs = groups.get((without, False))
        if not runs:
            continue
        longer = groups.get((without, True), runs)
        line = IdeaLine(
            rung.new,
            runs[0].parameters,
            median_seconds(runs) / max(1e-9, median_seconds(every)),
            estimate(runs),
            estimate(longer),
        )
        if rung != ALL:
            line.more_after_steps = gain(losses(runs), losses(every))
            line.more_after_seconds = gain(losses(longer), losses(every))
        lines.append(line)
    return lines


class Ideas(NamedTuple):
    """What a comparison of ideas shows."""

    lines: list[IdeaLine]
    notes: list[str]


def compare_ideas(groups: dict[Rung, list[TrainedRun]]) -> Ideas | None:
    """Nothing where there are not even two models to compare."""
    lines = idea_lines(results_of(groups))
    runs = [run for runs in groups.values() for run in runs]
    return Ideas(lines, idea_notes(lines, runs)) if len(lines) > 1 else None


def losses(runs: list[Result]) -> list[float]:
    return [run.val_loss for run in runs]


def median_seconds(runs: list[Result]) -> float:
    return statistics.median(run.seconds for run in runs)


def estimate(runs: list[Result]) -> Estimate:
    values = losses(runs)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.mean(values), spread)


def idea_table(lines: list[IdeaLine]) -> Table:
    columns = {
        "left out": lambda line: line.left_out,
        "parameters": lambda line: f"{line.parameters:,}",
        "after equal steps": lambda line: line.after_steps,
        "more, equal steps": lambda line: signed(line.more_after_steps),
        "time a step": lambda line: f"{line.time:.2f}",
        "after equal seconds": lambda line: line.after_seconds,
        "more, equal seconds": lambda line: signed(line.more_after_seconds),
    }
    return [list(columns)] + [[str(column(line)) for column in columns.values()] for line in lines]


def signed(more: Estimate | None) -> str:
    return "" if more is None else ("" if more.value < 0 else "+") + str(more)


def idea_notes(lines: list[IdeaLine], runs: list[TrainedRun]) -> list[str]:
    """What a reader must know of the table, and what it says."""
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    steps = max(run.rows[-1]["step"] for run in runs if not run.config["without"])
    return [
        f"{ALL.command}, trained on {runs[0].corpus} on {runs[0].device} with the seeds {seeds}: "
        f"{steps} steps with all ideas, and without an idea as many, or for as many seconds (in "
        f"{SHARES}ths of the steps). Validation loss at a run's best evaluation: mean "
        "± standard deviation; more: ± the standard error of the difference, as of independent "
        "runs.",
        "Sizes and rates were chosen with all ideas in, and stay: an idea is worth here what it "
        "adds to the others, and the model without all of them would do better with rates of its "
        "own.",
        *verdicts(lines),
    ]


def verdicts(lines: list[IdeaLine]) -> list[str]:
    """Which ideas bought something, which nothing, as far as several seeds can tell."""
    names: dict[str, list[str]] = {
        "Bought something": [],
        "Bought nothing": [],
        "Cost something": [],
    }
    for line in lines:
        more = line.more_after_seconds
        if line.left_out in IDEAS and more and more.uncertainty is not None:
            if abs(more.value) <= 2 * more.uncertainty:
                names["Bought nothing"].append(line.left_out)
            else:
                kind = "Bought something" if more.value > 0 else "Cost something"
                names[kind].append(line.left_out)
    return [
        f"{kind} at this size after equal seconds, as far as these seeds can tell (by two standard "
        f"errors): {', '.join(ideas)}."
        for kind, ideas in names.items()
        if ideas
    ]


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
        more = [getattr(line, name) for line in lines]
        panel.errorbar(
            [each.value for each in more],
            [number + offset for number in range(len(lines))],
            xerr=[2 * (each.uncertainty or 0) for each in more],
            fmt="o",
            color=colour,
            markerfacecolor=inside,
            markersize=7,
            elinewidth=1.5,
            gid=kind.replace(" ", "-"),
        )
        first = max(range(len(lines)), key=lambda i: more[i].value)
        panel.annotate(
            kind,
            (more[first].value, first + offset),
            xytext=(0, 9 if offset > 0 else -9),
            textcoords="offset points",
            horizontalalignment="right",
            verticalalignment="bottom" if offset < 0 else "top",
            size=10,
        )
    panel.axvline(0, color=theme.ink, linewidth=1)
    panel.set_yticks(range(len(lines)), [f"without {line.left_out}" for line in lines])
    panel.invert_yaxis()
    panel.set_xlabel("more validation loss than with all ideas (nats per character)")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(length=0)
    panel.grid(axis="x", color=theme.faint, linewidth=0.6)
    panel.set_axisbelow(True)
