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
# # 6 · Layer normalisation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/character-gpt/course/blob/main/notebooks/06_layer_norm.ipynb)
#
# In [the last notebook](05_residual.ipynb) every block adds to what was there. Sums grow. This one
# keeps what a block sees at the same size. After this notebook you can
#
# - show how the numbers in a residual stack grow with depth;
# - write batch normalisation and layer normalisation, and point at the numbers that each averages;
# - say why a model of sequences takes the second;
# - say what gain and bias are for;
# - tell a pre-norm block from a post-norm block, and what that choice changes.
#
# Run each cell with shift-enter, from the top. Change things: nothing can break that a restart
# does not mend.

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
from typing import Annotated, Literal

import residual
from trainer import Divides, Run
from common import LanguageModel, Tokenizer, draw_batch
from sample import generate
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GREEN, GREY, ORANGE, check, given, heat_map, plt, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

# %%
corpus = open_corpus(None)
training, validation = corpus.train, corpus.validation
tokenizer = Tokenizer(corpus.vocabulary)
V = len(corpus.vocabulary)
C = 32  # channels
idx, targets = draw_batch(training, 8, 256, torch.Generator().manual_seed(1))  # (B, T) both
print("idx", tuple(idx.shape), "vocabulary", V)

# %% [markdown]
# ## Sums grow
#
# Here is the model of the last notebook, untrained, with 16 blocks instead of 3. As a
# measure of **size** take the root of the mean square of all numbers in a tensor.
#
# **Predict before you run the next cell:** each block adds a little to `x`. How does the size go
# on from block to block?


# %%
def size(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.no_grad()
def states(model: nn.Module, idx: Tensor) -> list[Tensor]:
    """What the blocks hand on: the embeddings, then the output of each block."""
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(idx.shape[1]))
    found = [x]  # (B, T, C) each
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return found


torch.manual_seed(1)
deep = residual.Model(residual.Config(vocab_size=V, n_layer=16))
sizes = [size(x) for x in states(deep, idx)]
print(f"size of the embeddings {sizes[0]:.2f}, after 16 blocks {sizes[-1]:.2f}")

# %%
figure, axes = plt.subplots(figsize=(8, 3.2))
axes.plot(sizes, color=BLUE, marker="o")
axes.axhline(sizes[0], color=GREY, linestyle="--")
axes.annotate("the embeddings", (len(sizes) - 1, sizes[0] + 0.08), color=GREY, ha="right")
axes.annotate("the sum", (len(sizes) - 4, sizes[-4] + 0.25), color=BLUE, ha="right")
axes.set(xlabel="number of blocks so far", ylabel="size", ylim=(0, None))
plt.show()

# %% [markdown]
# The sum grows nearly all the way up. It has to: each block adds numbers that know nothing of
# those before, and the variances of such numbers add up. So a late block finds larger numbers than
# an early one.
#
# `lm_head`, which makes the logits, reads the largest numbers of all. So the deep model begins sure
# of things that it cannot know.

# %%
ln_V = torch.tensor(float(V)).log().item()
for n_layer in (1, 3, 16):
    torch.manual_seed(1)
    model = residual.Model(residual.Config(vocab_size=V, n_layer=n_layer))
    _, loss = model(idx, targets)
    print(f"blocks: {n_layer:2}, first loss {loss.item():.2f}, ln {V} = {ln_V:.2f}")

# %% [markdown]
# ## Normalise: but which numbers together?
#
# To normalise numbers, take off their mean and divide by their standard deviation. Then their mean
# is 0 and their variance 1, whatever they were before. A small ε keeps the division from 0.
#
# $$\hat{x} = \frac{x - \text{mean}(x)}{\sqrt{\text{var}(x) + \varepsilon}}$$
#
# The question is which numbers form such a group. Take one position from each of 16 blocks of
# text, as it comes out of the deep stack: a table of batch × channels.

# %%
rows = states(deep, idx[:16])[-1][:, -1]  # (B, C)
names = visible(tokenizer.decode(idx[:16, -1].tolist()))
print("rows", tuple(rows.shape), "of the characters", " ".join(names))

# %%
corner = rows[:6, :8]  # (B, C)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for panel, kind in zip(axes, ("batch", "layer"), strict=True):
    shade = torch.zeros(corner.shape)
    (shade[:, 2] if kind == "batch" else shade[2]).fill_(1)
    panel.imshow(shade, cmap="Blues", vmax=2.5, aspect="auto")
    for b in range(corner.shape[0]):
        for c in range(corner.shape[1]):
            panel.text(c, b, f"{corner[b, c]:.1f}", ha="center", va="center", size=10)
    panel.set_xticks(range(corner.shape[1]))
    panel.set_yticks(range(corner.shape[0]), names[: corner.shape[0]])
    panel.tick_params(length=0)
    panel.set(title=f"{kind} normalisation", xlabel="channel", ylabel="row of the batch")
