"""The pictures of a comparison, as SVG: a staircase of losses, and the curves over training."""

import colorsys
import math
import re
from collections.abc import Callable, Iterator
from html import escape
from itertools import accumulate
from statistics import mean
from textwrap import wrap
from typing import NamedTuple

from comparison.table import Row, progress

WIDTH = 520  # letters of 16 pixels are then still 11 pixels high on a phone
THEMES = {
    "light": {"background": "#ffffff", "ink": "#1f2328", "quiet": "#59636e", "line": "#d0d7de"},
    "dark": {"background": "#0d1117", "ink": "#e6edf3", "quiet": "#9198a1", "line": "#30363d"},
}
STYLE = """<style>svg { font: 16px system-ui, sans-serif; background: var(--background) }
text { fill: var(--quiet); stroke: var(--background); stroke-width: 4px; paint-order: stroke }
path, circle { fill: none; stroke: var(--line); stroke-linejoin: round; pointer-events: none }
.row path { stroke: currentColor } .riser { stroke: var(--quiet) } .line { stroke-width: 2.5 }
.row text, .row .band { fill: currentColor } .row .band { fill-opacity: 0.2; stroke: none }
.row .error { stroke: var(--ink) } .row .leader { stroke-opacity: 0.5 }
circle { pointer-events: all; stroke: none }</style>"""


class Color(NamedTuple):
    light: str
    dark: str
    dash: str  # SVG's stroke-dasharray

    def paint(self, shapes: str) -> str:
        return f'<g class="row" style="--light: {self.light}; --dark: {self.dark}">{shapes}</g>'


def palette(count: int) -> list[Color]:
    """From blue through green and red to violet; neighbors also differ in luminance."""
    colors = []
    for i in range(count):
        pure = colorsys.hsv_to_rgb((0.58 - 0.85 * i / max(count - 1, 1)) % 1, 1, 1)
        own, shades = 0.2126 * pure[0] + 0.7152 * pure[1] + 0.0722 * pure[2], []
        for light in ((0.175, 0.21), (0.085, 0.4))[i % 2]:  # luminances, for contrasts above 4.6
            white = max(0, (light - own) / (1 - own))  # otherwise, mix the hue with black
            linear = [x * min(1, light / own) + (1 - x) * white for x in pure]
            srgb = (12.92 * x if x < 0.0031 else 1.055 * x ** (1 / 2.4) - 0.055 for x in linear)
            shades.append("#" + "".join(f"{round(255 * x):02x}" for x in srgb))
        colors.append(Color(*shades, "2 3" if count > 12 and i % 4 > 1 else ""))
    return colors


def standalone(svg: str, theme: str) -> bytes:
    """The picture as a file, with the colors that a page would define."""
    svg = re.sub(r"--light: (?P<light>#\w+); --dark: (?P<dark>#\w+)", rf"color: \g<{theme}>", svg)
    return re.sub(r"var\(--(\w+)\)", lambda x: THEMES[theme][x[1]], svg).encode(errors="replace")


