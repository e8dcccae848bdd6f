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
# # 4 · Feed-forward
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/character-gpt/course/blob/main/notebooks/04_feed_forward.ipynb)
#
# Attention lets the positions talk. Now each one gets something to think with. After this notebook
# you can
#
# - say what an average cannot answer, and what a bend adds to it;
# - show that the feed-forward network treats every position by itself;
# - say where most of the parameters are, and what the four-fold width is for;
# - look at hidden units: when they are silent, what wakes them, what they say then;
# - explain why two linear layers without a bend are only one;
# - say at which point of the pipeline the loss falls.
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from trainer import Divides, Run
from common import LanguageModel, Tokenizer, draw_batch
from sample import generate
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GREY, ORANGE, check, given, heat_map, plt, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

# %% [markdown]
# ## The text
#
# The same as before. A line of the validation text, which no model here learns from, will be our
# example throughout.

# %%
corpus = open_corpus(None)
training, validation = corpus.train, corpus.validation
tokenizer = Tokenizer(corpus.vocabulary)
V = len(corpus.vocabulary)
lines = tokenizer.decode(validation[:20_000].tolist()).split("\n")
line = next((each for each in lines if 34 <= len(each) <= 42), lines[0][:40])
print(f"{len(training):,} characters to train on, {len(validation):,} to validate with")
print(line)

# %% [markdown]
# ## Communicate, then compute
#
# A head of attention hands each position an average of what others say. Here is a question that no
# average answers: *is exactly one of these two characters a vowel?* Let each character say 1 if it
# is a vowel and 0 if not, and take the mean $m$, on real pairs of neighbors.

# %%
vowel = torch.tensor([float(character in "aeiouAEIOU") for character in corpus.vocabulary])  # (V)
first, second = vowel[validation[:-1]], vowel[validation[1:]]
mean = (first + second) / 2  # what attention with two equal weights would hand over
answer = (first != second).float()
for m in (0.0, 0.5, 1.0):
    pairs = mean == m
    print(f"m = {m}: {int(pairs.sum()):6,} pairs", "-> yes" if answer[pairs].any() else "-> no")

# %% [markdown]
# The mean knows the answer: yes at ½, no on both sides. But the next thing to read it, `lm_head`,
# is linear: it can only draw a straight line through these three points.
#
# **Predict before you run the next cell:** what does the best straight line look like? What is the
# least that you must add to it?

# %%
ones = torch.ones_like(mean)
straight_inputs = torch.stack([ones, mean], dim=1)
bent_inputs = torch.stack([ones, mean, F.relu(mean - 0.5)], dim=1)
grid = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
line_fit = torch.linalg.lstsq(straight_inputs, answer[:, None], driver="gelsd").solution[:, 0]
bent_fit = torch.linalg.lstsq(bent_inputs, answer[:, None], driver="gelsd").solution[:, 0]
for name, inputs, fit in (("line", straight_inputs, line_fit), ("bend", bent_inputs, bent_fit)):
    numbers = " ".join(f"{each:6.2f}" for each in fit)
    print(
        f"{name}: mean squared error {(inputs @ fit - answer).square().mean():.3f}, fit {numbers}"
    )

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.2))
by_line = line_fit[0] + line_fit[1] * grid
by_bend = bent_fit[0] + bent_fit[1] * grid + bent_fit[2] * F.relu(grid - 0.5)
axes.plot(grid, by_line, color=GREY, linewidth=2)
axes.plot(grid, by_bend, color=BLUE, linewidth=2)
axes.scatter([0, 0.5, 1], [0, 1, 0], color=ORANGE, s=70, zorder=3)
axes.text(0.68, 1.2, "best line", color=GREY, ha="right")
axes.text(0.65, 0.78, "line with one ReLU", color=BLUE)
axes.text(0.03, -0.16, "wanted", color=ORANGE)
axes.set(xlabel="m, the mean of two characters", ylabel="exactly one a vowel?")
axes.set(ylim=(-0.3, 1.55), xticks=[0, 0.5, 1], yticks=[0, 1])
axes.set_yticklabels(["no", "yes"])
plt.show()

# %% [markdown]
# The line misses all three points, the one on the right by the most: pairs of vowels are rare, so
# they hardly count. One bend hits them all: $2m - 4\,\text{relu}(m - ½)$, where
# $\text{relu}(z) = \max(0, z)$. That is the whole idea of this stage: attention **communicates**,
# a network with bends **computes**.
#
# ## The model
#
# The config and the batched attention are those of the last notebook.