plt.show()

# %% [markdown]
# Shaded is one group. **Batch normalisation** compares the same channel in different positions:
# one mean for each column. **Layer normalisation** compares the channels of one position: one mean
# for each row. (The corner shows 6 of 16 rows and 8 of 32 channels; the group runs through all.)
#
# ## Along the batch
#
# Batch normalisation came first, for images. The variance is the plain mean of the squares, not
# the one with N − 1.

# %%
mean = rows.mean(dim=0)  # (C)
variance = rows.var(dim=0, unbiased=False)  # (C)
by_hand = (rows - mean) / (variance + 1e-5).sqrt()  # (B, C)
print("first channels' means before", [round(number, 2) for number in mean[:4].tolist()])
print("and after, the largest of all", round(by_hand.mean(dim=0).abs().max().item(), 6))
print("equal to PyTorch's:", torch.allclose(by_hand, nn.BatchNorm1d(C)(rows), atol=1e-5))

# %% [markdown]
# And when there is only one row, as when you sample? Then its mean is itself, and nothing is left.
# So the layer keeps a **running mean** and variance while it trains, and takes those afterwards.


# %%
class HandBatchNorm(nn.Module):
    """One mean and one variance for each channel, over the rows of the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.running_mean = torch.zeros(channels)
        self.running_variance = torch.ones(channels)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_variance  # (C)
        if self.training:
            mean, variance = x.mean(dim=0), x.var(dim=0, unbiased=False)  # (C)
            # A tenth of the way to this batch; for the variance, to the estimate with N - 1.
            self.running_mean = self.running_mean.lerp(mean, 0.1)
            self.running_variance = self.running_variance.lerp(x.var(dim=0), 0.1)
        return (x - mean) / (variance + 1e-5).sqrt()


# %%
mine, theirs = HandBatchNorm(C), nn.BatchNorm1d(C)
generator = torch.Generator().manual_seed(2)
batch_means, running_means = [], []
for _ in range(60):
    drawn, _ = draw_batch(training, 8, 16, generator)
    x = states(deep, drawn)[-1][:, -1]  # (B, C)
    assert torch.allclose(mine(x), theirs(x), atol=1e-5)
    batch_means.append(x.mean(dim=0))
    running_means.append(mine.running_mean)
mine.eval()
theirs.eval()
print("running means equal:", torch.allclose(mine.running_mean, theirs.running_mean, atol=1e-5))
print("evaluation equal:   ", torch.allclose(mine(rows), theirs(rows), atol=1e-5))

# %%
every_mean = states(deep, idx)[-1][:, -1].mean(dim=0)  # (C)
c = every_mean.abs().argmax().item()
figure, axes = plt.subplots(figsize=(8, 3.2))
axes.plot([means[c] for means in batch_means], ".", color=GREY)
axes.plot([0] + [means[c] for means in running_means], color=BLUE, linewidth=2)
axes.axhline(every_mean[c], color=ORANGE, linestyle="--")
axes.annotate("running mean", (7, every_mean[c] * 0.3), color=BLUE)
axes.annotate("each batch (dots)", (20, every_mean[c] * 0.55), color=GREY)
axes.annotate("mean of 256 rows (dashed)", (36, every_mean[c] * 0.4), color=ORANGE)
axes.set(xlabel="batches seen", ylabel=f"mean of channel {c}")
plt.show()

# %% [markdown]
# The running mean begins at 0 and needs some thirty batches to arrive; then it follows, calmer than
# the dots. Note what this layer has become: it behaves in one way while training, in another way
# afterwards, and it carries numbers that no gradient ever touches.
#
# ## Along the channels
#
# Layer normalisation needs none of this. The group is one position's own channels.


# %%
def hand_layer_norm(x: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)  # (..., 1)
    variance = x.var(dim=-1, keepdim=True, unbiased=False)  # (..., 1)
    return (x - mean) / (variance + 1e-5).sqrt()


x = states(deep, idx)[-1]  # (B, T, C)
print("(B, C):   ", torch.allclose(hand_layer_norm(rows), nn.LayerNorm(C)(rows), atol=1e-5))
print("(B, T, C):", torch.allclose(hand_layer_norm(x), nn.LayerNorm(C)(x), atol=1e-5))

# %% [markdown]
# `dim=-1` is the last dimension, the channels. The same line serves `(B, C)` and `(B, T, C)`, and
# there is no question whether it trains.
#
# **Predict:** the table of 16 rows, once normalised by columns, once by rows. What becomes of a
# channel that is high for all characters? What of a row whose numbers are all large?

# %%
tables = {
    "as it is": rows / size(rows),
    "by columns (batch)": HandBatchNorm(C)(rows),
    "by rows (layer)": hand_layer_norm(rows),
}
figure, axes = plt.subplots(1, 3, figsize=(12, 4))
channels = [str(c) if c % 8 == 0 else "" for c in range(C)]
for panel, (title, table) in zip(axes, tables.items(), strict=True):
    heat_map(panel, table, names, channels, title, cmap="PuOr", vmin=-3, vmax=3)
    panel.tick_params(axis="y", labelsize=7)
    panel.set(xlabel="channel")
axes[0].set(ylabel="position")
plt.show()

# %% [markdown]
# Violet is above 0, orange below. Vertical stripes on the left are channels that are high, or low,
# for nearly all characters. Batch normalisation wipes them out: each column's mean is 0. Layer
# normalisation leaves them, and brings each row to the same size.
#
# It forgets something, too. Scale a position's vector, or add the same to all its channels, and
# the result is the same: only the pattern counts.

# %%
print(torch.allclose(hand_layer_norm(rows), hand_layer_norm(3 * rows + 5), atol=1e-3))

# %% [markdown]
# ## Why a sequence model takes the second
#
# In a model of text `x` is `(B, T, C)`. Batch normalisation then takes every position of every row
# as one of its samples: one mean for each channel, over B and T.


# %%
class BatchNormOverTime(nn.Module):
    """nn.BatchNorm1d for (B, T, C): each of the B * T positions is a sample."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)  # (B, T, C)


