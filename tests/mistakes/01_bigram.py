# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def cut_batch(tokens: Tensor, starts: list[int], T: int) -> tuple[Tensor, Tensor]:
    idx = torch.stack([tokens[i : i + T] for i in starts])
    return idx, idx


# %% 2
def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1) - F.one_hot(targets, logits.shape[1])


# %% 3
@torch.inference_mode()
def generate(model, ids, length, temperature, generator):
    ids = list(ids)
    for _ in range(length):
        logits = model(torch.tensor([ids[-1:]]))[0][0, -1]
        order = logits.argsort(descending=True)
        probabilities = F.softmax(logits[order].double() * temperature, dim=0)
        pick = torch.multinomial(probabilities, 1, generator=generator)
        ids.append(order[pick].item())
    return ids


# %% 4
def train_merges(ids: list[int], count: int) -> dict[tuple[int, int], int]:
    merges = {}
    for new_id in range(256, 256 + count):
        merges[Counter(pairwise(ids)).most_common(1)[0][0]] = new_id
    return merges


# %% 5
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
