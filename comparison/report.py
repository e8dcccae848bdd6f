"""The page of a comparison: one self-contained HTML file, made from report.html."""

import ast
import difflib
import io
import keyword
import re
import textwrap
import tokenize
from base64 import b64encode
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from trainer import UserError
from comparison import drawing
from comparison.diagram import STAGES, diagram
from comparison.drawing import standalone
from comparison.table import TEXT_COLUMNS, Row, Table
from sample import generate, load
from trainer.corpus import Corpus
from trainer.sampling import SampleSettings

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

HERE = Path(__file__).resolve().parent
COLORED = "comment defined keyword number string fstring_start fstring_middle fstring_end".split()


def report(
    rows: list[Row],
    table: Table,
    notes: list[str],
    warning: str,
    corpus: Corpus,
    settings: SampleSettings,
) -> bytes:
    loader = FileSystemLoader(HERE)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    samples = [(row, sample_of(row, settings)) for row in rows if not row.is_variant]
    values = {"rows": rows, "table": table, "notes": notes, "warning": warning, "corpus": corpus}
    values |= {"settings": settings, "text_columns": TEXT_COLUMNS, "drawing": drawing}
    values |= {"steps": [*steps(rows)], "samples": samples, "diagrams": diagrams(rows)}
    page = environment.get_template("report.html").render(values)
    return page.replace("\0", "\ufffd").encode("utf-8", errors="replace")


def diagrams(rows: list[Row]) -> dict[str, dict[str, str]]:
    """Each stage's diagram in both themes, as data URLs."""
    pictures = {name: diagram(name) for name in {row.stage for row in rows} & STAGES.keys()}
    return {
        name: {
            theme: f"data:image/svg+xml;base64,{b64encode(standalone(svg, theme)).decode()}"
            for theme in ("light", "dark")
        }
        for name, svg in pictures.items()
    }


def steps(rows: list[Row]) -> Iterator[tuple]:
    """Each script: its docstring, and how its code differs from the script it improves on."""
    codes: dict[str, list[Markup]] = {}
    for row in rows:
        if row.stage not in codes and not row.is_variant:
            source = (HERE.parent / f"{row.stage}.py").read_text(encoding="utf-8")
            docstring = ast.get_docstring(ast.parse(source)) or ""
            end = ast.parse(source).body[0].end_lineno if docstring else 0
            code = highlighted("\n".join(source.split("\n")[end:]).strip("\n"))
            above = [row.baseline.stage] if row.baseline else []
            before = next((x for x in [*above, *reversed(codes)] if x in codes), None)
            lines = difference(codes[before], code) if before else [("same", x) for x in code]
            title, *paragraphs = docstring.split("\n\n")
            yield row, title.split(": ", 1)[-1].rstrip("."), map(prose, paragraphs), before, lines
            codes[row.stage] = code


def highlighted(code: str) -> list[Markup]:
    """The code's lines as HTML, with a class for each kind of token."""
    starts = [0, *accumulate(len(line) + 1 for line in code.split("\n"))]
    html, done, before = "", 0, ""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        start, end = (starts[line - 1] + column for line, column in (token.start, token.end))
        kind = "defined" if before in ("class", "def") else tokenize.tok_name[token.type].lower()
        kind = "keyword" if keyword.iskeyword(token.string) else kind
        opening, closing = (f'<span class="{kind}">', "</span>") if kind in COLORED else ("", "")
        word = str(escape(code[max(start, done) : end])).replace("\n", f"{closing}\n{opening}")
        html += escape(code[done:start]) + Markup(opening + word + closing)
        done, before = max(done, end), token.string
    return html.split("\n")


def prose(paragraph: str) -> Markup:
    """A paragraph of a docstring as HTML: the little Markdown that the scripts use."""
    if paragraph.startswith(" "):
        return Markup("<pre>{}</pre>").format(textwrap.dedent(paragraph))
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", str(escape(paragraph)))
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text, flags=re.DOTALL)
    if text.startswith("- "):
        text = text.removeprefix("- ").replace("\n- ", "</li><li>")
        return Markup(f"<ul><li>{text}</li></ul>")
    return Markup(f"<p>{text}</p>")


def difference(before: list[Markup], after: list[Markup]) -> list[tuple[str, Markup]]:
    kinds = {"+": "added", "-": "gone", " ": "same", "@": "gap"}
    lines = list(difflib.unified_diff(before, after, lineterm=""))[2:]
    return [(kinds[line[0]], Markup(line[1:])) for line in lines]


def first_line(corpus: Corpus) -> str:
    """A prompt that no model was trained on: the first whole line of the validation split."""
    _, *lines = corpus.tokenizer.decode(corpus.validation[:2000].tolist()).split("\n")
    return next((f"{line}\n"[:40] for line in lines if line.strip()), "")


def sample_of(row: Row, settings: SampleSettings) -> str:
    """What the model adds to the prompt."""
    run = (row.finished or row.runs)[0]
    how = (settings.sample_length, settings.temperature, settings.top_k, run.seed)
    try:
        return "".join(generate(*load(run.folder, run.about["device"]), settings.prompt, *how))
    except UserError as error:
        return f"({error})"
