"""The tables in README.md and docs/, written from results/ by cog.

python -m cogapp -r -I docs README.md docs/results.md docs/speed.md
"""

import ast
import csv
from pathlib import Path

import cog
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent


def table(name: str, *columns: str) -> None:
    """Print columns of a comparison's table; "idea" is the first line of the script's docstring."""
    with (ROOT / "results" / name / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    cells = [[cell(row, column) for column in columns] for row in rows]
    sides = ["left" if column in ("run", "idea") else "right" for column in columns]
    cog.outl(tabulate(cells, columns, "pipe", colalign=sides, disable_numparse=True))


def cell(row: dict[str, str], column: str) -> str:
    if column == "run":
        name = row["run"].split(" --no-")
        return f"`{row['run']}`" if len(name) < 4 else f"`{name[0]}` without the ideas"
    return idea(row["run"]) if column == "idea" else row[column]


def idea(command: str) -> str:
    script, *flags = command.split()
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    title = ast.get_docstring(ast.parse(source)).splitlines()[0]
    words = title.split(": ", 1)[-1].rstrip(".")
    if flags == ["--preset", "middle"]:
        return "the same, with 192 channels instead of 128"
    return f"the same with `{' '.join(flags)}`" if flags and "--preset" not in flags else words


def notes(name: str) -> None:
    """Print, as a list, the notes below a table of compare.py that do not explain its columns."""
    lines = (ROOT / "results" / name / "table.md").read_text(encoding="utf-8").splitlines()
    kept = ("Trained on", "Seeds:", "No difference shown")
    cog.outl("\n".join(f"- {line}" for line in lines if line.startswith(kept)))


def include(name: str) -> None:
    """Print the saved output of a benchmark."""
    cog.outl((ROOT / "results" / name).read_text(encoding="utf-8").strip())
