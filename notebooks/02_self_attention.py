# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/character-gpt/course/blob/main/notebooks/02_self_attention.ipynb)
#
# The bigram table sees one character. Here each character gathers from all that came before it, and
# learns for itself where to look. After this notebook you can
#
# - average the past in three ways, with a loop, a matrix and a softmax, and show that they agree;
# - say what a query, a key and a value are, and compute a head of attention from them by hand;
# - explain the mask, and why the scores are divided by √D;
# - say what attention does not know: the order of what it hears, and the other rows of the batch;
# - train a model with one head, and read from its weights where it looks.
#
# Run each cell with shift-enter, from the top.

# %%
# In Colab this fetches the course. Everywhere it lets Python find the scripts.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("lesson.py"):
    subprocess.run(["git", "clone", "-q", "https://github.com/character-gpt/course"], check=True)
    os.chdir("course/notebooks")
sys.path.insert(0, "..")

# %%
from copy import deepcopy
from dataclasses import dataclass
from math import log

from trainer import Run
from common import LanguageModel, Tokenizer, draw_batch
from sample import generate
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GREY, ORANGE, check, given, heat_map, plt, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

# %%
corpus = open_corpus(None)
training, validation = corpus.train, corpus.validation
tokenizer = Tokenizer(corpus.vocabulary)
V = len(tokenizer.vocabulary)

B, T = 4, 8
idx, _ = draw_batch(training, T, B, torch.Generator().manual_seed(5))  # (B, T) both
names = [visible(tokenizer.decode(row.tolist())) for row in idx]
for row in names:
    print(" ".join(row))

# %% [markdown]
# These four blocks of eight characters stay with us. `names` has their characters as labels.
#
# ## The past, averaged
#
# Let each character be a vector of `C` numbers, its **channels**. For now they are drawn at random,
# one vector for each character of the vocabulary.

# %%
C = 6
vectors = torch.randn(V, C, generator=torch.Generator().manual_seed(1))  # (V, C)
x = vectors[idx]  # (B, T, C)
print(tuple(idx.shape), "->", tuple(x.shape))

# %% [markdown]
# Position `t` shall know what came before it. The plainest way: take the mean of all vectors from
# the first one to its own.
#
# $$\text{out}_t = \frac{1}{t + 1} \sum_{s=0}^{t} x_s$$

# %%
by_loop = torch.zeros(B, T, C)  # (B, T, C)
for b in range(B):
    for t in range(T):
        by_loop[b, t] = x[b, : t + 1].mean(dim=0)

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 4))
channels = [str(c) for c in range(C)]
for panel, values, title in zip(axes, (x, by_loop), ("x", "mean so far"), strict=True):
    heat_map(panel, values[0], names[0], channels, title, cmap="PuOr", vmin=-2, vmax=2)
    panel.set(xlabel="channel", ylabel="character, first on top")
figure.colorbar(panel.images[0], ax=axes, shrink=0.7)
plt.show()

# %% [markdown]
# The first row is the same on both sides: there is no past yet. Further down the colors fade,
# since vectors drawn at random partly cancel in a mean. Much is lost in it, and that is what
# attention will mend.
#
# ### As a matrix product
#
# A row of a matrix product is a weighted sum. So a matrix with the shares in it does the work of
# both loops: row `t` has $1/(t+1)$ up to column `t`, and 0 after it. `tril` keeps the lower
# triangle.

# %%
shares = torch.ones(T, T).tril()  # (T, T)
shares = shares / shares.sum(dim=1, keepdim=True)  # (T, T)
by_matrix = shares @ x  # (B, T, C)
print("largest difference from the loop:", f"{(by_matrix - by_loop).abs().max():.7f}")
assert torch.allclose(by_matrix, by_loop, atol=1e-6)


# %%
def number_map(axes: plt.Axes, values: Tensor, labels: list[str], title: str, **options) -> None:
    """A heat map with the number in each field; what is not finite stays white."""
    finite = values.masked_fill(values.isinf(), float("nan"))
    heat_map(axes, finite, labels, labels, title, **options)
    axes.tick_params(labelsize=13)
    shades = axes.images[0]
    for t, row in enumerate(values.tolist()):
        for s, value in enumerate(row):
            dark = sum(shades.cmap(shades.norm(value))[:3]) < 1.4 and abs(value) != float("inf")
            name = "-∞" if value == float("-inf") else f"{value:.2f}"
            axes.text(s, t, name, ha="center", va="center", size=8, color="w" if dark else "k")


figure, axes = plt.subplots(figsize=(4.6, 4.6))
number_map(axes, shares, names[0], "shares")
axes.set(xlabel="is heard", ylabel="hears")
plt.show()

# %% [markdown]
# Read a row: what this character takes from each. Every row adds up to 1, and right of the diagonal
# stands only 0, for there lies the future. `(T, T) @ (B, T, C)` does it for all `B` blocks at once,
# with the same matrix.
#
# ### With a softmax
#
# The third way looks roundabout. Begin with a **score** of 0 for each pair, set the scores of the
# future to minus infinity, and take the softmax of each row:
#
# $$w_{ts} = \frac{e^{\text{score}_{ts}}}{\sum_{r} e^{\text{score}_{tr}}}, \qquad e^{-\infty} = 0$$

