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
# # 3 · Several heads
#
# Several small heads attend to several things at once. You build multi-head attention twice: as a
# list of heads, which is easy to read, and as one tensor, which is fast. Then you take a trained
# model apart, head by head.
#
# The validation loss drops from about 2.39 nats per character with one head to about 2.28 with
# four. Allow about 45 minutes to read and run, plus one to two hours for the exercises.
#
# ![The model: attention now has four heads in a list](../results/diagrams/multihead_attention.svg)

# %%
import sys
from copy import deepcopy
from time import perf_counter

sys.path.insert(0, "..")

from batched_attention import Config
from common import LanguageModel, Tokenizer, draw_batch
from self_attention import Head
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GRAY, ORANGE, causal, check, given, heat_map, plt, reveal, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

corpus = open_corpus(None)
training, validation = corpus.train, corpus.validation
tokenizer = Tokenizer(corpus.vocabulary)
config = Config(vocab_size=len(tokenizer.vocabulary))
V, T, C, H = config.vocab_size, config.block_size, config.n_embd, config.n_head
D = C // H
print(f"T = {T} characters of context, C = {C} channels, H = {H} heads of size D = C / H = {D}")

# %% [markdown]
# ## Why one head is not enough
#
# A head gives each position **one** set of attention weights, and they sum to 1: more weight for
# one character means less for another. Here are the texts `th` and `ht` with two channels,
# `t` = [1, 0] and `h` = [0, 1], plus position embeddings. A single head attends equally to both
# characters; with two heads, each attends to one.

# %%
embedding = {"t": torch.tensor([1.0, 0.0]), "h": torch.tensor([0.0, 1.0])}
positions = torch.tensor([[0.25, 0.25], [0.5, 0.5]])  # (T, C), here with T = C = 2
one_head = torch.tensor([0.5, 0.5])  # (T): weights
two_heads = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # (H, T): each head has weights of its own
for text in ("th", "ht"):
    x = torch.stack([embedding[each] for each in text]) + positions  # (T, C)
    print(f"{text} = {x.tolist()}")
    print(f"  one head: {(one_head @ x).tolist()}, two heads: {(two_heads @ x).tolist()}")

# %% [markdown]
# Equal weights cannot tell the two texts apart: swapping $a$ and $b$ does not change the mean
# $\frac12(a + p_0) + \frac12(b + p_1)$. Unequal weights would keep the order but weaken one
# character. Two heads keep both.
#
# ## A list of heads
#
# **Multi-head attention** runs `H` heads on the same input and **concatenates** their outputs. Each
# head has size `D = C / H`, so the concatenation has `C` channels again. A linear layer, the
# **output projection** `out_proj`, mixes them. `Head` is from the previous stage.