# %% [markdown]
# Take the embeddings of four blocks of text: no position knows of another yet. Change **one**
# character, the sixth of row 1. Normalise before and after the change, and see where the results
# differ.
#
# **Predict:** which of the 4 × 8 places change, for each of the two norms?

# %%
few = idx[:4]  # (B, T)
changed = few.clone()
changed[1, 5] = (changed[1, 5] + 1) % V


def embed(idx: Tensor) -> Tensor:
    return deep.token_embedding(idx) + deep.position_embedding(torch.arange(8))  # (B, T, C)


differences = {}  # (B, T) each
for name, norm in (("batch", BatchNormOverTime(C)), ("layer", nn.LayerNorm(C))):
    with torch.no_grad():
        difference = norm(embed(few)) - norm(embed(changed))  # (B, T, C)
    differences[name] = difference.abs().mean(dim=-1)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 2.9))
for panel, (name, difference) in zip(axes, differences.items(), strict=True):
    panel.imshow(difference > 0, cmap="Oranges", vmin=0, vmax=2.5, aspect="auto")
    for b in range(4):
        for t, character in enumerate(visible(tokenizer.decode(few[b].tolist()))):
            text = f"{character}\n{difference[b, t]:.3f}"
            panel.text(t, b, text, ha="center", va="center", size=9)
    panel.set_yticks(range(4))
    panel.tick_params(length=0)
    panel.set(title=f"{name} normalisation", xlabel="t, place in the block", ylabel="b, row")
plt.show()

# %% [markdown]
# Under each character stands how much its vector changed, shaded where that is not 0. With layer
# normalisation one place changed: the one you changed. With batch normalisation all 32 did.
# That is two troubles at once.
#
# - **Row 0 changed because row 1 did.** What the model says about a text hangs on the texts that
#   happen to stand beside it.
# - **Row 1 changed at t = 0 to 4, before the new character.** An earlier place has learnt something
#   about a later one. The mask of attention forbids just this; the mean goes around it. A model
#   that predicts the next character may never see it, so such a loss could not be trusted.
#
# The fewer rows share the mean, the larger the leak.

# %%
for rows_kept in (1, 4, 32, 256):
    a, b = idx[:rows_kept], idx[:rows_kept].clone()
    b[0, 5] = (b[0, 5] + 1) % V
    norm = BatchNormOverTime(C)
    with torch.no_grad():
        leak = (norm(embed(a)) - norm(embed(b)))[0, :5].abs().mean().item()
    print(f"{rows_kept:3} rows: the five earlier places of row 0 move by {leak:.4f}")

# %% [markdown]
# The third trouble you have met: training and evaluation are two different functions. Here both
# norms see 200 batches, then the same input in both modes.

# %%
for name, norm in (("batch", BatchNormOverTime(C)), ("layer", nn.LayerNorm(C))):
    with torch.no_grad():
        for _ in range(200):
            norm(embed(draw_batch(training, 8, 32, generator)[0]))
        while_training = norm.train()(embed(few))  # (B, T, C)
        afterwards = norm.eval()(embed(few))  # (B, T, C)
    difference = (while_training - afterwards).abs().max().item()
    print(f"{name} normalisation: training and evaluation differ by up to {difference:.2f}")

