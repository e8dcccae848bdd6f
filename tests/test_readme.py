"""The README keeps its word: what it says to type exists and works, its links lead somewhere."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, STAGES
from test_lessons import COMMANDS, tracked

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
PAGES = ["README.md", *tracked("docs/*.md")]
EVERYTHING = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)


def test_the_readme_is_short_and_its_commands_fit_on_githubs_page():
    assert len(README.splitlines()) <= 170
    assert max(map(len, BLOCKS.splitlines())) <= 98  # monospaced characters in 846 pixels


def test_every_table_is_current():
    """What cog would write is what is there."""
    command = [sys.executable, "-m", "cogapp", "--check", "-I", "docs", *PAGES]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Checking") == len(PAGES)


def test_every_script_that_it_says_to_run_exists():
    pattern = r"(?:python|python3|torchrun)\S*(?: -\S+)* ([\w/]+\.py)\b"
    scripts = set(re.findall(pattern, EVERYTHING))
    assert {"bigram.py", "gpt.py", "sample.py"} <= scripts
    scripts -= {"my_gpt.py"}  # the reader's own
    assert not [name for name in scripts if not (ROOT / name).exists()]


def test_every_flag_of_its_commands_exists(run):
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", EVERYTHING)) - {
        *("--no-index", "--extra-index-url", "--nanogpt", "--rounds", "--minutes"),
        *("--nproc", "--nnodes", "--rdzv"),  # torchrun's own
        *("--to", "--execute"),  # jupytext's
    }
    helps = "".join(run(script, "--help")[1] for script in (*STAGES, *COMMANDS))
    assert len(flags) > 10
    assert not [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", helps)]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    content = (ROOT / page).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", content, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
    links = re.findall(r"\]\(([^)\s]+)\)", content)
    links += re.findall(r"\b(?:src|srcset|href)=\"([^\"]+)\"", content)
    assert links or page != "README.md"
    for link in links:
        path, _, anchor = re.sub(r"\s", "", link).partition("#")
        if not path.startswith(("http:", "https:")):
            assert (ROOT / page).parent.joinpath(path).exists(), link
            assert path or anchor in anchors, link


def test_the_test_command_is_the_one_that_ci_runs():
    ci = ROOT / ".ci" / "run"
    if not ci.exists():
        pytest.skip("this is no checkout")
    (pattern,) = re.findall(r"grep -m 1 '(.*)' README.md", ci.read_text(encoding="utf-8"))
    lines = [line for line in BLOCKS.splitlines() if re.search(pattern, line)]
    assert lines and "-r requirements-dev.txt" in lines[0]
    assert re.search(r"/pytest( -n 2)?$", lines[0])  # all of the tests


@pytest.mark.slow
def test_the_python_lines_work(small_run, tmp_path):
    """In a process of their own, after a run of the stage that they name."""
    (lines,) = re.findall(r"```python\n(.*?)```", EVERYTHING, re.DOTALL)
    lines = lines.replace("ROMEO:", "Line 7:")  # the text of the tests has no ROMEO
    stage = re.search(r"runs/(\w+)", lines)[1]
    assert small_run(stage)[0] == 0
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{lines}"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    options = {"cwd": tmp_path, "env": environment, "timeout": 120, "encoding": "utf-8"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, **options)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_code_is_in_style(arguments):
    command = [sys.executable, "-m", "ruff", *arguments, *tracked("*.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
