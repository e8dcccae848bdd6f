"""Byte-pair encoding: the same merges and ids as the tokenizers library, and everything after."""

import csv
import json
import time
from pathlib import Path

import prepare
from bpe import PATTERN, BytePairTokenizer, learn
from explorer.hooks import record
from sample import generate, load
from trainer.corpus import open_corpus

import pytest
import torch
from conftest import ROOT, table
from hypothesis import given, settings
from hypothesis import strategies as st

PLAY = (ROOT / "data" / "pocket_play.py").read_text(encoding="utf-8")
TEXTS = {
    "source code": PLAY,
    "Chinese": "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏" * 3 + "天地 宇宙，日月。\n" * 40,
    "emoji": "😀😃😄 hello 👩‍👩‍👧‍👦 wow 😀😀 \u00a0\u3000 e\u0301 " * 20,
    "long words": f"{'abc' * 50} {'1' * 200}{'!' * 99}{' ' * 150}end",
    "repetition": "aaaaaaaa aaaa aaa aaaaaaaaaaaaa bababab ababab    \t\t\n\n\n\n 1111111 ......",
}


def library(text: str, vocab_size: int):
    """The same of the tokenizers library."""
    tokenizers = pytest.importorskip("tokenizers")
    pre, trainers = tokenizers.pre_tokenizers, tokenizers.trainers
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    cut = pre.Split(tokenizers.Regex(PATTERN), "isolated")
    as_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre.Sequence([cut, as_bytes])
    alphabet = pre.ByteLevel.alphabet()
    how = {"min_frequency": 0, "initial_alphabet": alphabet, "show_progress": False}
    theirs.train_from_iterator([text], trainers.BpeTrainer(vocab_size=vocab_size, **how))
    return theirs


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("vocab_size", [256, 300, 700])
def test_merges_and_ids_are_those_of_the_library(name, vocab_size):
    text = TEXTS[name]
    theirs, merges = library(text, vocab_size), learn(text, vocab_size)
    ours = BytePairTokenizer(merges)
    assert theirs.get_vocab_size() == len(ours.vocabulary)
    assert [list(pair) for pair in merges] == ours.source
    for each in TEXTS.values():  # also texts that it has not learned from
        assert ours.encode(each) == theirs.encode(each).ids
        assert ours.decode(ours.encode(each)) == each


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(256, 320))
def test_any_text_comes_back(text, vocab_size):
    tokenizer = BytePairTokenizer(learn(text, vocab_size))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert BytePairTokenizer([]).decode(BytePairTokenizer([]).encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(f"{text}\udcff")) == f"{text}?"  # no valid text


def test_samples_may_contain_invalid_bytes():
    tokenizer = BytePairTokenizer([])
    ids = tokenizer.encode("é€")
    assert "".join(tokenizer.stream(ids)) == "é€"
    damaged = [*ids[:-1], *tokenizer.encode("a"), ids[0]]
    assert "".join(tokenizer.stream(damaged)) == "é\ufffda\ufffd"


def test_learning_merges_by_hand():
    merges = learn("ab ab ab abc bc", 259)
    tokens = BytePairTokenizer(merges).vocabulary[256:]
    assert tokens == ["ab", " ab", "bc"]  # 4 times; 3 times; 1 of several that are there once


@pytest.fixture
def folder(run, tmp_path: Path) -> Path:
    (tmp_path / "play.txt").write_text(PLAY, encoding="utf-8")
    code, output, errors = run("bpe", "--data", "play.txt", "--vocab-size", 300, "--out", "tokens")
    assert (code, errors) == (0, "")
    assert f"wrote {len(PLAY):,} characters" in output
    return tmp_path / "tokens"


def test_both_splits_are_the_same_text_as_of_characters(folder, tmp_path):
    tokens, characters = open_corpus(folder), open_corpus(tmp_path / "play.txt")
    for name in ("train", "validation"):
        ours, theirs = (x.tokenizer.decode(vars(x)[name].tolist()) for x in (tokens, characters))
        assert ours == theirs
    assert tokens.text == characters.text
    assert tokens.characters_per_token == len(characters.validation) / len(tokens.validation)
    assert characters.characters_per_token == 1


