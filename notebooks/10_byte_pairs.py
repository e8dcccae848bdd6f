# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · Byte-pair encoding
#
# So far, every model read single characters. GPT-2 and its successors read **tokens**: frequent
# pieces of text, such as " the" or "ing". Here you build the tokenizer of `bpe.py`, look at what it
# learns from Shakespeare, and compare losses between tokenizers.
#
# Allow 60 minutes. Exercise 4 of notebook 1 was a tiny version of this. No model is trained here,
# so every cell takes seconds.

# %%
import sys

sys.path.insert(0, "..")

import math
import re
from collections import Counter
from itertools import pairwise

from bpe import BYTES, PATTERN, BytePairTokenizer, Pair, learn, merge, to_ids
from gpt import PRESETS, Model
from trainer.corpus import open_corpus

import torch
from lesson import BLUE, GRAY, GREEN, ORANGE, PINK, check, given, plt, reveal, visible
from torch import Tensor

corpus = open_corpus(None)
training = corpus.tokenizer.decode(corpus.train.tolist())
validation = corpus.tokenizer.decode(corpus.validation.tolist())
print(f"{len(training):,} characters for training, {len(validation):,} for validation")


# %%
def draw_tokens(rows: dict[str, list[str]]) -> None:
    """One row of tokens per label, each token in a box."""
    figure, axes = plt.subplots(figsize=(7.5, 0.34 * len(rows) + 0.1))
    longest = max(len("".join(tokens)) for tokens in rows.values())
    for y, tokens in enumerate(rows.values()):
        x = 0
        for i, token in enumerate(tokens):
            color = ("#cfe3f1", "#f6dcc4", "#cfe8de")[i % 3]
            axes.barh(y, len(token), left=x, height=0.8, color=color, edgecolor="white")
            style = {"family": "monospace", "fontsize": min(10, 560 / longest)}
            label = "".join(visible(token))
            axes.text(x + len(token) / 2, y, label, ha="center", va="center", **style)
            x += len(token)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlim=(0, longest), ylim=(len(rows) - 0.5, -0.5), xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    plt.show()


# %% [markdown]
# ## Merges by hand
#
# **Byte-pair encoding** (BPE) repeats one step: find the most frequent pair of neighboring tokens,
# and **merge** it into a new token wherever it occurs. Of equally frequent pairs, we take the one
# that occurs first. (`bpe.py` takes the one with the smallest ids.)

# %%
tokens = list("she sells seashells by the seashore")
rows = {"start": tokens}
for step in range(1, 7):
    counts = Counter(pairwise(tokens))
    (a, b), count = counts.most_common(1)[0]
    merged, i = [], 0
    while i < len(tokens):
        is_pair = tokens[i : i + 2] == [a, b]
        merged.append(a + b if is_pair else tokens[i])
        i += 1 + is_pair
    tokens = merged
    new = "".join(visible(a + b))
    print(
        f"merge {step}: {''.join(visible(a))} + {''.join(visible(b))} occurs {count} times → {new}"
    )
    rows[new] = tokens
draw_tokens(rows)

# %% [markdown]
# Each row applies one more merge, named on the left. ␣ is a space; colors only separate tokens.
# Each merge adds one token to the vocabulary, and later merges build on earlier ones. Tokens need
# not be syllables or words: BPE knows only frequency.
#
# ## Bytes
#
# Unicode has over 150,000 characters, too many to start with. But every text is stored as
# **bytes**, and there are only 256 of these. **UTF-8**, the usual encoding, writes a character as
# one to four bytes:

# %%
for character in "aé天😀":
    data = character.encode("utf-8")
    bits = " ".join(f"{byte:08b}" for byte in data)
    print(f"U+{ord(character):05X} {len(data)} byte(s): {data.hex(' '):12} {bits}")

text = "天 😀"
plain = BytePairTokenizer([])  # no merges
print(plain.encode(text), "→", plain.decode(plain.encode(text)))
print(f"byte {ord('a')}, an a, has the id {BYTES.index(ord('a'))}")

