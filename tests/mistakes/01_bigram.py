# Typical wrong answers to the exercises, by number: each must be caught. Those marked "right" must
# pass.
# %% 1
def cut_batch(tokens: Tensor, starts: list[int], T: int) -> tuple[Tensor, Tensor]:
    idx = torch.stack([tokens[i : i + T] for i in starts])
    return idx, idx


# %% 1
def cut_batch(tokens: Tensor, starts: list[int], T: int) -> tuple[Tensor, Tensor]:
    idx = torch.stack([tokens[starts[1] : starts[1] + T] for _ in starts])  # the same row each time
    return idx, idx + 3


# %% 1
def cut_batch(tokens: Tensor, starts: list[int], T: int) -> tuple[Tensor, Tensor]:
    idx = torch.stack([tokens[i : i + T] for i in starts])
    return idx, idx.roll(-1, dims=1)


# %% 1 right
def cut_batch(tokens: Tensor, starts: list[int], T: int) -> tuple[Tensor, Tensor]:
    positions = torch.tensor(starts)[:, None] + torch.arange(T)
    return tokens[positions], tokens[positions + 1]


# %% 2
def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1) - F.one_hot(targets, logits.shape[1])


# %% 3
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    ids = list(ids)
    for _ in range(length):
        logits = model(torch.tensor([ids[-1:]]))[0][0, -1]
        probabilities = F.softmax(logits * temperature, dim=0)
        ids.append(torch.multinomial(probabilities, 1, generator=generator).item())
    return ids


# %% 3
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    ids = list(ids)
    for _ in range(length):
        logits = model(torch.tensor([ids[-model.block_size :]]))[0][0, 0]  # of the first position
        probabilities = F.softmax(logits / temperature, dim=0)
        ids.append(torch.multinomial(probabilities, 1, generator=generator).item())
    return ids


# %% 3
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    ids = list(ids)
    for _ in range(length):
        logits = model(torch.tensor([ids[-model.block_size :]]))[0][0, -1]
        probabilities = F.softmax(logits.sort(descending=True).values / temperature, dim=0)
        ids.append(torch.multinomial(probabilities, 1, generator=generator).item())  # a rank, no id
    return ids


# %% 3
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    ids = list(ids)
    for _ in range(length):
        logits = model(torch.tensor([ids[-model.block_size :]]))[0][0, -1]
        ids.append((logits / temperature).argmax().item())
    return ids


# %% 3
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    ids = list(ids)
    for _ in range(length):
        logits = model(torch.tensor([ids[-model.block_size :]]))[0][0, -1]
        probabilities = F.softmax(logits / temperature, dim=0)
        ids.append(torch.multinomial(probabilities, 1).item())  # without the generator
    return ids


# %% 3
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    ids = list(ids)
    for _ in range(length):
        logits = model(torch.tensor([ids]))[0][0, -1]
        probabilities = F.softmax(logits / temperature, dim=0)
        ids.append(torch.multinomial(probabilities, 1, generator=generator).item())
    return ids


# %% 3
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    new = []
    for _ in range(length):
        logits = model(torch.tensor([[*ids, *new][-model.block_size :]]))[0][0, -1]
        probabilities = F.softmax(logits / temperature, dim=0)
        new.append(torch.multinomial(probabilities, 1, generator=generator).item())
    return new


# %% 3 right
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    ids = list(ids)
    for _ in range(length):
        logits = model(torch.tensor([ids[-model.block_size :]]))[0][0, -1]
        order = logits.argsort(descending=True)
        probabilities = F.softmax(logits[order].double() / temperature, dim=0)
        ids.append(order[torch.multinomial(probabilities, 1, generator=generator)].item())
    return ids


# %% 3 right
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    idx = torch.tensor([ids])
    for _ in range(length):
        logits, _ = model(idx[:, -model.block_size :])
        probabilities = F.softmax(logits[:, -1] / temperature, dim=-1)
        idx = torch.cat([idx, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return idx[0].tolist()


# %% 4
def train_merges(ids: list[int], count: int) -> dict[tuple[int, int], int]:
    merges = {}
    for new_id in range(256, 256 + count):
        merges[Counter(pairwise(ids)).most_common(1)[0][0]] = new_id
    return merges


# %% 4
def train_merges(ids: list[int], count: int) -> dict[tuple[int, int], int]:
    merges = {}
    for new_id in range(256, 256 + count):
        pair = Counter(pairwise(ids)).most_common(1)[0][0]
        merges[pair], ids = new_id, merge(ids, pair, new_id)
    return merges


def encode(text: str, merges: dict[tuple[int, int], int]) -> list[int]:
    ids = list(text.encode())
    for pair, new_id in reversed(merges.items()):
        ids = merge(ids, pair, new_id)
    return ids


def decode(ids: list[int], merges: dict[tuple[int, int], int]) -> str:
    token = {i: bytes([i]) for i in range(256)}
    for (a, b), new_id in merges.items():
        token[new_id] = token[a] + token[b]
    return b"".join(token[i] for i in ids).decode()


# %% 4
def encode(text: str, merges: dict[tuple[int, int], int]) -> list[int]:
    token = {bytes([i]): i for i in range(256)}
    name = {i: bytes([i]) for i in range(256)}
    for (a, b), new_id in merges.items():
        name[new_id] = name[a] + name[b]
        token[name[new_id]] = new_id
    data, ids = text.encode(), []
    while data:  # the longest token that fits, not the merges in their order
        fitting = max((each for each in token if data.startswith(each)), key=len)
        ids.append(token[fitting])
        data = data[len(fitting) :]
    return ids


# %% 4
def encode(text: str, merges: dict[tuple[int, int], int]) -> list[int]:
    ids = list(text.encode())
    for pair, new_id in merges.items():
        ids = merge(ids, pair, new_id)
    return ids


def decode(ids: list[int], merges: dict[tuple[int, int], int]) -> str:
    token = {i: chr(i) for i in range(256)}  # characters instead of bytes
    for (a, b), new_id in merges.items():
        token[new_id] = token[a] + token[b]
    return "".join(token[i] for i in ids)


# %% 4 right
def encode(text: str, merges: dict[tuple[int, int], int]) -> list[int]:
    ids = list(text.encode())
    while found := [pair for pair in pairwise(ids) if pair in merges]:
        pair = min(found, key=merges.get)  # the earliest merge, as GPT-2 does it
        ids = merge(ids, pair, merges[pair])
    return ids


def decode(ids: list[int], merges: dict[tuple[int, int], int]) -> str:
    pairs = {new_id: pair for pair, new_id in merges.items()}

    def expand(i: int) -> bytes:
        return b"".join(map(expand, pairs[i])) if i in pairs else bytes([i])

    return b"".join(map(expand, ids)).decode()