# %%
class MultiHeadAttention(nn.Module):
    """Several heads in parallel; a linear layer mixes their outputs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        head_size = config.n_embd // config.n_head
        self.heads = nn.ModuleList(Head(config, head_size) for _ in range(config.n_head))
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, H*D)
        return self.out_proj(x)  # (B, T, C)


HeadList = MultiHeadAttention  # a second name, since the batched class below has the same one
torch.manual_seed(1)
listed = HeadList(config)
x = torch.randn(2, T, C)  # (B, T, C)
outputs = [head(x) for head in listed.heads]  # H times (B, T, D)
print("input        ", tuple(x.shape))
print("head outputs ", *(tuple(output.shape) for output in outputs))
print("concatenated ", tuple(torch.cat(outputs, dim=-1).shape))
print("projected    ", tuple(listed(x).shape))

# %% [markdown]
# **Predict before you run.** With one head this layer has 4,128 parameters: three matrices of
# 32 × 32, and `out_proj` with its bias. How many does it have with eight heads?

# %%
guess = ...  # a number

# %% tags=["prediction"]
eight = HeadList(Config(n_head=8))
reveal(guess, sum(parameter.numel() for parameter in eight.parameters()))

# %% [markdown]
# More heads do not mean more parameters: $H$ matrices of $C \times C/H$ are as large as one of
# $C \times C$.
#
# ### The output projection
#
# Without `out_proj`, head 0 could write to channels 0 to 7 only. With it, each head can write to
# all channels. A matrix times a concatenation is a sum, in which each head has its own slice of the
# matrix. For column vectors, $W [f_0; f_1; \ldots] = W_0 f_0 + W_1 f_1 + \ldots$
#
# The weight of `nn.Linear(in, out)` has the shape (out, in), and the layer computes `x @ weight.T`.
# So columns belong to inputs, rows to outputs.
#
# **Exercise 1.** Return what head `h` contributes to the layer's output, without the bias.


# %% tags=["exercise"]
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    """Head h's contribution to attention(x), (B, T, C)."""
    # 1. Compute the head's output, (B, T, D).
    # 2. Take the slice of attention.out_proj.weight that multiplies it.
    return ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    torch.manual_seed(2)
    attention, x = HeadList(config), torch.randn(2, T, C)
    parts = [given(take_head(attention, x, h)) for h in range(H)]
    assert parts[0].shape == x.shape, f"the shape is {tuple(parts[0].shape)}, not {tuple(x.shape)}"
    wanted = []
    for h in range(H):
        without = deepcopy(attention)
        nn.init.zeros_(without.heads[h].value.weight)  # this head's output is now 0
        wanted.append(attention(x) - without(x))
    for h, part in enumerate(parts):
        gaps = [(part - each).abs().max().item() for each in wanted]
        k = min(range(H), key=gaps.__getitem__)
        assert k == h or gaps[k] > 1e-4, f"for head {h}, you return the contribution of head {k}"
        biased = torch.allclose(part - attention.out_proj.bias, wanted[h], atol=1e-4)
        assert not biased, f"the contribution of head {h} contains the bias"
        assert gaps[h] < 1e-4, f"removing head {h} changes attention(x) by something else"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def take_head(attention, x, h):
#     weight = attention.out_proj.weight[:, h * D : (h + 1) * D]  # (C, D)
#     return attention.heads[h](x) @ weight.T
# ```
#
# </details>
#
# ## All heads in one tensor
#
# The list computes $3H$ small matrix products one after the other, all of the same `x`. A CPU or
# GPU computes one large product faster, so `batched_attention.py` stacks the matrices into one,
# `qkv_proj`, with $3C$ outputs. What remains is to find the heads in its output.
#
# ![The same model, with the four heads in one tensor](../results/diagrams/batched_attention.svg)
#
# Take a tiny `qkv_proj(x)`: `T = 3`, `H = 2`, `D = 2`, so `C = 4`. Each number encodes where it is:
# 100 times its position, plus its channel.

# %%
qkv = (100 * torch.arange(3)[:, None] + torch.arange(12))[None]  # (B, T, 3*C), with B = 1
cut = qkv.view(1, 3, 3, 2, 2)  # (B, T, 3, H, D)
print("position 2, before view:", qkv[0, 2].tolist())
print("position 2, after view: ", cut[0, 2].tolist())

# %% [markdown]
# `view` cuts the 12 channels into query, key and value, each of these into heads, and each head
# into channels. No number moves. Attention needs `T` and `D` last, since `@` multiplies the last
# two dimensions and treats the others as a batch. `permute(2, 0, 3, 1, 4)` makes it
# `(3, B, H, T, D)`: each argument is the old index of a dimension.
#
# **Predict before you run.** Which number is `key[0, 1, 2, 1]`: batch row 0, head 1, position 2,
# channel 1 of the head?

# %%
guess = ...  # a number

# %% tags=["prediction"]
query, key, value = cut.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
reveal(guess, key[0, 1, 2, 1])


# %%
def numbered(axes: plt.Axes, values: Tensor, title: str) -> None:
    """Values in cells; channels of the same head and kind have the same color."""
    rows = [f"t = {t}" for t in range(3)]
    shades = values % 100 // 2  # 0 to 5
    heat_map(axes, shades, rows, [""] * values.shape[1], title, cmap="Set3", vmin=0, vmax=11)
    for t, row in enumerate(values.tolist()):
        for c, number in enumerate(row):
            axes.text(c, t, str(number), ha="center", va="center")