# %% [markdown]
# The first byte of a character says how many follow: it begins with `0`, `110`, `1110` or `11110`.
# All others begin with `10`.
#
# A **byte-level** tokenizer, like GPT-2's, starts with the 256 bytes as tokens. It can encode *any*
# text, even in a language that it has never seen. The ids follow GPT-2's order, which begins with
# the printable characters; that is why `a` is not 97.
#
# ## Words first
#
# Should a merge cross a space? Here are the first 40 merges on part of the text, with and without
# merges across spaces:

# %%
part = training[:20_000]
ids, pieces = to_ids(part), [bytes([byte]) for byte in BYTES]
for new in range(256, 296):
    a, b = Counter(pairwise(ids)).most_common(1)[0][0]
    ids = merge(ids, (a, b), new)
    pieces.append(pieces[a] + pieces[b])
print("across words:", *("".join(visible(piece.decode())) for piece in pieces[256:]))

split_first = BytePairTokenizer(learn(part, 296)).vocabulary[256:]
print("within words:", *("".join(visible(piece)) for piece in split_first))

words = re.findall(PATTERN, "The king's 12 men,\n\nall 300.")
draw_tokens({"words": words})

# %% [markdown]
# Tokens such as `e␣` or `,␣` attach a space to the end of a word. A larger vocabulary would have
# "dog.", "dog," and "dog!" as separate tokens. So a regular expression first splits the text into
# **words** (**pre-tokenization**), and no token crosses word boundaries. A word is a run of
# letters, digits or punctuation, with the space before it if that is the only whitespace; or a run
# of whitespace. GPT-2's pattern is similar, but keeps endings such as 's together.
#
# Splitting also saves work: the same word always gets the same tokens, so each distinct word is
# processed once.

# %%
word_counts = Counter(re.findall(PATTERN, training))
print(f"{sum(word_counts.values()):,} words, {len(word_counts):,} distinct; the most frequent:")
print(*("".join(visible(word)) for word, _ in word_counts.most_common(20)))

# %% [markdown]
# ### Exercise 1 · One merge
#
# `words` has one entry per distinct word: its ids, and its count in the text. Do one step of BPE.
# `merge(ids, pair, new)`, from notebook 1, is imported. Do not change `words`.


# %% tags=["exercise"]
def merge_step(words: list[tuple[list[int], int]], new: int) -> tuple[Pair, list]:
    """Return the most frequent pair, and the words with that pair merged into `new`."""
    ...  # for each word, count the pairs in pairwise(ids)
    pair = ...  # of equally frequent pairs, the smallest: (1, 5) before (2, 0)
    return pair, ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    small = [([1, 2], 5), ([2, 3, 2, 3, 2, 3], 1), ([4], 50)]
    pair, merged = map(given, given(merge_step(small, 9)))
    assert pair == (1, 2), f"(1, 2) occurs in a word that occurs 5 times, but you merge {pair}"
    assert small[0] == ([1, 2], 5), "you changed the list that you were given"
    expected = [([9], 5), ([2, 3, 2, 3, 2, 3], 1), ([4], 50)]
    assert merged == expected, f"merging (1, 2) into 9 should give {expected}, not {merged}"
    pair, _ = merge_step([([1, 2], 5), ([2, 3, 2, 3, 2, 3], 2)], 9)
    assert pair == (2, 3), f"(2, 3) occurs 3 times in a word that occurs twice; you merge {pair}"
    pair, _ = merge_step([([2, 0], 6), ([1, 7], 6), ([1, 5], 6)], 9)
    assert pair == (1, 5), f"of (1, 5), (1, 7) and (2, 0), the smallest is (1, 5), not {pair}"
    some = [(to_ids(word), count) for word, count in word_counts.items()]
    for new, expected in enumerate(learn(training, 264), 256):
        pair, some = merge_step(some, new)
        assert pair == expected, f"merge {new - 255} of the text should be {expected}, not {pair}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def merge_step(words: list[tuple[list[int], int]], new: int) -> tuple[Pair, list]:
#     counts: Counter[Pair] = Counter()
#     for ids, count in words:
#         for pair in pairwise(ids):
#             counts[pair] += count
#     pair = min(counts, key=lambda pair: (-counts[pair], pair))
#     return pair, [(merge(ids, pair, new), count) for ids, count in words]
# ```
#
# </details>
#
# ## Learning from Shakespeare
#
# Repeat that step and you have `bpe.learn`, which is faster: after a merge, it recounts only the
# words that changed. It learns from the training split only. The list of merges *is* the tokenizer.
# Its first 256 merges give V = 512 (with the 256 bytes), so one long list contains every smaller
# tokenizer.

# %%
merges = learn(training, 8192)
sizes = [V for V in (256, 512, 1024, 2048, 4096, 8192) if len(merges) >= V - 256]
tokenizers = {V: BytePairTokenizer(merges[: V - 256]) for V in sizes}
encoded = {V: torch.tensor(tokenizers[V].encode(training)) for V in sizes}
held_out = {V: torch.tensor(tokenizers[V].encode(validation)) for V in sizes}

vocabulary = tokenizers[sizes[-1]].vocabulary
for start in (256, 506, 1000, 4090):
    print(f"{start:5}: ", *(repr(token) for token in vocabulary[start : start + 9]))

# %% [markdown]
# First come pairs of letters, then short words and endings, then whole words. The first lines of
# validation as characters and as tokens:

# %%
line = validation[: validation.index("\n", 40)][:70]
rows = {f"V = {V:,}": tokenizers[V] for V in sizes[1::2]}
cut = {name: [*map(each.vocabulary.__getitem__, each.encode(line))] for name, each in rows.items()}
draw_tokens({"characters": list(line)} | cut)

# %% [markdown]
# ### Exercise 2 · Encode a word
#
# A new word arrives. It should get the same tokens as if it had been in the training text while
# these merges were learned.


# %% tags=["exercise"]
def encode_word(word: str, merges: list[Pair]) -> list[int]:
    """The token ids of a word; merge i of the list makes the token 256 + i."""
    ...  # start with to_ids(word), and replace pairs
    return ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    a, b, c = to_ids("abc")
    ids = given(encode_word("abc", []))
    assert ids == [a, b, c], f"without merges, abc should stay {[a, b, c]}, but it is {ids}"
    ids = encode_word("abcabc", [(b, c), (a, 256)])
    assert ids == [257, 257], f"with bc = 256 and a+256 = 257, abcabc is [257, 257], not {ids}"
    hint = "Hint: in which order did `learn` do these merges?"
    ids = encode_word("abc", [(b, c), (a, b)])
    assert ids == [a, 256], f"with bc = 256 and ab = 257, abc is [{a}, 256], not {ids}. {hint}"
    ids = encode_word("abcab", [(a, b), (b, c), (c, 256), (256, 257)])
    assert ids == [256, 258], f"with ab, bc, c+ab and ab+bc, abcab is [256, 258], not {ids}. {hint}"
    some = tokenizers[sizes[1]]
    for word in sorted({*re.findall(PATTERN, validation[:20_000])}):
        ids, expected = encode_word(word, merges[:256]), some.encode_word(word)
        assert ids == expected, f"{word!r} became {ids}, not {expected}. {hint}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def encode_word(word: str, merges: list[Pair]) -> list[int]:
#     ids, rank = to_ids(word), {pair: i for i, pair in enumerate(merges)}
#     while found := [pair for pair in pairwise(ids) if pair in rank]:
#         pair = min(found, key=rank.get)
#         ids = merge(ids, pair, 256 + rank[pair])
#     return ids
# ```
#
# Apply the earliest-learned merge first. Applying all merges in order gives the same ids, but takes
# thousands of steps per word.
#
# </details>
#
# Why not take the longest token that fits? Many words would get different tokens from the ones that
# the model was trained on:


