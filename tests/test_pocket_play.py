"""Pocket Play is what it claims: one derivation per text, an exact entropy, far dependencies."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from math import exp, fsum, isclose, log, sqrt
from pathlib import Path
from random import Random

import pytest

from data import pocket_play
from data.pocket_play import MANY, NAMES, ONE, REFRAINS, THINGS, WORDS, Symbol

SHA_256 = "e54e2fc7a5f18a36c395063fb84bdc6210264efc19bf618d32ad58097e644f69"
SCENE = ("scene",)


@pytest.fixture(scope="module")
def text() -> str:
    return pocket_play.play()


@pytest.fixture(scope="module")
def scenes(text: str) -> list[list[list[str]]]:
    """The text read back by its layout alone: scenes of speeches of lines, the speaker first."""
    result, scene = [], []
    for speech in text.removesuffix("\n\n").split("\n\n"):
        scene.append(speech.split("\n"))
        if scene[-1][0] == "ALL:":
            result.append(scene)
            scene = []
    assert not scene, "the text must end at the end of a scene"
    return result


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


def test_alternatives_are_distributions() -> None:
    symbols = reachable()
    assert len(symbols) < 40_000, "the exact entropy would no longer be found in a moment"
    for symbol in symbols:
        choices = pocket_play.alternatives(symbol)
        assert all(p > 0 for p, _ in choices)
        assert isclose(fsum(p for p, _ in choices), 1, abs_tol=1e-12), symbol
        assert len({tuple(parts) for _, parts in choices}) == len(choices), symbol


def test_words_are_drawn_with_different_probabilities() -> None:
    probabilities = [p for p, _ in pocket_play.alternatives(("word", "creature"))]
    assert 1.5 < probabilities[0] / probabilities[-1] < 2


@pytest.mark.parametrize(
    "symbol",
    [
        ("noun", "creature", ONE, True),
        ("noun", "object", MANY),
        ("where",),
        ("doubt",),
        ("target", "egg"),
        ("greeting", "Pip", "umbrella"),
    ],
)
def test_entropy_and_length_agree_with_a_complete_listing(symbol: tuple) -> None:
    texts = dict(ways := list(listing(symbol)))
    assert len(texts) == len(ways), "a text has two derivations"
    assert isclose(fsum(texts.values()), 1, abs_tol=1e-12)
    expected = fsum(-p * log(p) for p in texts.values())
    assert isclose(pocket_play.entropy(symbol), expected, rel_tol=1e-9)
    expected = fsum(p * len(text) for text, p in texts.items())
    assert isclose(pocket_play.length(symbol), expected, rel_tol=1e-9)


def test_a_scene_has_one_derivation_and_the_reported_probability() -> None:
    dice = Random(2)
    for _ in range(60):
        text, nats = pocket_play.draw(SCENE, dice)
        ways, parsed = derivations(SCENE, text)
        assert ways == 1, text
        assert isclose(parsed, nats, rel_tol=1e-9)
        # A scene shows where it ends, so that a play falls into scenes in one way only.
        assert re.findall("ALL:(?:\n.+)+\n\n", text) == [text[text.index("ALL:") :]]


def test_a_sentence_has_one_derivation_and_the_reported_probability() -> None:
    dice = Random(3)
    for number in range(3000):
        symbol = ("sentence", THINGS[number % len(THINGS)])
        text, nats = pocket_play.draw(symbol, dice)
        ways, parsed = derivations(symbol, text)
        assert ways == 1, text
        assert isclose(parsed, nats, rel_tol=1e-9)


def test_the_parser_sees_a_second_derivation(monkeypatch: pytest.MonkeyPatch) -> None:
    symbol, text = ("target", "clock"), "the clock"
    assert derivations(symbol, text)[0] == 1
    monkeypatch.setitem(WORDS, "object", [*WORDS["object"], "clock"])
    try:
        pocket_play.alternatives.cache_clear()
        assert derivations(symbol, text)[0] == 2
        assert derivations(symbol, "the cloak")[0] == 0
    finally:
        monkeypatch.undo()
        pocket_play.alternatives.cache_clear()


def test_entropy_is_in_the_wanted_range() -> None:
    assert 0.45 < pocket_play.entropy_per_character() < 0.7


def test_realised_nats_are_close_to_the_exact_entropy() -> None:
    dice = Random(4)
    entropy, length = pocket_play.entropy(SCENE), pocket_play.length(SCENE)
    drawn = [pocket_play.draw(SCENE, dice) for _ in range(2000)]
    for expected, values in (
        (entropy, [nats for _, nats in drawn]),
        (length, [len(text) for text, _ in drawn]),
        (0.0, [nats - len(text) * entropy / length for text, nats in drawn]),
    ):
        mean = fsum(values) / len(values)
        error = sqrt(fsum((value - mean) ** 2 for value in values)) / len(values)
        assert abs(mean - expected) < 3.5 * error


def test_the_play_reports_its_own_probability(text: str) -> None:
    again, nats = pocket_play.draw_play()
    assert again == text
    assert abs(nats / len(text) - pocket_play.entropy_per_character()) < 0.003


# The text: always the same, and laid out like Tiny Shakespeare.


def test_same_seed_same_text(text: str) -> None:
    assert hashlib.sha256(text.encode()).hexdigest() == SHA_256
    assert pocket_play.play(5000, 7) == pocket_play.play(5000, 7)
    assert pocket_play.play(5000, 7) != pocket_play.play(5000, 8)
    assert text.startswith(pocket_play.play(5000))


def test_size_and_characters(text: str) -> None:
    assert 1_000_000 <= len(text) < 1_005_000
    assert text.isascii()
    assert set(".,;:!?'-()[]\n ") < set(text)
    assert 60 <= len(set(text)) <= 65


def test_vocabulary_is_rich() -> None:
    assert 8 <= len(NAMES) <= 12
    assert len(WORDS["creature"]) + len(WORDS["object"]) >= 40
    assert len(WORDS["transitive"]) + len(WORDS["intransitive"]) >= 40
    assert len(WORDS["adjective"]) >= 25
    assert len(WORDS["adverb"]) >= 15


def test_layout(text: str) -> None:
    speech = re.compile(r"[A-Z]+:\n(?:[^\n]+\n)+\n")
    position = 0
    while position < len(text):
        match = speech.match(text, position)
        assert match, text[position : position + 200]
        position = match.end()
    assert set(re.findall(r"^([A-Z]+):$", text, re.M)) == {*map(str.upper, NAMES), "ALL"}
    assert not re.search(r"^ | $|  | [.,;:!?)\]]", text, re.M)


def test_sentences_begin_with_a_capital_and_end_with_a_stop(text: str) -> None:
    assert not re.search(r"[.!?]\s+[a-z]", text)
    assert not re.search(r"[^.!?\]]\n\n", text)
    assert not re.search(r":\n[a-z]", text)
    assert len(re.findall(r"[.!?] [A-Z]", text)) > 1000


def test_brackets_close_as_they_opened(text: str) -> None:
    closing = {"(": ")", "[": "]"}
    depths, opened = set(), []
    for character in text:
        if character in closing:
            opened.append(closing[character])
            depths.add("".join(opened))
        elif character in closing.values():
            assert opened.pop() == character
        elif character == "\n" and opened:
            pytest.fail("a bracket stays open at the end of its line")
    assert depths == {")", "]", ")]", "])"}


def test_articles(text: str) -> None:
    articles = re.findall(r"\b([Aa]n?) ([a-z])", text)
    assert {article for article, _ in articles} == {"a", "an", "A", "An"}
    assert all((letter in "aeiou") == (len(article) == 2) for article, letter in articles)


def test_nouns_and_verbs_agree(text: str) -> None:
    def one_of(*kinds: str) -> str:
        return "(?:" + "|".join(word for kind in kinds for word in WORDS[kind]) + ")"

    verb, adverb = one_of("intransitive", "transitive"), one_of("adverb")
    noun = rf"(?:{one_of('adjective')} )?{one_of('creature')}"
    determiner = "(The|An?|My|Every|Some|Two)"

    inner = r" \([^()]*\)(?=\])| \[[^][]*\](?=\))"
    plain = re.sub(r" \([^)]*\)| \[[^]]*\]", "", re.sub(inner, "", text))
    clauses = re.findall(rf"\b{determiner} {noun}(s?) (?:{adverb} )?{verb}(s?)\b", plain)
    assert len(clauses) > 4000
    for determiner, noun_ending, verb_ending in clauses:
        assert (noun_ending == "s") != (verb_ending == "s")
        if determiner != "The":
            assert (noun_ending == "s") == (determiner in ("Some", "Two"))

    for construction in (
        rf"{noun}(s?) [(\[]who {adverb} {verb}(s?)\b",
        rf"or so \w+ {noun}(s?) say(s?)\b",
    ):
        assert set(re.findall(construction, text)) == {("s", ""), ("", "s")}
    does = rf"\b[Dd]o((?:es)?) \w+ {noun}(s?) (?:{adverb} )?{verb}(s?)\b"
    assert set(re.findall(does, text)) == {("es", "", ""), ("", "s", "")}


# What only context, near or far, can tell.


def test_the_cast_takes_turns(scenes: list[list[list[str]]]) -> None:
    shapes = set()
    for scene in scenes:
        speakers = [speech[0].removesuffix(":") for speech in scene[:-1]]
        cast = list(dict.fromkeys(speakers))
        rounds = len(speakers) // len(cast)
        assert speakers == cast * rounds
        shapes.add((len(cast), rounds))
    assert shapes == {(size, rounds) for size in (2, 3) for rounds in (1, 2, 3)}


def test_the_first_round_calls_the_next_speaker(scenes: list[list[list[str]]]) -> None:
    names = re.compile(r"\b(" + "|".join(NAMES) + r")\b")
    for scene in scenes:
        cast = list(dict.fromkeys(speech[0].removesuffix(":") for speech in scene[:-1]))
        for turn, speech in enumerate(scene):
            called = [name.upper() for name in names.findall("\n".join(speech[1:]))]
            if turn < len(cast):
                assert called == [cast[(turn + 1) % len(cast)]]
                assert names.search(speech[-1 if turn else 1])
            else:
                assert called == []


def test_the_thing_returns(scenes: list[list[list[str]]]) -> None:
    things = re.compile(r"\b(" + "|".join(THINGS) + r")s?\b")
    between = 0
    for scene in scenes:
        thing = things.search(scene[0][1])[1]
        assert things.findall(scene[-1][-1]) == [thing]
        rest = things.findall("\n".join("\n".join(speech[1:]) for speech in scene[1:-1]))
        assert set(rest) <= {thing}
        between += bool(rest)
    assert between > 0.7 * len(scenes)


def test_the_refrain_returns(scenes: list[list[list[str]]]) -> None:
    used = set()
    for scene in scenes:
        refrain = scene[0][-1]
        used.add(refrain)
        assert scene[-1][1] == refrain
        for speech in scene[:-1]:
            assert (speech[-1] == refrain) == (speech[0] == scene[0][0])
            assert not set(speech[1:-1]) & set(REFRAINS)
    assert used == set(REFRAINS)


# The file.


def test_importing_does_nothing(tmp_path: Path) -> None:
    shutil.copy(pocket_play.__file__, tmp_path)
    command = [sys.executable, "-B", "-c", "import pocket_play"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == done.stderr == b""
    assert [path.name for path in tmp_path.iterdir()] == ["pocket_play.py"]


def test_running_writes_the_play_and_its_figures(tmp_path: Path, text: str) -> None:
    script = shutil.copy(pocket_play.__file__, tmp_path)
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-B", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (tmp_path / "pocket_play.txt").read_bytes() == text.encode()
    assert {path.name for path in tmp_path.iterdir()} == {"pocket_play.py", "pocket_play.txt"}
    exact = pocket_play.entropy_per_character()
    nats = pocket_play.draw_play()[1] / len(text)
    for figure in (
        f"{len(text):,}",
        len(set(text)),
        *(f"{x:.4f}" for x in (exact, exact / log(2), nats)),
    ):
        assert re.search(rf"(?<![\d.]){re.escape(str(figure))}(?![\d.])", done.stdout), figure


def test_write(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []

    def replace(source: Path, target: Path) -> None:
        replaced.append((source.read_bytes() == text.encode(), target.exists()))
        source.rename(target)

    monkeypatch.setattr(pocket_play.os, "replace", replace)
    path = tmp_path / "some.txt"
    assert pocket_play.write(path)[0] == text
    assert replaced == [(True, False)]
    assert [found.name for found in tmp_path.iterdir()] == ["some.txt"]