figure = plt.figure(figsize=(7.5, 5.2))
grid = figure.add_gridspec(3, 6, height_ratios=(1.3, 1, 1))
numbered(figure.add_subplot(grid[0, :]), qkv[0], "qkv_proj(x): 3*C channels per position")
for i, (kind, name) in enumerate(zip((query, key, value), ("query", "key", "value"), strict=True)):
    for h in range(2):
        axes = figure.add_subplot(grid[1 + h, 2 * i : 2 * i + 2])
        numbered(axes, kind[0, h], f"{name}, head {h}: (T, D)")
plt.show()

# %% [markdown]
# Each tile is the `(T, D)` matrix of one head. The head outputs go the other way, from
# `(B, H, T, D)` to `(B, T, C)`.
#
# **Exercise 2.** Split `(B, T, C)` into heads, head 0 first, and write the inverse.


# %% tags=["exercise"]
def split_heads(x: Tensor, H: int) -> Tensor:
    """From (B, T, C) to (B, H, T, D)."""
    B, T, C = x.shape
    return ...


def merge_heads(x: Tensor) -> Tensor:
    """From (B, H, T, D) to (B, T, C)."""
    B, H, T, D = x.shape
    return ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    x = torch.arange(2 * 5 * 12.0).view(2, 5, 12)  # (B, T, C)
    heads = given(split_heads(x, 3))
    assert tuple(heads.shape) == (2, 3, 5, 4), f"split, the shape is {tuple(heads.shape)}"
    wanted = torch.stack(x.chunk(3, dim=-1), dim=1)  # (B, H, T, D)
    right = (heads == wanted).float().mean().item()
    assert right == 1, f"split, the shape is right, but only {right:.0%} of the values are"
    merged = given(merge_heads(wanted))
    assert tuple(merged.shape) == (2, 5, 12), f"merged, the shape is {tuple(merged.shape)}"
    right = (merged == x).float().mean().item()
    assert right == 1, f"merged, the shape is right, but only {right:.0%} of the values are"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def split_heads(x, H):
#     B, T, C = x.shape
#     return x.view(B, T, H, C // H).transpose(1, 2)
#
#
# def merge_heads(x):
#     B, H, T, D = x.shape
#     return x.transpose(1, 2).reshape(B, T, H * D)
# ```
#
# </details>
#
# `batched_attention.py` does exactly this. One mask, `(T, T)`, broadcasts over batch and heads.


# %%
class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads at once: the heads are one more batch dimension."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        # No biases, as in the lecture; a key bias would cancel in softmax anyway.
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()  # (T, T)
        self.register_buffer("causal_mask", mask, persistent=False)  # a constant: not saved

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        x = self.qkv_proj(x)  # (B, T, 3*C)
        x = x.view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        query, key, value = x.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        # The variance of q·k grows with D; dividing by √D keeps softmax from saturating.
        scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5  # (B, H, T, T)
        scores = scores.masked_fill(~self.causal_mask[:T, :T], float("-inf"))
        weights = F.softmax(scores, dim=-1)  # attention weights: each row sums to 1
        x = weights @ value  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.out_proj(x)


# %% [markdown]
# ### The same function, faster
#
# Copy the list's weights into the batched layer. A weight's rows belong to outputs, so they follow
# the channels: all queries, head by head, then keys, then values.

# %%
batched = MultiHeadAttention(config)
rows = [getattr(head, name).weight for name in ("query", "key", "value") for head in listed.heads]
with torch.no_grad():
    batched.qkv_proj.weight.copy_(torch.cat(rows))  # 3*H times (D, C) -> (3*C, C)
    batched.out_proj.load_state_dict(listed.out_proj.state_dict())
difference = (listed(x) - batched(x)).abs().max().item()
print(f"one output {batched(x)[0, 0, 0].item():.4f}, largest difference {difference:.0e}")


# %%
def seconds(attention: nn.Module, x: Tensor) -> float:
    """The time of a forward and a backward pass."""
    began = perf_counter()
    attention(x).sum().backward()
    return perf_counter() - began


x = torch.randn(config.batch_size, T, C)  # (B, T, C)
for n_head in (1, 4, 16):
    both = [kind(Config(n_head=n_head)) for kind in (HeadList, MultiHeadAttention)]
    rounds = [[seconds(attention, x) for attention in both] for _ in range(100)]
    slow, fast = (min(times) for times in zip(*rounds, strict=True))  # min: least disturbed
    print(f"H = {n_head:2}: the list takes {slow / fast:.1f} times as long as one tensor")