# %%
def longest_first(word: str, V: int) -> list[str]:
    """Tokens from left to right, each as long as the vocabulary allows."""
    tokens = []
    while word:
        fits = (n for n in range(len(word), 0, -1) if word[:n] in tokenizers[V].ids)
        n = next(fits, 1)
        tokens.append(word[:n])
        word = word[n:]
    return tokens


differ = 0
distinct = sorted({*re.findall(PATTERN, validation)})
for word in distinct:
    by_rank = [tokenizers[512].vocabulary[i] for i in tokenizers[512].encode(word)]
    if longest_first(word, 512) != by_rank:
        differ += 1
        if differ % 100 == 1:
            print(f"{word!r:16} merges {by_rank}   longest {longest_first(word, 512)}")
print(f"{differ:,} of {len(distinct):,} distinct words differ")

# %% [markdown]
# ## Which tokens are there?

# %%
V = sizes[-2]  # 4,096
tokenizer = tokenizers[V]
occurs = torch.bincount(encoded[V], minlength=V)
top = [tokenizer.vocabulary[i] for i in occurs.argsort(descending=True)[:20]]
print("most frequent:", *map(repr, top))
print("longest:      ", *map(repr, sorted(tokenizer.vocabulary, key=len)[-8:]))
spaced = sum(token.startswith(" ") for token in tokenizer.vocabulary)
print(f"{spaced:,} of {V:,} tokens begin with a space\n")

for text in ("The", " the", " The", "THE", " THE", " king", " King", " KING"):
    ids = tokenizer.encode(text)
    print(f"{text!r:8}", [tokenizer.vocabulary[i] for i in ids], ids)

# %% [markdown]
# Frequent tokens are punctuation and short words. The longest include names from *these* plays.
#
# **The space belongs to the word after it.** "The" at the start of a line and " The" within one are
# different tokens with unrelated ids, and so are " the" and " The". The model has to learn from the
# text that they are the same word. A word in capitals is split, unless it is frequent.
#
# A token also hides its letters: the id of " king" does not show that it rhymes with " ring".
#
# Shakespeare has almost no numbers, so here are some years:

# %%
years = "In 2000 and 2000, not in 1999, 1987 or 2001. " * 50
dated = BytePairTokenizer(learn(years, 268))
draw_tokens(
    {y: [dated.vocabulary[i] for i in dated.encode(f" {y}")] for y in ("2000", "1999", "1910")}
)

# %% [markdown]
# A frequent year is one token; others are split in two or more, and the splits ignore place value.
# This can make arithmetic harder. Some newer tokenizers split numbers into single digits or groups
# of up to three.
#
# ## Decoding
#
# To decode, join the bytes of all ids. But sampling shows each token as it comes, and a token may
# end within a character:

# %%
ids = tokenizer.encode("天 😀")
print(len(ids), "tokens; each decoded alone:", [tokenizer.decode([i]) for i in ids])
print("together:", tokenizer.decode(ids))

# %% [markdown]
# `�` stands for invalid UTF-8. To avoid it, wait until a character is complete.
#
# ### Exercise 3 · Decode one by one


# %% tags=["exercise"]
def pieces_of(ids: list[int], tokens: list[bytes]) -> list[str]:
    """One string per id: the characters that this id completes, or "" if there are none."""
    ...  # keep the bytes of an incomplete character for the next id; drop them at the end
    return ...  # bytes.decode("utf-8", errors="ignore") skips an incomplete character


# %% tags=["check"]
@check
def exercise_3() -> None:
    tokens = [b"Hi ", b"\xf0\x9f\x98", b"\x80", b"\x83 \xe5", b"\xa4\xa9!"]
    pieces = given(pieces_of([0, 1, 2], tokens))
    assert "\ufffd" not in "".join(pieces), f"{pieces} has bytes that are only half a character"
    assert len(pieces) == 3, f"3 ids need 3 pieces, but there are {len(pieces)}"
    assert pieces == ["Hi ", "", "😀"], f"the pieces are ['Hi ', '', '😀'], not {pieces}"
    pieces = pieces_of([1, 3, 4, 0], tokens)
    expected = ["", "😃 ", "天!", "Hi "]
    problem = f"the pieces should be {expected}, not {pieces}"
    assert pieces == expected, f"{problem}: the second token completes 😃 and a space"
    long = "天 😀 Zoë → " * 3
    for some in (plain, tokenizer):
        ids = some.encode(long)
        whole = pieces_of(ids, some.tokens)
        assert "".join(whole) == long, f"{long!r} came back as {''.join(whole)!r}"
        for n in range(len(ids)):
            assert pieces_of(ids[:n], some.tokens) == whole[:n], "a later id changed a piece"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def pieces_of(ids: list[int], tokens: list[bytes]) -> list[str]:
#     pieces, waiting = [], b""
#     for i in ids:
#         waiting += tokens[i]
#         pieces.append(waiting.decode("utf-8", errors="ignore"))
#         waiting = waiting[len(pieces[-1].encode("utf-8")) :]
#     return pieces
# ```
#
# </details>
#
# A model may also sample bytes that never become a character. After these, this solution repeats
# characters; `bpe.py` uses Python's incremental decoder, which replaces them with `�`.
#
# ## Compression
#
# A larger vocabulary makes a text shorter. The measure is **characters per token**.
#
# **Predict before you run:** at V = 512, it is about 1.9 in the validation split. What is it at
# V = 4,096?

# %%
guess = ...  # characters per token at V = 4,096

# %% tags=["prediction"]
V = sizes[-2]
reveal(guess, len(validation) / len(held_out[V]), within=0.4)

# %%
figure, axes = plt.subplots(figsize=(6, 3.2))
for name, text, ids, style in (
    ("training", training, encoded, "o-"),
    ("validation", validation, held_out, "s--"),
):
    axes.plot(sizes, [len(text) / len(ids[V]) for V in sizes], style, label=name)
axes.set_xscale("log", base=2)
axes.set_xticks(sizes, [f"{V:,}" for V in sizes])
axes.set(xlabel="vocabulary size V", ylabel="characters per token", ylim=(0, None))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# On the training split, each doubling adds less than the one before, because the most frequent
# pairs are merged first. The validation split compresses less: the tokens were learned from the
# training split, and some, such as " Northumberland", occur only there.
#
# A context of 64 tokens spans more text:

# %%
for V in sizes[1::3]:
    window = tokenizers[V].decode(held_out[V][:64].tolist())
    print(f"--- V = {V:,}: {len(window)} characters\n{window}")
print(f"--- characters\n{validation[:64]}")

# %% [markdown]
# ## The cost
#
# `gpt.py` has two matrices of V rows: the token embedding and `lm_head`, V · C parameters each. A
# larger V also means more FLOPs in `lm_head` and in the softmax. The two matrices hold this
# fraction of all parameters:

# %%
columns = {}
for preset in ("small", "full"):
    C = PRESETS[preset].n_embd
    config = PRESETS[preset]
    with torch.device("meta"):  # shapes only, no memory
        total = sum(p.numel() for p in Model(config).parameters())
    blocks = total - 2 * config.vocab_size * C
    for each in (65, 512, 4096, 50_257):
        columns[f"{preset} {each:,}"] = (blocks / 1e6, 2 * each * C / 1e6)
        share = 2 * each * C / (blocks + 2 * each * C)
        print(
            f"{preset:5} V = {each:6,}: {blocks + 2 * each * C:10,} parameters, {share:.1%} in both"
        )

figure, panels = plt.subplots(1, 2, figsize=(7.5, 2.8))
for panel, preset in zip(panels, ("small", "full"), strict=True):
    names = [name for name in columns if name.startswith(preset)]
    rest, rows = zip(*(columns[name] for name in names), strict=True)
    labels = [name.removeprefix(preset) for name in names]
    panel.bar(labels, rest, color=GRAY, label="the rest")
    panel.bar(labels, rows, bottom=rest, color=ORANGE, label="embedding, lm_head")
    panel.set(xlabel="vocabulary size V", ylabel="million parameters", title=f"--preset {preset}")
panels[0].legend(frameon=False)
plt.show()

