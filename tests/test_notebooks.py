"""The notebooks: the same code as the scripts, run in a real kernel, exercises that check."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
import pytest
from conftest import ROOT, STAGES
from nbclient import NotebookClient
from nbformat import NotebookNode

NAMES = [f"{number:02}_{stage}" for number, stage in enumerate(STAGES, start=1)]
every_notebook = pytest.mark.parametrize("name", NAMES)


def source(name: str) -> NotebookNode:
    return jupytext.read(ROOT / "notebooks" / f"{name}.py")


def saved(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_of(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@every_notebook
def test_the_notebook_is_made_from_its_source(name: str) -> None:
    made, text = (
        [(cell.cell_type, cell.source) for cell in notebook.cells]
        for notebook in (saved(name), source(name))
    )
    assert made == text


def definitions(code: str) -> dict[str, str]:
    """Classes, functions and constants by name, without comments and line breaks."""
    result = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            result[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign):
            result[ast.unparse(node.targets[0])] = ast.dump(node)
    return result


@pytest.mark.parametrize("name, stage", list(zip(NAMES, STAGES, strict=True)))
def test_the_notebook_mirrors_its_script(name: str, stage: str) -> None:
    script = definitions((ROOT / f"{stage}.py").read_text(encoding="utf-8"))
    code = definitions(code_of(source(name)))
    assert script
    different = [each for each, dump in script.items() if code.get(each) != dump]
    assert not different, f"{stage}.py and its notebook differ in {', '.join(different)}"


@every_notebook
def test_no_cell_is_longer_than_a_screen(name: str) -> None:
    script = (ROOT / f"{name[3:]}.py").read_text(encoding="utf-8")
    for cell in source(name).cells:
        own = [line for line in cell.source.splitlines() if line not in script]
        assert len(cell.source.splitlines()) <= 60 and len(own) <= 40, cell.source


@every_notebook
def test_the_saved_outputs_are_whole_and_clean(name: str) -> None:
    notebook = saved(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))  # run once, from top to bottom
    pictures = 0
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        shown = str(output.get("text", "")) + str(dict(output.get("data", {}), **{"image/png": ""}))
        assert not re.search(
            r"/(home|root|tmp|work|Users|usr|opt)/|[A-Z]:\\\\|site-packages", shown
        )
        pictures += "image/png" in output.get("data", {})
    assert pictures >= 3
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size < 1_500_000


def solutions(notebook: NotebookNode) -> list[str]:
    folded = r"<details><summary>Solution</summary>\s*```python\n(.*?)```"
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(folded, text, re.DOTALL)


def mistakes(name: str) -> list[str]:
    text = (ROOT / "tests" / "mistakes" / f"{name}.py").read_text(encoding="utf-8")
    numbers_and_cells = re.split(r"^# %% (\d+)\n", text, flags=re.MULTILINE)[1:]
    assert numbers_and_cells[::2] == [str(i + 1) for i in range(len(numbers_and_cells) // 2)]
    return numbers_and_cells[1::2]


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def with_answers(name: str) -> Iterator[NotebookNode]:
    """The notebook's cells, each exercise also answered wrong and right."""
    notebook = source(name)
    answers = iter(zip(mistakes(name), solutions(notebook), strict=True))
    for cell in notebook.cells:
        yield cell
        if "check" in cell.metadata.get("tags", []):
            for kind, answer in zip(("mistake", "solution"), next(answers), strict=True):
                yield nbformat.v4.new_code_cell(answer)
                again = nbformat.v4.new_code_cell(cell.source)
                again.metadata["tags"] = [kind]
                yield again


@every_notebook
def test_it_runs_from_a_clean_kernel_and_its_exercises_check(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURSE_QUICK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = source(name)
    count = len(tagged(notebook, "exercise"))
    assert 3 <= count <= 5
    assert count == len(tagged(notebook, "check")) == len(solutions(notebook))
    notebook.cells = list(with_answers(name))
    client = NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    client.execute()  # raises where a cell does
    for tag, expected in (
        ("check", r"Nothing there yet: "),
        ("mistake", r"Not yet: (?!your code stopped)"),
        ("solution", r"(?:.*\n)*Right\.\n$"),
    ):
        said = ["".join(o.get("text", "") for o in c.outputs) for c in tagged(notebook, tag)]
        assert len(said) == count
        for i, each in enumerate(said):
            assert re.match(expected, each), f"exercise {i + 1}, {tag}: {each!r}"


def test_the_notebooks_open_in_colab() -> None:
    for name in NAMES:
        text = (ROOT / "notebooks" / f"{name}.py").read_text(encoding="utf-8")
        assert f"/blob/main/notebooks/{name}.ipynb)" in text
        (address,) = set(re.findall(r'"clone", "-q", "(https://github.com/[\w./-]+)"', text))
        assert f"research.google.com/github/{address.removeprefix('https://github.com/')}/" in text


def test_a_notebook_leaves_nothing_behind() -> None:
    left = {path.name for path in Path(ROOT, "notebooks").iterdir()} - {"__pycache__"}
    left -= {f"{name}{ending}" for name in NAMES for ending in (".py", ".ipynb")}
    assert left - {"lesson.py", ".ipynb_checkpoints"} == set()