# %% [markdown]
# Up to rounding, both layers compute the same function. Only the time differs: above, that of a
# forward and a backward pass through attention alone. The ratio grows with the number of heads. All
# later stages use the batched class.
#
# ## Training
#
# The model is that of the previous stage, with the new attention layer.


# %%
class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.attention(x)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# %% [markdown]
# Train it with 1, 2, 4 and 8 heads, on the same batches. The number of parameters is the same. All
# four take about half a minute on two cores.


# %%
def train(model: Model, parameters: list[nn.Parameter], count: int) -> float:
    """Train these parameters for `count` steps; return the exact validation loss."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    for _ in range(count):
        idx, targets = draw_batch(training, T, config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return exact_loss(model, validation)


models, losses = {}, {}
for n_head in (1, 2, 4, 8):
    torch.manual_seed(1)
    models[n_head] = Model(Config(vocab_size=V, n_head=n_head))
    losses[n_head] = train(
        models[n_head], list(models[n_head].parameters()), steps(config.max_iters)
    )
    print(f"H = {n_head}: validation loss {losses[n_head]:.3f}")
model = models[H]  # four heads: the one to look into

figure, axes = plt.subplots(figsize=(6.5, 3.2))
axes.plot(range(4), losses.values(), marker="o", color=BLUE)
for i, loss in enumerate(losses.values()):
    axes.annotate(f"{loss:.2f}", (i, loss), (5, 5), textcoords="offset points")
axes.set_xticks(range(4), losses.keys())
axes.margins(0.1, 0.25)
axes.set(xlabel="H, number of heads", ylabel="validation loss\n(nats per character)")
plt.show()

# %% [markdown]
# The second head helps most. Between four and eight heads the gap is smaller than that between two
# seeds, which is up to 0.02.
#
# ## What the heads attend to
#
# `look` repeats `forward` up to the attention weights.


# %%
@torch.no_grad()
def look(model: Model, idx: Tensor) -> tuple[Tensor, Tensor]:
    """The scores before the mask, and the attention weights: (B, H, T, T) each."""
    B, T = idx.shape
    attention = model.attention
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(T))  # (B, T, C)
    x = attention.qkv_proj(x).view(B, T, 3, attention.n_head, -1)  # (B, T, 3, H, D)
    query, key, _ = x.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5  # (B, H, T, T)
    masked = scores.masked_fill(~attention.causal_mask[:T, :T], float("-inf"))
    return scores, F.softmax(masked, dim=-1)


text = "and then"
_, weights = look(model, torch.tensor([tokenizer.encode(text)]))  # (1, H, T, T)
figure, axes = plt.subplots(2, 2, figsize=(7.5, 6.2))
for h, panel in enumerate(axes.flat):
    labels, bar = visible(text), "attention weight"
    heat_map(panel, causal(weights[0, h]), labels, labels, f"head {h}", bar, vmin=0, vmax=1)
    panel.set(xlabel="key position", ylabel="query position")
plt.show()

# %% [markdown]
# A row is a query position; its colors are the weights on itself and earlier positions. Head 1
# attends from `n`, `t` and `h` to the last vowel or space.
#
# A single text can mislead, so here are means over 2,000 windows of the validation text, for the
# last position. The right panel divides the weight that a kind of character gets by what distance
# alone would give it.

# %%
many = validation[: 2000 * T].view(-1, T).long()  # (B, T)
weights = look(model, many)[1][:, :, -1]  # (B, H, T)
by_distance = weights.mean(dim=0)  # (H, T)
letters, vowels = set(filter(str.isalpha, tokenizer.vocabulary)), set("aeiouAEIOU")
kinds = {"vowel": vowels, "consonant": letters - vowels, "space": set(" \n")}
preference = torch.zeros(len(kinds), H)
for i, kind in enumerate(kinds.values()):
    there = torch.tensor([each in kind for each in tokenizer.vocabulary])[many]  # (B, T)
    measured, expected = ((each * there[:, None]).sum((0, 2)) for each in (weights, by_distance))
    preference[i] = measured / expected  # (H)

figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.2), width_ratios=(8, 5))
heads, back = [str(h) for h in range(H)], [str(d) for d in range(T)]
heat_map(axes[0], by_distance.flip(-1), heads, back, "by distance", "mean weight", vmin=0)
limit = (preference - 1).abs().max().item()
options = {"cmap": "PuOr", "vmin": 1 - limit, "vmax": 1 + limit}
heat_map(
    axes[1],
    preference,
    list(kinds),
    heads,
    "by kind",
    "measured / expected",
    **options,
)
axes[0].set(xlabel="characters back", ylabel="head", aspect="auto")
axes[1].set(xlabel="head", ylabel="key", aspect="auto")
plt.show()

# %% [markdown]
# Heads 2 and 3 mostly attend to the character itself. It has no other path to `lm_head`, so some
# heads must carry it. Head 1 prefers spaces and vowels; nothing in the code says what a vowel
# is.
#
# ## Challenge · Circuits
#
# You can skip this section; only quiz question 4 uses it. Which pairs of characters make a head
# attend, and what does it then predict? Apart from the attention weights, this model is linear. So
# both answers are tables of characters × characters, like the bigram table. They are the head's
# **circuits** (Elhage et al., 2021):
#
# - **QK**: the score of a query character with a key character. It decides *where* a head attends.
# - **OV**: the logits that a character adds when it gets weight 1. It decides *what* is passed on.
#
# For both, take a head's rows and columns:


# %%
def matrices(model: Model, h: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head h's query, key and value matrices, (D, C), and its slice of out_proj, (C, D)."""
    attention = model.attention
    H = attention.n_head
    query, key, value = attention.qkv_proj.weight.detach().view(3, H, -1, C)[:, h]
    return query, key, value, attention.out_proj.weight.detach().view(C, H, -1)[:, h]


