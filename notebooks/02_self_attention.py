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
# # 2 · One head of self-attention
#
# The bigram table predicts from a single character. Here you build **self-attention**: each
# position takes a weighted average of the positions so far, with weights computed from the text.
# The validation loss falls from about 2.48 to about 2.39 nats per character.
#
# Allow about 45 minutes to read and run, plus one to two hours for the exercises.
#
# ![The model of self_attention.py](../results/diagrams/self_attention.svg)

# %%
import sys

sys.path.insert(0, "..")

from copy import deepcopy

from bigram import Model as BigramModel
from common import LanguageModel, Tokenizer, draw_batch
from sample import generate
from self_attention import Config
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GRAY, ORANGE, check, given, heat_map, plt, reveal, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

torch.set_printoptions(precision=2, sci_mode=False)
corpus = open_corpus(None)
tokenizer = Tokenizer(corpus.vocabulary)

# %% [markdown]
# ## Averaging the past
#
# To predict the next character, position `t` may use positions 0 to `t`. The simplest summary of
# them is their mean. Here are 3 positions with 2 numbers, or **channels**, each:

# %%
x = torch.tensor([[2.0, 7.0], [6.0, 4.0], [4.0, 1.0]])  # (T, C)
by_loop = torch.zeros(3, 2)  # (T, C)
for t in range(3):
    by_loop[t] = x[: t + 1].mean(dim=0)
print(by_loop)

# %% [markdown]
# ### As a matrix product
#
# `tril` keeps the lower triangle of a matrix. A lower triangle of ones times `x` adds up the past.
# Divide each row by its sum, and the sums become means.

# %%
triangle = torch.ones(3, 3).tril()  # (T, T)
print("triangle:", triangle.int(), "@ x =", triangle @ x, sep="\n")
weights = triangle / triangle.sum(dim=1, keepdim=True)  # (T, T)
print(f"\nweights:\n{weights}", "@ x =", weights @ x, sep="\n")
assert torch.allclose(weights @ x, by_loop)

# %% [markdown]
# Row `t` holds the weights of position `t`. They sum to 1, and the future gets 0.
#
# ### As a softmax
#
# Give each pair of positions a **score** of 0, set the scores of the future to −∞, and apply
# softmax to each row. Since $e^{-\infty} = 0$, the weights are the same as above.

# %%
scores = torch.zeros(3, 3).masked_fill(triangle == 0, float("-inf"))  # (T, T)
print("scores:", scores, "softmax:", F.softmax(scores, dim=-1), sep="\n")
assert torch.allclose(F.softmax(scores, dim=-1), weights)

other_scores = scores + torch.tensor([0.0, 2.0, 1.0])
print("\nother scores:", other_scores, "softmax:", F.softmax(other_scores, dim=-1), sep="\n")

# %% [markdown]
# With other scores, some positions count more than others, and each row still sums to 1. Softmax
# accepts any scores, so a model can compute them from the characters. That is attention.
#
# ### Exercise 1 · Fading weights
#
# Return the `(T, T)` weights of an average in which each step back counts half as much: 1, ½, ¼ and
# so on, divided by their sum. The future gets 0.


# %% tags=["exercise"]
def fading_weights(T: int) -> Tensor:
    # How many steps back is position s from position t? (T, T)
    # How much does it count?
    # What makes each row sum to 1?
    return ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    answer = given(fading_weights(6))
    assert tuple(answer.shape) == (6, 6), f"its shape is {tuple(answer.shape)}, not (6, 6)"
    assert not answer.isnan().any(), "there are NaNs in it"
    assert not answer.triu(1).any(), "a position puts weight on its future"
    for t, total in enumerate(answer.sum(dim=1).tolist()):
        assert abs(total - 1) < 1e-5, f"row {t} sums to {total:.3f}, not to 1"
    ratio = (answer[5, 5] / answer[5, 4]).item()
    assert abs(ratio - 2) < 1e-4, f"a position counts {ratio:.2f} times as much as the one before"
    ratio = (answer[5, 5] / answer[5, 3]).item()
    assert abs(ratio - 4) < 1e-3, f"a position counts {ratio:.2f} times as much as two steps back"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def fading_weights(T):
