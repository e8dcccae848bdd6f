"""The page of a comparison: one HTML file that needs no other, made from report.html."""

import argparse
import ast
import base64
import difflib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common import Corpus, Tokenizer, UserError
from comparison.curves import AXES, THEMES, picture
from comparison.ideas import Ideas, idea_picture, idea_table
from comparison.runs import STAGES, Rung, TrainedRun
from comparison.table import TEXT_COLUMNS, Line, Table
from sample import generate, load

HERE = Path(__file__).resolve().parent
CONTEXT = 3  # lines around a difference


def report(
    groups: dict[Rung, list[TrainedRun]],
    lines: list[Line],
    table: Table,
    warning: str,
    notes: list[str],
    ideas: Ideas | None,
    corpus: Corpus,
    prompt: str,
    options: argparse.Namespace,
) -> bytes:
    # Of several presets the smallest, which comes first.
    stages = {line.rung.stage: line for line in reversed(lines) if not line.rung.is_variant}
    environment = Environment(
        loader=FileSystemLoader(HERE, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["prose"] = prose
    page = environment.get_template("report.html").render(
        corpus=corpus,
        steps=[step(number, stages) for number in range(len(STAGES))],
        colours={
            stage: "; ".join(f"--{name}: {theme.colour(stage)}" for name, theme in THEMES.items())
            for stage in STAGES
        },
        first=lines[0],
        best=min(lines, key=lambda line: line.loss.value),
        worst=max(lines, key=lambda line: line.loss.value),
        pictures={
            title: {
                name: data_address(picture(groups, theme, "svg", (column,)))
                for name, theme in THEMES.items()
            }
            for column, title in AXES.items()
        },
        table=table,
        text_columns=TEXT_COLUMNS,
        ideas=ideas,
        ideas_table=idea_table(ideas.lines) if ideas else None,
        ideas_picture={
            name: data_address(idea_picture(ideas.lines, theme, "svg"))
            for name, theme in THEMES.items()
            if ideas
        },
        warning=warning,
        notes=notes,
        prompt=prompt,
        samples=[
            (rung, sample_of(runs[0], prompt, options))
            for rung, runs in groups.items()
            if not rung.is_variant
        ],
        options=options,
        zip=zip,
    )
    return page.replace("\0", "\ufffd").encode("utf-8", errors="replace")


def data_address(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def step(number: int, stages: dict[str, Line]) -> dict[str, Any]:
    """A step of the ladder: what the stage says of itself, what it came to, and its difference."""
    stage = STAGES[number]
    before = STAGES[number - 1] if number else None
    title, *paragraphs = read_docstring(stage).split("\n\n")
    code = read_code(stage)
    return {
        "number": number + 1,
        "stage": stage,
        "title": title.partition(": ")[2].rstrip("."),
        "paragraphs": [
            {"is_code": each.startswith(" "), "text": textwrap.dedent(each)}
            for each in paragraphs
            if not each.startswith("Since ")
        ],
        "line": stages.get(stage),
        "before": before,
        "code": list(difference(read_code(before), code)) if before else plain(code),
    }


def read_docstring(stage: str) -> str:
    return ast.get_docstring(ast.parse(read_source(stage)))


def read_code(stage: str) -> list[str]:
    """A script without its docstring, which the page shows as prose."""
    source = read_source(stage)
    end = ast.parse(source).body[0].end_lineno
    return "\n".join(source.splitlines()[end:]).strip("\n").split("\n")


def read_source(stage: str) -> str:
    return (HERE.parent / f"{stage}.py").read_text(encoding="utf-8")


def prose(paragraph: str) -> Markup:
    """What stands between backticks is code."""
    text = str(escape(paragraph))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", text))


class CodeLine(NamedTuple):
    kind: str  # "added", "gone", "same", or "gap"
    text: str


def plain(code: list[str]) -> list[CodeLine]:
    return [CodeLine("same", line) for line in code]


def difference(before: list[str], after: list[str]) -> Iterator[CodeLine]:
    kinds = {"+": "added", "-": "gone", " ": "same"}
    for line in list(difflib.unified_diff(before, after, lineterm="", n=CONTEXT))[2:]:
        yield CodeLine("gap", "") if line[0] == "@" else CodeLine(kinds[line[0]], line[1:])


def first_line(corpus: Corpus) -> str:
    """A prompt that no model has seen: the first whole line of the validation text."""
    numbers = corpus.validation[:2000].tolist()
    _, *lines = Tokenizer(corpus.vocabulary).decode(numbers).split("\n")
    return next((f"{line}\n"[:40] for line in lines if line.strip()), "")


def sample_of(run: TrainedRun, prompt: str, options: argparse.Namespace) -> str:
    try:
        model, tokenizer = load(run.folder, run.device)
        text = generate(
            model,
            tokenizer,
            prompt,
            options.sample_length,
            options.temperature,
            options.top_k,
            run.seed,
        )
        return "".join(text)
    except UserError as error:
        return f"({error})"