# %% [markdown]
# Layer normalisation has none of the three: a position's result hangs on that position alone.
#
# ## Gain and bias
#
# Normalised, every vector has mean 0 and size 1. Perhaps the next layer would rather have some
# channels large and others small. So both norms end with two learnt numbers for each channel,
# a **gain** γ and a **bias** β, which begin at 1 and 0, where they change nothing:
#
# $$y_c = \gamma_c \, \hat{x}_c + \beta_c$$

# %%
norm = nn.LayerNorm(C)
print("gain", tuple(norm.weight.shape), "bias", tuple(norm.bias.shape))
nn.init.uniform_(norm.weight, 0.5, 2)
nn.init.uniform_(norm.bias, -1, 1)
by_hand = hand_layer_norm(x) * norm.weight + norm.bias  # (B, T, C)
print("equal to PyTorch's:", torch.allclose(by_hand, norm(x), atol=1e-5))

# %% [markdown]
# ## Before or after
#
# A block has two parts that add to `x`. A norm can stand in front of each part, or behind each
# sum. The first transformer had it behind (**post**), most since have it in front (**pre**).


# %%
def draw_block(axes: plt.Axes, title: str, boxes: list, branches: list) -> None:
    axes.annotate("", (10.2, 0), (-0.4, 0), arrowprops={"arrowstyle": "->", "color": GREY})
    for start, end in branches:
        axes.plot([start, start, end, end], [0, 1, 1, 0], color=GREY, linewidth=1)
        axes.text(end, 0, "+", ha="center", va="center", bbox={"boxstyle": "circle", "fc": "white"})
    for left, height, text in boxes:
        colour = ORANGE if text == "norm" else BLUE
        style = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": colour}
        axes.text(left, height, text, ha="center", va="center", color=colour, bbox=style)
    axes.set(title=title, xlim=(-1, 10.5), ylim=(-0.5, 1.5))
    axes.text(-0.5, 0, "x", ha="right", va="center")
    axes.axis("off")


figure, axes = plt.subplots(2, 1, figsize=(9, 3.6))
draw_block(
    axes[0],
    "pre",
    [(1.3, 1, "norm"), (3, 1, "attention"), (6, 1, "norm"), (7.9, 1, "feed-forward")],
    [(0.3, 4.4), (5, 9.6)],
)
draw_block(
    axes[1],
    "post",
    [(1.8, 1, "attention"), (4.2, 0, "norm"), (6.7, 1, "feed-forward"), (9.3, 0, "norm")],
    [(0.3, 3.2), (5, 8.4)],
)
plt.show()

# %% [markdown]
# Follow the grey line from x to the end. In **pre** it meets nothing but sums: the straight way of
# the last notebook stays free, for the numbers and for the gradient. In **post** every norm
# stands on it. Pre leaves the sum to grow, so one more norm follows the last block, before
# `lm_head`; post needs none.
#
# Here is `layer_norm.py`. Attention and feed-forward are those of the last stage.


# %%
@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 8  # T: context length, in characters
    n_embd: int = 32  # C: embedding dimension (channels per character)
    n_head: Annotated[int, Divides("n_embd")] = 4  # H: attention heads, each of size D = C/H
    n_layer: int = 3  # number of blocks
    norm: Literal["pre", "post"] = "pre"  # normalize before each sublayer, or after the addition
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
# The block is what is new. Hold it against the drawing: the two lines of `post` and the two lines
# of `pre` differ only in where the norm's bracket opens.


