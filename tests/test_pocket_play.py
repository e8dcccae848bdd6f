"""Pocket Play is what it claims: always the same, with one derivation and an exact entropy."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from math import exp, fsum, isclose, log
from pathlib import Path
from random import Random

from data import pocket_play
from data.pocket_play import NAMES, ONE, THINGS, Symbol

import pytest
from conftest import TIME_LIMIT

SHA_256 = "e54e2fc7a5f18a36c395063fb84bdc6210264efc19bf618d32ad58097e644f69"
SCENE = ("scene",)


@pytest.fixture(scope="module")
def text() -> str:
    return pocket_play.play()


# The grammar, its entropy and its derivations, checked by means of its alternatives only.


def reachable() -> set[tuple]:
    found, waiting = {SCENE}, [SCENE]
    while waiting:
        for _, parts in pocket_play.alternatives(waiting.pop()):
            new = {part for part in parts if isinstance(part, tuple)} - found
            found |= new
            waiting += new
    return found


@cache
def beginning(symbol: Symbol) -> str:
    """What all texts of a symbol begin with. It spares the parser hopeless alternatives."""
    if isinstance(symbol, str):
        return symbol
    starts = []
    for _, parts in pocket_play.alternatives(symbol):
        start = ""
        for part in parts:
            start += beginning(part)
            if not isinstance(part, str):
                break
        starts.append(start)
    return os.path.commonprefix(starts)


def parser(text: str) -> Callable[[Symbol, int], dict[int, tuple[int, float]]]:
    @cache
    def ends(symbol: Symbol, start: int) -> dict[int, tuple[int, float]]:
        """Where a symbol that starts here can end: how many derivations, -ln p of all together."""
        if not text.startswith(beginning(symbol), start):
            return {}
        if isinstance(symbol, str):
            return {start + len(symbol): (1, 0.0)}
        result: dict[int, tuple[int, float]] = {}
        for p, parts in pocket_play.alternatives(symbol):
            reached = {start: (1, -log(p))}
            for part in parts:
                onwards: dict[int, tuple[int, float]] = {}
                for middle, (ways, nats) in reached.items():
                    for end, (more, cost) in ends(part, middle).items():
                        add(onwards, end, ways * more, nats + cost)
                reached = onwards
            for end, (ways, nats) in reached.items():
                add(result, end, ways, nats)
        return result

    def add(table: dict[int, tuple[int, float]], end: int, ways: int, nats: float) -> None:
        if end in table:
            before, cost = table[end]
            ways, nats = ways + before, -log(exp(-nats) + exp(-cost))
        table[end] = ways, nats

    return ends


def derivations(symbol: Symbol, text: str) -> tuple[int, float]:
    return parser(text)(symbol, 0).get(len(text), (0, 0.0))


def listing(symbol: Symbol) -> Iterator[tuple[str, float]]:
    """Every derivation of a symbol: its text and its probability."""
    if isinstance(symbol, str):
        yield symbol, 1.0
        return
    for p, parts in pocket_play.alternatives(symbol):
        texts = [("", p)]
        for part in parts:
            ways = list(listing(part))
            texts = [(text + more, q * r) for text, q in texts for more, r in ways]
        yield from texts


def test_alternatives_are_distributions():
    for symbol in reachable():
        choices = pocket_play.alternatives(symbol)
        assert all(p > 0 for p, _ in choices)
        assert isclose(fsum(p for p, _ in choices), 1, abs_tol=1e-12), symbol
        assert len({tuple(parts) for _, parts in choices}) == len(choices), symbol


@pytest.mark.parametrize(
    "symbol",
    [("noun", "creature", ONE, True), ("doubt",), ("greeting", "Pip", "umbrella")],
)
def test_entropy_and_length_agree_with_a_complete_listing(symbol):
    texts = dict(ways := list(listing(symbol)))
    assert len(texts) == len(ways), "a text has two derivations"
    assert isclose(fsum(texts.values()), 1, abs_tol=1e-12)
    expected = fsum(-p * log(p) for p in texts.values())
    assert isclose(pocket_play.entropy(symbol), expected, rel_tol=1e-9)
    expected = fsum(p * len(text) for text, p in texts.items())
    assert isclose(pocket_play.length(symbol), expected, rel_tol=1e-9)


def test_scenes_and_sentences_have_one_derivation_and_the_reported_probability():
    dice = Random(2)
    for symbol in [SCENE] * 30 + [("sentence", thing) for thing in THINGS * 120]:
        text, nats = pocket_play.draw(symbol, dice)
        ways, parsed = derivations(symbol, text)
        assert ways == 1, text
        assert isclose(parsed, nats, rel_tol=1e-9)
        if symbol == SCENE:  # it shows where it ends, so a play has one derivation too
            assert re.findall("ALL:(?:\n.+)+\n\n", text) == [text[text.index("ALL:") :]]


def test_the_text_is_always_the_same_and_laid_out_like_tiny_shakespeare(text):
    assert hashlib.sha256(text.encode()).hexdigest() == SHA_256
    assert pocket_play.play(5000, 7) == pocket_play.play(5000, 7) != pocket_play.play(5000, 8)
    assert text.startswith(pocket_play.play(5000))
    assert 1_000_000 <= len(text) < 1_005_000
    assert text.isascii() and 60 <= len(set(text)) <= 65
    assert re.fullmatch(r"(?:[A-Z]+:\n(?:[^\n]+\n)+\n)+", text)
    assert set(re.findall(r"^([A-Z]+):$", text, re.M)) == {*map(str.upper, NAMES), "ALL"}


def test_running_writes_the_play_and_its_numbers(tmp_path, text):
    script = shutil.copy(pocket_play.__file__, tmp_path)
    options = {"env": {**os.environ, "PYTHONHASHSEED": "12345"}, "timeout": TIME_LIMIT}
    output = subprocess.check_output([sys.executable, "-B", script], text=True, **options)
    assert (tmp_path / "pocket_play.txt").read_bytes() == text.encode()
    assert {path.name for path in tmp_path.iterdir()} == {"pocket_play.py", "pocket_play.txt"}
    exact, (again, nats) = pocket_play.entropy_per_character(), pocket_play.draw_play()
    assert again == text
    assert abs(nats / len(text) - exact) < 0.003
    for number in (exact, exact / log(2), nats / len(text)):
        assert f"{number:.4f}" in output


def test_only_pocket_play_has_a_known_entropy(tmp_path):
    folder = Path(pocket_play.__file__).parent
    entropy = pocket_play.known_entropy(str(folder / ".." / folder.name / "pocket_play.txt"))
    assert entropy == pocket_play.entropy_per_character() and 0.45 < entropy < 0.7
    assert pocket_play.known_entropy(str(tmp_path / "pocket_play.txt")) is None