#     steps_back = torch.arange(T)[:, None] - torch.arange(T)[None, :]  # (T, T)
#     weights = (0.5**steps_back).tril()
#     return weights / weights.sum(dim=1, keepdim=True)
# ```
#
# </details>
#
# ## Token and position embeddings
#
# In notebook 1, a row of the table was already the answer: `V` logits. From now on, a row is an
# intermediate result: `C` = 32 learned numbers that describe a character. Later layers turn them
# into logits.
#
# An average ignores order: it treats the past as a **bag of words**. So `x` is the sum of two
# learned vectors: a **token embedding** (which character it is) and a **position embedding** (where
# it is).

# %%
torch.manual_seed(1)
config = Config(vocab_size=len(tokenizer.vocabulary))
V, T, C = config.vocab_size, config.block_size, config.n_embd
idx = torch.tensor([tokenizer.encode(text) for text in ("to be or", "not to b")])  # (B, T)
names = visible("to be or")

tokens = nn.Embedding(V, C)(idx).detach()  # (B, T, C)
positions = nn.Embedding(T, C)(torch.arange(T)).detach()  # (T, C), the same for each row of B
x = tokens + positions  # (B, T, C)

figure, axes = plt.subplots(3, 1, figsize=(7.5, 5.9))
panels = {"token embedding": tokens[0], "position embedding": positions, "their sum, x": x[0]}
for panel, (title, values) in zip(axes, panels.items(), strict=True):
    labels = [str(t) for t in range(T)] if title == "position embedding" else names
    heat_map(panel, values, labels, [], title, cmap="PuOr", vmin=-4, vmax=4)
axes[2].set_xlabel(f"{C} channels")
figure.colorbar(axes[2].images[0], ax=axes, label="value", shrink=0.5)
plt.show()

# %% [markdown]
# The two `o`s share a token embedding. Their sums differ because their positions do.
#
# ## Queries, keys and values
#
# Three learned matrices turn each position's `x` into three vectors of size `D`:
#
# - a **query**: what this position looks for;
# - a **key**: what it offers;
# - a **value**: what it passes on.
#
# The dot product of a query and a key is their score. Here is one by hand, then all at once:

# %%
D = 4  # small enough to read; the model will have D = 32
to_query, to_key, to_value = (nn.Linear(C, D, bias=False) for _ in range(3))
with torch.no_grad():
    query, key, value = to_query(x), to_key(x), to_value(x)  # (B, T, D) each
print("query of position 5:", query[0, 5])
print("key of position 2:  ", key[0, 2])

by_hand = sum(query[0, 5, d] * key[0, 2, d] for d in range(D))
scores = query @ key.transpose(1, 2)  # (B, T, T)
print(f"their score: {by_hand:.3f} by hand, {scores[0, 5, 2]:.3f} in scores, {tuple(scores.shape)}")
assert torch.isclose(by_hand, scores[0, 5, 2])

# %% [markdown]
# Softmax turns scores into **attention weights**. The output averages the values, not `x`:
#
# $$w_{ts} = \underset{s \le t}{\text{softmax}} \; \frac{q_t \cdot k_s}{\sqrt{D}}
# \qquad \text{out}_t = \sum_{s \le t} w_{ts} \, v_s$$
#
# ### Exercise 2 · A causal head
#
# Compute these outputs from queries, keys and values. The next section explains √D.