def staircase(rows: list[Row], width: int = WIDTH) -> str:
    """A line for each row: further right is better, and a bar is the drop from its baseline."""
    errors = [(row.improvement and row.improvement.error) or 0 for row in rows]
    losses = [row.loss.value for row in rows]
    low, high = min(losses) - max(errors), max(losses) + max(errors)
    x = scale(high, low, 16, width - 140)  # the numbers need room on the right
    y, level, shapes = (
        40,
        {},
        [text(0, 16, "validation loss (nats per character): further right is better")],
    )
    for row, loss, error, color in zip(rows, losses, errors, palette(len(rows)), strict=True):
        name = f"{row.name}: {f'{loss:.3f}' if row.finished else progress(row)}"
        lines = wrap(name, width // 9, break_on_hyphens=False)
        level[id(row)] = y = y + 19 * len(lines) + 29
        base = row.baseline if row.improvement else row
        start, end, worst, best = map(x, (base.loss.value, loss, loss + error, loss - error))
        size = 9 * max(map(len, lines)) + 8
        left = start + 8 if start + size < width else max(start - size, 0)
        bar = 'stroke-width="5" stroke-dasharray="7 3"' if row.is_variant else 'stroke-width="10"'
        parts = [
            f'<path {bar} d="M{start:.1f} {y}H{end:.1f}"/>',
            f'<path stroke-width="3" d="M{end:.1f} {y - 9}v18"/>',
            f'<path class="error" d="M{worst:.1f} {y - 4}v8v-4H{best:.1f}v4v-8"/>' * (error > 0),
            *(text(left, y - 14 - 19 * i, line) for i, line in enumerate(reversed(lines))),
            text(max(start, best) + 10, y + 6, str(row.improvement or "")),
        ]
        shapes.append(color.paint("".join(parts)))
        shapes.insert(0, f'<path class="riser" d="M{start:.1f} {level[id(base)]}V{y}"/>')
    for tick in ticks(low, high):
        label = text(x(tick), 38, f"{tick:.10g}", "middle")
        shapes.insert(0, f'<path d="M{x(tick):.1f} 44V{y + 14}"/>{label}')
    size = f'width="{width}" height="{y + 20}" viewBox="0 0 {width} {y + 20}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}{"".join(shapes)}</svg>'


def curves(rows: list[Row], column: str) -> str:
    """The loss while training: the mean over the seeds, in a band from the best to the worst."""
    lines = [lines_of(row, column) for row in rows]
    points = [each for row in lines for line in row for seeds in line for each in seeds]
    at, losses = ([each[name] for each in points] for name in ("at", "val_loss"))
    flags = [re.split(" (?=--)", row.name.replace("--preset ", "")) for row in rows]
    shared = set.intersection(*map(set, flags))
    names = [" ".join(x for x in each if x not in shared) or " ".join(each) for each in flags]
    bottom, right = max(340, 60 + 20 * len(rows)), WIDTH - 40 - 9 * min(22, max(map(len, names)))
    x, y = scale(min(at), max(at), 50, right), scale(max(losses), min(losses), 40, bottom - 10)
    shapes = [
        text(0, 16, "validation loss (nats per character)"),
        text(50, bottom + 42, f"{column.rstrip('s')}s"),
    ]
    for tick in ticks(min(at), max(at), step=0.5 if max(at) - min(at) < 2 else 1):
        value = float(f"{10**tick:.1g}")  # 1, 10, 100, or also 3, 30
        shapes.append(text(x(tick), bottom + 20, f"{value:,.10g}", "middle"))
    for tick in ticks(min(losses), max(losses)):
        label = text(42, y(tick) + 5, f"{tick:.10g}", "end")
        shapes.append(f'<path d="M50 {y(tick):.1f}H{right}"/>{label}')
    ends = [y(mean(each["val_loss"] for each in line[-1][-1])) for line in lines]
    order = sorted(range(len(rows)), key=ends.__getitem__)
    # Move labels down until they no longer overlap, then up until none is below the plot.
    down = [*accumulate(sorted(ends), lambda above, end: max(end, above + 20))]
    up = accumulate([bottom + 20, *down[::-1]], lambda below, end: min(end, below - 20))
    for i, label in zip(order, [*up][:0:-1], strict=True):
        color, last = palette(len(rows))[i], x(lines[i][-1][-1][0]["at"])
        leader = path([(last, ends[i]), (right + 6, label), (right + 20, label)], "leader")
        name = text(right + 24, label + 5, names[i] if len(names[i]) < 23 else f"{names[i][:21]}…")
        shapes.append(color.paint("".join([*curve(rows[i], lines[i], color, x, y), leader, name])))
    size = f'width="{WIDTH}" height="{bottom + 50}" viewBox="0 0 {WIDTH} {bottom + 50}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}{"".join(shapes)}</svg>'


def curve(row: Row, lines: list, color: Color, x: Callable, y: Callable) -> Iterator[str]:
    """The lines of a row with their bands, and circles for the page to show values on hover."""
    dash = "8 4" if row.is_variant else color.dash
    for line in lines:
        xs = [x(mean(each["at"] for each in seeds)) for seeds in line]
        ys = [[y(each["val_loss"]) for each in seeds] for seeds in line]
        best, middle, worst = ([*zip(xs, map(f, ys), strict=True)] for f in (max, mean, min))
        yield path(best + worst[::-1], "band") + path(middle, "line", dash)
        for (a, b), seeds in zip(middle, line, strict=True):
            loss = mean(each["val_loss"] for each in seeds)
            title = f"<title>{escape(row.name)}, step {seeds[0]['step']:,}: {loss:.3f}</title>"
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="8" tabindex="0">{title}</circle>'


def lines_of(row: Row, column: str) -> list[list[tuple[dict[str, float], ...]]]:
    """The evaluations, all seeds together or, if their steps differ, a line for each run."""
    runs = [run.rows[1:] or run.rows for run in row.finished or row.runs]  # not the untrained loss
    logs = [[each | {"at": math.log10(max(each[column], 0.01))} for each in rows] for rows in runs]
    alike = len({tuple(each["step"] for each in log) for log in logs}) == 1
    return [list(zip(*log, strict=True)) for log in ([logs] if alike else [[x] for x in logs])]


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def path(points: list[tuple[float, float]], kind: str, dash: str = "") -> str:
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" stroke-dasharray="{dash}" d="{d}"/>'


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def ticks(low: float, high: float, step: float | None = None) -> list[float]:
    step = step or float(f"{(high - low) / 3 or 1:.1g}")
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