# %%
@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 8  # T: context length, in characters
    n_embd: int = 32  # C: embedding dimension (channels per character)
    n_head: Annotated[int, Divides("n_embd")] = 4  # H: attention heads, each of size D = C/H
    batch_size: int = 32  # B: sequences per training step
    max_iters: int = 5000  # training steps
    eval_interval: int = 500  # steps between evaluations
    learning_rate: float = 1e-3  # AdamW's step size; bigram.py's 1e-2 is too large for deep models


# %%
class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads at once: the heads are one more batch dimension."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        # No biases: a key bias cancels in softmax, and out_proj's bias absorbs a value bias.
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
# This is new: two linear layers with a ReLU between them.
#
# $$\text{FeedForward}(x) = W_2 \, \text{relu}(W_1 x + b_1) + b_2$$


# %%
class FeedForward(nn.Module):
    """An MLP that processes each position separately."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up_proj(x))  # (B, T, 4*C)
        return self.down_proj(x)  # (B, T, C)


# %% [markdown]
# In the model it stands behind the attention, on the way to the logits.


# %%
class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.attention(x)
        x = self.feed_forward(x)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# %%
config = Config(vocab_size=V)
B, T, C = config.batch_size, config.block_size, config.n_embd
torch.manual_seed(1)
model = Model(config)
idx, targets = draw_batch(training, T, B, torch.Generator().manual_seed(1))
with torch.no_grad():
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(T))  # (B, T, C)
    heard = model.attention(x)  # (B, T, C)
    wide = model.feed_forward.up_proj(heard)  # (B, T, 4*C)
    hidden = F.relu(wide)  # (B, T, 4*C)
    worked_out = model.feed_forward.down_proj(hidden)  # (B, T, C)
for name, each in (("heard", heard), ("wide", wide), ("hidden", hidden), ("out", worked_out)):
    print(f"{name:6} {tuple(each.shape)!s:13} smallest number {each.min():6.3f}")

# %% [markdown]
# The vector of a position becomes four times as wide, everything negative becomes 0, and it becomes
# as narrow again as it was.
#
# ### Every position by itself
#
# `nn.Linear` works on the last dimension only, and ReLU on single numbers. So nothing mixes the
# positions. See it: change one position's input a little, and measure how much each position's
# output changes; do so for each position in turn, with the attention and with the feed-forward.
#
# **Predict before you run the next cell:** which squares of the two pictures will be bright, at
# least a little?


# %%
@torch.no_grad()
def influence(part: nn.Module, x: Tensor) -> Tensor:
    """How far each position's output moves (columns) when one position's input does (rows)."""
    T, C = x.shape
    rows = []
    for t in range(T):
        changed = x.clone()
        changed[t] += 0.5 * torch.randn(C, generator=torch.Generator().manual_seed(t))
        rows.append((part(changed[None]) - part(x[None]))[0].norm(dim=-1))  # (T)
    return torch.stack(rows)  # (T, T)


beginning = torch.tensor(tokenizer.encode(line[:T]))
with torch.no_grad():
    x = model.token_embedding(beginning) + model.position_embedding.weight[: len(beginning)]
labels = visible(line[:T])
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2))
for panel, part, title in zip(
    axes, (model.attention, model.feed_forward), ("attention", "feed-forward"), strict=True
):
    moved = influence(part, x)  # (T, T)
    heat_map(panel, moved, labels, labels, title)
    panel.set(xlabel="whose output moves", ylabel="whose input was changed")
    print(f"{title:12} places where the output moves: {int((moved > 0).sum())} of {moved.numel()}")
plt.show()

# %% [markdown]
# With the attention a change reaches the position itself and all later ones. With the feed-forward
# only the diagonal is bright: the rest is 0, exactly. The same little network is laid on each of
# the `T` positions, and none knows that there are others.
#
# ## Where the parameters are
#
# **Predict before you run the next cell:** which part of the model has the most numbers to learn,
# and about what share of all?

# %%
counts = {
    name.replace("_", " "): sum(each.numel() for each in part.parameters())
    for name, part in model.named_children()
}
total = sum(counts.values())
figure, axes = plt.subplots(figsize=(7.5, 2.6))
colors = [BLUE if name == "feed forward" else GREY for name in counts]
axes.barh(list(counts), list(counts.values()), color=colors)
for place, count in enumerate(counts.values()):
    axes.text(count + total * 0.005, place, f"{count:,} ({count / total:.0%})", va="center")
axes.invert_yaxis()
axes.set(xlabel="parameters", xlim=(0, max(counts.values()) * 1.25))
axes.tick_params(left=False)
plt.show()
print(f"{total:,} in all")

# %% [markdown]
# Two matrices of $C \times 4C$ make $8C^2$ numbers, besides the biases; the attention has $4C^2$.
# In a large model, where $C$ is in the thousands and there are many layers of both, the embeddings
# and `lm_head` hardly count: then about two thirds of all parameters are feed-forward.
#
# ## Training
#
# Several models will go through the same training, so the loop stands in a function. The lines that
# learn are the usual ones.


# %%
def learn(model: nn.Module, count: int, looks: int = 1) -> list[tuple[int, float]]:
    """Train for so many steps; look at the validation loss at the end, or so often on the way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(1)
    evaluations = []
    for step in range(1, count + 1):
        idx, targets = draw_batch(training, config.block_size, config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, count // looks) == 0:
            evaluations.append((step, exact_loss(model, validation)))
    return evaluations


# %%
with_bend = learn(model, steps(config.max_iters), looks=10)
for step, loss in with_bend[1::2]:
    print(f"step {step:5,}  validation loss {loss:.3f}")

# %% [markdown]
# ## Inside: the hidden units
#
# The trained network has $4C$ hidden units for each position. Watch them on real text: read
# thirty thousand characters of the validation text, each with the seven before it, and keep what
# stands at the last position. `N` is how many.


# %%
@torch.no_grad()
def before_bend(idx: Tensor) -> Tensor:
    """What goes into the ReLU."""
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(idx.shape[1]))
    return model.feed_forward.up_proj(model.attention(x))  # (B, T, 4*C)


