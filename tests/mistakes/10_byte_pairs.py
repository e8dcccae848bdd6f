# Typical wrong answers to the exercises, by number: each must be caught. Those marked "right" must
# pass.
# %% 1
def merge_step(words: list[tuple[list[int], int]], new: int) -> tuple[Pair, list]:
    counts = Counter()
    for ids, _ in words:
        counts.update(pairwise(ids))  # each word once
    pair = min(counts, key=lambda pair: (-counts[pair], pair))
    return pair, [(merge(ids, pair, new), count) for ids, count in words]


# %% 1
def merge_step(words: list[tuple[list[int], int]], new: int) -> tuple[Pair, list]:
    counts = Counter()
    for ids, count in words:
        for pair in pairwise(ids):
            counts[pair] += count
    pair = counts.most_common(1)[0][0]  # the first of equally frequent pairs
    return pair, [(merge(ids, pair, new), count) for ids, count in words]


# %% 1
def merge_step(words: list[tuple[list[int], int]], new: int) -> tuple[Pair, list]:
    counts = Counter()
    for ids, count in words:
        for pair in pairwise(ids):
            counts[pair] += count
    pair = min(counts, key=lambda pair: (-counts[pair], pair[0]))  # not the second id
    return pair, [(merge(ids, pair, new), count) for ids, count in words]


# %% 1
def merge_step(words: list[tuple[list[int], int]], new: int) -> tuple[Pair, list]:
    counts = Counter()
    for ids, count in words:
        for pair in pairwise(ids):
            counts[pair] += count
    pair = min(counts, key=lambda pair: (-counts[pair], pair))
    return pair, [merge(ids, pair, new) for ids, _ in words]  # without the counts


# %% 1
def merge_step(words: list[tuple[list[int], int]], new: int) -> tuple[Pair, list]:
    counts = Counter()
    for ids, count in words:
        for pair in pairwise(ids):
            counts[pair] += count
    pair = min(counts, key=lambda pair: (-counts[pair], pair))
    for i, (ids, count) in enumerate(words):
        words[i] = (merge(ids, pair, new), count)  # changes the list
    return pair, words


# %% 1 right
def merge_step(words: list[tuple[list[int], int]], new: int) -> tuple[Pair, list]:
    counts = Counter(pair for ids, count in words for pair in [*pairwise(ids)] * count)
    most = max(counts.values())
    pair = sorted(pair for pair in counts if counts[pair] == most)[0]
    return pair, [(merge(ids, pair, new) if pair in pairwise(ids) else ids, n) for ids, n in words]


# %% 2
def encode_word(word: str, merges: list[Pair]) -> list[int]:
    ids, i = to_ids(word), 0
    while i + 1 < len(ids):  # from left to right
        if (ids[i], ids[i + 1]) in merges:
            ids[i : i + 2] = [256 + merges.index((ids[i], ids[i + 1]))]
            i = 0
        else:
            i += 1
    return ids


# %% 2
def encode_word(word: str, merges: list[Pair]) -> list[int]:
    ids = to_ids(word)
    for i, pair in reversed([*enumerate(merges)]):  # the last merge first
        ids = merge(ids, pair, 256 + i)
    return ids


# %% 2
def encode_word(word: str, merges: list[Pair]) -> list[int]:
    tokens, ids, data = BytePairTokenizer(merges).tokens, [], word.encode()
    while data:  # the longest token that fits
        best = max((token for token in tokens if data.startswith(token)), key=len)
        ids.append(tokens.index(best))
        data = data[len(best) :]
    return ids


# %% 2
def encode_word(word: str, merges: list[Pair]) -> list[int]:
    ids = list(word.encode())  # bytes, not ids
    for i, pair in enumerate(merges):
        ids = merge(ids, pair, 256 + i)
    return ids


# %% 2 right
def encode_word(word: str, merges: list[Pair]) -> list[int]:
    ids = to_ids(word)
    for i, pair in enumerate(merges):
        ids = merge(ids, pair, 256 + i)
    return ids


# %% 3
def pieces_of(ids: list[int], tokens: list[bytes]) -> list[str]:
    return [tokens[i].decode("utf-8", errors="replace") for i in ids]


# %% 3
def pieces_of(ids: list[int], tokens: list[bytes]) -> list[str]:
    return [tokens[i].decode("utf-8", errors="ignore") for i in ids]


# %% 3
def pieces_of(ids: list[int], tokens: list[bytes]) -> list[str]:
    return list(b"".join(tokens[i] for i in ids).decode())  # characters


# %% 3
def pieces_of(ids: list[int], tokens: list[bytes]) -> list[str]:
    pieces, waiting = [], b""
    for i in ids:
        waiting += tokens[i]
        try:
            pieces.append(waiting.decode())
            waiting = b""
        except UnicodeDecodeError:
            pieces.append("")  # keeps back complete characters, too
    return pieces


# %% 3
def pieces_of(ids: list[int], tokens: list[bytes]) -> list[str]:
    pieces, waiting = [], b""
    for i in ids:
        waiting += tokens[i]
        pieces.append(waiting.decode("utf-8", errors="ignore"))
        waiting = waiting[len(pieces[-1]) :]  # characters, not bytes
    return pieces


# %% 3 right
def pieces_of(ids: list[int], tokens: list[bytes]) -> list[str]:
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokens[i]) for i in ids]


# %% 4
def bits_per_character(p: Tensor, ids: Tensor, characters: int) -> float:
    return -p[ids].log().sum().item() / characters  # nats


# %% 4
def bits_per_character(p: Tensor, ids: Tensor, characters: int) -> float:
    return -p[ids].log2().mean().item()  # per token


# %% 4
def bits_per_character(p: Tensor, ids: Tensor, characters: int) -> float:
    return -p[ids].log2().mean().item() * characters / len(ids)


# %% 4
def bits_per_character(p: Tensor, ids: Tensor, characters: int) -> float:
    return -(p * p.log2()).sum().item() * len(ids) / characters  # the entropy of p


# %% 4 right
def bits_per_character(p: Tensor, ids: Tensor, characters: int) -> float:
    nats = -p.log()[ids].mean().item()
    return nats / math.log(2) / (characters / len(ids))