# %% [markdown]
# **Exercise 3: the OV circuit.** Follow vectors `x`, such as the embeddings of all characters,
# through head `h` to the logits. The check adds up heads, positions and `out_proj`'s bias, and
# compares the sum with the model's logits.


# %% tags=["exercise"]
def ov_circuit(model: Model, h: int, x: Tensor) -> Tensor:
    """The logits, (N, V), that head h adds where it attends to x, (N, C), with weight 1.

    N is any number of vectors.
    """
    # matrices(model, h) has the value and output matrices; model.lm_head follows.
    return ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    idx = many[:50]  # (B, T)
    predicted = 0
    for h in range(H):
        of_tokens = given(ov_circuit(model, h, model.token_embedding.weight))  # (V, V)
        assert tuple(of_tokens.shape) == (V, V), f"the shape is {tuple(of_tokens.shape)}"
        of_positions = ov_circuit(model, h, model.position_embedding.weight)  # (T, V)
        predicted += look(model, idx)[1][:, h] @ (of_tokens[idx] + of_positions)  # (B, T, V)
    error = predicted + model.lm_head(model.attention.out_proj.bias) - model(idx)[0]  # (B, T, V)
    gap, constant = error.abs().max().item(), error.std(dim=(0, 1)).max().item() < 1e-4
    assert gap < 1e-3 or not constant, f"every position has the same error, up to {gap:.2f}"
    assert gap < 1e-3, f"predicted and measured logits differ by up to {gap:.2f}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def ov_circuit(model, h, x):
#     _, _, value, output = matrices(model, h)
#     return model.lm_head(x @ value.T @ output.T)
# ```
#
# The bias of `out_proj` belongs to no head.
#
# </details>
#
# **Exercise 4: the QK circuit.** Compute it for a query at position `t` and a key at position `s`.
# The check compares it with the model's scores.


# %% tags=["exercise"]
def qk_circuit(model: Model, h: int, t: int, s: int) -> Tensor:
    """The scores, (V, V): a row per query character, a column per key character."""
    # A character at position t enters as its token embedding plus position embedding t.
    return ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    scores, _ = look(model, many)  # (B, H, T, T)
    for h, t, s in ((0, 5, 5), (1, 7, 4), (H - 1, 6, 0)):
        circuit = given(qk_circuit(model, h, t, s))
        assert tuple(circuit.shape) == (V, V), f"the shape is {tuple(circuit.shape)}"
        predicted, measured = circuit[many[:, t], many[:, s]], scores[:, h, t, s]  # (B) each
        where = f"head {h}, t = {t}, s = {s}:"
        swapped = (circuit[many[:, s], many[:, t]] - measured).abs().max() < 1e-3
        assert t == s or not swapped, f"{where} queries and keys are swapped"
        ratio = (predicted.norm() / measured.norm()).item()
        assert 0.99 < ratio < 1.01, f"{where} the scores are {ratio:.2f} times the measured ones"
        gap = (predicted - measured).abs().max().item()
        assert gap < 1e-3, f"{where} predicted and measured scores differ by up to {gap:.2f}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def qk_circuit(model, h, t, s):