# %%
class Block(nn.Module):
    """Attention, then feed-forward; each adds its output to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = config.norm
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "post":
            x = self.attention_norm(x + self.attention(x))
            return self.feed_forward_norm(x + self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x))
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x


# %%
class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.final_norm = nn.LayerNorm(config.n_embd) if config.norm == "pre" else nn.Identity()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.blocks(x)
        logits = self.lm_head(self.final_norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# %% [markdown]
# The question of the beginning again: 16 blocks, nothing learnt. Now for no norm, pre and post.


# %%
def make(kind: str, **choices: float) -> nn.Module:
    torch.manual_seed(1)
    if kind == "none":
        return residual.Model(residual.Config(vocab_size=V, **choices))
    return Model(Config(vocab_size=V, norm=kind, **choices))


colours = {"none": GREY, "pre": BLUE, "post": ORANGE}
by_depth = {}
for kind in colours:
    model = make(kind, n_layer=16)
    by_depth[kind] = states(model, idx)
    print(f"{kind:4}  first loss {model(idx, targets)[1].item():.2f}, ln {V} = {ln_V:.2f}")
    if kind == "pre":
        entering = zip(model.blocks, by_depth[kind][:-1], strict=True)
        normed = [block.attention_norm(x) for block, x in entering]

# %%
figure, axes = plt.subplots(figsize=(8, 3.6))
for kind, found in by_depth.items():
    axes.plot([size(x) for x in found], color=colours[kind], marker="o")
    axes.annotate(kind, (16.3, size(found[-1])), color=colours[kind], va="center")
axes.plot([size(x) for x in normed], color=BLUE, linestyle=":", linewidth=2)
axes.annotate("what pre's attention reads (dotted)", (8, 0.55), color=BLUE, ha="center")
axes.set(xlabel="number of blocks so far", ylabel="size", xlim=(-0.5, 17.8), ylim=(0, None))
axes.set_xticks(range(0, 17, 2))
plt.show()

# %% [markdown]
# Post holds the line itself at 1. Pre lets the sum grow, though more slowly, as no part's answer
# grows with it; what attention reads is of size 1 at any depth. And both begin close to ln V.
#
# ## Training
#
# Three blocks, as in the script, and fewer steps, for each kind in turn. The model of the last
# notebook, without norms, is `none`.

# %%
models, curves, losses = {}, {}, {}
for kind in colours:
    models[kind] = model = make(kind)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=Config.learning_rate, fused=True)
    curves[kind] = []
    for step in range(steps(1500)):
        if step % steps(150) == 0:
            curves[kind].append((step, exact_loss(model, validation[:20_000])))
        idx, targets = draw_batch(training, Config.block_size, Config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    curves[kind].append((step + 1, exact_loss(model, validation[:20_000])))
    losses[kind] = exact_loss(model, validation)
    print(f"{kind:4}  validation loss after {step + 1} steps {losses[kind]:.3f}")

# %%
figure, axes = plt.subplots(figsize=(8, 3.6))
for kind, style in zip(colours, (":", "-", "--"), strict=True):
    axes.plot(*zip(*curves[kind], strict=True), color=colours[kind], linestyle=style, linewidth=2)
axes.annotate("pre (line)", (steps(300), 2.6), color=BLUE)
axes.annotate("post (dashes)", (steps(300), 2.69), color=ORANGE)
axes.annotate("none (dots)", (steps(300), 2.78), color=GREY)
axes.set(xlabel="training steps", ylabel="loss (nats per character)", ylim=(2.1, 3.2))
plt.show()

# %% [markdown]
# Three blocks are too few to need help: from step 300 on the three curves lie almost on top of each
# other, and at the end pre and post are about 0.01 below the model with no norm.
#
# Is pre better than post, then? Not here. Over three seeds of the script's full training of 5000
# steps, `python layer_norm.py` came to 2.065 ± 0.003 and `python layer_norm.py --norm post` to
# 2.071 ± 0.008. The difference is smaller than the spread: in a stack of three, at this learning
# rate, there is none that you could rely on.
#
# What training made of the sizes:

# %%
idx, targets = draw_batch(training, 8, 256, torch.Generator().manual_seed(1))  # (B, T) both
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True)
for panel, trained in zip(axes, (False, True), strict=True):
    for kind, model in models.items():
        found = [size(x) for x in states(model if trained else make(kind), idx)]
        panel.plot(found, color=colours[kind], marker="o")
        shift = 0.15 if kind == "none" and not trained else 0  # keep the words apart
        panel.annotate(kind, (3.1, found[-1] + shift), color=colours[kind], va="center")
    panel.set(title="after training" if trained else "before", xlabel="number of blocks so far")
    panel.set(xlim=(-0.2, 3.6), xticks=range(4))
axes[0].set(ylabel="size", ylim=(0, None))
plt.show()

# %% [markdown]
# Training makes the blocks speak up: without norms the sum more than doubles on its way. In pre it
# grows as well, but only the sum: every part reads it through its norm. In post the inner states
# stay near 1. That the last one is larger is wanted by the model: only gain and bias can do it.
#
# So look at the gains of the pre model. All began at 1, on the dashed line.

# %%
figure, axes = plt.subplots(figsize=(8, 3.2))
norms = [(name, m) for name, m in models["pre"].named_modules() if isinstance(m, nn.LayerNorm)]
labels = []
for i, (name, norm) in enumerate(norms):
    gains = norm.weight.detach()  # (C)
    axes.plot(gains, torch.full_like(gains, i), "o", color=BLUE, alpha=0.4)
    label = name.removesuffix("_norm").replace("_", "-").replace("final", "lm_head")
    labels.append(label.replace("blocks.", "block ").replace(".", ", "))
axes.axvline(1, color=GREY, linestyle="--")
axes.set_yticks(range(len(norms)), labels)
axes.invert_yaxis()
axes.set(xlabel="gain of a channel (a dot each)", ylabel="norm in front of")
plt.show()

# %% [markdown]
# A dot is a channel. Most gains have grown a little, those in front of the logits the most: larger
# logits are how a model says that it is sure. Within a row they spread: some channels are turned
# up more than others.
#
# ## What it buys: longer strides
#
# Where depth and learning rate are small, the model of the last notebook does well without norms.
# Ask for more: six blocks, and a learning rate of 0.03, thirty times that of the script.
#
# **Predict before you run the next cell:** which of the three learns, and what may happen to the
# others?

# %%
strides = {}
for kind in colours:
    model = make(kind, n_layer=6)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, fused=True)
    strides[kind] = []
    for _ in range(steps(200)):
        idx, targets = draw_batch(training, Config.block_size, Config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        strides[kind].append(loss.item())
    print(f"{kind:4}  size after the last block {size(states(model, idx)[-1]):.3g}")

frequencies = torch.bincount(training, minlength=V) / len(training)  # (V)
unigram = -torch.xlogy(frequencies, frequencies).sum().item()
print(f"loss of a model that knows only how often each character occurs: {unigram:.2f}")

# %%
figure, axes = plt.subplots(figsize=(8, 3.6))
for kind, batches in strides.items():
    axes.plot(batches, color=colours[kind], linewidth=1.5)
axes.axhline(unigram, color=GREEN, linestyle="--")
words = "dashed: knows only how often each character occurs"
axes.annotate(words, (steps(60), unigram + 0.9), color=GREEN)
axes.annotate("none", (steps(13), 5.5), color=GREY)
axes.annotate("post", (steps(170), unigram + 0.3), color=ORANGE)
axes.annotate("pre", (steps(170), 2.1), color=BLUE)
axes.set(xlabel="training steps", ylabel="loss of each batch", ylim=(1.9, 7))
plt.show()

# %% [markdown]
# With no norm the loss leaves the picture, for good after about ten steps: each part reads what the
# last one made too large, answers with something larger still, and the size printed above has lost
# all measure. Pre learns. Its sum has become large, too, but no part sees that.
#
# Post does not run away, yet it stays about where a model is that ignores the context. Norms on
# the straight way need a gentler start: a **warm-up**, a learning rate that begins near 0 and rises
# over the first steps. Here is post at a third of that learning rate, without and with one.

# %%
for warm_up in (1, steps(200)):
    model = make("post", n_layer=6)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for step in range(steps(300)):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1, (step + 1) / warm_up)
        idx, targets = draw_batch(training, Config.block_size, Config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rising over {warm_up:3} steps: validation loss {exact_loss(model, validation):.2f}")

# %% [markdown]
# Without, it is stuck as before; with a warm-up the same model learns. Pre needed none. That is one
# reason why deep models put the norm in front, and why it is the default here.
#
# ## Sampling
#
# The pre model after its 1500 steps:

# %%
print("".join(generate(models["pre"], tokenizer, length=250)))

# %% [markdown]
# ## The script
#
# `layer_norm.py` is the classes above and this function, the same as in all stages before.


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
# ### 1 · Catch a look ahead
#
# Write a test for any layer: does it let an earlier place see a later one? Take `x`, `(B, T, C)`,
# change the vector at the last place of row 0, and say whether the result at any **earlier** place
# of row 0 has changed. Leave `x` itself as it was.


# %% tags=["exercise"]
def looks_ahead(layer: Callable[[Tensor], Tensor], x: Tensor) -> bool: ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    x = torch.randn(3, 5, C, generator=torch.Generator().manual_seed(1))  # (B, T, C)
    before = x.clone()
    layer_says = given(looks_ahead(nn.LayerNorm(C), x))
    assert torch.equal(x, before), "x has changed: work on x.clone()"
    assert not layer_says, (
        "it accuses layer normalisation: the place that you changed may change, and only the "
        "places before it count"
    )
    batch_says = looks_ahead(BatchNormOverTime(C), x)
    assert batch_says, "it misses the leak of batch normalisation over time"
    backwards = looks_ahead(lambda x: x.flip(1).cumsum(1).flip(1), x)
    assert backwards, "it misses a sum over all that comes later"
    assert not looks_ahead(lambda x: x.cumsum(1), x), "a sum over what came before is no leak"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def looks_ahead(layer: Callable[[Tensor], Tensor], x: Tensor) -> bool:
#     changed = x.clone()
#     changed[0, -1] += 1 + torch.rand(x.shape[-1])
#     return not torch.allclose(layer(x)[0, :-1], layer(changed)[0, :-1])
# ```
#
# Why not add the same number to all channels? Layer normalisation would take it off again, and
# the test could no longer tell a layer that looks ahead behind such a norm.
#
# </details>
#
# ### 2 · Fold the gain away
#
# In a pre block a linear layer follows each norm. Once the training is over, gain and bias can go
# into that layer (give it a bias if it has none): find `weight` and `bias` such that `F.linear(x̂,
# weight, bias)` gives what `linear(norm(x))` gave, where x̂ is normalised only, with no gain and no
# bias.


# %% tags=["exercise"]
def fold(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]: ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    torch.manual_seed(1)
    norm, linear, x = nn.LayerNorm(6), nn.Linear(6, 6), torch.randn(4, 6)
    nn.init.uniform_(norm.weight, 0.5, 2)
    wanted = linear(norm(x))
    weight, bias = given(fold(norm, linear))
    assert torch.allclose(wanted, linear(norm(x))), "leave norm and linear as they were"
    assert tuple(weight.shape) == (6, 6), f"weight has the shape {tuple(weight.shape)}, not (6, 6)"
    wrong_side = linear.weight * norm.weight[:, None]
    assert not torch.allclose(weight, wrong_side), (
        "that scales what comes out of the linear layer; the gain scales what goes in: the "
        "columns of its weight"
    )
    off = (F.linear(hand_layer_norm(x), weight, bias) - wanted).abs().max()
    assert off < 1e-4, f"without a bias in the norm already, the results differ by {off:.2f}"
    nn.init.uniform_(norm.bias, -1, 1)
    weight, bias = fold(norm, linear)
    off = (F.linear(hand_layer_norm(x), weight, bias) - linear(norm(x))).abs().max()
    assert off < 1e-4, (
        f"with a bias in the norm the results differ by {off:.2f}: it goes through the weight of "
        "the linear layer, as it was before you scaled it"
    )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def fold(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
#     weight = linear.weight * norm.weight  # the gain of channel c scales column c
#     bias = linear.bias + linear.weight @ norm.bias
#     return weight, bias
# ```
#
# So gain and bias add nothing that linear layers with a bias could not say without them. They are
# there for the training.
#
# </details>
#
# ### 3 · One idea from a paper: RMSNorm
#
# Zhang and Sennrich asked in 2019 whether the mean must be taken off at all
# ([Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467)). They only divide, by
# the root of the mean square, and keep the gain:
#
# $$y_c = \gamma_c \, \frac{x_c}{\sqrt{\frac{1}{C} \sum_{i=1}^{C} x_i^2 + \varepsilon}}$$


# %% tags=["exercise"]
def rms_norm(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    torch.manual_seed(1)
    x, gain, ones = torch.randn(3, 4, 8) * 2 + 1, torch.rand(8) + 0.5, torch.ones(8)
    plain = given(rms_norm(x, ones))
    assert plain.shape == x.shape, f"the shape is {tuple(plain.shape)}, not {tuple(x.shape)}"
    assert plain.mean(dim=-1).abs().max() > 1e-3, "the mean is gone: this norm leaves it in"
    sizes = plain.square().mean(dim=-1).sqrt()  # (B, T)
    assert torch.allclose(sizes, torch.ones(3, 4), atol=1e-3), (
        f"the first position's root mean square is {sizes[0, 0]:.2f}, not 1: divide by the root of "
        "the mean of x², over the last dimension; a variance takes the mean off first"
    )
    assert rms_norm(torch.zeros(1, 8), ones).isfinite().all(), "zeros give nan: where is eps?"
    small = x / 1000
    same = torch.allclose(rms_norm(small, ones), F.rms_norm(small, (8,), ones, 1e-5), atol=1e-4)
    assert same, "for small numbers eps is in the wrong place: add it inside the root"
    same = torch.allclose(rms_norm(x, gain), F.rms_norm(x, (8,), gain, 1e-5), atol=1e-5)
    assert same, "without a gain it is right; multiply each channel by its own"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rms_norm(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
#     mean_square = x.square().mean(dim=-1, keepdim=True)
#     return gain * x / (mean_square + eps).sqrt()
# ```
#
# To put it into the model, make a module of it that holds the gain as an `nn.Parameter` of C ones.
# Then write that module wherever `Block` and `Model` say `nn.LayerNorm`.
#
# </details>
#
# The next cell does so with your function, and trains both kinds for 500 steps.


# %%
class RMSNorm(nn.Module):
    """Your rms_norm, with a gain that is learnt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain)