# %% tags=["exercise"]
def causal_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # scores, (B, T, T)
    # weights, (B, T, T)
    # the output, (B, T, size of a value)
    return ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    torch.manual_seed(1)
    query, key = torch.randn(2, 3, 7, 9)  # B = 3, T = 7, D = 9
    one_hot = torch.eye(7).expand(3, 7, 7)  # with these values, the output is the weights
    answer = given(causal_head(query, key, one_hot))
    assert tuple(answer.shape) == (3, 7, 7), f"its shape is {tuple(answer.shape)}, not (3, 7, 7)"
    assert not answer.isnan().any(), "there are NaNs in it"
    assert not answer.triu(1).any(), "a position attends to its future"
    total = answer[1, 2].sum().item()
    assert abs(total - 1) < 1e-5, f"the weights of a query sum to {total:.2f}, not to 1"
    gap = (answer[0, 6, 0] / answer[0, 6, 1]).log()  # between two scores
    ratio = gap / (query[0, 6] @ (key[0, 0] - key[0, 1]))
    assert ratio > 0, "row t of the scores must belong to query t"
    assert abs(ratio - 1 / 3) < 1e-3, f"at D = 9 the dot products are multiplied by {ratio:.2f}"
    wanted = F.scaled_dot_product_attention(query, key, query, is_causal=True)
    assert torch.allclose(causal_head(query, key, query), wanted, atol=1e-5), "other values: wrong"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def causal_head(query, key, value):
#     B, T, D = query.shape
#     scores = query @ key.transpose(1, 2) * D**-0.5  # (B, T, T)
#     past = torch.ones(T, T, dtype=torch.bool).tril()
#     weights = F.softmax(scores.masked_fill(~past, float("-inf")), dim=-1)
#     return weights @ value
# ```
#
# </details>
#
# The script's `Head` is the same computation as a module. Its mask is a **buffer**: it moves to the
# GPU with the model, but it is not trained. `[:T, :T]` crops the mask for shorter inputs.


# %%
class Head(nn.Module):
    """One head of causal self-attention, with queries, keys and values of size D."""

    def __init__(self, config: Config, head_size: int) -> None:
        super().__init__()
        # No biases, as in the lecture; a key bias would cancel in softmax anyway.
        self.query = nn.Linear(config.n_embd, head_size, bias=False)
        self.key = nn.Linear(config.n_embd, head_size, bias=False)
        self.value = nn.Linear(config.n_embd, head_size, bias=False)
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()  # (T, T)
        self.register_buffer("causal_mask", mask, persistent=False)  # a constant: not saved

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        query = self.query(x)  # (B, T, D)
        key = self.key(x)  # (B, T, D)
        value = self.value(x)  # (B, T, D)
        # The variance of q·k grows with D; dividing by √D keeps softmax from saturating.
        scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5  # (B, T, T)
        scores = scores.masked_fill(~self.causal_mask[:T, :T], float("-inf"))
        weights = F.softmax(scores, dim=-1)  # attention weights: each row sums to 1
        return weights @ value  # (B, T, D)


head = Head(config, D)
head.query, head.key, head.value = to_query, to_key, to_value
from_torch = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # (B, T, D)
assert torch.allclose(head(x), from_torch, atol=1e-5)  # PyTorch's own function agrees

# %% [markdown]
# ## Why divide by √D?
#
# **Variance** is the mean squared distance from the mean; its root is the standard deviation.
# Variances of independent numbers add up. Multiplying a number by c multiplies its variance by c².
#
# Suppose that all components of queries and keys are independent, with mean 0 and variance 1. Then
# each product has variance 1, and `q·k` adds up `D` of them.
#
# **Predict before you run:** what is the standard deviation of `q·k` at `D` = 64?

# %%
guess = ...  # a number


# %% tags=["prediction"]
def random_scores(size: int) -> Tensor:
    """The scores of 1,000 random queries, each with 8 random keys."""
    queries, keys = torch.randn(1000, 1, size), torch.randn(1000, 8, size)
    return (queries * keys).sum(dim=-1)  # (1000, 8)


torch.manual_seed(1)
reveal(guess, random_scores(64).std(), within=0.5)

