"""compare.py --modern: what modern_gpt.py is without each of its ideas."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import files, start

import compare
from common import load_corpus
from comparison import step_times
from comparison.curves import THEMES
from comparison.ideas import (
    ALL,
    EQUAL_STEPS,
    IDEAS,
    equal_seconds,
    idea_lines,
    idea_notes,
    idea_picture,
    idea_table,
)
from comparison.runs import RUNGS, Terms, read_run
from comparison.table import Result, as_text, read_results

FLAGS = ["--data", "text.txt", "--device", "cpu", "--max-iters", 1, "--sample-length", 20]
NAME = "modern_gpt-preset-small"
WRITTEN = {
    *("modern.csv", "modern.md", "modern.svg", "modern-dark.svg", "modern.png"),
    "step_times.json",
}
ALIKE = {rung.new: 1.0 for rung in EQUAL_STEPS}  # as if no idea took any time


def call(folder: Path, *flags: object) -> tuple[str, str, int]:
    process = start("compare", *FLAGS, *flags, cwd=folder, threads=1)
    return *process.communicate(), process.returncode


def write_step_times(folder: Path, seconds: dict[str, float]) -> None:
    terms = Terms(load_corpus(folder / "text.txt"), "cpu")
    step_times.save_step_times(folder / compare.STEP_TIMES, seconds, terms)


@pytest.fixture(scope="module")
def trained_ideas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of one step with all ideas and without each of them, compared."""
    folder = tmp_path_factory.mktemp("ideas")
    lines = (f"{i}: {i * 7 % 13} of {i * 5 % 11}\n" for i in range(300))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    assert call(folder, "--stages", "modern_gpt", "--seeds", 1)[1:] == ("", 0)
    write_step_times(folder, ALIKE)
    with_all = folder / "runs" / "compare" / "text" / f"{NAME}-1-steps-seed-1"
    settings = json.loads((with_all / "config.json").read_text(encoding="utf-8"))
    for idea in IDEAS[1:]:  # as if trained, with the same losses; the others are trained
        without = settings | {"config": settings["config"] | {"without": [idea]}}
        shutil.copytree(with_all, with_all.with_name(f"{NAME}-without-{idea}"))
        path = with_all.with_name(f"{NAME}-without-{idea}") / "config.json"
        path.write_text(json.dumps(without), encoding="utf-8")
    for path in with_all.parent.glob("*.*"):
        path.unlink()
    output, errors, code = call(folder, "--modern", "--seeds", 1)
    assert (code, errors) == (0, "")
    assert "runs on text: 2 to train, 10 there already" in output
    (folder / "output.txt").write_text(output, encoding="utf-8")
    return folder


def test_all_ideas_are_compared_with_all_but_one(trained_ideas: Path):
    output = (trained_ideas / "output.txt").read_text(encoding="utf-8")
    rows = output.partition("---\n")[2].partition("\n\n")[0].splitlines()
    assert [row.split("  ")[0] for row in rows] == ["nothing", *IDEAS, "all: gpt.py's model"]
    assert "A quick look: 1 steps instead of 2000. What is better" in output
    out = trained_ideas / "runs" / "compare" / "text"
    assert {path.name for path in out.iterdir() if path.is_file()} == WRITTEN
    results = read_results(out / "modern.csv")
    first = [result for result in results if "--max-iters" not in result.flags]
    assert [result.flags for result in first] == [rung.flags for rung in EQUAL_STEPS]
    for result in results:
        assert f"{result.parameters:,}" in output
        assert f"{result.val_loss:.3f}" in output
    picture = ElementTree.parse(out / "modern.svg").getroot()
    ids = [element.get("id") for element in picture.iter()]
    assert {"equal-steps", "equal-seconds"} <= set(ids)


