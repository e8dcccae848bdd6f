"""As a reader does it: start JupyterLab in a browser, open a notebook, run all cells."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

NOTEBOOK = "02_self_attention.ipynb"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab in a copy of the course, which it may write to."""
    ignored = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "course", ignore=ignored)
    settings = ("--ServerApp.port=0", "--IdentityProvider.token=", "--LabApp.news_url=")
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", *settings],
        cwd=tmp_path / "course",
        env=os.environ
        | {"COURSE_QUICK": "1", "OMP_NUM_THREADS": "1"}
        | {f"JUPYTER_{each}_DIR": str(tmp_path / each) for each in ("RUNTIME", "CONFIG")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (found := list((tmp_path / "RUNTIME").glob("jpserver-*.json"))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        yield json.loads(found[0].read_text(encoding="utf-8"))["url"]
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.browser
def test_a_notebook_runs_in_the_browser(browser, server, tmp_path):
    path = tmp_path / "course" / "notebooks" / NOTEBOOK
    before = nbformat.read(path, as_version=4)
    for cell in (cell for cell in before.cells if cell.cell_type == "code"):
        cell.outputs, cell.execution_count = [], None  # any outputs afterward are new
    nbformat.write(before, path)

    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(f"{server}lab/tree/notebooks/{NOTEBOOK}")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("Python 3", exact=False).first.wait_for()  # the kernel is there
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    deadline = time.monotonic() + 180
    while not (cells := cells_once_run(path)):
        assert time.monotonic() < deadline, "the last cell has not run"
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)

    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) >= 3
    diagram = page.locator(".jp-MarkdownOutput img").first  # it lies outside of notebooks/
    diagram.scroll_into_view_if_needed()
    assert diagram.evaluate("picture => picture.naturalWidth") > 200
    pictures = page.locator(".jp-OutputArea img")
    pictures.last.scroll_into_view_if_needed()
    assert pictures.last.evaluate("picture => picture.naturalWidth") > 200
    page.close()


@pytest.mark.slow
@pytest.mark.browser
def test_a_saved_answer_is_there_when_the_notebook_is_opened_again(browser, server, tmp_path):
    path = tmp_path / "course" / "notebooks" / NOTEBOOK
    source = path.with_suffix(".py").read_bytes()
    answer = "# my own answer is 42"
    for visit in ("first", "second"):
        page = browser.new_context().new_page()  # without what the first visit left in the browser
        page.set_default_timeout(60_000)
        page.goto(f"{server}lab/tree/notebooks/{NOTEBOOK}")
        cell = page.locator(".jp-CodeCell .cm-content").first
        cell.wait_for()
        page.wait_for_timeout(2000)  # a complaint about the file would appear now
        assert page.locator(".jp-Dialog").count() == 0
        if visit == "first":
            cell.click()
            page.keyboard.press("Control+End")
            page.keyboard.type(f"\n{answer}")
            page.keyboard.press("Control+s")
            deadline = time.monotonic() + 60
            while answer not in path.read_text(encoding="utf-8"):
                assert time.monotonic() < deadline, "the answer was not saved"
                page.wait_for_timeout(200)
        assert answer in cell.inner_text()
        page.context.close()
    assert path.with_suffix(".py").read_bytes() == source


def cells_once_run(path: Path) -> list:
    """The code cells of the file that the reader has saved; none before the last one has run."""
    try:
        cells = nbformat.read(path, as_version=4).cells
    except nbformat.reader.NotJSONError:  # it is being written at this moment
        return []
    cells = [cell for cell in cells if cell.cell_type == "code"]
    return cells if cells[-1].execution_count is not None else []