windows = validation[:30_000].unfold(0, T, 1)  # (N, T)
before = before_bend(windows)[:, -1]  # (N, 4*C)
after = F.relu(before)  # (N, 4*C)
last = windows[:, -1]  # (N), the characters that stand there
print("hidden units by character", tuple(after.shape))
print(f"exactly 0 after ReLU: {(after == 0).float().mean():.0%}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharex=True)
edges = torch.linspace(-6, 6, 61)
for panel, values, title in zip(axes, (before, after), ("before ReLU", "after ReLU"), strict=True):
    shares, _ = torch.histogram(values.flatten().clamp(-6, 6), edges)
    shares = shares / values.numel()
    colors = [ORANGE if edge < -0.01 else BLUE for edge in edges[:-1]]
    panel.bar(edges[:-1], shares, width=0.2, align="edge", color=colors)
    panel.set(title=title, xlabel="activation", ylabel="share of all units")
plt.show()

# %% [markdown]
# Before the bend the numbers lie on both sides of 0, a little more than half of them below (the
# outermost bars hold all that is beyond ±6). After it, all these stand in the one tall bar at 0:
# mind the different scales. A unit at 0 is **silent**: it adds nothing to the output.
#
# ### Who wakes whom
#
# **Predict before you run the next cell:** is it always about the same number of units that speak,
# or does it depend on the character? Which one leaves the most silent?

# %%
often = (torch.bincount(last, minlength=V) >= 100).nonzero().flatten()
silent = torch.stack([(after[last == i] == 0).sum(dim=1).float().mean() for i in often])
order = silent.argsort(descending=True)
figure, axes = plt.subplots(figsize=(11, 3))
axes.bar(range(len(order)), silent[order], color=BLUE)
average = (after == 0).sum(dim=1).float().mean()
axes.hlines(average, -0.6, len(order) - 0.4, color=ORANGE, linestyle="--")
axes.text(len(order) - 0.2, average, "mean", color=ORANGE, va="center")
axes.set_xticks(range(len(order)), visible(tokenizer.decode(often[order].tolist())))
axes.set(xlabel="character", ylabel=f"silent units of {4 * C}", xlim=(-0.7, len(order) + 2))
plt.show()

# %% [markdown]
# Only characters that occur at least 100 times are shown. On average about half of the units are
# silent, but the number depends on the character: the space leaves by far the most of them silent,
# nearly three quarters.
#
# ### A line, unit by unit
#
# Each column is a character of our line, each row a hidden unit. The rows are sorted by the place
# where a unit is largest, so that what belongs together stands together.

# %%
start = "\n" * (T - 1) if "\n" in tokenizer.vocabulary else line[:1] * (T - 1)
read = torch.tensor(tokenizer.encode(start + line)).unfold(0, T, 1)  # (len(line), T)
picture = F.relu(before_bend(read)[:, -1])  # (len(line), 4*C)
rows = picture.argmax(dim=0).argsort(stable=True)  # (4*C)
figure, axes = plt.subplots(figsize=(11, 7))
image = axes.imshow(picture[:, rows].T, aspect="auto", cmap="cividis", vmax=picture.quantile(0.99))
axes.set_xticks(range(len(line)), visible(line))
axes.set(xlabel="character of the line", ylabel="hidden unit, sorted by where it is largest")
figure.colorbar(image, label="activation", pad=0.01, extend="max")
plt.show()

# %% [markdown]
# Each column has its own pattern of bright rows. Compare the columns of a letter that occurs more
# than once: many of the same rows light up, but not with the same strength, since the attention has
# brought each of them other news. The spaces are the darkest columns.
#
# ### What a unit listens to
#
# Which characters wake a unit? Add up its activation by character (so frequent ones have an
# advantage). Some units give most of it to very few. Here are four such, each with another
# favourite.

# %%
by_character = torch.zeros(V, 4 * C).index_add_(0, last, after)  # (V, 4*C)
shares = by_character / by_character.sum(dim=0).clamp(min=1e-6)  # (V, 4*C), a unit adds up to 1
picked = {}
for unit in shares.max(dim=0).values.argsort(descending=True).tolist():
    picked.setdefault(shares[:, unit].argmax().item(), unit)
units = list(picked.values())[:4]
figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), sharey=True)
for panel, unit in zip(axes, units, strict=False):
    most = shares[:, unit].topk(8)
    panel.bar(range(8), most.values, color=BLUE)
    panel.set_xticks(range(8), visible(tokenizer.decode(most.indices.tolist())))
    panel.set(title=f"unit {unit}", xlabel="character")