def test_what_is_there_is_not_trained_again(trained_ideas: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(trained_ideas, folder)
    before = files(folder)
    for flags in (["--seeds", 1], ["--no-train"]):
        output, errors, code = call(folder, "--modern", *flags)
        assert (code, errors) == (0, "")
        assert "left out" not in output.partition("left out  ")[0]
        assert files(folder) == before


def test_the_ladder_has_them_in_its_report_and_not_in_its_table(trained_ideas: Path):
    output, errors, code = call(trained_ideas, "--no-train", "--out", "ladder")
    assert (code, errors) == (0, "")
    assert "left out" not in output
    (result,) = read_results(trained_ideas / "ladder" / "losses.csv")
    assert (result.stage, result.flags) == ("modern_gpt", "--preset small")
    page = (trained_ideas / "ladder" / "report.html").read_text(encoding="utf-8")
    assert "an idea is worth here what it adds to the others" in page
    section = page.partition('<h2 id="ideas">')[2].partition("</section>")[0]
    for idea in IDEAS:
        assert f"<code>{idea}</code>" in section


def test_what_is_faster_is_trained_for_longer(trained_ideas: Path, tmp_path: Path):
    """The runs for equal seconds: made, found again, and missed where they are not there."""
    folder = tmp_path / "copy"
    shutil.copytree(trained_ideas, folder)
    out = folder / "runs" / "compare" / "text"
    flags = ["--modern", "--seeds", 1, "--max-iters", 10]
    for path in sorted(out.glob(f"{NAME}-*")):  # as if each had taken ten steps, and ten seconds
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        settings["config"] |= {"max_iters": 10, "eval_interval": 1}
        (path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        head, *_ = (path / "losses.csv").read_text(encoding="utf-8").splitlines()
        rows = (f"{step},4,{4 - step / 10},0.003,1,{step}" for step in range(11))
        (path / "losses.csv").write_text("\n".join([head, *rows, ""]), encoding="utf-8")
    write_step_times(folder, ALIKE | {"muon": 0.8})
    output, errors, code = call(folder, *flags)
    assert (code, errors) == (0, "")
    assert "runs on text: 1 to train, 12 there already" in output
    (longer,) = out.glob(f"{NAME}-without-muon-max-iters-12-*")
    assert read_run(longer).config["max_iters"] == 12
    output, errors, code = call(folder, *flags)
    assert (code, errors) == (0, "")
    assert "runs on text: 0 to train, 13 there already" in output
    (result,) = (each for each in read_results(out / "modern.csv") if "12" in each.flags)
    assert result.val_loss == read_run(longer).best["val_loss"]
    assert f"{result.val_loss:.3f}" in output
    shutil.rmtree(longer)
    output, errors, code = call(folder, *flags, "--no-train")
    assert (code, errors) == (0, "")
    assert "not there: modern_gpt --preset small --without muon --max-iters 12" in output
    (row,) = (line for line in output.splitlines() if line.startswith("muon "))
    assert row.split()[-1] == "0.80"  # and then nothing: no column of equal seconds has a number


def test_without_a_run_of_all_ideas_there_is_nothing_to_compare(
    trained_ideas: Path, tmp_path: Path
):
    folder = tmp_path / "copy"
    shutil.copytree(trained_ideas, folder)
    for path in (folder / "runs" / "compare" / "text").glob(f"{NAME}-1-steps*"):
        shutil.rmtree(path)
    before = files(folder)
    output, errors, code = call(folder, "--modern", "--no-train")
    assert code == 2
    assert re.fullmatch(r"compare\.py: nothing to compare: .*leave out --no-train\n", errors)
    assert files(folder) == before


def test_the_ideas_are_of_one_stage(trained_ideas: Path):
    output, errors, code = call(trained_ideas, "--modern", "--stages", "bigram,gpt")
    assert (output, code) == ("", 2)
    assert errors == "compare.py: --modern compares modern_gpt.py with itself: leave out --stages\n"


def test_equal_seconds_are_more_steps_for_what_is_faster(trained_ideas: Path):
    same, faster, slower, little = (rung.new for rung in EQUAL_STEPS[1:5])
    terms = Terms(load_corpus(trained_ideas / "text.txt"), "cpu", ladder=EQUAL_STEPS)
    usual = terms.config(ALL)
    rungs = equal_seconds(ALIKE | {faster: 0.83, slower: 1.25, little: 0.98}, terms)
    assert [rung.new for rung in rungs] == [faster, slower]
    longer, shorter = (terms.config(rung) for rung in rungs)
    assert longer["max_iters"] == usual["max_iters"] * 12 // 10
    assert shorter["max_iters"] == usual["max_iters"] * 8 // 10
    assert longer["without"] == (faster,)
    assert equal_seconds({}, terms) == ()


def test_the_time_of_a_step_is_measured_once(
    trained_ideas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(step_times, "ROUNDS", 2)
    monkeypatch.chdir(tmp_path)
    terms = Terms(load_corpus(trained_ideas / "text.txt"), "cpu", ladder=EQUAL_STEPS)
    threads = torch.get_num_threads()
    measured = compare.step_times_of(terms)
    assert torch.get_num_threads() == threads
    assert measured.keys() == ALIKE.keys()
    assert min(measured.values()) > 0.001
    path = tmp_path / compare.STEP_TIMES
    assert step_times.read_step_times(path, terms) == measured
    assert step_times.read_step_times(path, replace(terms, device="cuda")) == {}
    text = path.read_text(encoding="utf-8")
    for other in (
        text[:50],
        "[]",
        text.replace('"seconds"', '"minutes"'),
        re.sub("[0-9]", "7", text),
    ):
        path.write_text(other, encoding="utf-8")
        assert step_times.read_step_times(path, terms) == {}


def result(flags: str, seed: int, loss: float, seconds: float) -> Result:
    return Result("modern_gpt", f"{ALL.flags} {flags}".strip(), seed, 7, 9, 1.0, loss, 5, seconds)


def test_what_an_idea_buys_is_counted_by_hand():
    results = [
        result("", 1, 1.5, 100),
        result("", 2, 1.7, 110),
        result("--without rope", 1, 1.8, 80),
        result("--without rope", 2, 1.8, 90),
        result("--without rope --max-iters 875 --eval-interval 218", 1, 1.7, 100),
        result("--without muon", 1, 1.4, 100),
        result("--without muon", 2, 1.6, 120),
    ]
    lines = idea_lines(results, ALIKE | {"rope": 0.81, "muon": 1.04})
    assert [line.left_out for line in lines] == ["nothing", "rope", "muon"]
    rows = idea_table(lines)[1:]
    assert rows[0][2:] == ["1.600 ± 0.141", "", "1.00", "1.600 ± 0.141", ""]
    # The variances of the three pairs of runs are 0.02, 0 and 0.02; their mean's root is 0.115.
    assert rows[1][2:] == ["1.800 ± 0.000", "+0.200 ± 0.115", "0.81", "1.700", "+0.100 ± 0.141"]
    # Where equal seconds are as many steps, the same runs count for both.
    assert rows[2][2:4] == rows[2][5:7] == ["1.500 ± 0.141", "-0.100 ± 0.115"]
    assert rows[2][4] == "1.04"
    # Where they are not, and their runs are missing, nothing is said of equal seconds.
    results = [each for each in results if "875" not in each.flags]
    some = idea_lines(results, ALIKE | {"rope": 0.81})
    assert idea_table(some)[2][2:] == ["1.800 ± 0.000", "+0.200 ± 0.115", "0.81", "", ""]
    unknown = idea_lines(results, {})
    assert idea_table(unknown)[2][2:] == ["1.800 ± 0.000", "+0.200 ± 0.115", "", "", ""]
    for each, theme in itertools.product((lines, some), THEMES.values()):
        assert idea_picture(each, theme, "svg").startswith(b"<?xml")


def test_the_table_fits_a_terminal():
    flags = ["", *(f"--without {idea}" for idea in IDEAS)]
    results = [result(each, seed, 1.5, 100) for each in flags for seed in (1, 2, 3)]
    lines = idea_lines(results, ALIKE)
    for width in (70, 80, 100, 200):
        text = as_text(idea_table(lines), width)
        assert max(map(len, text.splitlines())) <= width
        assert ("relative" in text) == (width >= 100)


def test_the_verdict_names_what_bought_nothing(trained_ideas: Path):
    results = [
        result(flags, seed, loss + seed / 1000, 100)
        for flags, loss in {
            "": 1.5,
            "--without rope": 1.6,
            "--without muon": 1.501,
            "--without qk-norm": 1.4,
            "--without all": 1.9,
        }.items()
        for seed in (1, 2, 3)
    ]
    some = next((trained_ideas / "runs" / "compare" / "text").glob(f"{NAME}-1-*"))
    notes = "\n".join(idea_notes(idea_lines(results, ALIKE), {ALL: [read_run(some)]}))
    assert re.search(r"These lowered the loss.*: rope\.", notes)
    assert re.search(r"These bought nothing.*: muon\.", notes)
    assert re.search(r"These raised it: qk-norm\.", notes)


def test_the_rows_of_the_ladder_are_of_the_same_preset():
    modern = [rung for rung in RUNGS if rung.stage == "modern_gpt"]
    assert [rung.flags for rung in modern] == [f"--preset {p}" for p in ("small", "middle", "full")]
