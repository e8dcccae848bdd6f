"""Pocket Play: a small invented play to train on when Tiny Shakespeare is out of reach.

It is sampled from a probabilistic grammar: symbols are replaced by other symbols, with known
probabilities, until only text is left. Every text can arise in one way only, so the entropy of
this language is known exactly. That is the lowest average loss that any model can reach on fresh
text, even one that sees all the text before. For Shakespeare, nobody knows that number; here it
shows how far a model still has to go.

Run `python data/pocket_play.py` to write pocket_play.txt beside this file; it takes seconds.
"""

import os
from collections.abc import Sequence
from functools import cache
from math import log
from pathlib import Path
from random import Random

# A symbol is a text, which stands for itself, or a tuple such as ("call", "Pip"), which is replaced
# by the symbols of one of its alternatives. Each alternative comes with its probability.
Symbol = str | tuple
Alternatives = list[tuple[float, list[Symbol]]]


def listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


NAMES = listed("Pip, Tansy, Bramble, Juniper, Wilf, Odette, Hugo, Zinnia")
# Words that can fill the same slot all differ: if a thing were also an object, "the clock" could
# arise in two ways, and the probability of a text would no longer be that of its choices.
THINGS = listed("lantern, umbrella, letter, key, accordion, map, clock, egg")
REFRAINS = [
    "Round goes the moon.",
    "But nobody told the geese!",
    "Left, right, puddle!",
    "Quick, the soup!",
    "Oh, these wet boots!",
    "Only the cat knows.",
]
WORDS = {
    # Nouns and verbs are all regular: an s is the only ending that they need.
    "creature": listed("""owl, hen, badger, cat, otter, aunt, baker, moth, king, toad, bee, cook,
        goat, duck, uncle, snail, crow, poet, mole, judge, newt, eel, swan, sailor, imp, robin,
        duke, crab, heron, piper, giant, ant, queen, tailor, vole, yak, goblin, usher, hedgehog,
        monk, lamb, pilot, emu, elephant, wizard, miner, clown, oboist"""),
    "object": listed("""kite, drum, pie, hat, apple, bell, cup, boot, spoon, jar, teapot, onion,
        harp, coat, rope, ladder, bun, ring, wig, trumpet, pot, oar, violin, broom, sock, anchor,
        pear, balloon, lamp, button, cake, flute, urn, coin, barrel, pillow, plum, oven, carpet,
        inkpot, zither, wheelbarrow, jug, pin, vase, envelope"""),
    "place": listed("""bridge, garden, mill, roof, river, harbour, bakery, hill, tower, cellar,
        station, cloud, gate, museum, bath, attic, wood, swamp, orchard, island, stable, well"""),
    "adjective": listed("""old, red, shy, tiny, wet, odd, big, sad, icy, quiet, wise, loud, lazy,
        calm, unusual, bold, pink, round, jolly, brave, eager, green, muddy, proud, silly, dizzy,
        clever, kind, sleepy, gentle, polite, crooked, velvet, awkward, invisible, half-asleep,
        moon-eyed, extra-large, well-read, meek, neat, grey, vain, hasty"""),
    "adverb": listed("""often, never, always, gladly, rarely, sadly, slowly, oddly, loudly, almost,
        kindly, boldly, softly, secretly, badly, quietly, eagerly, suddenly, nearly, merrily"""),
    "intransitive": listed("""hum, sing, yawn, wait, nod, bow, dream, snore, sulk, grin, dance,
        sneeze, giggle, skip, float, wink, laugh, wander, sob, limp, wave, tremble, blink, stumble,
        arrive, whistle"""),
    "transitive": listed("""paint, mend, hide, lift, need, steal, count, guard, sell, follow,
        borrow, tickle, weigh, love, chase, admire, fear, drop, help, shake, find, pull, lose,
        inspect, thank, salute, avoid, adore, juggle, measure, forget, repair, untie, imitate,
        question"""),
    "preposition": listed("under, near, behind, above, beside, past, below, inside"),
    "time": listed("""at noon, today, in May, at dusk, all day, twice, at six, on Mondays, at home,
        at sea, for hours, before tea, until dawn, every year"""),
    "beginning": listed("""Let us, I'll, Please, We should, I can, You could, I'd rather, We might,
        They must"""),
    "interjection": listed("""Yes!, No., Oh dear!, Ha!, Perhaps., Just so., Nonsense!, Well!, Hm.,
        Why not?, Goodness me!, Excellent!"""),
    "joint": [",\nand ", ",\nbut ", "; ", ",\nwhile ", " because ", ": "],
}