# %%
past = torch.ones(T, T, dtype=torch.bool).tril()  # (T, T)
scores = torch.zeros(T, T)  # (T, T)
scores = scores.masked_fill(~past, float("-inf"))
by_softmax = F.softmax(scores, dim=-1) @ x  # (B, T, C)
print("largest difference from the matrix:", f"{(by_softmax - by_matrix).abs().max():.7f}")
assert torch.allclose(by_softmax, by_matrix, atol=1e-6)

# %% [markdown]
# **Predict before you run the next cell:** now the scores are no longer 0 but drawn at random. What
# stays as it was in the rows of the weights, and what changes?

# %%
scores = torch.randn(T, T, generator=torch.Generator().manual_seed(2))  # (T, T)
masked = scores.masked_fill(~past, float("-inf"))  # (T, T)
weights = F.softmax(masked, dim=-1)  # (T, T)

figure, axes = plt.subplots(1, 3, figsize=(12, 4.4))
limits = {"cmap": "PuOr", "vmin": -3, "vmax": 3}
number_map(axes[0], scores, names[0], "scores", **limits)
number_map(axes[1], masked, names[0], "masked", **limits)
number_map(axes[2], weights, names[0], "weights, after softmax")
print("the rows add up to", " ".join(f"{total:.2f}" for total in weights.sum(dim=-1)))
plt.show()

# %% [markdown]
# The future stays at 0 and each row still adds up to 1, but now a row prefers some characters to
# others. That is why the roundabout way is the good one: scores may be any numbers at all, so they
# can be *computed from the characters*. Attention is just this, with scores that are learned.
#
# ## What a character is, and where it stands
#
# A mean forgets the order. So each place in the block gets a vector as well, and the two are added:
# a **token embedding** says what stands there, a **position embedding** says where. Both are tables
# that training fills. From here on the sizes are those of `self_attention.py`.


# %%
@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 8  # T: context length, in characters
    n_embd: int = 32  # C: embedding dimension (channels per character)
    batch_size: int = 32  # B: sequences per training step
    max_iters: int = 5000  # training steps
    eval_interval: int = 500  # steps between evaluations
    learning_rate: float = 1e-3  # AdamW's step size; bigram.py's 1e-2 is too large for deep models


# %%
torch.manual_seed(1)
config = Config(vocab_size=V)
C = config.n_embd
what_embedding = nn.Embedding(V, C)
where_embedding = nn.Embedding(T, C)
what = what_embedding(idx).detach()  # (B, T, C)
where = where_embedding(torch.arange(T)).detach()  # (T, C)
x = what + where  # (B, T, C)
print(tuple(what.shape), "+", tuple(where.shape), "->", tuple(x.shape))

# %% [markdown]
# `(T, C)` is added to each of the `B` blocks: the place means the same in all of them. The picture
# shows the block with the fewest different characters.

# %%
b = min(range(B), key=lambda b: len(set(names[b])))
figure, axes = plt.subplots(3, 1, figsize=(8.5, 7.2))
titles = ("what (token embedding)", "where (position embedding)", "x, their sum")
for panel, values, title in zip(axes, (what[b], where, x[b]), titles, strict=True):
    labels = [str(t) for t in range(T)] if values is where else names[b]
    heat_map(panel, values, labels, [""] * C, title, cmap="PuOr", vmin=-3, vmax=3)
axes[2].set_xlabel(f"the {C} channels")
figure.colorbar(panel.images[0], ax=axes, shrink=0.4)
plt.show()

# %% [markdown]
# On top the same character has the same row, wherever it stands. In the sum no two rows are alike.
#
# ## Query, key, value
#
# Each position makes three vectors of `D` numbers from its `x`, by three matrices that are learned:
#
# - the **query**: what am I looking for?
# - the **key**: what do I have?
# - the **value**: what do I pass on to whoever listens?
#
# A score is the dot product of a query with a key: large where they point the same way.

# %%
D = 16
to_query, to_key, to_value = (nn.Linear(C, D, bias=False) for _ in range(3))
with torch.no_grad():
    query = to_query(x)  # (B, T, D)
    key = to_key(x)  # (B, T, D)
    value = to_value(x)  # (B, T, D)
print("x", tuple(x.shape), "-> query, key, value", tuple(query.shape))

# %% [markdown]
# One score, by hand: how much position 5 of block 0 likes what position 2 has. Then all of them at
# once: the matrix product takes each query with each key.

# %%
by_hand = sum(query[0, 5, d] * key[0, 2, d] for d in range(D))
scores = query @ key.transpose(1, 2)  # (B, T, T)
print(f"by hand {by_hand:.4f}, in the matrix {scores[0, 5, 2]:.4f}, of shape {tuple(scores.shape)}")

