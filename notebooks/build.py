"""Run notebooks and write their .ipynb files, after a change to the course.

    python notebooks/build.py                       all of them
    python notebooks/build.py 02_self_attention     only this one

A notebook's source is the .py file of the same name. Outputs of cells tagged `prediction` are left
out, since they would give the answer away. If pyproject.toml names the repository, each notebook
gets a Colab badge and a cell that fetches the course there.
"""

import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
WHERE = {"resources": {"metadata": {"path": HERE}}}
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb)"
)
FETCH = """# In Colab, this fetches the course.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("lesson.py"):
    if not os.path.exists("course"):
        address = "https://github.com/{repository}"
        subprocess.run(["git", "clone", "-q", address, "course"], check=True)
    os.chdir("course/notebooks")"""


def repository() -> str:
    """Owner and name on GitHub, from the one place that has them; empty if unknown."""
    text = HERE.with_name("pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "https://github.com/([^"]+)"', text, re.MULTILINE)
    return found[1].rstrip("/") if found else ""


def source(name: str, address: str) -> NotebookNode:
    notebook = jupytext.read(HERE / f"{name}.py")
    if address:
        notebook.cells[0].source += "\n\n" + BADGE.format(repository=address, name=name)
        notebook.cells.insert(1, nbformat.v4.new_code_cell(FETCH.format(repository=address)))
    return notebook


def main() -> None:
    for name in sys.argv[1:] or sorted(path.stem for path in HERE.glob("[0-9][0-9]_*.py")):
        notebook = source(name, repository())
        NotebookClient(notebook, timeout=900, coalesce_streams=True, **WHERE).execute()
        for cell in notebook.cells:
            tags = cell.metadata.get("tags", [])
            cell.metadata = {"tags": tags} if tags else {}
            if "prediction" in tags:
                cell.outputs = []
        # Without jupytext's metadata, JupyterLab never writes into the source or reads from it.
        del notebook.metadata["jupytext"]
        nbformat.write(notebook, HERE / f"{name}.ipynb")
        print(f"{name}.ipynb", flush=True)


if __name__ == "__main__":
    main()