# %%
sizes = [2**i for i in range(1, 11)]
figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.3))
for name, color, power in (("q·k", ORANGE, 0), ("q·k / √D", BLUE, -0.5)):
    scores = [random_scores(size) * size**power for size in sizes]
    deviations = [each.std().item() for each in scores]
    largest = [F.softmax(each, dim=-1).amax(dim=-1).mean().item() for each in scores]
    for panel, line in zip(axes, (deviations, largest), strict=True):
        panel.plot(sizes, line, color=color, marker="o", markersize=4)
        end = (sizes[-1], line[-1])
        panel.annotate(name, end, (-4, 8), textcoords="offset points", color=color, ha="right")
        panel.set_xscale("log", base=2)
axes[0].set(xlabel="D, the size of a query", ylabel="standard deviation of the scores")
axes[1].set(xlabel="D, the size of a query", ylabel="mean of the largest weight", ylim=(0, 1.1))
plt.show()

# %% [markdown]
# `q·k` has variance `D`, so its standard deviation is √D. At large `D`, one weight is close to 1:
# softmax **saturates**. The derivative of a weight with respect to its own score, `w(1 − w)`, is
# then close to 0, so queries and keys hardly learn. Divided by √D, scores have standard deviation 1
# at any `D`.
#
# ## The model
#
# The model adds the embeddings, applies one head with `D` = `C`, and maps the result to logits.
# Training takes about 10 seconds on two cores.


# %%
class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.attention = Head(config, config.n_embd)
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


# %%
def train(model: nn.Module, learning_rate: float) -> list[tuple[int, float]]:
    """The script's training; returns pairs of a step and its validation loss."""
    last = steps(config.max_iters)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    curve = []
    for step in range(1, last + 1):
        idx, targets = draw_batch(corpus.train, T, config.batch_size, generator)  # (B, T) each
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (50, 100, 200, 500, 1000, 2000, 3000, 4000, last):
            curve.append((step, exact_loss(model, corpus.validation)))
    return curve


torch.manual_seed(1)
model = Model(config)
untrained = deepcopy(model)
curves = {
    "bigram": train(BigramModel(config), learning_rate=1e-2),
    "one head": train(model, config.learning_rate),
}
for name, curve in curves.items():
    print(f"{name:9} validation loss {curve[-1][1]:.3f}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.4))
for (name, curve), color in zip(curves.items(), (ORANGE, BLUE), strict=True):
    axes.plot(*zip(*curve, strict=True), color=color, marker="o", markersize=4)
    axes.annotate(name, curve[-1], (7, 0), textcoords="offset points", color=color, va="center")
lowest = min(loss for curve in curves.values() for _, loss in curve)
axes.set(xscale="log", ylim=(lowest - 0.05, lowest + 0.9))
axes.set(xlabel="training step", ylabel="validation loss\n(nats per character)")
plt.show()

# %% [markdown]
# ## Look inside
#
# `Head` does not return its attention weights, so this cell computes them again: for one text, then
# averaged over the validation text, for queries at the last position, which see all eight
# characters.


# %%
@torch.no_grad()
def weights_of(model: nn.Module, idx: Tensor) -> Tensor:
    head, T = model.attention, idx.shape[1]
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(T))  # (B, T, C)
    scores = head.query(x) @ head.key(x).transpose(1, 2) * C**-0.5  # (B, T, T); D = C
    return F.softmax(scores.masked_fill(~head.causal_mask[:T, :T], float("-inf")), dim=-1)


def show_maps(models: dict[str, nn.Module]) -> None:
    """Attention weights in the text "to be or", masked positions left blank."""
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.5))
    for panel, (title, each) in zip(axes, models.items(), strict=True):
        weights = weights_of(each, idx)[0].masked_fill(~each.attention.causal_mask, float("nan"))
        heat_map(panel, weights, names, names, title, vmin=0, vmax=1)
        panel.set(xlabel="key position", ylabel="query position")
    figure.colorbar(axes[0].images[0], ax=axes, label="attention weight", shrink=0.8)
    plt.show()