def test_a_large_text_is_encoded_in_pieces_by_several_processes(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WORK", 500)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 100)
    flags = ["play.txt", "play.txt", "--out", "twice", "--tokenizer", folder]
    assert run("prepare", *flags)[::2] == (0, "")
    corpus = open_corpus(tmp_path / "twice", verify=True)
    text, border = PLAY + PLAY, 2 * len(PLAY) * 9 // 10
    for part, ids in ((text[:border], corpus.train), (text[border:], corpus.validation)):
        assert ids.tolist() == corpus.tokenizer.encode(part)


def test_a_run_on_tokens(folder, small_run, run, tmp_path):
    assert small_run("gpt", "--data", folder, "--out", "one")[0] == 0
    about = json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))
    assert about["config"]["vocab_size"] == 300
    model, tokenizer = load(tmp_path / "one", "cpu")
    text = "".join(generate(model, tokenizer, "def ", 20, temperature=0))
    flags = ["--prompt", "def ", "--sample-length", 20, "--temperature", 0]
    code, output, _ = run("sample", "one", *flags)
    assert (code, output) == (0, f"def {text}\n")
    assert small_run("gpt", "--data", folder, "--seed", 2, "--out", "more")[0] == 0
    assert small_run("gpt", "--data", "play.txt", "--out", "two")[0] == 0
    flags = ["one", "two", "more", "--sample-length", 10, "--out", "both"]
    code, output, errors = run("compare", *flags)
    assert (code, errors) == (0, "")
    with (tmp_path / "both" / "table.csv").open(encoding="utf-8", newline="") as file:
        tokens, characters = csv.DictReader(file)
    assert tokens["run"] == f"{characters['run']} (300 tokens)"
    losses = [min(row[2] for row in table(tmp_path / name)) for name in ("one", "more")]
    per_character = sum(losses) / 2 / about["corpus"]["characters_per_token"]
    loss = float(tokens["validation loss"].split()[0])
    assert abs(loss - per_character) < 0.001
    assert float(tokens["ensemble loss"]) <= loss
    assert record(model, torch.tensor([tokenizer.encode("def ")]))["logits"].shape[-1] == 300


def test_an_export_has_the_same_tokens(folder, small_run, run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    assert small_run("gpt", "--data", folder, "--out", "one")[0] == 0
    assert run("export", "one", "--out", "exported")[::2] == (0, "")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "exported" / "tokenizer.json"))
    ours = open_corpus(folder).tokenizer
    for text in TEXTS.values():
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_runs_with_other_tokens_do_not_fit(folder, small_run, run):
    assert small_run("gpt", "--data", folder, "--out", "one")[0] == 0
    for command, complaint in (
        ("gpt --data play.txt --init-from one --out two", "has other tokens than that run"),
        ("prepare play.txt --tokenizer one --out three", "is not a usable prepared text"),
        ("bpe --vocab-size 255 --out four", "'255' is not a whole number >= 256 and <= 65536"),
    ):
        code, _, errors = run(*command.split())
        assert (code, errors.count("\n")) == (2, 1), errors
        assert complaint in errors


def test_pieces_end_at_white_space_however_long():
    text = "x" + " " * 10**6 + "a b c"
    began = time.perf_counter()
    assert prepare.last_border(text) == len(text) - 2
    assert prepare.last_border(text[:-4]) == 1
    assert prepare.last_border("none") == prepare.last_border("  none") == 0
    assert time.perf_counter() - began < 10  # and not hours


@pytest.mark.parametrize(
    "merges", [[[-1, 5]], [[0, 256]], [[0]], [["a", "b"]], 5, [[0, 0]] * 2**16]
)
def test_damaged_merges_are_refused(merges, folder, run):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | {"vocabulary": merges}), encoding="utf-8")
    code, _, errors = run("gpt", "--data", folder)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "is not a usable prepared text" in errors