def exchange_norms(module: nn.Module) -> None:
    for name, part in module.named_children():
        if isinstance(part, nn.LayerNorm):
            setattr(module, name, RMSNorm(part.normalized_shape[0]))
        exchange_norms(part)


if rms_norm(torch.ones(1, C), torch.ones(C)) is None:
    print("This comparison waits for exercise 3.")
else:
    for name in ("LayerNorm", "RMSNorm"):
        model = make("pre")
        if name == "RMSNorm":
            exchange_norms(model)
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=Config.learning_rate, fused=True)
        for _ in range(steps(500)):
            idx, targets = draw_batch(training, Config.block_size, Config.batch_size, generator)
            logits, loss = model(idx, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:9} {count:,} parameters, loss {exact_loss(model, validation):.3f}")

# %% [markdown]
# ### 4 · Teach it to add
#
# This model reads any text, sums too. Write `a+b=c` with `n` digits for a and b and `n + 1` for c,
# zeros in front. Turn the digits of c round, since one adds from the last digit on: `07+05=210`
# says 7 + 5 = 012.
#
# Return `idx` and `targets` for a batch of sums. As always `targets` are moved by one. But the
# model shall not learn to guess the question: wherever the next character still belongs to the
# prompt, up to and with the `=`, the target is -100, which `F.cross_entropy` leaves out.