#     query, key, _, _ = matrices(model, h)
#     token, position = model.token_embedding.weight, model.position_embedding.weight
#     queries = (token + position[t]) @ query.T
#     keys = (token + position[s]) @ key.T
#     return queries @ keys.T * query.shape[0] ** -0.5
# ```
#
# </details>
#
# Here are both circuits of head 1. Each row is shown minus its mean, which softmax ignores:

# %%
common = [tokenizer.ids[each] for each in " aehinorstuy" if each in tokenizer.ids]
token, position = model.token_embedding.weight.detach(), model.position_embedding.weight.detach()
query, key, value, output = matrices(model, 1)
qk = (token + position[7]) @ query.T @ (key @ (token + position[6]).T) * D**-0.5  # (V, V)
ov = token @ value.T @ output.T @ model.lm_head.weight.detach().T  # (V, V)

labels = visible(tokenizer.decode(common))
figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.8))
for panel, circuit, name in zip(axes, (qk, ov), ("QK score", "OV logit"), strict=True):
    part = circuit[common][:, common]
    part = part - part.mean(dim=1, keepdim=True)
    limit = part.abs().max().item()
    options = {"cmap": "PuOr", "vmin": -limit, "vmax": limit}
    heat_map(panel, part, labels, labels, name, f"{name} minus mean of the row", **options)
axes[0].set(ylabel="query character", xlabel="key character, one back")
axes[1].set(ylabel="key character", xlabel="next character")
plt.show()

# %% [markdown]
# QK: most queries score the space, `i` and `o` high, and `h`, `n`, `r` and `s` low. OV: a
# space lowers the logit of another space. Together they form a **skip-trigram**: at the `h` of
# "␣h", the head attends to the space and so makes a space less likely to come next.
#
# ## Break it: remove a head
#
# **Ablation** removes a component of a trained model, to see how much the model relies on it.
#
# **Exercise 5.** Return a copy of the model in which head `h` contributes nothing.


# %% tags=["exercise"]
def without_head(model: Model, h: int) -> Model:
    """A copy of the model, with head h zeroed."""
    # 1. Copy the model with deepcopy.
    # 2. Under torch.no_grad(), set the weights of the copy that carry head h to 0.
    return ...


# %% tags=["check"]
@check
def exercise_5() -> None:
    before = deepcopy(model.state_dict())
    for h in range(H):
        ablated, wanted = given(without_head(model, h)), deepcopy(model)
        with torch.no_grad():  # another way: zero the head's values instead
            wanted.attention.qkv_proj.weight.view(3, H, D, C)[2, h] = 0
        same = all(torch.equal(before[name], each) for name, each in model.state_dict().items())
        assert same, "the model itself has changed"
        gap = (ablated(many)[0] - wanted(many)[0]).abs().max().item()
        assert gap < 1e-3, f"head {h}: the logits differ from those without it by up to {gap:.2f}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def without_head(model, h):
#     ablated = deepcopy(model)
#     with torch.no_grad():
#         ablated.attention.out_proj.weight[:, h * D : (h + 1) * D] = 0
#     return ablated
# ```
#
# </details>
#
# **Predict before you run.** Remove the head whose removal hurts least. Is the loss with the three
# remaining heads above or below the loss of the model trained with one head?

# %%
guess = ...  # "above" or "below"