axes[0].set_ylabel("share of its activation")
plt.show()

# %% [markdown]
# One character makes between a third and about half of the activation of each of these.
#
# ### What a unit says
#
# Take the hundred places where a unit is largest. Silence it there, and see by how much the
# probability of each next character falls: so much of it came from this unit.


# %%
@torch.no_grad()
def said(unit: int, places: Tensor) -> Tensor:
    """How much probability each next character gets from this unit, on average over places."""
    probabilities = []
    for factor in (1, 0):  # as it is, then silenced
        hidden = after[places].clone()  # (places, 4*C)
        hidden[:, unit] *= factor
        logits = model.lm_head(model.feed_forward.down_proj(hidden))  # (places, V)
        probabilities.append(F.softmax(logits, dim=-1).mean(dim=0))  # (V)
    return probabilities[0] - probabilities[1]


# %%
ranked = []
for unit in range(4 * C):
    loudest = after[:, unit].topk(100).indices
    gain = said(unit, loudest)  # (V)
    ranked.append((gain.max().item(), gain.argmax().item(), unit, loudest))
rules = {}
for strength, following, unit, loudest in sorted(ranked, key=lambda each: -each[0]):
    rules.setdefault(following, (unit, loudest, strength))  # one unit for each next character
print("unit   is largest after                                 adds to the probability of")
for following, (unit, loudest, strength) in list(rules.items())[:8]:
    contexts = {}
    for n in loudest.tolist():
        context = "".join(visible(tokenizer.decode(windows[n, -5:].tolist())))
        contexts.setdefault(context[-3:], context)  # no two with the same end
    shown = "   ".join(list(contexts.values())[:5])
    print(f"{unit:4}   {shown:50}  {visible(tokenizer.vocabulary[following])[0]} {strength:.2f}")

# %% [markdown]
# So a unit is a rule: *when* this has been read, *then* that is likelier. Its row in `up_proj` is
# the when, its column in `down_proj` is the then. You know many of these rules from spelling. What
# comes before the last character counts, too: that part the attention has brought. These eight have
# the largest effect, each on another next character.
#
# ## Without the bend
#
# What if we leave out the ReLU? The widths stay, the number of parameters stays. A version in which
# the width and the bend can be chosen:


# %%
class AnyFeedForward(nn.Module):
    """FeedForward with any width, and any activation or none."""

    def __init__(self, config: Config, width: int, activation: Callable) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, width)
        self.down_proj = nn.Linear(width, config.n_embd)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


def no_bend(x: Tensor) -> Tensor:
    return x


def model_with(feed_forward: nn.Module, seed: int = 1) -> Model:
    """The model, but with another network behind the attention."""
    torch.manual_seed(seed)
    variant = Model(config)
    variant.feed_forward = feed_forward
    return variant


# %% [markdown]
# **Predict before you run the next cell:** three models, one with the bend, one with the same two
# matrices and no bend, one with nothing behind the attention, which is the model of the last
# notebook. In which order will their losses be?