# %% [markdown]
# GPT-2 has 50,257 tokens. In the small preset, their two matrices would hold 94% of the parameters.
# (GPT-2 uses one matrix for both: **weight tying**.)
#
# ## Rare tokens
#
# Only batches that contain a token update its embedding. So rare tokens get few updates. How many
# are rare?

# %%
figure, axes = plt.subplots(figsize=(6, 3.2))
for V, color in zip(sizes[1:], (BLUE, GREEN, ORANGE, PINK, GRAY), strict=False):
    occurs = torch.bincount(encoded[V], minlength=V)
    rare, never = (occurs < 10).sum().item(), (occurs == 0).sum().item()
    print(f"V = {V:,}: {rare:,} tokens ({rare / V:.0%}) occur < 10 times, {never} of them never")
    line = occurs.sort(descending=True).values.clamp(min=0.5)
    axes.loglog(range(1, V + 1), line, color=color, label=f"V = {V:,}")
axes.axhline(10, color="black", linestyle=":", linewidth=1)
axes.set(xlabel="rank of the token", ylabel="occurrences in training", ylim=(0.8, None))
axes.legend(frameon=False, fontsize=9)
plt.show()

occurs = torch.bincount(encoded[sizes[-2]], minlength=sizes[-2])
used_up = [i for i in range(256, len(occurs)) if occurs[i] == 0]
print("never, though learned:", *(repr(tokenizer.vocabulary[i]) for i in used_up[-8:]))

# %% [markdown]
# At V = 4,096, 883 tokens occur fewer than 10 times in a million characters, and 445 of them never.
# Of these, 191 are bytes that Shakespeare does not use. Nearly all others are intermediate tokens:
# a later merge absorbed every occurrence. Only weight decay changes their embeddings, which stay
# random. A prompt that contains such a token feeds the model noise.
#
# ## Bits per character
#
# The loss of a GPT is in nats *per token*. Can you compare it between tokenizers? Take a **unigram
# model**, which knows only each token's frequency.
#
# **Predict before you run:** does its loss per token rise or fall as V grows?

# %%
guess = ...  # "rise" or "fall"

# %% tags=["prediction"]
reveal(guess, "rise")

# %% [markdown]
# A longer token carries more information, so it is harder to predict. Losses per token are not
# comparable. Compare **bits per character**: the bits for the whole text, divided by its number of
# characters, which does not depend on the tokenizer.
#
# $$\text{bits per character} =
# \frac{\text{nats per token}}{\ln 2 \cdot \text{characters per token}}$$
#
# ### Exercise 4 · Bits per character
#
# A model gives token `i` the probability `p[i]`, whatever came before. Compute its bits per
# character on a text with these ids. On Tiny Shakespeare, the check prints 3.98 for V = 512.


# %% tags=["exercise"]
def bits_per_character(p: Tensor, ids: Tensor, characters: int) -> float:
    """The bits for all ids, divided by the number of characters; p has shape (V)."""
    return ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    p = torch.tensor([0.5, 0.25, 0.25])
    bits = float(given(bits_per_character(p, torch.tensor([0, 1, 2, 1]), 14)))
    right = abs(bits - 0.5) < 1e-4
    assert right, f"1 + 2 + 2 + 2 bits for 14 characters are 0.5 per character, not {bits:.3f}"
    V = sizes[1]
    counts = torch.bincount(encoded[V], minlength=V) + 1
    p, ids = counts / counts.sum(), held_out[V]
    bits = float(bits_per_character(p, ids, len(validation)))
    seen = torch.bincount(ids, minlength=V)
    expected = -(seen * p.log2()).sum().item() / len(validation)
    assert abs(bits - expected) < 1e-3, f"at V = {V}, it should be {expected:.3f}, not {bits:.3f}"
    print(f"{bits:.2f} bits per character at V = {V}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def bits_per_character(p: Tensor, ids: Tensor, characters: int) -> float:
#     return -p[ids].log2().sum().item() / characters
# ```
#
# </details>
#
# Two models per tokenizer, on the validation split. The **uniform** model gives each token
# the probability 1/V.

# %%
nats: dict[str, list[float]] = {"uniform": [], "unigram": []}
for V in sizes:
    counts = torch.bincount(encoded[V], minlength=V) + 1  # + 1: no probability is 0
    nats["uniform"].append(math.log(V))
    nats["unigram"].append(-(counts / counts.sum()).log()[held_out[V]].mean().item())
per_token = [len(validation) / len(held_out[V]) for V in sizes]

figure, panels = plt.subplots(1, 2, figsize=(7.5, 3))
for (name, loss), style in zip(nats.items(), ("o-", "s--"), strict=True):
    bits = [each / math.log(2) / n for each, n in zip(loss, per_token, strict=True)]
    panels[0].plot(sizes, loss, style, label=name)
    panels[1].plot(sizes, bits, style, label=name)
    for V, each, bit in list(zip(sizes, loss, bits, strict=True))[1::3]:
        print(f"{name}, V = {V:5,}: {each:.2f} nats per token, {bit:.2f} bits per character")
for panel, unit in zip(panels, ("nats per token", "bits per character"), strict=True):
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes[::2], [f"{V:,}" for V in sizes[::2]])
    panel.set(xlabel="vocabulary size V", ylabel=unit, ylim=(0, None))