# %%
sums = Tokenizer("0123456789+=")
print(sums.encode("07+05=210"))


# %% tags=["exercise"]
def addition_batch(a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor]: ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    a, b = torch.tensor([12, 7, 99]), torch.tensor([34, 5, 1])
    idx, targets = given(addition_batch(a, b, 2))
    assert tuple(idx.shape) == tuple(targets.shape) == (3, 8), (
        f"idx has the shape {tuple(idx.shape)}, targets {tuple(targets.shape)}, not (3, 8) both: a "
        "sum has 9 characters, the last is never read and the first never predicted"
    )
    read = [sums.decode(row) for row in idx.tolist()]
    assert read[1][:6] == "07+05=", f"the second prompt is {read[1][:6]!r}, not '07+05='"
    assert read[0][6:] != "04", "the digits of c stand as one reads them: turn them round"
    assert read[1][6:] == "21", f"7 + 5 = 012, turned round 210, but idx ends in {read[1][6:]!r}"
    assert read[2][6:] == "00", f"99 + 1 = 100, turned round 001, but idx ends in {read[2][6:]!r}"
    asked = targets != -100  # (B, T)
    assert not asked.all(), "nothing is masked: set targets to -100 where the prompt is predicted"
    first = int(asked[0].int().argmax())
    assert first != 6, "the first digit of c is masked: it is the target at the place of the ="
    assert first == 5, f"the first target that counts is at place {first}, not at 5"
    assert asked[:, 5:].all(), "the digits of c must not be masked"
    assert not asked[:, :5].any(), "the prompt must be masked in every row"
    assert not torch.equal(targets[:, 6:], idx[:, 6:]), "targets are not moved by one"
    answers = [sums.decode(row) for row in targets[:, 5:].tolist()]
    assert answers == ["640", "210", "001"], f"the targets say {answers}"
    shape = tuple(addition_batch(a[1:2], b[1:2], 1)[0].shape)
    assert shape == (1, 5), f"with one digit idx has the shape {shape}, not (1, 5)"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def addition_batch(a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor]:
