"""A run that starts from another's weights: what it takes over, what it refuses, what it adds."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from comparison.ensemble import ensemble_loss
from comparison.runs import read_run
from prepare import prepare
from sample import load
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import pytest
import torch
from conftest import files
from test_bad_input import refusal
from test_runs import assert_same_run, stop_at, table

EXACT = {"gpt": ["--precision", "float32"], "bigram": []}  # the dtype that hides no mistake
# They overshoot, so that the best weights are neither the first nor the last.
WILD = {
    "gpt": "--learning-rate 1 --warmup-iters 20 --eval-interval 5 --dropout 0".split(),
    "bigram": "--learning-rate 1 --max-iters 15 --eval-interval 3".split(),
}
STILL = "--learning-rate 1e-30 --max-iters 1".split()  # it moves no weight at all
NEW = "%qЖ"  # characters that sort before, between and after those of the text


def state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def best_loss(folder: Path) -> float:
    return min(row[2] for row in table(folder))


@pytest.fixture
def sources(small_run: Callable, tmp_path: Path) -> Iterator[Callable]:
    """Train a run to start from; whatever the test does with it, it stays as it was."""
    made = {}

    def call(stage: str) -> Path:
        folder = tmp_path / f"{stage} source"
        assert small_run(stage, *EXACT[stage], *WILD[stage], "--out", folder)[0] == 0
        made[folder] = files(folder)
        return folder

    yield call
    for folder, before in made.items():
        assert files(folder) == before


def other_text(path: Path, line: str) -> Path:
    path.write_text("".join(line.format(i, i * 3 % 7) for i in range(200)), encoding="utf-8")
    return path


@pytest.fixture
def more(text: Path, tmp_path: Path) -> Path:
    """Another text, with a few characters that the first one lacks."""
    path = other_text(tmp_path / "more.txt", "Ж{}: a q is {} % — or is it?\n")
    known = set(text.read_text(encoding="utf-8"))
    assert set(path.read_text(encoding="utf-8")) - known == set(NEW)
    return path


@pytest.fixture
def less(text: Path, tmp_path: Path) -> Path:
    """A text with only some of the characters of the first."""
    path = other_text(tmp_path / "less.txt", "Line {}: the café is {} it?\n")
    assert set(path.read_text(encoding="utf-8")) < set(text.read_text(encoding="utf-8"))
    return path


def prepared(path: Path) -> Path:
    folder = path.with_suffix(".prepared")
    prepare([path], folder)
    return folder


@pytest.fixture
def refused(run: Callable, tmp_path: Path) -> Callable:
    return lambda script, *flags: refusal(run, tmp_path, script, *flags)


@pytest.mark.parametrize("stage", ["gpt", "bigram"])
def test_it_starts_from_the_best_weights_with_their_settings(stage, sources, run, tmp_path):
    source = sources(stage)
    first, *_, last = (row[2] for row in table(source))
    assert best_loss(source) < min(first, last)
    flags = ["--init-from", source, "--out", "next", *EXACT[stage]]
    code, output, _ = run(stage, *flags, *STILL)
    assert code == 0
    assert output.count(str(source)) == 1
    assert "preset" not in output
    assert table(tmp_path / "next")[0][2] == pytest.approx(best_loss(source), abs=2e-6)
    best, next_best = (state(folder / "best.pt") for folder in (source, tmp_path / "next"))
    weights, next_weights = best["parts"]["model"], next_best["parts"]["model"]
    torch.testing.assert_close(next_weights, weights, rtol=0, atol=0)

    config = best["config"] | {"learning_rate": 1e-30, "max_iters": 1}
    assert state(tmp_path / "next" / "checkpoint.pt")["config"] == config
    written = json.loads((tmp_path / "next" / "config.json").read_text(encoding="utf-8"))
    assert (written["config"], written["init_from"]) == (config, str(source))


def test_flags_that_do_not_change_what_the_weights_compute_may_differ(sources, run, tmp_path):
    source = sources("gpt")
    flags = "--learning-rate 0.002 --max-iters 10 --dropout 0.3 --batch-size 2".split()
    assert run("gpt", "--init-from", source, "--out", "next", *flags)[0] == 0
    given = {"learning_rate": 0.002, "max_iters": 10, "dropout": 0.3, "batch_size": 2}
    saved = state(tmp_path / "next" / "checkpoint.pt")
    assert saved["config"] == state(source / "best.pt")["config"] | given
    progress = table(tmp_path / "next")
    assert [row[0] for row in progress] == [0, 5, 10]
    assert progress[-1][2] < progress[0][2]  # and it learns


# Of these --n-head changes no shape, and one layer more finds all the weights of the others.
SIZES = "n-embd 16,block-size 16,block-size 4,n-layer 1,n-layer 3,n-head 4,n-head 1".split(",")


@pytest.mark.parametrize("size", SIZES)
def test_flags_that_change_what_the_weights_compute_are_refused(size, sources, refused):
    complaint = refused("gpt", "--init-from", sources("gpt"), *f"--{size}".split())
    assert "flag" in complaint


@pytest.mark.parametrize("idea", ["rope", "qk-norm", "embedding-skip"])
def test_other_ideas_are_other_functions(idea, small_run, refused):
    rates = "--learning-rate 0.1 --muon-learning-rate 0.1 --warmup-iters 1 --out run".split()
    assert small_run("modern_gpt", *rates)[0] == 0
    flags = ["--init-from", "run", "--out", "next", f"--no-{idea}"]
    assert "flag" in refused("modern_gpt", *flags)


def test_other_heads_are_refused_however_short_the_training(small_run, refused):
    assert small_run("gpt", "--max-iters", 1, "--learning-rate", 1e-9, "--out", "run")[0] == 0
    assert "flag" in refused("gpt", "--init-from", "run", "--out", "next", "--n-head", 4)


def test_its_own_source_is_not_overwritten(sources, refused, tmp_path):
    source = sources("gpt")
    for folder in (source, f"{source}/../{source.name}"):
        flags = ["gpt", "--init-from", source, "--out", folder]
        assert "has a run" in refused(*flags)
        assert "start from" in refused(*flags, "--overwrite")
    shutil.copytree(source, tmp_path / "runs" / "gpt")  # which is overwritten without --out
    assert "start from" in refused("gpt", "--init-from", Path("runs", "gpt"), "--overwrite")


def test_another_stages_weights(sources, refused):
    assert "bigram.py" in refused("gpt", "--init-from", sources("bigram"))


# A text with more characters, or fewer.


def test_a_text_with_other_characters(sources, refused, more):
    source = sources("gpt")
    for data in (more, prepared(more)):
        complaint = refused("gpt", "--init-from", source, "--data", data)
        assert all(fact in complaint for fact in (str(data), repr(NEW), "--extend-vocabulary"))


@pytest.mark.parametrize("stage", ["gpt", "bigram"])
def test_new_characters_leave_the_weights_of_the_others(stage, sources, run, more, tmp_path):
    source = sources(stage)
    flags = ["--init-from", source, "--data", more, "--extend-vocabulary", "--out", "next"]
    assert run(stage, *flags, *STILL)[0] == 0
    before, after = state(source / "best.pt"), state(tmp_path / "next" / "best.pt")
    old, vocabulary = before["vocabulary"], after["vocabulary"]
    assert vocabulary == "".join(sorted(old + NEW))
    assert after["config"]["vocab_size"] == len(vocabulary)
    rows = torch.tensor([vocabulary.index(character) for character in old])
    new_rows = torch.tensor([vocabulary.index(character) for character in NEW])
    for name, weight in before["parts"]["model"].items():
        grown = after["parts"]["model"][name]
        if name == "logit_table.weight":
            assert torch.equal(grown[rows][:, rows], weight)
            # A fresh table holds zeros.
            assert not grown[new_rows].any() and not grown[:, new_rows].any()
        elif name in ("token_embedding.weight", "lm_head.weight"):
            assert torch.equal(grown[rows], weight)
            fresh = grown[new_rows]
            assert 0.005 < fresh.std() < 0.05  # as small as at the start of any run
            assert len(fresh.unique(dim=0)) == len(NEW)
        else:
            assert torch.equal(grown, weight)


def test_a_run_with_new_characters_resumes(sources, run, more, tmp_path, monkeypatch):
    source = shutil.copytree(sources("gpt"), tmp_path / "moved")
    flags = ["--init-from", source, "--extend-vocabulary", "--learning-rate", 0.01]
    assert run("gpt", *flags, "--data", prepared(more), "--out", "whole")[0] == 0
    stop_at(13, monkeypatch)
    assert run("gpt", *flags, "--data", more, "--out", "stopped")[0] == 130
    shutil.rmtree(source)  # it is no longer needed
    assert run("gpt", "--resume", "--out", "stopped")[0] == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    rows = table(tmp_path / "whole")
    assert rows[-1][2] < rows[0][2]  # it learns them, and from then on knows them
    assert run("gpt", "--init-from", "whole", "--data", more, "--out", "last")[0] == 0
    assert run("sample", "last", "--prompt", NEW)[1].startswith(NEW)


@pytest.mark.parametrize("stage", ["gpt", "bigram"])
def test_a_text_with_fewer_characters_keeps_their_ids(stage, sources, run, less, tmp_path):
    source = sources(stage)
    flags = ["--init-from", source, "--learning-rate", 0.01, *EXACT[stage]]
    assert run(stage, *flags, "--data", less, "--out", "next")[0] == 0
    before, after = state(source / "best.pt"), state(tmp_path / "next" / "checkpoint.pt")
    assert after["vocabulary"] == before["vocabulary"]
    assert after["config"]["vocab_size"] == len(before["vocabulary"])

    model, tokenizer = load(source, "cpu")
    ids = torch.tensor(tokenizer.encode(less.read_text(encoding="utf-8")))
    border = len(ids) * 9 // 10
    first = table(tmp_path / "next")[0]
    assert first[2] == pytest.approx(exact_loss(model, ids[border:]), abs=1e-5)
    assert first[1] == pytest.approx(exact_loss(model, ids[: len(ids) - border]), abs=1e-5)

    # compare.py reads that text with the model's ids, too.
    expected = pytest.approx(best_loss(tmp_path / "next"), abs=1e-4)
    assert ensemble_loss(2 * [read_run(tmp_path / "next")], open_corpus(less)) == expected

    # --extend-vocabulary, where there is nothing to add, adds nothing; and a prepared folder,
    # which has ids of its own, gives the same run.
    flags += ["--extend-vocabulary", "--data", prepared(less), "--out", "folder"]
    assert run(stage, *flags)[0] == 0
    assert_same_run(tmp_path / "folder", tmp_path / "next")


def test_a_run_on_a_prepared_folder_is_the_run_on_its_text(
    small_run, run, refused, text, tmp_path, monkeypatch
):
    assert small_run("gpt", "--data", text, "--out", "whole")[0] == 0
    data = prepared(text)
    stop_at(13, monkeypatch)
    assert small_run("gpt", "--data", data, "--out", "stopped")[0] == 130
    resume = ["gpt", "--resume", "--out", "stopped", "--sample-length", 20]
    # The text itself counts as another corpus: its SHA-256 is not the folder's.
    assert str(text) in refused(*resume, "--data", text)
    assert run(*resume)[0] == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    shutil.rmtree(data)
    assert str(data) in refused(*resume)