# %% [markdown]
# The rest you know: scale (the reason comes below), mask, softmax, weighted sum. But it is the
# values that are summed, not `x` itself.
#
# $$w_{ts} = \underset{s \le t}{\text{softmax}} \;
# \frac{\text{query}_t \cdot \text{key}_s}{\sqrt{D}} \qquad \text{out}_t = \sum_{s \le t} w_{ts} \,
# \text{value}_s$$

# %%
scores = scores * D**-0.5  # (B, T, T)
weights = F.softmax(scores.masked_fill(~past, float("-inf")), dim=-1)  # (B, T, T)
out = weights @ value  # (B, T, D)
print(tuple(weights.shape), "@", tuple(value.shape), "->", tuple(out.shape))

# %%
figure, axes = plt.subplots(1, B, figsize=(12, 3.4))
for b, panel in enumerate(axes):
    heat_map(panel, weights[b], names[b], names[b], f"block {b}", vmin=0, vmax=1)
    panel.set_xlabel("is heard")
axes[0].set_ylabel("hears")
figure.colorbar(panel.images[0], ax=axes, shrink=0.7, label="weight")
plt.show()

# %% [markdown]
# Before, one matrix of weights served all blocks. Now each block has its own, since the weights
# come from the characters. Nothing is trained yet, so what they prefer means nothing.
#
# As a class, this is the `Head` of the script. The mask is a **buffer**: it moves to the GPU with
# the model, but it is not a parameter. `[:T, :T]` cuts it for texts shorter than a block, as they
# occur in sampling.


# %%
class Head(nn.Module):
    """One head of causal self-attention, with queries, keys and values of size D."""

    def __init__(self, config: Config, head_size: int) -> None:
        super().__init__()
        # No biases: a key bias cancels in softmax, and a value bias only adds a constant.
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


# %% [markdown]
# With our three matrices in it, it must give what we had. PyTorch has a function of its own for the
# whole; it must agree as well.

# %%
head = Head(config, D)
head.query, head.key, head.value = to_query, to_key, to_value
from_torch = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # (B, T, D)
with torch.no_grad():
    print("Head differs by", f"{(head(x) - out).abs().max():.7f}")
    print("PyTorch differs by", f"{(from_torch - out).abs().max():.7f}")
    assert torch.allclose(head(x), out, atol=1e-5)
assert torch.allclose(from_torch, out, atol=1e-5)

# %% [markdown]
# ## Why divide by √D
#
# Say that the channels of queries and keys are independent, with mean 0 and spread (standard
# deviation) 1. A score adds up `D` products, and each adds 1 to the variance:
#
# $$\text{Var}(q \cdot k) = \sum_{d=1}^{D} \text{Var}(q_d \, k_d) = D$$
#
# So scores spread like √D. What does a softmax do with scores that are far apart?
#
# **Predict before you run the next cell:** a position hears eight characters. What do its weights
# look like at `D` = 4, and at `D` = 1024?

# %%
generator = torch.Generator().manual_seed(3)
figure, axes = plt.subplots(2, 3, figsize=(9, 4.6), sharex=True, sharey=True)
for (above, below), size in zip(axes.T, (4, 64, 1024), strict=True):
    one_query = torch.randn(size, generator=generator)
    eight_keys = torch.randn(8, size, generator=generator)
    dots = eight_keys @ one_query
    above.bar(range(8), F.softmax(dots, dim=-1), color=ORANGE)
    below.bar(range(8), F.softmax(dots * size**-0.5, dim=-1), color=BLUE)
    above.set(title=f"D = {size}", ylim=(0, 1))
    below.set(xlabel="character that is heard", xticks=range(8))
axes[0, 0].set_ylabel("weight,\nscores as they are", color=ORANGE)
axes[1, 0].set_ylabel("weight,\nscores divided by √D", color=BLUE)
plt.show()

# %% [markdown]
# Above, at 64 and at 1024, one character takes nearly everything. Below, the weights stay shared at
# any size. The same as a measurement, over a thousand queries for each `D`:
#
# - the spread of the scores;
# - how many characters are heard, $e^{\text{entropy}}$ with entropy $= -\sum_s w_s \ln w_s$: 8 if
#   all weights are equal, 1 if one takes all;
# - how far the weights still move when a score does, $\sum_s w_s (1 - w_s)$, the diagonal of the
#   softmax's derivative. Where that is 0, queries and keys learn nothing.

# %%
sizes = [2**i for i in range(11)]
measured = {"as they are": [], "divided by √D": []}
for size in sizes:
    queries = torch.randn(1000, 1, size, generator=generator)
    keys = torch.randn(1000, 8, size, generator=generator)
    dots = (queries * keys).sum(dim=-1)  # 1000 rows of 8 scores
    for way, scale in zip(measured, (1, size**-0.5), strict=True):
        w = F.softmax(dots * scale, dim=-1)
        heard = torch.exp(-torch.xlogy(w, w).sum(dim=-1)).mean()
        slope = (w * (1 - w)).sum(dim=-1).mean()
        measured[way].append(((dots * scale).std().item(), heard.item(), slope.item()))

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
titles = ("spread of the scores", "characters heard, of 8", "how far the weights move")
for way, color in zip(measured, (ORANGE, BLUE), strict=True):
    for panel, line, title in zip(axes, zip(*measured[way], strict=True), titles, strict=True):
        panel.semilogx(sizes, line, base=2, color=color, marker="o", markersize=4)
        panel.set(title=title, xlabel="D", ylim=(0, None))
    axes[1].annotate(way, (64, measured[way][6][1]), (64, measured[way][6][1] + 0.7), color=color)