# The ending of a noun and that of its verb: an owl hums, owls hum.
ONE, MANY = ("", "s"), ("s", "")
DETERMINERS = {
    ONE: [(0.4, "the"), (0.3, "a"), (0.2, "my"), (0.1, "every")],
    MANY: [(0.5, "the"), (0.3, "some"), (0.2, "two")],
}


def ranked(symbols: Sequence[Symbol]) -> Alternatives:
    """As in any language, some words are more common: the first about twice as much as the last."""
    weights = range(2 * len(symbols), len(symbols), -1)
    return [(w / sum(weights), [symbol]) for w, symbol in zip(weights, symbols, strict=True)]


def determined(determiner: str, word: str) -> str:
    article = "n" if determiner in ("a", "A") and word[0] in "aeiou" else ""
    return f"{determiner}{article} {word}" if determiner else word


@cache
def alternatives(symbol: tuple) -> Alternatives:
    """The grammar, from the whole scene down to the single word."""
    match symbol:
        case ("scene",):
            return [(0.4, [("cast", 2)]), (0.6, [("cast", 3)])]
        case ("cast", size, *cast) if len(cast) < size:
            return ranked([("cast", size, *cast, name) for name in NAMES if name not in cast])
        case ("cast", _, *cast):
            return ranked([("plot", thing, *cast) for thing in THINGS])
        case ("plot", thing, *cast):
            return ranked([("speeches", refrain, thing, *cast) for refrain in REFRAINS])

        case ("speeches", refrain, thing, first, *others):
            # All speak in turn, for one to three rounds. The first speaker always ends on the
            # refrain, and in the first round everyone calls the next speaker by name.
            talk = ("talk", thing, 4)
            called = zip(others, [*others[1:], first], strict=True)
            opening = [("speech", first, ("greeting", others[0], thing), talk, refrain)]
            opening += [("speech", name, talk, ("call", listener)) for name, listener in called]
            again = [("speech", first, talk, refrain), *(("speech", name, talk) for name in others)]
            ending = ("speech", "All", refrain, ("exit", thing))
            return [
                (0.4, [*opening, ending]),
                (0.4, [*opening, *again, ending]),
                (0.2, [*opening, *again, *again, ending]),
            ]
        case ("speech", speaker, *lines):
            ended = [part for line in lines for part in (line, "\n")]
            return [(1.0, [f"{speaker.upper()}:\n", *ended, "\n"])]
        case ("greeting", listener, thing):
            return [
                (0.3, [f"{listener}, where is the {thing}?"]),
                (0.3, [f"Look, {listener}: ", ("word", "adjective", "", "a"), f" {thing}!"]),
                (0.2, [f"Hush, {listener}. We left the {thing} ", ("where",), "."]),
                (0.2, [f"Ah, {listener}! I found {determined('a', thing)} ", ("where",), "."]),
            ]
        case ("call", listener):
            starts = "And you", "Am I right", "Any ideas", "Is it so", "What now"
            return ranked([f"{start}, {listener}?" for start in starts])
        case ("exit", thing):
            ways = "They hide the", "They follow the", "They bow to the", "Nobody saw the"
            return ranked([f"[{way} {thing}.]" for way in ways])

        case ("talk", thing, 1):
            return [(1.0, [("sentence", thing)])]
        case ("talk", thing, most):
            sentence, rest = ("sentence", thing), ("talk", thing, most - 1)
            return [(0.3, [sentence]), (0.2, [sentence, " ", rest]), (0.5, [sentence, "\n", rest])]
        case ("sentence", thing):
            clause, action = ("clause", thing, True), ("action", thing, "")
            return [
                (0.25, [clause, "."]),
                (0.05, [clause, "!"]),
                (0.18, [clause, ("word", "joint"), ("clause", thing, False), "."]),
                (0.12, [("word", "beginning"), " ", action, "."]),
                (0.07, ["Does ", ("noun", "creature", ONE), " ", action, "?"]),
                (0.05, ["Do ", ("noun", "creature", MANY), " ", action, "?"]),
                (0.05, ["Why does ", ("noun", "creature", ONE), " ", action, "?"]),
                (0.03, ["Why do ", ("noun", "creature", MANY), " ", action, "?"]),
                (0.06, ["What ", ("phrase", "a", "object", ""), "!"]),
                (0.03, [f"Is the {thing} ", ("word", "adjective"), "?"]),
                (0.05, [f"The {thing} ", ("action", thing, "s"), "."]),
                (0.06, [("word", "interjection")]),
            ]

        case ("clause", thing, capital):
            return [
                (0.6, [("subject", ONE, capital), " ", ("action", thing, "s")]),
                (0.4, [("subject", MANY, capital), " ", ("action", thing, "")]),
            ]
        case ("subject", number, capital):
            creature = ("noun", "creature", number, capital)
            return [(0.8, [creature]), (0.2, [creature, " ", ("aside", number[1])])]
        case ("aside", ending):
            who = ["who ", ("word", "adverb"), " ", ("word", "intransitive", ending)]
            return [
                (0.5, ["(", *who, ")"]),
                (0.2, ["[", *who, "]"]),
                (0.2, ["(", *who, " [", ("doubt",), "])"]),
                (0.1, ["[", *who, " (", ("doubt",), ")]"]),
            ]
        case ("doubt",):
            return [
                (0.4, ["or so ", ("noun", "creature", ONE), " says"]),
                (0.2, ["or so ", ("noun", "creature", MANY), " say"]),
                (0.4, ["but only ", ("word", "time")]),
            ]
        case ("action", thing, ending):
            alone = [("word", "intransitive", ending), ("setting",)]
            acting = [("word", "transitive", ending), " ", ("target", thing), ("setting",)]
            return [
                (0.25, alone),
                (0.45, acting),
                (0.10, [("word", "adverb"), " ", *alone]),
                (0.20, [("word", "adverb"), " ", *acting]),
            ]
        case ("target", thing):
            return [
                (0.2, [f"the {thing}"]),
                (0.4, [("noun", "object", ONE)]),
                (0.2, [("noun", "object", MANY)]),
                (0.2, [("noun", "creature", ONE)]),
            ]
        case ("setting",):
            return [(0.6, []), (0.2, [" ", ("where",)]), (0.2, [" ", ("word", "time")])]
        case ("where",):
            return [(1.0, [("word", "preposition"), " ", ("noun", "place", ONE)])]

        case ("noun", kind, number, *capital):
            return [
                (p, [("phrase", word.capitalize() if any(capital) else word, kind, number[0])])
                for p, word in DETERMINERS[number]
            ]
        case ("phrase", determiner, kind, ending):
            return [
                (0.6, [("word", kind, ending, determiner)]),
                (0.4, [("word", "adjective", "", determiner), " ", ("word", kind, ending)]),
            ]
        case ("word", kind, *form):
            ending, determiner = (*form, "", "")[:2]
            return ranked([determined(determiner, word + ending) for word in WORDS[kind]])
    raise ValueError(f"no rule for {symbol}")