show_maps({"untrained": untrained, "trained": model})

windows = corpus.validation.unfold(0, T, T)  # (N, T)
by_distance = weights_of(model, windows)[:, -1].mean(dim=0).flip(0)  # (T)
figure, axes = plt.subplots(figsize=(6, 3))
axes.bar(range(T), by_distance, color=BLUE)
for distance, weight in enumerate(by_distance.tolist()):
    axes.text(distance, weight, f"{weight:.2f}", ha="center", va="bottom")
axes.set(xlabel="distance, in characters back", ylabel="mean attention weight", xticks=range(T))
plt.show()

# %% [markdown]
# Before training, attention is diffuse. Afterward, most of the weight stays on the position itself,
# and most of the rest goes one character back.
#
# ### Exercise 3 · A window
#
# How far back does this head look? Return a `bool` mask, `(T, T)`, that is `True` for the last `W`
# positions up to the query's own. The check then prints the trained model's loss for several `W`.


# %% tags=["exercise"]
def window_mask(T: int, W: int) -> Tensor:
    # the queries' positions, (T, 1)
    # the keys' positions, (1, T)
    # compare them, (T, T)
    return ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    mask = given(window_mask(8, 3))
    assert tuple(mask.shape) == (8, 8), f"its shape is {tuple(mask.shape)}, not (8, 8)"
    assert mask.dtype == torch.bool, f"its dtype is {mask.dtype}, not torch.bool"
    assert not mask.triu(1).any(), "a query sees its future"
    for t, count in enumerate(mask.sum(dim=1).tolist()):
        wanted = min(t + 1, 3)
        assert count == wanted, f"with W = 3, query {t} sees {count} positions, not {wanted}"
    assert mask[7, 5:].all(), "query 7 sees three positions, but not the last three"
    short = deepcopy(model)
    for W in (1, 2, 4, 8):
        short.attention.causal_mask.copy_(window_mask(T, W))
        print(f"W = {W}: validation loss {exact_loss(short, corpus.validation):.3f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def window_mask(T, W):
#     query_position = torch.arange(T)[:, None]
#     key_position = torch.arange(T)[None, :]
#     distance = query_position - key_position  # (T, T)
#     return (distance >= 0) & (distance < W)
# ```
#
# At `W` = 1 the head does worse than the bigram. One more character recovers most of the
# improvement, and `W` = 4 is as good as 8.
#
# </details>
#
# ## Break it: no mask
#
# Now every position sees the whole block, the future included.
#
# **Predict before you run:** will the validation loss be above 2, between 1 and 2, or below 1? The
# masked head reached about 2.39. Training takes about 5 seconds.

# %%
guess = ...  # "above 2", "between" or "below 1"

# %% tags=["prediction"]
torch.manual_seed(1)
unmasked = Model(config)
unmasked.attention.causal_mask.fill_(True)
unmasked_loss = train(unmasked, config.learning_rate)[-1][1]
reveal(guess, "above 2" if unmasked_loss > 2 else "between" if unmasked_loss > 1 else "below 1")

# %%
show_maps({"causal mask": model, "no mask": unmasked})
for name, each, loss in (
    ("causal mask", model, curves["one head"][-1][1]),
    ("no mask", unmasked, unmasked_loss),
):
    sample = "".join(generate(each, tokenizer, length=150)).strip()
    print(f"--- {name}, loss {loss:.2f}:", sample, sep="\n")

# %% [markdown]
# The loss is far lower, but the model is useless. Each position attends to the next one, which *is*
# the character that it has to predict. The last position has nothing to copy, and sampling uses
# only that one. If a loss is too good to be true, look for such a **leak**.
#
# ## Break it: no positions
#
# Position embeddings fixed at 0 leave the head with a bag of characters (5 seconds):

# %%
torch.manual_seed(1)
no_positions = Model(config)
nn.init.zeros_(no_positions.position_embedding.weight).requires_grad_(False)
curves["no positions"] = train(no_positions, config.learning_rate)
for name, curve in curves.items():
    print(f"{name:12} validation loss {curve[-1][1]:.3f}")

# %% [markdown]
# More than half of the improvement over the bigram is gone. The head still knows which characters
# came before, but not in what order.
#
# ## Six notes on attention
#
# These notes follow the lecture, except NoPE.
#
# **1 · Attention is communication on a directed graph.** The positions are nodes. Each node
# receives a weighted sum of messages, the values, along its incoming edges.

# %%
with torch.no_grad():
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(T))  # (B, T, C)
    weights, value = weights_of(model, idx)[0], model.attention.value(x)[0]  # (T, T), (T, C)
    received = torch.zeros(T, C)  # messages, added up edge by edge
    for t in range(T):
        for s in range(t + 1):  # an edge from s to t
            received[t] += weights[t, s] * value[s]
    gap = (received - model.attention(x)[0]).abs().max().item()
    assert gap < 1e-5
    print(f"the sums differ from the head's output by at most {gap:.0e}")

