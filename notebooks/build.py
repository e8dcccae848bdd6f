"""Run notebooks and write their .ipynb files; for those who change the course.

    python notebooks/build.py                       all of them
    python notebooks/build.py 02_self_attention     only this one

A notebook's source is the .py file of the same name. Outputs of cells tagged `prediction` are left
out, since they would give the answer away.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def main() -> None:
    for name in sys.argv[1:] or sorted(path.stem for path in HERE.glob("0*.py")):
        notebook = jupytext.read(HERE / f"{name}.py")
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": HERE}}).execute()
        for cell in notebook.cells:
            tags = cell.metadata.get("tags", [])
            cell.metadata = {"tags": tags} if tags else {}
            if "prediction" in tags:
                cell.outputs = []
        # Without jupytext's metadata, JupyterLab never writes into the source or reads from it.
        notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
        nbformat.write(notebook, HERE / f"{name}.ipynb")
        print(f"{name}.ipynb", flush=True)


if __name__ == "__main__":
    main()
