"""The page of a comparison: one self-contained HTML file, made from report.html."""

import ast
import base64
import difflib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainer import UserError
from common import Tokenizer
from comparison.curves import AXES, THEMES, picture
from comparison.ideas import Ideas, idea_picture, idea_table
from comparison.runs import STAGES, Row, TrainedRun
from comparison.table import TEXT_COLUMNS, Line, Table
from sample import generate, load
from trainer.corpus import Corpus
from trainer.sampling import SampleSettings

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

HERE = Path(__file__).resolve().parent
CONTEXT = 3  # lines around a difference


def report(
    groups: dict[Row, list[TrainedRun]],
    lines: list[Line],
    table: Table,
    warning: str,
    notes: list[str],
    ideas: Ideas | None,
    corpus: Corpus,
    settings: SampleSettings,
) -> bytes:
    # Of several presets, the smallest, which comes first.
    stages = {line.row.stage: line for line in reversed(lines) if not line.row.is_variant}
    environment = Environment(
        loader=FileSystemLoader(HERE, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    page = environment.get_template("report.html").render(
        corpus=corpus,
        steps=[step(number, stages) for number in range(len(STAGES))],
        colors={
            stage: "; ".join(f"--{name}: {theme.color(stage)}" for name, theme in THEMES.items())
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
        samples=[
            (row, sample_of(runs[0], settings))
            for row, runs in groups.items()
            if not row.is_variant
        ],
        settings=settings,
        zip=zip,
    )
    return page.replace("\0", "\ufffd").encode("utf-8", errors="replace")


def data_address(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def step(number: int, stages: dict[str, Line]) -> dict[str, Any]:
    """One stage on the page: its docstring, its result, and what changes in its code."""
    stage = STAGES[number]
    before = STAGES[number - 1] if number else None
    source = read_source(stage)
    title, *paragraphs = ast.get_docstring(ast.parse(source)).split("\n\n")
    code = code_of(source)
    return {
        "number": number + 1,
        "stage": stage,
        "title": title.partition(": ")[2].rstrip("."),
        "paragraphs": list(map(prose, paragraphs)),
        "line": stages.get(stage),
        "before": before,
        "code": list(difference(code_of(read_source(before)), code)) if before else plain(code),
    }


def code_of(source: str) -> list[str]:
    """A script without its docstring, which the page shows as prose."""
    end = ast.parse(source).body[0].end_lineno
    return "\n".join(source.splitlines()[end:]).strip("\n").split("\n")


def read_source(stage: str) -> str:
    return (HERE.parent / f"{stage}.py").read_text(encoding="utf-8")


def prose(paragraph: str) -> Markup:
    """A paragraph of a docstring as HTML: the little Markdown that the stages use."""
    if paragraph.startswith(" "):
        return Markup("<pre>{}</pre>").format(textwrap.dedent(paragraph))
    text = str(escape(paragraph))
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text, flags=re.DOTALL)
    if text.startswith("- "):
        items = text.removeprefix("- ").split("\n- ")
        return Markup("<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>")
    return Markup(f"<p>{text}</p>")


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
    """A prompt that no model was trained on: the first whole line of the validation split."""
    ids = corpus.validation[:2000].tolist()
    _, *lines = Tokenizer(corpus.vocabulary).decode(ids).split("\n")
    return next((f"{line}\n"[:40] for line in lines if line.strip()), "")


def sample_of(run: TrainedRun, settings: SampleSettings) -> str:
    """What the model adds to the prompt."""
    try:
        model, tokenizer = load(run.folder, run.device)
        return "".join(
            generate(
                model,
                tokenizer,
                settings.prompt,
                settings.sample_length,
                settings.temperature,
                settings.top_k,
                run.seed,
            )
        )
    except UserError as error:
        return f"({error})"