figure, axes = plt.subplots(figsize=(7.5, 2.5))
for t in range(T):
    for s in range(t):
        style = {"color": BLUE, "alpha": 0.9} if t == T - 1 else {"color": GRAY, "alpha": 0.4}
        style |= {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=-0.45"}
        style |= {"linewidth": 0.5 + 8 * weights[t, s].item(), "shrinkA": 12, "shrinkB": 12}
        axes.annotate("", (t, 0), (s, 0), arrowprops=style)
for t, name in enumerate(names):
    axes.text(t, 0, name, ha="center", va="center", bbox={"boxstyle": "circle", "fc": "w"})
axes.set(xlim=(-0.5, T - 0.5), ylim=(-0.4, 1.7))
axes.axis("off")
axes.set_title("line width: attention weight; blue: what the last position receives", fontsize=11)
plt.show()

# %% [markdown]
# **2 · It has no notion of space.** A node receives a *set* of messages, so one head needs position
# embeddings to know their order. Stacked causal layers can infer positions from the mask ("NoPE"),
# because each position sees a different number of others. Here there are no position embeddings,
# and the first seven characters are reversed. The last output changes only in two layers *with* a
# mask.

# %%
reversed_idx = torch.cat([idx[:, :-1].flip(1), idx[:, -1:]], dim=1)  # (B, T)
print("".join(names), "->", "".join(visible(tokenizer.decode(reversed_idx[0].tolist()))))
torch.manual_seed(1)
for layers in (1, 2):
    for mask in ("causal mask", "no mask"):
        stack = nn.Sequential(*(Head(config, C) for _ in range(layers)))
        for layer in stack if mask == "no mask" else ():
            layer.causal_mask.fill_(True)
        with torch.no_grad():
            ends = [stack(model.token_embedding(each))[:, -1] for each in (idx, reversed_idx)]
        change = (ends[0] - ends[1]).abs().max()
        print(f"layers: {layers}, {mask + ':':12} changes by {change:.6f}")

# %% [markdown]
# **3 · Nothing crosses the batch.** Each row is a graph of its own. Here position 3 of row 1
# changes: row 0 stays the same, and row 1 changes from there on.

# %%
changed = idx.clone()  # (B, T)
changed[1, 3] = tokenizer.encode("e")[0]
with torch.no_grad():
    difference = (model(changed)[0] - model(idx)[0]).abs().amax(dim=-1)  # (B, T)
for row, each in enumerate((difference > 1e-5).int().tolist()):
    print(f"row {row}, changed outputs:", *each)

# %% [markdown]
# **4 · The mask is a choice.** A **decoder block** has the causal mask and can generate text. An
# **encoder block** has none and suits complete texts, for instance to classify them.
#
# **5 · Self or cross.** In **self-attention**, queries, keys and values come from the same
# sequence. In **cross-attention**, keys and values come from another one, such as the text to
# translate (here 3 random vectors).

# %%
print("positions that each query sees")
print("decoder:", *model.attention.causal_mask.sum(dim=1).tolist())
print("encoder:", *unmasked.attention.causal_mask.sum(dim=1).tolist())

other, attention = torch.randn(2, 3, C), model.attention  # (B, S, C)
with torch.no_grad():
    query, key, value = attention.query(x), attention.key(other), attention.value(other)
cross_weights = F.softmax(query @ key.transpose(1, 2) * C**-0.5, dim=-1)  # (B, T, S)
print("cross-attention: weights", tuple(cross_weights.shape), end=", ")
print("outputs", tuple((cross_weights @ value).shape))

# %% [markdown]
# **6 · Scaling by 1/√D** keeps softmax from saturating.
#
# ### Challenge · Exercise 4: a previous-token head
#
# Set a head's weights by hand so that each position from 1 on attends to the one before it with a
# weight above 0.99, whatever the characters are. Of the 32 channels, 0 to 23 hold a token
# embedding. Channel 24 + t is 1 at position t and 0 elsewhere.


# %% tags=["exercise"]
def previous_token_weights() -> tuple[Tensor, Tensor]:
    # query_weight and key_weight are (D, C) = (8, 32) each. nn.Linear(C, D) has such a weight and
    # computes x @ weight.T, so columns belong to inputs, rows to outputs.
    # What does the query of position t look for? What does the key of position s offer?
    return ...  # query_weight, key_weight


# %% tags=["check"]
@check
def exercise_4() -> None:
    answer = given(previous_token_weights())
    for name, each in zip(("query", "key"), answer, strict=True):
        assert tuple(each.shape) == (8, 32), f"the {name} weight's shape is {tuple(each.shape)}"
    torch.manual_seed(1)
    x = torch.cat([torch.randn(5, 8, 24), torch.eye(8).expand(5, 8, 8)], dim=-1)  # (B, T, C)
    by_hand = Head(Config(n_embd=32, block_size=8), 8)
    read_position = torch.eye(32)[24:]  # with these values, the output is the weights
    for layer, weight in zip((by_hand.query, by_hand.key), answer, strict=True):
        layer.weight = nn.Parameter(weight.float())
    by_hand.value.weight = nn.Parameter(read_position)
    weights = by_hand(x).detach()  # (B, T, T)
    assert torch.allclose(weights, weights[:1]), "the weights depend on the token embeddings"
    for t in range(1, 8):
        favorite, weight = weights[0, t].argmax().item(), weights[0, t, t - 1].item()
        assert favorite == t - 1, f"position {t} attends most to position {favorite}"
        assert weight > 0.99, f"position {t} attends to {t - 1} with a weight of only {weight:.3f}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def previous_token_weights():
#     query_weight, key_weight = torch.zeros(2, 8, 32)
#     key_weight[:, 24:] = torch.eye(8)  # "I am t"
#     query_weight[:7, 25:] = 30 * torch.eye(7)  # "I look for t - 1", with the score 30 / √8
#     return query_weight, key_weight
# ```
#
# </details>
#
# ### Challenge · Exercise 5: the backward pass by hand
#
# From `d_out`, the gradient of a loss with respect to a head's output, compute the gradients with
# respect to queries, keys and values. Work backward, one line per operation.


# %% tags=["exercise"]
def head_backward(query, key, value, weights, d_out) -> tuple[Tensor, Tensor, Tensor]:
    """`weights` are the attention weights, (B, T, T), of the forward pass."""
    # Two rules: if Y = A @ B, then dA = dY @ Bᵀ and dB = Aᵀ @ dY (the shapes allow nothing else).
    # If a value is used in several places, its gradients add up.

    # out = weights @ value
    # weights = softmax(scores): the derivative of w_s with respect to score_r is w_s (δ - w_r),
    # where δ is 1 if s = r, else 0. Each score affects all weights of its row.
    # scores = query @ keyᵀ / √D
    return ...  # d_query, d_key, d_value


# %% tags=["check"]
@check
def exercise_5() -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 6, 5, dtype=torch.float64)  # B = 2, T = 6, D = 5
    d_out = torch.randn(2, 6, 5, dtype=torch.float64)
    leaves = [each.requires_grad_() for each in (query.clone(), key.clone(), value.clone())]
    past = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = (leaves[0] @ leaves[1].transpose(1, 2) * 5**-0.5).masked_fill(~past, float("-inf"))
    weights = F.softmax(scores, dim=-1)  # (B, T, T)
    (weights @ leaves[2]).backward(d_out)
    answers = given(head_backward(query, key, value, weights.detach(), d_out))
    for name, answer, leaf in reversed([*zip(("dQ", "dK", "dV"), answers, leaves, strict=True)]):
        assert answer.shape == leaf.shape, f"the shape of {name} is {tuple(answer.shape)}"
        error = (answer - leaf.grad).abs().max().item()
        factor = ((answer * leaf.grad).sum() / leaf.grad.square().sum()).item()
        right_way = torch.allclose(answer, factor * leaf.grad)
        hint = f": it is {factor:.3f} times autograd's" if right_way else ""
        assert error < 1e-9, f"{name} is off by {error:.1e}{hint}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def head_backward(query, key, value, weights, d_out):