panels[0].legend(frameon=False)
plt.show()

# %% [markdown]
# Per token, both models seem to get worse; per character, both get better. Even the uniform model
# improves, though it knows nothing: the gain comes from the tokenizer. A token is a frequent
# string, so it carries context with it.
#
# **This does not say that a GPT gets better too**: it sees the context anyway. A larger V gives it
# a longer context, but more parameters and rare tokens. In equal time, `gpt.py` reaches 2.51 bits
# on characters and 2.25 at V = 1,024 ([table](../docs/results.md)).
#
# ## The script
#
# `bpe.py` has `learn` and `BytePairTokenizer`. In a terminal, in the course's folder:
#
# ```
# python gpt.py --out runs/characters
# python bpe.py --vocab-size 512 --out data/shakespeare-512
# python gpt.py --data data/shakespeare-512 --out runs/tokens
# python compare.py runs/characters runs/tokens
# ```
#
# `gpt.py` prints losses per token. `compare.py` shows them in nats and in bits per character.

# %% [markdown]
# ## Quiz
#
# 1. Why do the first 256 tokens stand for bytes and not for characters?
#    <details><summary>Answer</summary>These 256 bytes encode every text; there are too many
#    characters.</details>
# 2. Model A has 3.0 nats per token at 2.0 characters per token, model B 4.5 at 3.0. Which is
#    better?
#    <details><summary>Answer</summary>Neither: both have 1.5 nats, or 2.16 bits, per
#    character.</details>
# 3. Why can "of the" never become one token here?
#    <details><summary>Answer</summary>Merges stay within words, and " the" is a word of its
#    own.</details>
# 4. You encode Python code with a tokenizer learned from Shakespeare. What happens?
#    <details><summary>Answer</summary>Every character survives, but tokens are shorter, so the
#    context spans less text.</details>
# 5. A token never occurs in the training split. What does the model learn about it?
#    <details><summary>Answer</summary>Its embedding gets no gradient and stays random. Its row in
#    `lm_head` does get one, in every batch: the model learns that it does not come next.</details>
#
# ## Papers
#
# - Gage (1994), [A New Algorithm for Data
#   Compression](http://www.pennelynn.com/Documents/CUJ/HTML/94HTML/19940045.HTM): byte pairs
# - Sennrich et al. (2016), [Neural Machine Translation of Rare Words with Subword
#   Units](https://arxiv.org/abs/1508.07909): BPE for language, with merges within words
# - Radford et al. (2019), [Language Models are Unsupervised Multitask
#   Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   GPT-2, with byte-level BPE
# - Kudo & Richardson (2018), [SentencePiece](https://arxiv.org/abs/1808.06226): the space is a
#   character like any other

# %% [markdown]
# **Next →** [README](../README.md)