axes[1].set_ylim(0, 8)
axes[2].set_ylim(0, 1)
plt.show()
for size, (spread, heard, slope) in zip(sizes, measured["as they are"], strict=True):
    if size in (16, 1024):
        print(f"D = {size:4}: spread {spread:5.2f}, heard {heard:.2f}, movement {slope:.2f}")

# %% [markdown]
# As they are, the scores spread like √D, about 4 at 16 and 32 at 1024, and the softmax becomes a
# choice of one that hardly moves. Divided by √D, all three stay nearly level, whatever the size of
# the head.
#
# ## A graph that passes messages
#
# Think of the positions as the nodes of a graph. An arrow goes from the one that speaks to the one
# that hears, and the weight says how loud. This picture has one block in it, with the weights of
# our head.

# %%
b = 0
figure, axes = plt.subplots(figsize=(10, 3.6))
for listener in range(T):
    for speaker in range(listener):
        last = listener == T - 1
        arrow = {
            "arrowstyle": "-|>",
            "connectionstyle": "arc3,rad=-0.5",
            "linewidth": 0.3 + 6 * weights[b, listener, speaker].item(),
            "color": BLUE if last else GREY,
            "alpha": 0.9 if last else 0.35,
            "shrinkA": 14,
            "shrinkB": 14,
        }
        axes.annotate("", (listener, 0), (speaker, 0), arrowprops=arrow)
for t, name in enumerate(names[b]):
    axes.text(t, 0, name, size=15, ha="center", va="center", bbox={"boxstyle": "circle", "fc": "w"})
    axes.text(t, -0.55, f"hears {t + 1}", size=10, ha="center", color=BLUE if t == T - 1 else GREY)
axes.set(xlim=(-0.5, T - 0.5), ylim=(-0.7, 1.7))
axes.axis("off")
plt.show()

# %% [markdown]
# All arrows go to the right: nobody hears the future. The last node hears all (in blue), the first
# one only itself; what a node hears of itself is not drawn. The thicker, the louder. Written as
# messages along the arrows, one by one, it is the same head:

# %%
received = torch.zeros(T, D)  # (T, D)
for listener in range(T):
    for speaker in range(listener + 1):
        received[listener] += weights[b, listener, speaker] * value[b, speaker]
assert torch.allclose(received, out[b], atol=1e-5)
print("the messages add up to the output of the head")

# %% [markdown]
# ## No notion of space
#
# A node hears a set of messages. Nothing says where they come from, unless the message itself does.
#
# **Predict before you run the next cell:** we turn the first seven characters around, and leave the
# last where it is. What becomes of the output at the last position, without position embeddings,
# and with them?

# %%
turned = torch.cat([idx[:, :-1].flip(1), idx[:, -1:]], dim=1)  # (B, T)
print(f"{''.join(names[0])} becomes {''.join(visible(tokenizer.decode(turned[0].tolist())))}")
with torch.no_grad():
    alone = [head(what_embedding(each))[:, -1] for each in (idx, turned)]  # (B, D) each
    placed = [head(what_embedding(each) + where)[:, -1] for each in (idx, turned)]  # (B, D) each
print(f"without positions the last output changes by {(alone[0] - alone[1]).abs().max():.6f}")
print(f"with positions it changes by                 {(placed[0] - placed[1]).abs().max():.6f}")
assert torch.allclose(*alone, atol=1e-5)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for panel, (before, after), title in zip(
    axes, (alone, placed), ("without positions", "with positions"), strict=True
):
    panel.bar(range(D), before[0], color=GREY, alpha=0.5)
    panel.plot(range(D), after[0], "o", color=ORANGE)
    panel.set(title=title, xlabel="channel of the last output", xticks=range(0, D, 3))
axes[0].set_ylabel("grey: as it was\norange: turned around")
plt.show()

# %% [markdown]
# On the left each dot sits on the end of its bar: to this head the two pasts are one and the same.
# On the right they part. The order is known only because the position embeddings tell it.
#
# ## Nothing crosses the batch
#
# The blocks of a batch are learned from together, but they are separate graphs: no arrow leads from
# one to another.
#
# **Predict:** we change one character, at place 3 of block 1. Which of the 32 outputs change?

# %%
changed = idx.clone()  # (B, T)
changed[1, 3] = (changed[1, 3] + 1) % V
with torch.no_grad():
    other = head(what_embedding(changed) + where)  # (B, T, D)
    change = (other - head(x)).norm(dim=-1)  # (B, T)

figure, axes = plt.subplots(figsize=(7.5, 3.4))
shades = axes.imshow(change, cmap="cividis")
for b in range(B):
    for t in range(T):
        bright = change[b, t] > change.max() / 2
        axes.text(t, b, names[b][t], ha="center", va="center", color="k" if bright else "w")