#     scale = query.shape[-1] ** -0.5
#     d_value = weights.transpose(1, 2) @ d_out
#     d_weights = d_out @ value.transpose(1, 2)
#     d_scores = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True))
#     d_query = d_scores @ key * scale
#     d_key = d_scores.transpose(1, 2) @ query * scale
#     return d_query, d_key, d_value
# ```
#
# The mask needs no line of its own: where a weight is 0, `d_scores` is 0.
#
# </details>
#
# ## Quiz
#
# 1. Why does the mask act on scores before softmax, not on weights after it?
#
# <details><summary>Answer</summary>
#
# If weights were zeroed after softmax, a row would no longer sum to 1, and the future would still
# have influenced it.
#
# </details>
#
# 2. The averaging matrix is the same for all rows of a batch. Why does attention have one for each?
#
# <details><summary>Answer</summary>
#
# The scores are computed from the characters, which differ from row to row.
#
# </details>
#
# 3. Why would a bias in the key layer change nothing?
#
# <details><summary>Answer</summary>
#
# It adds the same number to all scores of a query, and softmax ignores that.
#
# </details>
#
# 4. How many scores does a head compute for `T` = 8, and for twice that?
#
# <details><summary>Answer</summary>
#
# 64 and 256: the cost is quadratic in `T`.
#
# </details>
#
# 5. Your model reaches a validation loss of 0.5 and samples nonsense. What do you check first?
#
# <details><summary>Answer</summary>
#
# Whether a position can see its target: the mask, and the shift of the targets.
#
# </details>

# %% [markdown]
# ## The script
#
# `git diff --no-index bigram.py self_attention.py` shows what changes. `main` stays the same.
#
# ## Papers
#
# - Bahdanau et al. (2014), [Neural Machine Translation by Jointly Learning to Align and
#   Translate](https://arxiv.org/abs/1409.0473): attention, first as cross-attention.
# - Vaswani et al. (2017), [Attention Is All You Need](https://arxiv.org/abs/1706.03762).
# - Haviv et al. (2022), [Transformer Language Models without Positional Encodings Still Learn
#   Positional Information](https://arxiv.org/abs/2203.16634): NoPE.
#
# **Next →** [03_multihead_attention](03_multihead_attention.ipynb)