# %%
torch.manual_seed(2)
straight = model_with(AnyFeedForward(config, 4 * C, no_bend))
without_bend = learn(straight, steps(config.max_iters), looks=10)
plain = model_with(nn.Identity())
without_network = learn(plain, steps(config.max_iters), looks=10)
curves = (
    ("nothing", without_network, GREY),
    ("without bend", without_bend, ORANGE),
    ("with bend", with_bend, BLUE),
)
for name, curve, _ in curves:
    print(f"{name:13} validation loss {curve[-1][1]:.3f}")

# %%
figure, axes = plt.subplots(figsize=(8, 3.6))
for (name, curve, color), height in zip(curves, (-1, 1, 0), strict=True):
    axes.plot(*zip(*curve, strict=True), color=color, marker="o", markersize=4)
    place = (curve[-1][0] * 1.02, curve[-1][1] + 0.012 * height)
    axes.annotate(name, place, color=color, va="center", annotation_clip=False)
axes.set(xlabel="training steps", ylabel="validation loss", xlim=(0, with_bend[-1][0] * 1.2))
plt.show()

# %% [markdown]
# Without the bend the network buys nothing, although it has as many parameters: it ends about where
# the model ends that has no network at all. What helps is the bend.
#
# ### Two linear layers are one
#
# Why? Because of the order in which matrices may be multiplied:
#
# $$W_2 (W_1 x) = (W_2 W_1) x$$
#
# The product on the right is one matrix, known before any $x$ comes. Leave the biases aside (they
# are exercise 3) and try it with the weights that were just learned.

# %%
with torch.no_grad():
    W1, W2 = straight.feed_forward.up_proj.weight, straight.feed_forward.down_proj.weight
    one = W2 @ W1  # (C, C)
    in_two_steps = heard @ W1.T @ W2.T  # (B, T, C)
    in_one_step = heard @ one.T  # (B, T, C)
print("W1", tuple(W1.shape), " W2", tuple(W2.shape), " together", tuple(one.shape))
print(f"numbers: {W1.numel() + W2.numel():,} in two, {one.numel():,} in one")
print("same output:", torch.allclose(in_two_steps, in_one_step, atol=1e-5))

# %% [markdown]
# Everything the wide layer learned fits into an eighth of the numbers. And even that one is idle:
# `lm_head` is linear too, and would swallow it the same way.
#
# With a bend there is no such matrix. Walk in small steps from what one position heard to what
# another one heard, and watch a few channels of the output on the way.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
way = torch.linspace(0, 1, 201)[:, None]
for panel, each, title in zip(axes, (straight, model), ("without bend", "with bend"), strict=True):
    with torch.no_grad():
        x = each.token_embedding(windows[:1]) + each.position_embedding.weight  # (1, T, C)
        heard = each.attention(x)[0]  # (T, C)
        path = (1 - way) * heard[0] + way * heard[-1]  # (steps of the walk, C)
        channels = each.feed_forward(path)  # (steps of the walk, C)
        bent = channels - (1 - way) * channels[0] - way * channels[-1]
    for channel in bent.abs().max(dim=0).values.topk(4).indices:
        panel.plot(way, channels[:, channel] - channels[0, channel], linewidth=2)
    print(f"{title:13} farthest from a straight line: {bent.abs().max():.6f}")
    panel.set(title=title, xlabel="how far from one to the other", ylabel="output, from its start")
plt.show()

# %% [markdown]
# Without a bend each channel goes straight from its start to its end: the small number printed is
# rounding. With it, a channel turns wherever a unit wakes or falls silent on the way. The output
# of a point half-way between two inputs need not lie half-way between theirs: that is what no
# average can do.
#
# ## How wide
#
# Each hidden unit is one bend. Four times the width is a custom since the first transformer.
#
# **Predict before you run the next cell:** what happens to the loss with a quarter of the width of
# the vector, the same width, four times, sixteen times? A fifth of the steps is enough to see it.
# Each width is trained from two random beginnings, to see how much is chance.