axes.add_patch(plt.Rectangle((2.5, 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=3))
axes.set(xlabel="t, place in the block", ylabel="b, which block", yticks=range(B))
figure.colorbar(shades, label="change of the output", shrink=0.8)
plt.show()
print("changed outputs in each block:", (change > 1e-6).sum(dim=1).tolist())

# %% [markdown]
# Only block 1, and in it only from place 3 on: no other row, and no earlier place. Both are what
# makes `B · T` examples out of one batch: none of them can look up its answer elsewhere.
#
# ## Masked or not, self or cross
#
# The mask is a choice. With it, attention is **causal**, as a model needs that writes from left to
# right. Without it everyone hears everyone; a model that reads a finished text, to tell its mood
# for instance, does that.
#
# Whom one listens to is a choice too. In **self**-attention queries, keys and values come from the
# same sequence. In **cross**-attention keys and values come from another one: a translator writes
# in one language and listens to a text in another. It may have another length; call it `S`.


# %%
@torch.no_grad()
def attend(
    listening: Tensor, speaking: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    query = to_query(listening)  # (B, T, D)
    key, value = to_key(speaking), to_value(speaking)  # (B, S, D) both
    scores = query @ key.transpose(1, 2) * D**-0.5  # (B, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1)  # (B, T, S)
    return weights, weights @ value  # (B, T, S) and (B, T, D)


few = x[:, :5]  # the first five of each block, so that the picture stays clear
S = 3
second, _ = draw_batch(training, S, B, torch.Generator().manual_seed(6))  # (B, S) both
memory = (what_embedding(second) + where_embedding(torch.arange(S))).detach()  # (B, S, C)
kinds = {
    "self, masked": attend(few, few, past[:5, :5]),
    "self, unmasked": attend(few, few),
    "cross": attend(few, memory),
}
for kind, (w, o) in kinds.items():
    print(f"{kind:15} weights {tuple(w.shape)}, output {tuple(o.shape)}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 2.6))
for panel, (kind, (w, _)) in zip(axes, kinds.items(), strict=True):
    other_text = visible(tokenizer.decode(second[0].tolist()))
    for s, name in enumerate(other_text if kind == "cross" else names[0][:5]):
        panel.text(s, 1.08, name, ha="center", color=ORANGE, size=13)
        for t in range(5):
            if w[0, t, s] > 0:
                panel.plot((s, t), (1, 0), color=GREY, linewidth=0.2 + 7 * w[0, t, s].item())
    for t in range(5):
        panel.text(t, -0.22, names[0][t], ha="center", color=BLUE, size=13)
    panel.set(title=kind, ylim=(-0.3, 1.3), xlim=(-0.5, 4.5))
    panel.axis("off")
axes[0].text(-0.4, 1.08, "speak", ha="right", color=ORANGE)
axes[0].text(-0.4, -0.22, "hear", ha="right", color=BLUE)
plt.show()

# %% [markdown]
# With the mask no line leads down to the left. Without it each of the five hears all five. In
# cross-attention the five hear three others. The computation is the same each time.
#
# ## The model
#
# Embed what and where, let the head gather, and turn its output into logits. Two tables, a head and
# a matrix stand where the bigram had one table. Here `D` is `C`.


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
torch.manual_seed(1)
model = Model(config)
untrained = deepcopy(model)  # to look at later
for name, parameter in model.named_parameters():
    print(f"{name:26} {str(tuple(parameter.shape)):9} {parameter.numel():5,} numbers")
print(f"{'together':36} {sum(each.numel() for each in model.parameters()):5,}")
print(f"the bigram table has {V * V:,}")

# %% [markdown]
# To compare with: the counted table of pairs from [the first notebook](01_bigram.ipynb).

# %%
pairs = torch.bincount(training[:-1] * V + training[1:], minlength=V * V).view(V, V) + 1  # (V, V)
counted = pairs / pairs.sum(dim=1, keepdim=True)  # (V, V)
bigram_loss = -counted.log()[validation[:-1], validation[1:]].mean().item()
print(f"pairs {bigram_loss:.3f}, untrained {exact_loss(model, validation):.3f}, ln V {log(V):.3f}")

# %% [markdown]
# **Predict:** the head sees up to eight characters, and the bigram one. After training, how far
# will its loss be below that of the pairs?
#
# The four lines are the same as ever.

# %%
generator = torch.Generator().manual_seed(1)
optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
history, evaluations = [], []
for step in range(steps(config.max_iters)):
    if step % steps(config.eval_interval) == 0:
        evaluations.append((step, exact_loss(model, validation)))
    idx, targets = draw_batch(training, config.block_size, config.batch_size, generator)
    logits, loss = model(idx, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(loss.item())
learned_loss = exact_loss(model, validation)
evaluations.append((step + 1, learned_loss))
print(f"validation loss: one head {learned_loss:.3f}, pairs {bigram_loss:.3f}")

# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
axes.plot(history, color=GREY, linewidth=0.5, alpha=0.6)
axes.plot(*zip(*evaluations, strict=True), color=BLUE, marker="o", linewidth=2)
axes.axhline(bigram_loss, color=ORANGE, linestyle="--")
axes.annotate("each batch", (len(history) * 0.2, max(history) - 1), color=GREY)
axes.annotate("validation", (len(history) * 0.12, 3.0), color=BLUE)
axes.annotate("pairs", (len(history) * 0.9, bigram_loss + 0.3), color=ORANGE)
axes.set(xlabel="training steps", ylabel="loss (nats per character)")
plt.show()

# %% [markdown]
# The blue line goes below the dashed one, but not far: the gain is less than a tenth of a nat.
# Where does it come from?
#
# At the first place of a block there is nothing to hear but oneself. The further to the right, the
# more there is. Here is the validation loss for each place.

# %%
windows = validation.unfold(0, T + 1, T)  # blocks, each with the character after it


@torch.no_grad()
def loss_by_place(model: nn.Module) -> Tensor:
    logits, _ = model(windows[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(-1, T).mean(dim=0)  # (T)


by_place = loss_by_place(model)  # (T)
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.plot(range(T), by_place, color=BLUE, marker="o")
axes.axhline(bigram_loss, color=ORANGE, linestyle="--")
axes.annotate("pairs", (T - 2, bigram_loss + 0.005), color=ORANGE)
axes.annotate("one head", (T - 2, by_place[-2] + 0.015), color=BLUE)
axes.set(xlabel="t, place in the block", ylabel="validation loss")
plt.show()
print(" ".join(f"{each:.3f}" for each in by_place))

# %% [markdown]
# At place 0 the head is worse than the pairs: it sees no more than they do, and has to serve all
# eight places with the same three matrices. One character of past makes up for that, a second one
# helps again. What lies further back hardly matters to this model. Its weights will show the same.
#
# ## Where it looks
#
# The weights are computed inside `Head.forward` and not returned. Its own layers give them again.


# %%
@torch.no_grad()
def weights_of(model: nn.Module, idx: Tensor) -> Tensor:
    B, T = idx.shape
    head = model.attention
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(T))  # (B, T, C)
    scores = head.query(x) @ head.key(x).transpose(1, 2)  # (B, T, T)
    scores = scores * head.key.out_features**-0.5  # (B, T, T)
    return F.softmax(scores.masked_fill(~head.causal_mask[:T, :T], float("-inf")), dim=-1)


# %% [markdown]
# Here is a real line of the validation text. The head sees eight characters, so each row shows what
# a character takes from itself and the seven before it: the last row of the weights in the block
# that ends there.

# %%
lines = tokenizer.decode(validation[:20_000].tolist()).split("\n")[1:]
line = next((each for each in lines if 28 <= len(each) <= 36), "".join(lines)[:32])
numbers = torch.tensor(tokenizer.encode(line))
ending_here = numbers.unfold(0, T, 1)  # one block for each character from the eighth on
bands = []
for each in (untrained, model):
    band = torch.zeros(len(line), len(line))
    band[:T, :T] = weights_of(each, numbers[None, :T])[0]
    for t, row in enumerate(weights_of(each, ending_here)[:, -1], start=T - 1):
        band[t, t - T + 1 : t + 1] = row
    bands.append(band)

# %%
figure, axes = plt.subplots(1, 2, figsize=(14, 7))
for panel, band, title in zip(axes, bands, ("untrained", "trained"), strict=True):
    heat_map(panel, band, visible(line), visible(line), title, vmin=0, vmax=1)
    panel.set(xlabel="is heard", ylabel="hears")
figure.colorbar(panel.images[0], ax=axes, shrink=0.5, label="weight")
plt.show()

# %% [markdown]
# Untrained, the weight is strewn over all that can be heard. Trained, it has gathered near the
# diagonal: most characters take most from themselves, and nearly all of the rest from the one or
# two before.
# How much that is differs from character to character. Here is the mean over the whole validation
# text, at the last place of each block.

# %%
rows = weights_of(model, windows[:, :-1])[:, -1]  # one row of T weights for each block
ending = windows[:, T - 1]  # and the character that it belongs to
by_distance = rows.mean(dim=0).flip(0)  # (T)
common = ending.bincount(minlength=V).topk(min(25, V)).indices
by_character = torch.stack([rows[ending == i].mean(dim=0) for i in common])
order = by_character[:, -1].argsort()
common, by_character = common[order], by_character[order]
print("characters back: weight  ", end="")
print("  ".join(f"{back}: {weight:.3f}" for back, weight in enumerate(by_distance)))

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), width_ratios=(1, 2))
colors = [BLUE, ORANGE] + [GREY] * (T - 2)
axes[0].bar(range(T), by_distance, color=colors)
axes[0].set(xlabel="how many characters back", ylabel="mean weight", title="all characters")
axes[0].set_xticks(range(T))
bottom = torch.zeros(len(common))
for back, color in enumerate(colors):
    axes[1].bar(range(len(common)), by_character[:, -1 - back], bottom=bottom, color=color)
    bottom += by_character[:, -1 - back]
axes[1].set_xticks(range(len(common)), visible(tokenizer.decode(common.tolist())))
axes[1].set(xlabel="character that hears", title="the most frequent ones", ylim=(0, 1))
for height, text, color in zip(
    (0.75, 0.65, 0.55), ("itself", "one back", "further"), colors, strict=False
):
    axes[0].text(T - 1, height, text, color=color, ha="right")
plt.show()

# %% [markdown]
# About four fifths of the weight stay with the character itself, and most of the rest goes one
# back. So this head is a table of pairs that also glances at the character before. On the right,
# the further to the left a character stands, the more it takes from the others. An `I` may be a
# word or part of a name in capitals, and only what stood before it tells which. A comma hardly
# listens: whatever stood before it, nearly always a space or a new line follows.
#
# ## Without the mask
#
# What if everyone hears everyone in training? All that it takes is a mask that is `True`
# everywhere.
#
# **Predict before you run the next cell:** will the loss be higher or lower than with the mask?

# %%
torch.manual_seed(1)
unmasked = Model(config)
unmasked.attention.causal_mask.fill_(True)
generator = torch.Generator().manual_seed(1)
optimizer = torch.optim.AdamW(unmasked.parameters(), lr=config.learning_rate, fused=True)
for _ in range(steps(config.max_iters)):
    idx, targets = draw_batch(training, config.block_size, config.batch_size, generator)
    logits, loss = unmasked(idx, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"unmasked {exact_loss(unmasked, validation):.3f}, masked {learned_loss:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
for panel, each, title in zip(axes, (model, unmasked), ("masked", "unmasked"), strict=True):
    heat_map(panel, weights_of(each, numbers[None, :T])[0], visible(line[:T]), visible(line[:T]))
    panel.set(title=title, xlabel="is heard", ylabel="hears")
plt.show()

# %% [markdown]
# Much lower, and worth nothing. The bright line stands one step right of the diagonal: each
# position listens to the next character, which is the very one that it has to predict. Only the
# last one has nobody to copy from.

# %%
for each, name in ((model, "masked"), (unmasked, "unmasked")):
    print(f"{name:8}", " ".join(f"{loss:5.2f}" for loss in loss_by_place(each)))

# %% [markdown]
# In sampling it is always the last position that counts. So look at what the two of them write.

# %%
for each, name in ((model, "masked"), (unmasked, "unmasked")):
    sample = "".join(generate(each, tokenizer, length=200)).strip()
    print(f"--- {name}\n{sample}")

# %% [markdown]
# The masked one writes pieces of words. The other one gets stuck in a letter or two: it has learned
# to copy, and there is nothing to copy yet. A loss that is too good to be true is most often a leak
# like this.
#
# ## The script
#
# `self_attention.py` is the three classes above and this function, the same as in `bigram.py`.


# %%
def main() -> None:
    run = Run(Config)
    model = Model(run.config).to(run.device)
    # fused: one kernel updates all parameters
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.config.learning_rate, fused=True)
    for idx, targets in run.batches(model, optimizer):  # (B, T) each; targets are shifted by one
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss)
    run.finish()


# %% [markdown]
# ## Exercises
#
# Fill in a cell, run it, then run the one below: it says whether the answer is right, or what is
# off. A solution is folded under each.
#
# ### 1 · A past that fades
#
# Return the weights matrix, `(T, T)`, of a mean in which each further step back counts half as
# much: in a row the weights go like 1 for oneself, ½ for the character before, ¼ for the one before
# that, and add up to 1. The future gets 0.


# %% tags=["exercise"]
def fading_weights(T: int) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    answer = given(fading_weights(6))
    assert tuple(answer.shape) == (6, 6), f"its shape is {tuple(answer.shape)}, not (6, 6)"
    assert not answer.triu(1).any(), "there is weight right of the diagonal: that is the future"
    for t, total in enumerate(answer.sum(dim=1).tolist()):
        assert abs(total - 1) < 1e-5, f"row {t} adds up to {total:.3f}, not 1"
    ratio = (answer[5, 5] / answer[5, 4]).item()
    assert abs(ratio - 2) < 1e-4, f"oneself counts {ratio:.2f} times the one before, not 2 times"
    assert abs(answer[5, 5] / answer[5, 3] - 4) < 1e-4, "two steps back must count a quarter"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def fading_weights(T: int) -> Tensor:
#     places = torch.arange(T)
#     steps_back = places[:, None] - places[None, :]  # (T, T)
#     scores = (-log(2) * steps_back).masked_fill(steps_back < 0, float("-inf"))  # (T, T)
#     return F.softmax(scores, dim=-1)  # (T, T)
# ```
#
# A score that falls by ln 2 halves the weight. To divide `0.5**steps_back`, cut off by `tril`, by
# the sum of its rows is as good.
#
# </details>
#
# ### 2 · The head itself
#
# From given queries and keys, `(B, T, D)` both, and values, which may have another width, return
# what a causal head gives.


# %% tags=["exercise"]
def causal_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    torch.manual_seed(1)
    query, key = torch.randn(2, 3, 7, 9)  # B = 3, T = 7, D = 9
    one_hot = torch.eye(7).expand(3, 7, 7)  # with these values the output is the weights
    answer = given(causal_head(query, key, one_hot))
    assert tuple(answer.shape) == (3, 7, 7), f"its shape is {tuple(answer.shape)}"
    assert not answer.triu(1).any(), "a position hears one that comes after it"
    total = answer[1, 2].sum().item()
    assert abs(total - 1) < 1e-5, f"weights add up to {total:.2f}, not 1: softmax over which dim?"
    gap = (answer[0, 6, 0] / answer[0, 6, 1]).log()  # of two scores
    ratio = gap / (query[0, 6] @ (key[0, 0] - key[0, 1]))
    assert ratio > 0, "scores have the wrong order: position t asks, so its query makes row t"
    assert abs(ratio - 1 / 3) < 1e-3, f"with D = 9 scores are multiplied by {ratio:.2f}, not by 1/3"
    wanted = F.scaled_dot_product_attention(query, key, query, is_causal=True)
    assert torch.allclose(causal_head(query, key, query), wanted, atol=1e-5), "off for other values"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def causal_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
#     B, T, D = query.shape
#     scores = query @ key.transpose(1, 2) * D**-0.5  # (B, T, T)
#     past = torch.ones(T, T, dtype=torch.bool).tril()  # (T, T)
#     scores = scores.masked_fill(~past, float("-inf"))
#     return F.softmax(scores, dim=-1) @ value
# ```
#
# </details>
#
# ### 3 · Listen to another text
#
# Cross-attention: queries and keys have D channels, `(B, T, D)` and `(B, S, D)`; keys and values
# come from other texts, and values may have another width. These texts were of different lengths,
# so the shorter ones are filled up. `present`, `(B, S)`, is `False` where there is only filling,
# and nobody may hear that. There is no other mask.


# %% tags=["exercise"]
def cross_attention(query: Tensor, key: Tensor, value: Tensor, present: Tensor) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    torch.manual_seed(1)
    query, key = torch.randn(2, 4, 8), torch.randn(2, 6, 8)  # B = 2, T = 4, S = 6, D = 8
    present = torch.arange(6) < torch.tensor([[6], [3]])  # the second text has three characters
    one_hot = torch.eye(6).expand(2, 6, 6)  # with these values the output is the weights
    answer = given(cross_attention(query, key, one_hot, present))
    assert tuple(answer.shape) == (2, 4, 6), f"its shape is {tuple(answer.shape)}, not (2, 4, 6)"
    filling = answer[1, :, 3:].sum(dim=-1).max().item()
    assert filling == 0, (
        f"the filling gets {filling:.2f} of the weight: a score of 0 is not silence"
    )
    total = answer[1, 0].sum().item()
    assert abs(total - 1) < 1e-5, f"weights add up to {total:.2f}, not 1: mask before the softmax"
    assert answer[0].all(), "in the first text all six are present, and each may be heard"
    wanted = F.scaled_dot_product_attention(query, key, one_hot, present[:, None])
    assert torch.allclose(answer, wanted, atol=1e-5), "the weights are off: divided by √D?"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cross_attention(query: Tensor, key: Tensor, value: Tensor, present: Tensor) -> Tensor:
#     scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5  # (B, T, S)
#     scores = scores.masked_fill(~present[:, None, :], float("-inf"))
#     return F.softmax(scores, dim=-1) @ value
# ```
#
# </details>
#
# ### 4 · A short memory
#
# Make a mask, `(T, T)`, of `bool`: `True` where a position may hear, that is itself and those just
# before it, `W` characters in all (fewer at the beginning). The check puts it into the trained
# model and measures what each `W` costs.


# %% tags=["exercise"]
def window_mask(T: int, W: int) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    mask = given(window_mask(8, 3))
    assert tuple(mask.shape) == (8, 8), f"its shape is {tuple(mask.shape)}, not (8, 8)"
    assert mask.dtype == torch.bool, f"it holds {mask.dtype}, not bool"
    assert mask.diagonal().all(), "each position must hear itself"
    assert not mask.triu(1).any(), "a position hears one that comes after it"
    for t, count in enumerate(mask.sum(dim=1).tolist()):
        wanted = min(t + 1, 3)
        assert count == wanted, f"with W = 3 position {t} hears {count} characters, not {wanted}"
    assert mask[7, 5:].all(), "the last W characters are the ones to hear"
    short = deepcopy(model)
    for W in (1, 2, 4, 8):
        short.attention.causal_mask.copy_(window_mask(T, W))
        print(f"W = {W}: validation loss {exact_loss(short, validation):.3f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def window_mask(T: int, W: int) -> Tensor:
#     places = torch.arange(T)
#     steps_back = places[:, None] - places[None, :]  # (T, T)
#     return (steps_back >= 0) & (steps_back < W)
# ```
#
# Alone with itself the head loses all that it gained. One character of past brings most of it back,
# and with four it is as good as with eight. A single head asks a single question, and that one is
# answered nearby. In [the next notebook](03_multihead_attention.ipynb) there are several.
#
# </details>
