"""A run that starts from another's weights: what it takes over, what it refuses, what it adds."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL, SMALL_MODEL, files, losses, same_state
from test_gpt import stop_at, table

from prepare import prepare
from sample import load
from training import exact_loss

# They overshoot, so that the best weights are neither the first nor the last.
WILD = {
    "gpt": "--learning-rate 1 --warmup-iters 20 --eval-interval 5 --dropout 0 --precision float32",
    "bigram": "--learning-rate 3 --max-iters 15 --eval-interval 5",
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
        assert small_run(stage, *WILD[stage].split(), "--seed", 3, "--out", folder)[0] == 0
        made[folder] = files(folder)
        return folder

    yield call
    for folder, before in made.items():
        assert files(folder) == before


@pytest.fixture
def more(text: Path, tmp_path: Path) -> Path:
    """Another text, with a few characters that the first one lacks."""
    path = tmp_path / "more.txt"
    lines = (f"Ж{i}: a q is {i * 3 % 7} % — or is it?\n" for i in range(200))
    path.write_text("".join(lines), encoding="utf-8")
    known = set(text.read_text(encoding="utf-8"))
    assert set(path.read_text(encoding="utf-8")) - known == set(NEW)
    return path


@pytest.fixture
def less(text: Path, tmp_path: Path) -> Path:
    """A text that is content with some of the characters of the first."""
    path = tmp_path / "less.txt"
    lines = (f"Line {i * 5 % 31}: the café is it?\n" for i in range(200))
    path.write_text("".join(lines), encoding="utf-8")
    assert set(path.read_text(encoding="utf-8")) < set(text.read_text(encoding="utf-8"))
    return path


def prepared(path: Path) -> Path:
    folder = path.with_suffix(".prepared")
    prepare([path], folder)
    return folder


# What it takes over.


@pytest.mark.parametrize("stage", ["gpt", "bigram"])
def test_it_starts_from_the_best_weights_with_their_settings(
    stage: str, sources: Callable, run: Callable, tmp_path: Path
) -> None:
    source = sources(stage)
    first, *_, last = (row[2] for row in table(source))
    assert best_loss(source) < min(first, last)
    code, output, _ = run(stage, "--init-from", source, "--out", "next", *STILL)
    assert code == 0
    assert output.count(f"starts from the weights of {source}") == 1
    assert "preset" not in output
    assert table(tmp_path / "next")[0][2] == pytest.approx(best_loss(source), abs=2e-6)
    best, next_best = (state(folder / "best.pt") for folder in (source, tmp_path / "next"))
    torch.testing.assert_close(next_best["model"], best["model"], rtol=0, atol=0)

    config = best["config"] | {"learning_rate": 1e-30, "max_iters": 1}
    assert state(tmp_path / "next" / "checkpoint.pt")["config"] == config
    settings = json.loads((tmp_path / "next" / "config.json").read_text(encoding="utf-8"))
    assert settings["config"] == config
    assert settings["init_from"] == str(source)


def test_flags_differ_from_the_source(sources: Callable, run: Callable, tmp_path: Path) -> None:
    source = sources("gpt")
    flags = "--learning-rate 0.002 --max-iters 10 --dropout 0.3 --batch-size 2".split()
    assert run("gpt", "--init-from", source, "--out", "next", *flags)[0] == 0
    given = {"learning_rate": 0.002, "max_iters": 10, "dropout": 0.3, "batch_size": 2}
    saved = state(tmp_path / "next" / "checkpoint.pt")
    assert saved["config"] == state(source / "best.pt")["config"] | given
    assert saved["step"] == 10
    progress = table(tmp_path / "next")
    assert [row[0] for row in progress] == [0, 5, 10]
    assert progress[-1][2] < progress[0][2]  # and it learns


# What it refuses.


@pytest.fixture
def refused(run: Callable, tmp_path: Path) -> Callable:
    """Call a script that must refuse and write nothing; its one line of complaint."""

    def call(script: str, *flags: object) -> str:
        before = files(tmp_path)
        folders = sorted(tmp_path.rglob("*"))
        code, _, errors = run(script, *flags)
        assert code == 2
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith(f"{script}.py: ")
        assert files(tmp_path) == before
        assert sorted(tmp_path.rglob("*")) == folders
        return errors

    return call


# Of these --n-head changes no shape, and a layer more finds all the weights of the others.
SIZES = ["--n-embd 16", "--block-size 16", "--n-layer 1", "--n-layer 3", "--n-head 4"]


@pytest.mark.parametrize("size", SIZES)
def test_other_sizes(size: str, sources: Callable, refused: Callable) -> None:
    complaint = refused("gpt", "--init-from", sources("gpt"), *size.split())
    assert "has changed since" not in complaint  # the script has not


def test_flags_that_do_not_go_with_it(sources: Callable, small_run: Callable, refused: Callable):
    source = sources("gpt")
    init = ["--init-from", source]
    assert "--preset is for a fresh model" in refused("gpt", *init, "--preset", "small")
    assert small_run("gpt", "--out", "other")[0] == 0
    message = refused("gpt", *init, "--resume", "--out", "other")
    assert "--init-from is for a new run" in message
    assert "goes with --init-from" in refused("gpt", "--extend-vocabulary")


@pytest.mark.parametrize("spelling", ["{0}", "{0}/../{0.name}", "link"])
def test_its_own_source_is_not_overwritten(
    spelling: str, sources: Callable, refused: Callable, tmp_path: Path
) -> None:
    source = sources("gpt")
    if spelling == "link":
        try:
            (tmp_path / "link").symlink_to(source)
        except OSError:
            pytest.skip("links need a right here")
    flags = ["--init-from", source, "--out", spelling.format(source)]
    assert "already holds a run" in refused("gpt", *flags)
    assert "is the run to start from: name another folder" in refused("gpt", *flags, "--overwrite")


def test_nor_is_it_by_overwriting_the_usual_folder(
    small_run: Callable, refused: Callable, tmp_path: Path
) -> None:
    """Without --out the run to overwrite is runs/gpt."""
    assert small_run("gpt")[0] == 0
    refused("gpt", "--init-from", Path("runs", "gpt"), "--overwrite")


def test_what_is_no_run_of_this_stage(
    sources: Callable, small_run: Callable, refused: Callable, tmp_path: Path
) -> None:
    source = sources("bigram")
    assert f"the run in {source} was made by bigram.py" in refused("gpt", "--init-from", source)
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty", "text.txt"):
        message = refused("gpt", "--init-from", folder, "--out", "next")
        assert message.startswith(f"gpt.py: {folder} ")


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_text_with_other_characters(
    as_folder: bool, sources: Callable, refused: Callable, more: Path
) -> None:
    source = sources("gpt")
    data = prepared(more) if as_folder else more
    message = refused("gpt", "--init-from", source, "--data", data)
    assert f"does not know 3 of the characters in {data}: {NEW!r}; --extend-vocabulary" in message


# A text with more characters, or fewer.


@pytest.mark.parametrize("stage", ["gpt", "bigram"])
def test_new_characters_leave_the_weights_of_the_others(
    stage: str, sources: Callable, run: Callable, more: Path, tmp_path: Path
) -> None:
    source = sources(stage)
    flags = ["--init-from", source, "--data", more, "--extend-vocabulary", "--out", "next"]
    assert run(stage, *flags, *STILL)[0] == 0
    before, after = state(source / "best.pt"), state(tmp_path / "next" / "best.pt")
    old, vocabulary = before["vocabulary"], after["vocabulary"]
    assert vocabulary == "".join(sorted(old + NEW))
    assert after["config"]["vocab_size"] == len(vocabulary)
    places = torch.tensor([vocabulary.index(character) for character in old])
    new_places = torch.tensor([vocabulary.index(character) for character in NEW])
    by_character = ["token_embedding.weight", "to_logits.weight", "logit_table.weight"]
    for name, weight in before["model"].items():
        grown = after["model"][name]
        assert grown.isfinite().all()
        if name not in by_character:
            assert torch.equal(grown, weight)
        elif stage == "bigram":
            assert grown.shape == (len(vocabulary), len(vocabulary))
            assert torch.equal(grown[places][:, places], weight)
            # A fresh table holds zeros.
            assert not grown[new_places].any() and not grown[:, new_places].any()
        else:
            assert torch.equal(grown[places], weight)
            fresh = grown[new_places]
            assert 0.005 < fresh.std() < 0.05  # as small as at the start of any run
            assert len(fresh.unique(dim=0)) == len(NEW)


@pytest.mark.parametrize("stage", ["gpt", "bigram"])
def test_new_characters_are_learnt_and_written(
    stage: str, sources: Callable, run: Callable, more: Path, tmp_path: Path
) -> None:
    source = sources(stage)
    flags = ["--init-from", source, "--data", more, "--extend-vocabulary", "--out", "next"]
    rate = ["--learning-rate", 0.01, "--max-iters", 100, "--eval-interval", 50]
    assert run(stage, *flags, *rate)[0] == 0
    progress = table(tmp_path / "next")
    assert progress[-1][2] < progress[0][2] - 0.3
    code, output, _ = run("sample", "next", "--prompt", "Ж%q", "--sample-length", 300)
    assert code == 0
    assert output.startswith("Ж%q")
    assert set(output.removeprefix("Ж%q")) & set(NEW)
    # And once more from there: now it knows them.
    assert run(stage, "--init-from", "next", "--data", more, "--out", "last", *STILL)[0] == 0
    assert table(tmp_path / "last")[0][2] == pytest.approx(best_loss(tmp_path / "next"), abs=2e-6)


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_run_with_new_characters_resumes(
    as_folder: bool,
    sources: Callable,
    run: Callable,
    more: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "moved"
    shutil.copytree(sources("gpt"), source)
    data = prepared(more) if as_folder else more
    flags = ["--init-from", source, "--data", data, "--extend-vocabulary", "--learning-rate", 0.01]
    assert run("gpt", *flags, "--out", "whole")[0] == 0
    stop_at(13, monkeypatch)
    assert run("gpt", *flags, "--out", "stopped")[0] == 130
    shutil.rmtree(source)  # it is needed no longer
    assert run("gpt", "--resume", "--out", "stopped")[0] == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for name in ("checkpoint.pt", "best.pt"):
        assert same_state(tmp_path / "stopped" / name, tmp_path / "whole" / name)


@pytest.mark.parametrize("stage", ["gpt", "bigram"])
def test_a_text_with_fewer_characters_keeps_their_numbers(
    stage: str, sources: Callable, run: Callable, less: Path, tmp_path: Path
) -> None:
    source = sources(stage)
    flags = ["--init-from", source, "--learning-rate", 0.01]
    assert run(stage, *flags, "--data", less, "--out", "next")[0] == 0
    before, after = state(source / "best.pt"), state(tmp_path / "next" / "checkpoint.pt")
    assert after["vocabulary"] == before["vocabulary"]
    assert after["config"]["vocab_size"] == len(before["vocabulary"])

    model, tokenizer = load(source, "cpu")
    numbers = torch.tensor(tokenizer.encode(less.read_text(encoding="utf-8")))
    border = len(numbers) * 9 // 10
    first = table(tmp_path / "next")[0]
    assert first[2] == pytest.approx(exact_loss(model, numbers[border:]), abs=1e-5)
    training_loss = exact_loss(model, numbers[: len(numbers) - border])
    assert first[1] == pytest.approx(training_loss, abs=1e-5)

    # --extend-vocabulary, where there is nothing to add, adds nothing.
    more_flags = ["--extend-vocabulary", "--out", "extended"]
    assert run(stage, *flags, "--data", less, *more_flags)[0] == 0
    assert losses(tmp_path / "extended") == losses(tmp_path / "next")


@pytest.mark.parametrize("stage", ["gpt", "bigram"])
@pytest.mark.parametrize("kind", ["less", "more"])
def test_a_prepared_text_gives_the_same_losses_as_the_text(
    stage: str, kind: str, sources: Callable, run: Callable, less: Path, more: Path, tmp_path: Path
) -> None:
    """Its numbers come from a vocabulary of its own, and are translated."""
    source, data = sources(stage), {"less": less, "more": more}[kind]
    flags = ["--init-from", source, "--learning-rate", 0.01, "--extend-vocabulary"]
    for out, each in (("text", data), ("folder", prepared(data))):
        assert run(stage, *flags, "--data", each, "--out", out)[0] == 0
    assert losses(tmp_path / "folder") == losses(tmp_path / "text")
    assert same_state(*(tmp_path / name / "checkpoint.pt" for name in ("folder", "text")))
    model, tokenizer = load(source, "cpu")
    if kind == "less":
        numbers = torch.tensor(tokenizer.encode(data.read_text(encoding="utf-8")))
        expected = exact_loss(model, numbers[len(numbers) * 9 // 10 :])
        assert table(tmp_path / "folder")[0][2] == pytest.approx(expected, abs=1e-5)


# A prepared folder by itself.


@pytest.mark.parametrize("stage", ["gpt", "bigram"])
def test_training_on_a_prepared_folder_is_training_on_its_text(
    stage: str, run: Callable, text: Path, tmp_path: Path
) -> None:
    flags = [*SMALL, *SMALL_MODEL[stage]]
    if stage == "gpt":
        flags += ["--precision", "float32"]
    outputs = []
    for out, data in (("text run", text), ("folder run", prepared(text))):
        code, output, _ = run(stage, *flags, "--data", data, "--out", out)
        assert code == 0
        outputs.append(output)
    assert losses(tmp_path / "text run") == losses(tmp_path / "folder run")
    for name in ("checkpoint.pt", "best.pt"):
        assert same_state(tmp_path / "text run" / name, tmp_path / "folder run" / name)
    samples = [(tmp_path / out / "sample.txt").read_bytes() for out in ("text run", "folder run")]
    assert samples[0] == samples[1]
    assert "of 9,335 characters (31 different)" in outputs[0]
    assert "of 9,335 characters (31 different)" in outputs[1]


def test_a_run_on_a_prepared_folder_resumes(
    small_run: Callable, run: Callable, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(text)
    flags = ["--precision", "float32", "--data", data]
    assert small_run("gpt", *flags, "--out", "whole")[0] == 0
    stop_at(13, monkeypatch)
    assert small_run("gpt", *flags, "--out", "stopped")[0] == 130
    assert run("gpt", "--resume", "--out", "stopped")[0] == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert same_state(*(tmp_path / name / "checkpoint.pt" for name in ("stopped", "whole")))

    # The text itself is another corpus, for all that is known: its SHA-256 is not the folder's.
    code, _, errors = run("gpt", "--resume", "--out", "stopped", "--data", text)
    assert code == 2
    assert "is not the text that the run in stopped learns from" in errors
    shutil.rmtree(data)
    assert run("gpt", "--resume", "--out", "stopped")[0] == 2