# %%
widths = [C // 4, C, 4 * C, 16 * C]
losses = torch.zeros(len(widths), 2)
for i, width in enumerate(widths):
    for seed in (1, 2):
        torch.manual_seed(10 + seed)
        variant = model_with(AnyFeedForward(config, width, F.relu), seed)
        losses[i, seed - 1] = learn(variant, steps(1000))[-1][1]
size = [
    sum(each.numel() for each in AnyFeedForward(config, w, F.relu).parameters()) for w in widths
]
for i, width in enumerate(widths):
    print(
        f"width {width:3}: {size[i]:6,} parameters, loss {losses[i, 0]:.3f} and {losses[i, 1]:.3f}"
    )

# %%
figure, axes = plt.subplots(figsize=(6.5, 3))
axes.plot(widths, losses.mean(dim=1), color=BLUE)
for seed in (0, 1):
    axes.scatter(widths, losses[:, seed], color=BLUE)
axes.set_xscale("log", base=2)
axes.set_xticks(widths, ["C/4", "C", "4C", "16C"])
axes.set(xlabel="hidden units", ylabel=f"loss after {steps(1000)} steps")
axes.minorticks_off()
plt.show()

# %% [markdown]
# Two dots of one width give a first idea of what chance makes; the line is their mean. More bends,
# lower loss, at each width. But each width also has four times the parameters of the one before.
# Four times `C` is a bargain and no law; the next stages spend further parameters on more layers
# instead.
#
# ## Where the loss falls
#
# A position's vector passes the embedding, the attention and the feed-forward. How much of the next
# character can be read from it at each of these points? Put a **read-out** there, a linear layer to
# logits of its own, and train nothing but these read-outs; the model stays as it is.


# %%
@torch.no_grad()
def on_the_way(model: Model, idx: Tensor) -> list[Tensor]:
    positions = torch.arange(idx.shape[1])
    embedded = model.token_embedding(idx) + model.position_embedding(positions)  # (B, T, C)
    heard = model.attention(embedded)  # (B, T, C)
    return [embedded, heard, model.feed_forward(heard)]


def learn_readouts(model: Model, count: int) -> list[float]:
    """Train a read-out at each point; return their validation losses."""
    torch.manual_seed(1)
    readouts = nn.ModuleList(nn.Linear(C, V) for _ in range(3))
    optimizer = torch.optim.AdamW(readouts.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, count)
    generator = torch.Generator().manual_seed(1)

    def losses(idx: Tensor, targets: Tensor) -> Tensor:
        points = zip(readouts, on_the_way(model, idx), strict=True)
        logits = [readout(x).flatten(0, 1) for readout, x in points]  # (B*T, V) each
        return torch.stack([F.cross_entropy(each, targets.flatten()) for each in logits])

    for _ in range(count):
        loss = losses(*draw_batch(training, T, 4 * B, generator)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    whole = (len(validation) - 1) // T * T
    idx, targets = validation[:whole].view(-1, T), validation[1 : whole + 1].view(-1, T)
    with torch.no_grad():
        return losses(idx, targets).tolist()


# %% [markdown]
# **Predict before you run the next cell:** after the embedding a position knows only its own
# character: think of the bigram. How do the two models share the rest of the way between attention
# and feed-forward?

# %%
points = ["embedding", "attention", "feed-forward"]
pairs = training[:-1] * V + training[1:]
table = torch.bincount(pairs, minlength=V * V).view(V, V) + 1.0  # (V, V)
table = (table / table.sum(dim=1, keepdim=True)).log()  # (V, V)
bigram = -table[validation[:-1], validation[1:]].mean().item()
print(f"counted pairs of characters {bigram:.3f}")
full_way, plain_way = (learn_readouts(each, steps(1000)) for each in (model, plain))
for name, full_loss, plain_loss in zip(points, full_way, plain_way, strict=True):
    print(f"after {name:12}  with feed-forward {full_loss:.3f}   without {plain_loss:.3f}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.4))
axes.plot(points, full_way, color=BLUE, marker="o", linewidth=2)
axes.plot(points[:2], plain_way[:2], color=GREY, marker="o", linewidth=2)
axes.axhline(bigram, color=ORANGE, linestyle="--", linewidth=1)
axes.text(2.2, bigram + 0.004, "bigram table", color=ORANGE, va="bottom", ha="center")
axes.text(0.95, plain_way[1], "model without feed-forward ", color=GREY, va="center", ha="right")
axes.text(1.55, (full_way[1] + full_way[2]) / 2 + 0.02, "model with feed-forward", color=BLUE)
axes.set(ylabel="loss of a read-out", xlabel="read after", xlim=(-0.2, 2.6))
plt.show()

# %% [markdown]
# The embedding alone is nearly worth a bigram table, in both models. In the grey model attention
# must do all the rest. In the blue one it does less that a linear layer can read: it only has to
# bring the right things together. Its feed-forward makes the larger part of the way down, and ends
# below the grey model. (The last number without feed-forward is read at the same point as the one
# before: nothing stands between them.)
#
# ## A sample

# %%
print("".join(generate(model, tokenizer, length=300)))

# %% [markdown]
# Still a window of at most eight characters, so words fall apart. What it got better at is making
# the most of them.
#
# ## The script
#
# `feed_forward.py` is the classes above and this function, the same as in the stages before.


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
# ### 1 · Count the silent
#
# `hidden` holds activations after a ReLU, `(N, 4*C)`. Return two shares, each between 0 and 1: how
# many of all its numbers are 0, and how many of its units are **dead**, that is 0 at every one of
# the `N` places.


# %% tags=["exercise"]
def silence(hidden: Tensor) -> tuple[float, float]: ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    hidden = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 3.0]])
    zero, dead = (float(share) for share in given(silence(hidden)))
    assert zero <= 1 and dead <= 1, "shares, not numbers: divide by how many there are"
    assert abs(zero - 5 / 8) < 1e-6, f"5 of these 8 numbers are 0, which is 0.625, not {zero:.3f}"
    assert abs(dead - 3 / 4) > 1e-6, "a unit that speaks once is not dead: 0 at every place"
    assert abs(dead - 1 / 2) < 1e-6, f"2 of these 4 units never speak: 0.5, not {dead:.3f}"
    zero, dead = silence(after)
    print(f"trained model: {zero:.0%} of the activations are 0, {dead:.0%} of the units dead")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def silence(hidden: Tensor) -> tuple[float, float]:
#     is_zero = hidden == 0
#     return is_zero.float().mean().item(), is_zero.all(dim=0).float().mean().item()
# ```
#
# </details>
#
# ### 2 · The same as a convolution
#
# A convolution of width 1 looks at one position at a time, so it must be able to do the same.
# Compute what `feed_forward` computes with two calls of `F.conv1d`. It wants its input as
# `(B, C, T)` and its weight as `(out, in, 1)`; give back `(B, T, C)`.


# %% tags=["exercise"]
def by_convolution(x: Tensor, feed_forward: FeedForward) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, T, C)  # (3, T, C)
    with torch.no_grad():
        out, wanted = given(by_convolution(x, model.feed_forward)), model.feed_forward(x)
        assert out.shape == wanted.shape, f"its shape is {tuple(out.shape)}, not {tuple(x.shape)}"
    assert (out - wanted).abs().max() < 1e-3, (
        f"the outputs differ by up to {(out - wanted).abs().max():.2f}: is the ReLU between the "
        "two, and did transpose swap T and C? view cuts the same row of numbers elsewhere"
    )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def by_convolution(x: Tensor, feed_forward: FeedForward) -> Tensor:
#     up_proj, down_proj = feed_forward.up_proj, feed_forward.down_proj
#     x = x.transpose(1, 2)  # (B, C, T)
#     x = F.relu(F.conv1d(x, up_proj.weight[:, :, None], up_proj.bias))  # (B, 4*C, T)
#     x = F.conv1d(x, down_proj.weight[:, :, None], down_proj.bias)  # (B, C, T)
#     return x.transpose(1, 2)  # (B, T, C)
# ```
#
# </details>
#
# ### 3 · Two layers into one
#
# Return the one matrix `(C, C)` and the one bias `(C)` that do what `up_proj` and `down_proj` do
# when there is no activation function between them. Multiply out $W_2 (W_1 x + b_1) + b_2$.


