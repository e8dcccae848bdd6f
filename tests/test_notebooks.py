"""The notebooks: the same code as the scripts, run in a real kernel, exercises that check."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import build
import nbformat
import pytest
from conftest import ROOT, STAGES
from nbclient import NotebookClient
from nbformat import NotebookNode
from test_lessons import assert_threads_spin_briefly, read

SCRIPTS = {  # the notebooks, and what each of them builds
    "01_bigram": ["bigram"],
    "02_self_attention": ["self_attention"],
    "03_multihead_attention": ["multihead_attention", "batched_attention"],
    "04_feed_forward": ["feed_forward"],
    "05_residual": ["residual"],
    "06_layer_norm": ["layer_norm"],
    "07_gpt": ["gpt"],
    "08_modern_gpt": ["modern_gpt"],
    "09_look_inside": [],
    "10_byte_pairs": [],
}
NOT_TAUGHT = {"Config", "main"}
every_notebook = pytest.mark.parametrize("name", SCRIPTS)


def source(name: str) -> NotebookNode:
    return build.source(name, build.repository())


def saved(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_of(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@every_notebook
def test_the_notebook_is_made_from_its_source(name):
    made, text = (
        [(cell.cell_type, cell.source) for cell in notebook.cells]
        for notebook in (saved(name), source(name))
    )
    assert made == text


def definitions(code: str) -> set[tuple[str, str]]:
    """All classes and functions, without comments and line breaks."""
    nodes = ast.parse(code).body
    return {(n.name, ast.dump(n)) for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef)}


@pytest.mark.parametrize("name, script", [(n, each) for n in SCRIPTS for each in SCRIPTS[n]])
def test_what_is_new_in_a_script_is_built_in_its_notebook(name, script):
    above = STAGES[: STAGES.index(script)][-1:]
    old = set().union(*(definitions(read(f"{each}.py")) for each in above))
    wanted = {each for each in definitions(read(f"{script}.py")) - old if each[0] not in NOT_TAUGHT}
    assert wanted
    different = wanted - definitions(code_of(source(name)))
    assert not different, f"{name} lacks {script}.py's {', '.join(sorted(dict(different)))}"


@every_notebook
def test_it_is_short_enough_for_one_sitting(name):
    cells = source(name).cells
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    assert words <= 1700 and len(cells) <= 55
    assert "minutes" in cells[0].source
    for script in SCRIPTS[name][:1]:
        assert f"../results/diagrams/{script}.svg" in cells[0].source
    assert "**Next →**" in cells[-1].source and "<details>" not in cells[-1].source
    text = "".join(cell.source for cell in cells)
    assert text.count("<summary>Answer</summary>") >= 5  # the quiz


@every_notebook
def test_trainer_is_imported_before_torch(name):
    assert_threads_spin_briefly(code_of(source(name)), cwd=ROOT / "notebooks")


@every_notebook
def test_no_cell_is_longer_than_a_screen(name):
    script = "".join(read(f"{each}.py") for each in SCRIPTS[name])
    for cell in source(name).cells:
        own = [line for line in cell.source.splitlines() if line not in script]
        assert len(cell.source.splitlines()) <= 60 and len(own) <= 40, cell.source


@every_notebook
def test_the_saved_outputs_are_complete_and_clean(name):
    notebook = saved(name)
    assert "jupytext" not in notebook.metadata  # JupyterLab would tie the notebook to its source
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))  # run once, from top to bottom
    assert not any(cell.outputs for cell in tagged(notebook, "prediction"))
    pictures = 0
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        data = {kind: text for kind, text in output.get("data", {}).items() if "image" not in kind}
        private = r"/(home|root|tmp|work|Users|usr|opt)/|[A-Z]:\\\\|site-packages"
        assert not re.search(private, str(output.get("text", "")) + str(data))
        pictures += "image/svg+xml" in output.get("data", {})
    assert 3 <= pictures <= 9
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 1_500_000


def solutions(notebook: NotebookNode) -> list[str]:
    folded = r"<details><summary>Solution</summary>\s*```python\n(.*?)```"
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(folded, text, re.DOTALL)


def other_answers(name: str) -> list[list[tuple[str, str]]]:
    """For each exercise, wrong answers and, marked so, right ones other than the solution."""
    text = read(f"tests/mistakes/{name}.py")
    parts = re.split(r"^# %% (\d+)( right)?\n", text, flags=re.MULTILINE)[1:]
    answers: list[list[tuple[str, str]]] = []
    for number, right, cell in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if int(number) == len(answers) + 1:
            answers.append([])
        assert int(number) == len(answers)
        answers[-1].append(("solution" if right else "mistake", cell))
    return answers


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def with_answers(name: str) -> Iterator[NotebookNode]:
    """The notebook's cells, each exercise also answered wrong and right."""
    notebook = source(name)
    answers = iter(zip(other_answers(name), solutions(notebook), strict=True))
    for cell in notebook.cells:
        yield cell
        if "check" in cell.metadata.get("tags", []):
            others, solution = next(answers)
            for kind, answer in [*others, ("solution", solution)]:
                yield nbformat.v4.new_code_cell(answer)
                again = nbformat.v4.new_code_cell(cell.source)
                again.metadata["tags"] = [kind]
                yield again