#     texts = [
#         f"{x:0{n}}+{y:0{n}}=" + f"{x + y:0{n + 1}}"[::-1]
#         for x, y in zip(a.tolist(), b.tolist(), strict=True)
#     ]
#     rows = torch.tensor([sums.encode(text) for text in texts])
#     idx, targets = rows[:, :-1], rows[:, 1:].clone()
#     targets[:, : 2 * n + 1] = -100
#     return idx, targets
# ```
#
# </details>
#
# The next cells train the model of this notebook on sums of two digits, a little wider than above,
# if the exercise is solved. A tenth of the 10,000 sums is kept back for the test.

# %%
order = torch.randperm(10_000, generator=torch.Generator().manual_seed(1))
held_out, to_learn = order[:1000], order[1000:]  # a sum's number is 100 a + b
adds = addition_batch(torch.tensor([1]), torch.tensor([2]), 2) is not None
if adds:
    torch.manual_seed(1)
    adder = Model(Config(vocab_size=12, n_embd=48, batch_size=64, learning_rate=3e-3))
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(adder.parameters(), lr=3e-3, fused=True)
    for _ in range(steps(1000)):
        drawn = to_learn[torch.randint(len(to_learn), (64,), generator=generator)]  # (B)
        idx, targets = addition_batch(drawn // 100, drawn % 100, 2)  # (B, T) both
        logits, loss = adder(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss of the last batch {loss.item():.3f}")
else:
    print("The training waits for exercise 4.")

# %%
if adds:
    a, b = held_out // 100, held_out % 100
    idx, _ = addition_batch(a, b, 2)  # (B, T)
    written = idx[:, :6]  # (B, T): the prompts
    for _ in range(3):
        logits, _ = adder(written)  # (B, T, V)
        written = torch.cat([written, logits[:, -1:].argmax(dim=-1)], dim=1)
    right = 0
    for x, y, row in zip(a.tolist(), b.tolist(), written.tolist(), strict=True):
        right += sums.decode(row[6:])[::-1] == f"{x + y:03}"
    for row in written[:5].tolist():
        print(sums.decode(row))
    print(f"{right} of {len(held_out)} sums that it has never seen are right")
else:
    print("The test waits for exercise 4.")

# %% [markdown]
# Once it is solved, see how much the turning round was worth: take it out of your function (the
# check will then complain) and run these two cells again. The test must then compare without
# `[::-1]`.
#
# [The last notebook](07_gpt.ipynb) makes it a GPT: larger, and trained with care.