# %% tags=["prediction"]
def zero_head(model: Model, h: int) -> Model:
    """A copy in which a hook zeroes head h's output, so training cannot bring it back.

    PyTorch calls the hook before `out_proj` runs; it can change that layer's input.
    """

    def zero(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        heads = inputs[0].unflatten(-1, (H, D))  # (B, T, H, D)
        return (heads * (torch.arange(H) != h)[:, None]).flatten(-2)  # (B, T, C)

    copy = deepcopy(model)
    copy.attention.out_proj.register_forward_pre_hook(zero)
    return copy


ablated = [zero_head(model, h) for h in range(H)]
removed = [exact_loss(each, validation) for each in ablated]
reveal(guess, "above" if min(removed) > losses[1] else "below")

# %% [markdown]
# Now train only the two linear layers after the heads, `out_proj` and `lm_head`, for 500 steps,
# with the head still zeroed (a few seconds). The other heads stay as they were.

# %%
retrained = []
for each in ablated:
    behind = [*each.attention.out_proj.parameters(), *each.lm_head.parameters()]
    retrained.append(train(each, behind, steps(500)))

figure, axes = plt.subplots(figsize=(7.5, 3.8))
for name, loss in (("all four heads", losses[H]), ("trained with one head", losses[1])):
    axes.axhline(loss, color=GRAY, linestyle="--", linewidth=1)
    axes.text(H - 0.5, loss, name, color=GRAY, va="bottom")
for h, (before, after) in enumerate(zip(removed, retrained, strict=True)):
    axes.annotate("", (h, after), (h, before), arrowprops={"arrowstyle": "->", "color": GRAY})
    for loss, color, word in ((before, ORANGE, " zeroed"), (after, BLUE, " retrained")):
        axes.plot(h, loss, "o", color=color)
        box = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 1}
        text = f"{loss:.2f}{word * (h == 0)}"
        axes.text(h + 0.1, loss, text, color=color, va="center", bbox=box)
axes.set_xticks(range(H), [f"head {h}" for h in range(H)])
axes.set_xlim(-0.4, H + 0.4)
axes.set(xlabel="zeroed head", ylabel="validation loss\n(nats per character)")
plt.show()

# %% [markdown]
# Zeroing any head makes the model worse than one trained with a single head. But retraining the two
# linear layers removes most of the increase, so most of it was not lost information. Ablation
# leaves the model **miscalibrated**: `out_proj` and `lm_head` were trained for a sum of four
# contributions. Ablation measures how much this model relies on a head, not how good a model can be
# without it.
#
# ## The scripts
#
# `git diff --no-index self_attention.py multihead_attention.py` shows the additions: `n_head` and
# the class `MultiHeadAttention`. In
# `git diff --no-index multihead_attention.py batched_attention.py`, `Head` is gone and that class
# is rewritten.

# %% [markdown]
# ## Quiz
#
# **1.** Why can one head not attend fully to two characters at once?
#
# <details><summary>Answer</summary>
#
# Its weights sum to 1. Fully attending to one leaves 0 for the other.
#
# </details>
#
# **2.** `x` is `(B, T, C)`. Why is `x.view(B, H, T, D)` wrong, although it runs?
#
# <details><summary>Answer</summary>
#
# In memory, the channels of a position are neighbors: head 0 would get whole positions.
#
# </details>
#
# **3.** Does the batched layer reach a lower loss than the list?
#
# <details><summary>Answer</summary>
#
# No. It computes the same function with fewer, larger products.
#
# </details>
#
# **4.** A head's QK circuit has a high score for (`n`, `a`), and its OV circuit a high logit for
# (`a`, `d`). What does the head do?
#
# <details><summary>Answer</summary>
#
# At an `n` it attends to an earlier `a`, and then raises the logit of `d` as the next character.
#
# </details>
#
# **5.** Ablating a head raises the loss by 0.5. Is a model trained without it 0.5 worse?
#
# <details><summary>Answer</summary>
#
# Not necessarily: in training, the other heads would have adjusted to its absence.
#
# </details>
#
# ## Papers
#
# - Vaswani et al. (2017), [Attention Is All You Need](https://arxiv.org/abs/1706.03762)
# - Michel et al. (2019), [Are Sixteen Heads Really Better than
#   One?](https://arxiv.org/abs/1905.10650)
# - Elhage et al. (2021), [A Mathematical Framework for Transformer
#   Circuits](https://transformer-circuits.pub/2021/framework/index.html)

# %% [markdown]
# **Next →** [04_feed_forward](04_feed_forward.ipynb)