def words_of(output: NotebookNode) -> str:
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


@pytest.mark.slow
@every_notebook
def test_it_runs_from_a_clean_kernel_and_its_exercises_check(name, monkeypatch):
    monkeypatch.setenv("COURSE_QUICK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = source(name)
    count = len(tagged(notebook, "exercise"))
    assert 3 <= count <= 6
    assert count == len(tagged(notebook, "check")) == len(solutions(notebook))
    notebook.cells = list(with_answers(name))
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=120, resources=resources).execute()  # raises where a cell does
    for tag, expected in (
        ("check", r"… Not finished: "),
        ("mistake", r"(?:.*\n)*✗ Not yet: (?!your code stopped)"),
        ("solution", r"(?:.*\n)*✓ Right\.$"),
    ):
        said = ["".join(map(words_of, cell.outputs)) for cell in tagged(notebook, tag)]
        assert len(said) == count if tag == "check" else len(said) >= count
        for i, each in enumerate(said):
            assert re.match(expected, each), f"{tag} {i + 1}: {each!r}"


@pytest.mark.slow
def test_a_check_notices_a_failed_cell_and_names_the_readers_line():
    checking = "@check\ndef exercise_1() -> None:\n    assert f([1, 2]) == 1, 'it is not 1'"
    codes = ["from lesson import check", "def f(x):\n    return x[0]", checking]
    codes += ["def f(x)\n    return x[1]", checking]  # the colon is missing
    codes += ["def f(x):\n    y = 9\n    return x[y]", checking]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in codes])
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=60, allow_errors=True, resources=resources).execute()
    right, stale, broken = (
        "".join(map(words_of, cell.outputs)) for cell in notebook.cells if cell.source == checking
    )
    assert right == "✓ Right."
    assert "the cell that you ran last stopped with SyntaxError" in stale
    assert "IndexError" in broken and "in line 3 of f: return x[y]" in broken


def test_a_notebook_gets_a_badge_once_the_repository_is_known():
    without, known = (build.source("01_bigram", address) for address in ("", "someone/a-course"))
    assert "colab" not in str(without).lower()
    link = "research.google.com/github/someone/a-course/blob/main/notebooks/01_bigram.ipynb)"
    assert link in known.cells[0].source
    assert "https://github.com/someone/a-course" in known.cells[1].source
    rest = ([cell.source for cell in cells] for cells in (known.cells[2:], without.cells[1:]))
    assert len({*map(tuple, rest)}) == 1


def test_the_notebooks_leave_nothing_behind():
    left = {path.name for path in Path(ROOT, "notebooks").iterdir()}
    left -= {f"{name}{ending}" for name in SCRIPTS for ending in (".py", ".ipynb")}
    assert left <= {".ipynb_checkpoints", "__pycache__", "lesson.py", "build.py"}