# %% tags=["exercise"]
def collapse(up_proj: nn.Linear, down_proj: nn.Linear) -> tuple[Tensor, Tensor]: ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    up_proj, down_proj = straight.feed_forward.up_proj, straight.feed_forward.down_proj
    with torch.no_grad():
        matrix, bias = given(collapse(up_proj, down_proj))
        assert matrix.shape == (C, C), (
            f"the matrix is {tuple(matrix.shape)}: which one comes first?"
        )
        assert bias.shape == (C,), f"the bias has the shape {tuple(bias.shape)}, not ({C},)"
        x = torch.randn(100, C, generator=torch.Generator().manual_seed(1))
        wanted, nothing = down_proj(up_proj(x)), down_proj(up_proj(torch.zeros(C)))
        near = torch.allclose(x @ matrix.T, wanted - nothing, atol=1e-4)
        assert near, "the matrix is not the product of the two weights, down_proj's on the left"
        assert torch.allclose(bias, nothing, atol=1e-4), (
            f"the bias is off by up to {(bias - nothing).abs().max():.2f}: "
            "the first layer's bias goes through the second layer, too"
        )
    one_layer = nn.Linear(C, C)
    one_layer.weight, one_layer.bias = nn.Parameter(matrix), nn.Parameter(bias)
    small = model_with(one_layer)
    others = {k: v for k, v in straight.state_dict().items() if "feed_forward" not in k}
    small.load_state_dict(others, strict=False)
    two, one = exact_loss(straight, validation), exact_loss(small, validation)
    print(f"validation loss: two layers {two:.3f}, one layer {one:.3f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def collapse(up_proj: nn.Linear, down_proj: nn.Linear) -> tuple[Tensor, Tensor]:
#     return down_proj.weight @ up_proj.weight, down_proj.weight @ up_proj.bias + down_proj.bias
# ```
#
# </details>
#
# ### 4 · A softer bend
#
# GPT-2 bends with **GELU**, which is round where ReLU has a corner. Write the form it uses:
#
# $$\text{gelu}(x) = \frac{x}{2} \left( 1 + \tanh\left( \sqrt{\frac{2}{\pi}}
# \left( x + 0.044715\, x^3 \right) \right) \right)$$


# %% tags=["exercise"]
def gelu(x: Tensor) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    x = torch.linspace(-4, 4, 801)
    y, wanted = given(gelu(x)), F.gelu(x, approximate="tanh")
    assert y.shape == x.shape, f"its shape is {tuple(y.shape)}: it works on each number by itself"
    assert abs(y[-1] - 4) < 0.01, f"far to the right it must be x itself: at 4 it is {y[-1]:.3f}"
    assert abs(y[0]) < 0.01, f"far to the left it must be 0: at -4 it is {y[0]:.3f}"
    off, place = (y - wanted).abs().max(dim=0)
    assert off < 1e-4, (
        f"at {x[place]:.2f} it is {y[place]:.4f}, PyTorch's is {wanted[place]:.4f}: look at the "
        "constants (the root of 2/π is 0.7979; 0.044715 goes with the cube)"
    )
    print(f"farthest from the exact GELU: {(y - F.gelu(x)).abs().max():.4f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gelu(x: Tensor) -> Tensor:
#     inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
#     return x / 2 * (1 + torch.tanh(inner))
# ```
#
# </details>
#
# ### 5 · A gate, at the same price
#
# Many newer models have **SwiGLU** here: two layers side by side, one opens and closes the other,
# and a third makes the result narrow. None has a bias.
#
# $$\text{SwiGLU}(x) = W_3 \left( \text{silu}(W_1 x) \odot W_2 x \right), \qquad
# \text{silu}(z) = \frac{z}{1 + e^{-z}}$$
#
# Three matrices instead of two: which width makes it about as large as `FeedForward`, at most 5 %
# more or less, for any $C$ from 16 on? Work it out, then write the class. `F.silu` is there.


# %% tags=["exercise"]
class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = ...  # W1
        self.up = ...  # W2
        self.down = ...  # W3

    def forward(self, x: Tensor) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_5() -> None:
    for each in (config, Config(vocab_size=V, n_embd=96)):
        network = SwiGLU(each)
        given(network.gate), given(network.up), given(network.down)
        count, wanted = (
            sum(p.numel() for p in net.parameters()) for net in (network, FeedForward(each))
        )
        assert abs(count / wanted - 1) <= 0.05, (
            f"with C = {each.n_embd} it has {count:,} parameters, {count / wanted - 1:+.0%} "
            f"against {wanted:,}: solve 3 · C · width = 8 · C² for the width"
        )
    torch.manual_seed(2)
    network = SwiGLU(config)
    x = torch.randn(2, T, C)  # (2, T, C)
    opened = network.down(F.silu(network.gate(x)) * network.up(x))
    assert torch.allclose(given(network(x)), opened, atol=1e-5), (
        "gate: silu, then times up's output"
    )
    loss = learn(model_with(network), steps(1000))[-1][1]
    print(f"after {steps(1000)} steps: plain {losses[2].mean():.3f}, SwiGLU {loss:.3f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# class SwiGLU(nn.Module):
#     def __init__(self, config: Config) -> None:
#         super().__init__()
#         width = round(8 * config.n_embd / 3)
#         self.gate = nn.Linear(config.n_embd, width, bias=False)  # W1
#         self.up = nn.Linear(config.n_embd, width, bias=False)  # W2
#         self.down = nn.Linear(width, config.n_embd, bias=False)  # W3
#
#     def forward(self, x: Tensor) -> Tensor:
#         return self.down(F.silu(self.gate(x)) * self.up(x))
# ```
#
# </details>
#
# One round of talking and thinking helps. Why not several, one after the other? Stacked without
# care they hardly learn: [the next notebook](05_residual.ipynb) gives the gradient a way through.