# What follows works for every grammar in this form.


@cache
def entropy(symbol: Symbol) -> float:
    """The expected -ln p of a text of this symbol: that of the choice, then that of its parts."""
    if isinstance(symbol, str):
        return 0.0
    return sum(p * (sum(map(entropy, parts)) - log(p)) for p, parts in alternatives(symbol))


@cache
def length(symbol: Symbol) -> float:
    """The expected number of characters of a text of this symbol."""
    if isinstance(symbol, str):
        return len(symbol)
    return sum(p * sum(map(length, parts)) for p, parts in alternatives(symbol))


def draw(symbol: Symbol, dice: Random) -> tuple[str, float]:
    """A text of this symbol, and its -ln p."""
    if isinstance(symbol, str):
        return symbol, 0.0
    point = dice.random()
    for choice in alternatives(symbol):
        point -= choice[0]
        if point < 0:
            break
    p, parts = choice
    drawn = [draw(part, dice) for part in parts]
    return "".join(text for text, _ in drawn), sum(nats for _, nats in drawn) - log(p)


def entropy_per_character() -> float:
    """The lowest average loss, in nats, that any model of this language can reach."""
    return entropy(("scene",)) / length(("scene",))


def known_entropy(path: str) -> float | None:
    """The loss that no model can beat on average, if that file is Pocket Play."""
    is_pocket_play = Path(path).resolve() == Path(__file__).resolve().with_suffix(".txt")
    return entropy_per_character() if is_pocket_play else None


def play(characters: int = 1_000_000, seed: int = 1) -> str:
    return draw_play(characters, seed)[0]


def draw_play(characters: int = 1_000_000, seed: int = 1) -> tuple[str, float]:
    """Whole, independent scenes until there are enough characters, and their -ln p."""
    dice = Random(seed)
    scenes, nats, size = [], 0.0, 0
    while size < characters:
        text, cost = draw(("scene",), dice)
        scenes.append(text)
        nats += cost
        size += len(text)
    return "".join(scenes), nats


def write(path: Path) -> tuple[str, float]:
    """Write the play, and return it and its -ln p. No process sees a half-written file."""
    text, nats = draw_play()
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    unfinished.write_bytes(text.encode())
    os.replace(unfinished, path)
    return text, nats


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".txt")
    text, nats = write(path)
    exact = entropy_per_character()
    print(f"{path.name}: {len(text):,} characters, {len(set(text))} distinct")
    print(f"exact entropy: {exact:.4f} nats = {exact / log(2):.4f} bits per character")
    print(f"-ln p of this text: {nats / len(text):.4f} nats per character")
