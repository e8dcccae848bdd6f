"""Byte-pair encoding: learn tokens that are longer than a character.

Large models read **tokens**, not characters: frequent pieces of text, such as " the" or
"ing". **Byte-pair encoding** (BPE) starts with the 256 possible bytes, so that any text can be
encoded, and repeats one step: **merge** the most frequent pair of neighbors into a new token.

    python bpe.py --vocab-size 512 --out data/shakespeare-512
    python gpt.py --data data/shakespeare-512
"""

import codecs
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Annotated

from trainer import UserError, cli
from common import Tokenizer
from trainer.corpus import default_corpus, open_corpus
from trainer.flags import Limits, Parser, options_for, path_of

Pair = tuple[int, int]
MAX_VOCABULARY = 2**16  # an id has two bytes in a prepared text
VocabSize = Annotated[int, Limits(lambda x: 256 <= x <= MAX_VOCABULARY, ">= 256 and <= 65536")]

# Pre-tokenization: no token crosses a word boundary. A word is a run of letters, digits or
# punctuation, with at most one space before it, or a run of whitespace. Runs are cut after 64
# characters, so that no word is slow to encode. Everything beyond ASCII counts as a letter.
LETTERS, PUNCTUATION, SPACE = "[A-Za-z\u0080-\U0010ffff]", "[!-/:-@\\[-`{-~]", "[\x00-\x20\x7f]"
PATTERN = f" ?{LETTERS}{{1,64}}| ?[0-9]{{1,64}}| ?{PUNCTUATION}{{1,64}}|{SPACE}{{1,64}}"
# The first 256 tokens: each byte, in GPT-2's order, which begins with the printable characters.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
ID_OF = {byte: i for i, byte in enumerate(BYTES)}


class BytePairTokenizer(Tokenizer):
    """Turns text into token ids and back, with the merges that `learn` found."""

    def __init__(self, merges: Iterable[Pair]) -> None:
        self.source = [list(pair) for pair in merges]  # as meta.json and checkpoints store them
        self.unit = "tokens"
        self.rank = {(first, second): i for i, (first, second) in enumerate(self.source)}
        self.tokens = [bytes([byte]) for byte in BYTES]
        for first, second in self.source:
            if min(first, second) < 0 or len(self.tokens) >= MAX_VOCABULARY:
                raise ValueError  # damaged, which open_prepared reports
            self.tokens.append(self.tokens[first] + self.tokens[second])
        self.vocabulary = [token.decode("utf-8", errors="replace") for token in self.tokens]
        self.ids = {token: i for i, token in enumerate(self.vocabulary)}

    def encode(self, text: str) -> list[int]:
        return [i for word in re.findall(PATTERN, text) for i in self.encode_word(word)]

    @lru_cache(2**17)  # noqa: B019 (most words of a text have occurred before)
    def encode_word(self, word: str) -> list[int]:
        """Apply the merges in the order in which they were learned."""
        ids = to_ids(word)
        while pairs := self.rank.keys() & {*pairwise(ids)}:
            pair = min(pairs, key=self.rank.get)
            ids = merge(ids, pair, 256 + self.rank[pair])
        return ids

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids as they come; invalid UTF-8, which a model may sample, becomes \ufffd."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.tokens[i])
        yield decoder.decode(b"", final=True)


def to_ids(word: str) -> list[int]:
    return [ID_OF[byte] for byte in word.encode("utf-8", "replace")]


def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """Replace each occurrence of a pair, from left to right, with the token `new`."""
    merged, i = [], 0
    while i < len(ids):
        is_pair = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
        merged.append(new if is_pair else ids[i])
        i += 1 + is_pair
    return merged


def learn(text: str, vocab_size: int) -> list[Pair]:
    """Learn merges until there are `vocab_size` tokens, or no pairs are left.

    Of equally frequent pairs, the smallest is merged. A merge changes only the words that contain
    the pair, so only these are recounted.
    """
    words = [(to_ids(word), count) for word, count in Counter(re.findall(PATTERN, text)).items()]
    counts: Counter[Pair] = Counter()
    words_with: dict[Pair, set[int]] = defaultdict(set)
    for i, (ids, count) in enumerate(words):
        for pair in pairwise(ids):
            counts[pair] += count
            words_with[pair].add(i)
    merges, queue = [], sorted((-count, pair) for pair, count in counts.items())  # a heap
    while queue and 256 + len(merges) < vocab_size:
        count, pair = heapq.heappop(queue)
        if -count != counts[pair]:  # outdated: the queue also has the current count
            continue
        new = 256 + len(merges)
        merges.append(pair)
        change: Counter[Pair] = Counter()  # in the count of each pair
        for i in words_with.pop(pair):
            ids, count = words[i]
            merged = merge(ids, pair, new)
            words[i] = merged, count
            for each in pairwise(ids):
                change[each] -= count
            for each in pairwise(merged):
                change[each] += count
                words_with[each].add(i)
        for each, difference in change.items():
            counts[each] += difference
            if difference and counts[each]:
                heapq.heappush(queue, (-counts[each], each))
    return merges


def main() -> None:
    from prepare import prepare, refuse_taken, report  # here because prepare.py imports this file

    parser = Parser(__doc__)
    parser.add_argument("--data", type=path_of, metavar="TEXT", help="UTF-8 text to learn from")
    about = "number of tokens, 256 of which are the bytes (default 512)"
    parser.add_argument("--vocab-size", default=512, help=about, **options_for(VocabSize))
    parser.add_argument("--out", type=path_of, required=True, metavar="DIR", help="new folder")
    options = parser.parse_args()

    refuse_taken(options.out)
    path = options.data or default_corpus()
    if path.is_dir():
        raise UserError(f"{path} is a folder: pass a UTF-8 text as --data")
    corpus = open_corpus(path)
    text = corpus.tokenizer.decode(corpus.train.tolist())  # only the training split
    tokenizer = BytePairTokenizer(learn(text, options.vocab_size))
    longest = sorted(tokenizer.vocabulary, key=len)[-10:]
    print(f"{len(tokenizer.tokens):,} tokens; the longest:", *map(repr, longest))
    report(prepare([path], options.out, tokenizer), options.out)


if __name__ == "__main__":
    cli(main)
