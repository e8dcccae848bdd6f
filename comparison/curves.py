"""The validation loss of each stage, plotted over steps and over seconds."""

import io
import statistics
from typing import NamedTuple

from comparison.runs import STAGES, Row, TrainedRun

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

AXES = {
    "step": "training steps",
    "seconds": "seconds of training",
}
LABEL_SIZE = 10.0


class Theme(NamedTuple):
    """Colors for a background. Color-blind readers can tell those of the stages apart too."""

    background: str
    ink: str
    faint: str
    colors: tuple[str, ...]

    def color(self, stage: str) -> str:
        return self.colors[STAGES.index(stage)]

    def style(self) -> dict[str, object]:
        return {
            "font.family": "DejaVu Sans",
            "font.size": 11,
            "svg.hashsalt": "curves",  # the same picture is the same file
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.edgecolor": self.faint,
            "xtick.color": self.ink,
            "ytick.color": self.ink,
            "axes.facecolor": self.background,
            "figure.facecolor": self.background,
        }


THEMES = {
    "light": Theme(
        "#ffffff",
        "#1f2328",
        "#d0d7de",
        (
            *("#2c1111", "#808017", "#215821", "#de6bad", "#3387db"),
            *("#180259", "#9632fa", "#83326f", "#df4c71"),
        ),
    ),
    "dark": Theme(
        "#0d1117",
        "#e6edf3",
        "#30363d",
        (
            *("#ea0606", "#eaea06", "#66e466", "#c5084a", "#c3e0fd"),
            *("#ad98ed", "#9632fa", "#cd059b", "#cd7c90"),
        ),
    ),
}


def picture(
    groups: dict[Row, list[TrainedRun]],
    theme: Theme,
    format: str,
    axes: tuple[str, ...] = tuple(AXES),
) -> bytes:
    """A panel for each of `axes`, side by side."""
    with matplotlib.rc_context(theme.style()):
        figure = Figure(figsize=(5.6 * len(axes), 4.8), layout="constrained")
        for panel, column in zip(
            figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True
        ):
            draw(panel, groups, theme, column)
        return written(figure, format)


def written(figure: Figure, format: str) -> bytes:
    content = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else {}
    figure.savefig(content, format=format, dpi=160, metadata=metadata)
    return content.getvalue()


def draw(panel: Axes, groups: dict[Row, list[TrainedRun]], theme: Theme, column: str) -> None:
    """Each row's mean over its seeds, with a band from the best seed to the worst."""
    ends = {}
    for row, runs in groups.items():
        color = theme.color(row.stage)
        evaluations = list(zip(*(run.rows for run in runs), strict=True))  # across the seeds
        x = [statistics.mean(each[column] for each in seeds) for seeds in evaluations]
        losses = [[each["val_loss"] for each in seeds] for seeds in evaluations]
        y = [statistics.mean(each) for each in losses]
        low, high = ([extreme(each) for each in losses] for extreme in (min, max))
        style = "--" if row.is_variant else "-"
        gid = "-".join([column, *row.name.split()])
        panel.plot(x, y, color=color, linestyle=style, linewidth=2, gid=gid)
        panel.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
        ends[row] = (x[-1], y[-1])
    # The losses of untrained models are cut off: they would leave little room for all others.
    evaluations = [each for runs in groups.values() for run in runs for each in run.rows[1:]]
    trained = [each["val_loss"] for each in evaluations]
    pad = 0.08 * (max(trained) - min(trained)) or 0.1
    panel.set_ylim(min(trained) - pad, max(trained) + 2 * pad)
    if column == "seconds":
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel(AXES[column])
    panel.set_ylabel("validation loss (nats per character)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color=theme.faint, linewidth=0.6)
    panel.set_axisbelow(True)
    label_ends(panel, ends, theme)


def label_ends(panel: Axes, ends: dict[Row, tuple[float, float]], theme: Theme) -> None:
    """The name of each line at its end, moved up or down where two would overlap."""
    points = 72 * panel.figure.get_figheight() * 0.85 / (panel.get_ylim()[1] - panel.get_ylim()[0])
    rows = sorted(ends, key=lambda row: ends[row][1])
    heights = [ends[row][1] * points for row in rows]
    for row, height, moved in zip(rows, heights, apart(heights, LABEL_SIZE * 1.3), strict=True):
        color = theme.color(row.stage)
        panel.annotate(
            row.name,
            ends[row],
            xytext=(14, moved - height),
            textcoords="offset points",
            verticalalignment="center",
            color=color,
            size=LABEL_SIZE,
            weight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "relpos": (0, 0.5), "shrinkB": 0},
            bbox={"color": theme.background, "alpha": 0.8, "pad": 0.5, "linewidth": 0},
        )


def apart(heights: list[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as possible until they are `gap` apart.

    After subtracting i gaps from the i-th height, this is isotonic regression: wherever neighbors
    decrease, both are replaced by their mean (pool adjacent violators).
    """
    groups: list[list[float]] = []
    for i, height in enumerate(heights):
        groups.append([height - i * gap])
        while len(groups) > 1 and statistics.mean(groups[-2]) > statistics.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    even = [statistics.mean(group) for group in groups for _ in group]
    return [height + i * gap for i, height in enumerate(even)]
