"""compare.py --modern: what modern_gpt.py is without each of its ideas."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import compare
from comparison import step_times
from comparison.curves import THEMES
from comparison.ideas import (
    ALL,
    EQUAL_STEPS,
    IDEAS,
    equal_seconds,
    idea_lines,
    idea_picture,
    idea_table,
)
from comparison.runs import Row, Terms
from comparison.table import Result, read_results
from trainer.corpus import open_corpus

import pytest
import torch
from conftest import files
from fake_runs import write_run

STEPS = 10
FLAGS = f"--data text.txt --device cpu --max-iters {STEPS} --sample-length 20".split()
OUT = compare.RUNS / "text"
WRITTEN = {
    *("modern.csv", "modern.md", "modern.svg", "modern-dark.svg", "modern.png"),
    "step_times.json",
}
SAME_TIMES = {row.new: 1.0 for row in EQUAL_STEPS}  # as if no idea took any time


@pytest.fixture
def terms(text: Path) -> Terms:
    return Terms(open_corpus(text), "cpu", max_iters=STEPS, table=EQUAL_STEPS)


@pytest.fixture
def fake(terms: Terms, tmp_path: Path) -> Path:
    """A folder with runs with all ideas and without each of them, none of them trained."""
    for i, row in enumerate(EQUAL_STEPS):
        for seed in (1, 2):
            folder = tmp_path / OUT / f"{i}-{seed}"
            write_run(folder, terms, row, seed, loss=1.5 + i / 100 + seed / 1000)
    save_times(tmp_path, terms, SAME_TIMES)
    return tmp_path


def save_times(folder: Path, terms: Terms, seconds: dict[str, float]) -> None:
    step_times.save_step_times(folder / compare.STEP_TIMES, seconds, terms)


def test_all_ideas_are_compared_with_all_but_one(fake, run):
    for flags in (["--seeds", 2], ["--no-train"]):  # neither has anything to train
        code, output, errors = run("compare", *FLAGS, "--modern", *flags)
        assert (code, errors) == (0, "")
        assert "left out:" not in output and "missing" not in output
    rows = output.partition("---\n")[2].partition("\n\n")[0].splitlines()
    assert [row.split("  ")[0] for row in rows] == ["nothing", *IDEAS, "all: gpt.py's model"]
    assert f"with {STEPS} steps instead of 2000" in output
    assert {path.name for path in (fake / OUT).iterdir() if path.is_file()} == WRITTEN
    results = read_results(fake / OUT / "modern.csv")
    assert [each.flags for each in results[::2]] == [row.flags for row in EQUAL_STEPS]
    assert results[4].flags == "--preset small --no-rope"
    assert results[-1].flags.count("--no-") == len(IDEAS)
    ids = [each.get("id") for each in ElementTree.parse(fake / OUT / "modern.svg").iter()]
    assert {"equal-steps", "equal-seconds"} <= set(ids)


@pytest.mark.slow
def test_a_missing_idea_is_trained(fake, terms, run):
    """For equal steps, and for equal seconds too, as it takes less time."""
    without_muon = next(i for i, row in enumerate(EQUAL_STEPS) if row.new == "muon")
    (fake / OUT / f"{without_muon}-1" / "config.json").unlink()
    save_times(fake, terms, SAME_TIMES | {"muon": 0.5})
    code, output, errors = run("compare", *FLAGS, "--modern", "--seeds", 1)
    assert (code, errors) == (0, "")
    paths = (fake / OUT).glob("modern_gpt-*/config.json")
    configs = [json.loads(path.read_text(encoding="utf-8"))["config"] for path in paths]
    assert {config["max_iters"] for config in configs} == {STEPS, 2 * STEPS}
    assert not any(config["muon"] for config in configs)
    before = files(fake)
    assert ": 0 to train" in run("compare", *FLAGS, "--modern", "--seeds", 1)[1]
    assert files(fake) == before


def test_the_report_has_them_and_its_table_has_not(fake, run):
    code, output, errors = run("compare", *FLAGS, "--no-train")
    assert (code, errors) == (0, "")
    assert "left out" not in output
    results = read_results(fake / OUT / "losses.csv")
    assert {(each.stage, each.flags) for each in results} == {("modern_gpt", "--preset small")}
    page = (fake / OUT / "report.html").read_text(encoding="utf-8")
    section = page.partition('<h2 id="ideas">')[2].partition("</section>")[0]
    assert all(f"<code>{idea}</code>" in section for idea in IDEAS)


def test_equal_seconds_are_more_steps_for_what_is_faster(terms):
    terms = replace(terms, max_iters=None)
    faster, slower, little = IDEAS[1:4]
    rows = equal_seconds(SAME_TIMES | {faster: 0.83, slower: 1.25, little: 0.98}, terms)
    assert [row.new for row in rows] == [faster, slower]
    longer, shorter = (terms.config(row) for row in rows)
    usual = terms.config(ALL)["max_iters"]
    assert (longer["max_iters"], shorter["max_iters"]) == (usual * 12 // 10, usual * 8 // 10)
    assert [idea for idea in IDEAS if not longer[idea]] == [faster]
    assert equal_seconds({}, terms) == ()


@pytest.mark.slow
def test_the_time_of_a_step_is_measured_once(terms, tmp_path, monkeypatch):
    monkeypatch.setattr(step_times, "ROUNDS", 2)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    measured = compare.step_times_of(terms)
    assert torch.get_num_threads() == threads
    assert measured.keys() == SAME_TIMES.keys() and min(measured.values()) > 0.001
    assert step_times.read_step_times(compare.STEP_TIMES, terms) == measured


def result(row: Row, seed: int, loss: float) -> Result:
    return Result(row.stage, row.flags, seed, 7, 9, 1.0, loss, 5, 100.0)


def without(idea: str) -> Row:
    return next(row for row in EQUAL_STEPS if row.new == idea)


def test_the_table_of_ideas_is_computed_by_hand():
    longer = without("rope").changed(max_iters=875, eval_interval=218)
    results = [
        *(result(ALL, seed, loss) for seed, loss in ((1, 1.5), (2, 1.7))),
        *(result(without("rope"), seed, 1.8) for seed in (1, 2)),
        result(longer, 1, 1.7),
        *(result(without("muon"), seed, loss) for seed, loss in ((1, 1.4), (2, 1.6))),
    ]
    lines = idea_lines(results, SAME_TIMES | {"rope": 0.81, "muon": 1.04})
    assert [line.left_out for line in lines] == ["nothing", "rope", "muon"]
    rows = idea_table(lines)[1:]
    assert rows[0][2:] == ["1.600 ± 0.141", "", "1.00", "1.600 ± 0.141", ""]
    # The variances of the three pairs of runs are 0.02, 0 and 0.02; their mean's root is 0.115.
    assert rows[1][2:] == ["1.800 ± 0.000", "+0.200 ± 0.115", "0.81", "1.700", "+0.100 ± 0.141"]
    # If equal seconds are as many steps, the same runs count for both.
    assert rows[2][2:4] == rows[2][5:7] == ["1.500 ± 0.141", "-0.100 ± 0.115"]
    # If they are not, and their runs are missing, those columns are empty.
    results = [each for each in results if "875" not in each.flags]
    some = idea_lines(results, SAME_TIMES | {"rope": 0.81})
    assert idea_table(some)[2][2:] == ["1.800 ± 0.000", "+0.200 ± 0.115", "0.81", "", ""]
    unknown = idea_lines(results, {})
    assert idea_table(unknown)[2][2:] == ["1.800 ± 0.000", "+0.200 ± 0.115", "", "", ""]
    for each, theme in itertools.product((lines, some), THEMES.values()):
        assert idea_picture(each, theme, "svg").startswith(b"<?xml")
