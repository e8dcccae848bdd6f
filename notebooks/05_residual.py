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
# # 5 · Residual connections
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/character-gpt/course/blob/main/notebooks/05_residual.ipynb)
#
# Attention and feed-forward, as in [the notebook before](04_feed_forward.ipynb), become a
# **block**, and blocks are stacked. That works only with a small trick: each part adds its result
# to its input instead of replacing it. After this notebook you can
#
# - say what goes wrong in a deep stack without the additions, and show it in two learning curves;
# - explain why a sum lets the gradient through, and measure how much of it arrives in each block;
# - read the residual stream: what each part writes to it, and what the model would say if it
#   stopped there;
# - take a trained model apart, block by block, and say what each is worth.

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
from dataclasses import dataclass
from typing import Annotated

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
validation = validation[: len(validation) // 4]
tokenizer = Tokenizer(corpus.vocabulary)
V = len(corpus.vocabulary)
print(f"{V} characters, {len(training):,} to train on, {len(validation):,} to validate with")

# %% [markdown]
# Six models will be trained and evaluated often, so a quarter of the validation text has to do.
#
# ## A block, and a stack of them
#
# Two settings are new. `n_layer` says how many blocks there are, `residual` whether they add. A
# course model adds; the switch is there so that you can see what happens otherwise.


# %%
@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 8  # T: context length, in characters
    n_embd: int = 32  # C: embedding dimension (channels per character)
    n_head: Annotated[int, Divides("n_embd")] = 4  # H: attention heads, each of size D = C/H
    n_layer: int = 3  # number of blocks
    residual: bool = True  # skip connections around attention and feed-forward
    batch_size: int = 32  # B: sequences per training step
    max_iters: int = 5000  # training steps
    eval_interval: int = 500  # steps between evaluations
    learning_rate: float = 1e-3  # AdamW's step size; bigram.py's 1e-2 is too large for deep models


# %% [markdown]
# Attention and the feed-forward network are those of the last stages.


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
# Here is the new idea, in two lines of `forward`. Both parts return vectors of `C` channels, the
# same shape that they were given. So results can be added to inputs, and the output of one block
# can be the input of the next.


# %%
class Block(nn.Module):
    """Attention, then feed-forward; each adds its output to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.residual = config.residual
        self.attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        if not self.residual:
            return self.feed_forward(self.attention(x))
        x = x + self.attention(x)
        x = x + self.feed_forward(x)
        return x


# %% [markdown]
# And the model: where there was one attention and one feed-forward, there are `n_layer` blocks.


# %%
class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.blocks(x)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# %% [markdown]
# An addition has no weights. Both kinds of model have the same numbers to learn.

# %%
for residual in (True, False):
    model = Model(Config(vocab_size=V, residual=residual))
    print(f"residual={residual!s:5}: {sum(p.numel() for p in model.parameters()):,} weights")

# %% [markdown]
# What does an addition do to a vector? Take a fresh block and look at one position: 32 channels go
# in and 32 come out.

# %%
torch.manual_seed(1)
config = Config(vocab_size=V)
block, x = Block(config), torch.randn(1, 8, config.n_embd)  # x (B, T, C)
added = block(x)
block.residual = False
replaced = block(x)
figure, axes = plt.subplots(figsize=(8, 3))
for values, colour in ((x, GREY), (added, BLUE), (replaced, ORANGE)):
    axes.plot(values[0, -1].detach(), color=colour, marker="o", markersize=4)
for height, label, colour in (
    (1, "input", GREY),
    (0.92, "added", BLUE),
    (0.84, "replaced", ORANGE),
):
    axes.text(1.01, height, label, color=colour, transform=axes.transAxes, va="top")
axes.set(xlabel="channel", ylabel="value at the last position")
plt.show()

# %% [markdown]
# Blue stays close to grey: a fresh block that adds passes its input on and changes it a little.
# Orange is almost flat: what a fresh block puts in its input's place is small, and most of what the
# input said is gone.
#
# ## Depth without additions
#
# The training lines are those of every stage. They are in a function here, because six models are
# to be trained: one, three and six blocks, with and without additions.


# %%
def train(config: Config) -> tuple[Model, list[tuple[int, float]]]:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    model = Model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    evaluations = []
    for step in range(steps(1500)):
        if step % steps(150) == 0:
            evaluations.append((step, exact_loss(model, validation)))
        idx, targets = draw_batch(training, config.block_size, config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    evaluations.append((step + 1, exact_loss(model, validation)))
    return model, evaluations


# %% [markdown]
# **Predict before you run the next cell:** two models of three blocks, the same weights at the
# start, the same batches. One adds, one replaces. Which begins with the lower loss, which ends with
# the lower one, and how far apart?

# %%
trained, curves = {}, {}
for residual in (True, False):
    trained[3, residual], curves[3, residual] = train(Config(vocab_size=V, residual=residual))
    (_, first), *_, (_, last) = curves[3, residual]
    print(f"residual={residual!s:5}: first {first:.3f}, last {last:.3f}")

# %% [markdown]
# To judge these numbers: what would a model reach that has not looked at any context, and only
# knows how often each character occurs?

# %%
counts = torch.bincount(training.long(), minlength=V) + 1
frequency_loss = -(counts / counts.sum()).log()[validation.long()].mean().item()
print(f"frequencies alone: {frequency_loss:.3f} nats per character")

# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
for residual, colour, label in ((True, BLUE, "added"), (False, ORANGE, "replaced")):
    axes.plot(*zip(*curves[3, residual], strict=True), color=colour, marker="o", linewidth=2)
    at, height = curves[3, residual][-1]
    axes.text(at * 1.02, height, label, color=colour, va="center")
axes.axhline(frequency_loss, color=GREY, linestyle="--")
axes.text(at, frequency_loss + 0.05, "frequencies alone", color=GREY, ha="right")
axes.set(xlabel="training steps", ylabel="validation loss (nats per character)")
plt.show()

# %% [markdown]
# The orange curve gets a little below the dashed line and then hardly moves for hundreds of steps,
# before it finds more. The blue one is far below it by then. At the start blue was the worse of the
# two: its logits are larger, because everything adds up, and it is sure of wrong things.
#
# **Predict:** a single block, and six. Does depth help where blocks add? Where they replace?

# %%
for n_layer in (1, 6):
    for residual in (True, False):
        config = Config(vocab_size=V, n_layer=n_layer, residual=residual)
        trained[n_layer, residual], curves[n_layer, residual] = train(config)
depths = (1, 3, 6)
print("blocks      " + "".join(f"{n_layer:8}" for n_layer in depths))
for residual, label in ((True, "added"), (False, "replaced")):
    losses = [curves[n_layer, residual][-1][1] for n_layer in depths]
    print(f"{label:12}" + "".join(f"{loss:8.3f}" for loss in losses))

# %%
figure, axes = plt.subplots(figsize=(6, 3.4))
for residual, colour, label in ((True, BLUE, "added"), (False, ORANGE, "replaced")):
    losses = [curves[n_layer, residual][-1][1] for n_layer in depths]
    axes.plot(depths, losses, color=colour, marker="o", linewidth=2)
    axes.text(6.15, losses[-1], label, color=colour, va="center")
axes.axhline(frequency_loss, color=GREY, linestyle="--")
axes.text(1, frequency_loss + 0.04, "frequencies alone", color=GREY)
axes.set_xticks(depths)
axes.set(xlabel="blocks", ylabel="loss after the training")
plt.show()

# %% [markdown]
# Blue falls with depth, orange rises: six blocks that replace have learnt little more than the
# frequencies. It is not that they have too few weights, for they have the same number as the six
# that add. They do not find good values for them.
#
# ## The gradient on its way down
#
# A weight learns from its gradient, and the gradient begins at the loss. To reach the first block
# it has to come through all the others. Measure what arrives, before the first step.


# %%
def gradient_by_block(config: Config) -> list[float]:
    torch.manual_seed(1)
    model = Model(config)
    generator = torch.Generator().manual_seed(1)
    idx, targets = draw_batch(training, config.block_size, 256, generator)
    _, loss = model(idx, targets)
    loss.backward()
    squares = [[p.grad.square().sum() for p in block.parameters()] for block in model.blocks]
    return [sum(each).sqrt().item() for each in squares]


# %% [markdown]
# **Predict:** three, six and twelve blocks, none of them trained. How much smaller than in the last
# block is the gradient in the first?

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, width_ratios=(3, 4.5, 8))
for panel, n_layer in zip(axes, (3, 6, 12), strict=True):
    for residual, colour in ((True, BLUE), (False, ORANGE)):
        sizes = gradient_by_block(Config(vocab_size=V, n_layer=n_layer, residual=residual))
        panel.semilogy(range(1, n_layer + 1), sizes, color=colour, marker="o")
        label = "added" if residual else "replaced"
        print(f"{n_layer:2} blocks, {label:8}: first {sizes[0]:.1e}, last {sizes[-1]:.1e}")
    panel.set_xticks(range(1, n_layer + 1))
    panel.set(title=f"{n_layer} blocks", xlabel="block")
    panel.grid(axis="y", alpha=0.3)
axes[2].text(6, 30, "added", color=BLUE)
axes[2].text(6, 1e-10, "replaced", color=ORANGE)
axes[0].set(ylabel="size of the gradient", ylim=(1e-15, 1e4))
plt.show()

# %% [markdown]
# The axis is logarithmic: a straight line is a factor per block. Where parts replace, each block
# passes on about a tenth of the gradient, and with twelve blocks the first gets next to nothing.
# Where they add, all blocks get about the same.
#
# ### Why: a sum lets the gradient through
#
# Begin with the smallest sum there is.

# %%
a = torch.tensor(2.0, requires_grad=True)
b = torch.tensor(3.0, requires_grad=True)
(a + b).backward()
print(f"gradient of a + b: {a.grad.item()} for a, {b.grad.item()} for b")

# %% [markdown]
# Each summand gets the whole gradient. So in $x + f(x)$ it goes two ways: through $f$, and past it.
#
# $$\frac{d}{dx}\, f(x) = f'(x) \qquad \frac{d}{dx}\, \bigl(x + f(x)\bigr) = 1 + f'(x)$$
#
# A chain of blocks multiplies what its links have. If all slopes $f'$ are 0.1 and there are twelve:

# %%
for residual, label in ((True, "added"), (False, "replaced")):
    start = x = torch.tensor(1.0, requires_grad=True)
    for _ in range(12):
        x = x + 0.1 * x if residual else 0.1 * x
    x.backward()
    print(f"{label:8}: {start.grad.item():.3g}")

# %% [markdown]
# These are $1.1^{12}$ and $0.1^{12}$. Multiply out two links and you see where the gradient goes:
#
# $$(1 + f_1')(1 + f_2') = 1 + f_1' + f_2' + f_1' f_2'$$
#
# Four ways through two links: past both, through one, through the other, through both. Without
# additions only the last is there, the smallest. Twelve blocks have 24 parts, and $2^{24}$ ways;
# one of them, the 1, meets no weight at all. With vectors a slope is a matrix and the 1 is the
# identity, but the sum is the same.
#
# ### The same on the way up
#
# AdamW divides each gradient by its usual size. Does that not mend small gradients? In part, down
# to a floor of $10^{-8}$. But the way forward has the same links. Ask how much the vectors still
# differ between places of the text: a model that gives all places the same vector cannot give them
# different predictions. (In 64-bit numbers, as 32 bits would round the smallest differences away.)


# %%
def embed(model: Model, idx: Tensor) -> Tensor:
    positions = torch.arange(idx.shape[1])  # (T)
    return model.token_embedding(idx) + model.position_embedding(positions)  # (B, T, C)


@torch.no_grad()
def spread_by_block(config: Config) -> list[float]:
    torch.manual_seed(1)
    model = Model(config).double()
    idx, _ = draw_batch(training, config.block_size, 256, torch.Generator().manual_seed(1))
    x = embed(model, idx)  # (B, T, C)
    spreads = []
    for block in [nn.Identity(), *model.blocks]:
        x = block(x)  # (B, T, C)
        spreads.append((x - x.mean(dim=(0, 1))).norm(dim=-1).mean().item())
    return spreads


# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
for residual, colour, label in ((True, BLUE, "added"), (False, ORANGE, "replaced")):
    spreads = spread_by_block(Config(vocab_size=V, n_layer=12, residual=residual))
    axes.semilogy(spreads, color=colour, marker="o")
    axes.text(12.3, spreads[-1], label, color=colour, va="center")
    print(f"{label:8}: embedding {spreads[0]:.1e}, after block 12 {spreads[-1]:.1e}")
axes.set_xticks(range(13), ["in", *range(1, 13)])
axes.set(xlabel="after block", ylabel="distance from the mean vector")
axes.grid(axis="y", alpha=0.3)
plt.show()

# %% [markdown]
# Where parts replace, the differences between places shrink block by block until hardly anything is
# left: whatever the text says, nearly the same vector comes out at the top. From there a model can
# learn little more than the frequencies, and for long the orange curve did just that. An optimizer
# can enlarge a gradient, but not bring back what the vectors no longer say.
#
# Blue grows a little instead, since every part adds. In a very deep model this becomes a problem of
# its own, and [the next notebook](06_layer_norm.ipynb) deals with it.
#
# ## The residual stream
#
# Look at the model of additions in another way. From the embedding to `lm_head` there is one
# vector per position, the **stream**. A part reads it, works out something and writes that back, as
# a sum. Nothing is ever replaced:
#
# $$x_\text{last} = x_\text{embedding} + \text{attention}_1 + \text{feed-forward}_1 + \dots$$
#
# From here on we look at the trained model of six blocks. This function notes all that is written
# and the stream after each writing.


# %%
@torch.no_grad()
def read_stream(model: Model, idx: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    x = embed(model, idx)  # (B, T, C)
    written, stream = [x], [x]
    for block in model.blocks:
        for part in (block.attention, block.feed_forward):
            written.append(part(x))  # (B, T, C)
            x = x + written[-1]  # (B, T, C)
            stream.append(x)
    return written, stream


# %%
model = trained[6, True].eval()
n_layer = len(model.blocks)
idx, targets = draw_batch(validation, 8, 2000, torch.Generator().manual_seed(1))
written, stream = read_stream(model, idx)
logits, _ = model(idx)  # (B, T, V)
names = ["embedding"]
names += [f"{part} {i}" for i in range(1, n_layer + 1) for part in ("attention", "feed-forward")]
difference = (model.lm_head(sum(written)) - logits).abs().max().item()
print(f"{len(written)} summands; their sum gives the logits of the model: {difference < 1e-3}")

# %% [markdown]
# How much does each write? The size of a vector is its length, here the mean over all positions.

# %%
sizes = [x.norm(dim=-1).mean().item() for x in written]
stream_sizes = [x.norm(dim=-1).mean().item() for x in stream]
kinds = [GREY] + [BLUE, GREEN] * n_layer
figure, axes = plt.subplots(figsize=(9, 3.8))
axes.bar(range(len(sizes)), sizes, color=kinds)
axes.plot(stream_sizes, color=ORANGE, marker="o")
axes.text(len(sizes) - 0.7, stream_sizes[-1], "the stream\nso far", color=ORANGE, va="center")
for place, (label, colour) in enumerate((("attention", BLUE), ("feed-forward", GREEN))):
    axes.text(0, max(stream_sizes) * (0.95 - 0.09 * place), f"■ {label}", color=colour)
middles = [0] + [2 * i + 1.5 for i in range(n_layer)]
axes.set_xticks(middles, ["embedding"] + [f"block {i + 1}" for i in range(n_layer)])
axes.tick_params(axis="x", length=0)
axes.set(xlabel="written by", ylabel="mean length")
plt.show()

# %% [markdown]
# No part outweighs the rest: apart from the embedding, each bar is less than half of the line above
# it. The last blocks write the most, and the stream grows with them, but by less than the length of
# what is added: the vectors point in different directions, and a part may also take away.
#
# ## If the model stopped here
#
# `lm_head` reads the last stream. Since all streams have the same channels, it can also read an
# earlier one: what would the model say if it stopped here? This is called the **logit lens**.
#
# **Predict:** draw the loss by depth, from the bare embedding to the last block. Does it fall
# evenly?

# %%
with torch.no_grad():
    lens = [model.lm_head(x) for x in stream]  # (B, T, V) each
lens_losses = [F.cross_entropy(each.flatten(0, 1), targets.flatten()).item() for each in lens]
figure, axes = plt.subplots(figsize=(9, 3.6))
axes.plot(lens_losses, color=ORANGE, linewidth=1.5)
axes.scatter(range(len(lens_losses)), lens_losses, color=kinds, zorder=3, s=45)
axes.axhline(frequency_loss, color=GREY, linestyle="--")
axes.text(len(names) - 1, frequency_loss + 0.05, "frequencies alone", color=GREY, ha="right")
axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
axes.set(xlabel="read after", ylabel="loss (nats per character)")
plt.show()
for name, loss in zip(names, lens_losses, strict=True):
    print(f"{name:14} {loss:.3f}")

# %% [markdown]
# It falls step by step, and no single part does the work. At the bottom it is worse than the
# frequencies alone: the embedding says what *is* there, and `lm_head` was only ever trained to
# read the top. Most feed-forwards (green) bring it down by more than the attention (blue) before
# them, but they can only work on what the attention has fetched.
#
# The same for one position: the place among all these where the model has gained most on the way
# from the bottom to the top.

# %%
right = [F.log_softmax(each, dim=-1).gather(2, targets[..., None])[..., 0] for each in lens]
gain = right[-1] - right[0]  # (B, T)
row, place = divmod(gain.argmax().item(), gain.shape[1])
context = tokenizer.decode(idx[row, : place + 1].tolist())
print("context:", "".join(visible(context)))
print("next:   ", visible(tokenizer.decode([targets[row, place].item()]))[0])

# %%
top = [F.softmax(each[row, place], dim=-1).topk(5) for each in lens]
shades = torch.stack([values for values, _ in top])  # (13, 5)
figure, axes = plt.subplots(figsize=(7, 5.6))
axes.imshow(shades, cmap="cividis", aspect="auto", vmin=0, vmax=1)
for depth, (values, indices) in enumerate(top):
    labels = visible(tokenizer.decode(indices.tolist()))
    for i, (value, label) in enumerate(zip(values.tolist(), labels, strict=True)):
        ink = "white" if value < 0.5 else "black"
        axes.text(i, depth, f"{label}   {value:.2f}", color=ink, ha="center", va="center")
axes.set_yticks(range(len(names)), names)
axes.set_xticks(range(5), ["1st", "2nd", "3rd", "4th", "5th"])
axes.set(xlabel="most likely next character", ylabel="read after")
axes.tick_params(length=0)
plt.show()

# %% [markdown]
# At the bottom no character stands out. Further up some guess takes the lead, often another one
# than at the end, and only the last blocks settle on what is right. You see the model change its
# mind, one addition after the other.
#
# ### Who voted for it
#
# `lm_head` is a matrix, and a matrix times a sum is the sum of the products. So the logits, too,
# are a sum, with one summand for each part: its vote. Only differences between logits count, so the
# mean over the vocabulary is taken off each vote.

# %%
with torch.no_grad():
    votes = torch.stack([model.lm_head(x[row, place]) for x in written])  # (13, V)
votes = votes - votes.mean(dim=-1, keepdim=True)
candidates = votes.sum(dim=0).topk(8).indices
labels = visible(tokenizer.decode(candidates.tolist()))
shown = votes[:, candidates]  # (13, 8)
limit = shown.abs().max().item()
figure, axes = plt.subplots(figsize=(7, 5.6))
heat_map(axes, shown, names, labels, cmap="PuOr", vmin=-limit, vmax=limit)
axes.set_aspect("auto")
for depth in range(len(names)):
    for i in range(len(labels)):
        ink = "white" if shown[depth, i].abs() > 0.6 * limit else "black"
        vote = round(shown[depth, i].item(), 1) + 0.0  # no -0.0
        axes.text(i, depth, f"{vote:+.1f}", color=ink, ha="center", va="center", fontsize=9)
axes.set(xlabel="next character, the likeliest on the left", ylabel="written by")
plt.show()

# %% [markdown]
# Violet is a vote for the character, orange one against it. A column adds up to the character's
# logit, up to a constant. Most votes here are for, since only the eight winners are shown; the
# losers would be orange. No part decides alone: the first column is a sum of many votes.
#
# ## Take a block out
#
# A block that adds can be left out: the stream goes past it, and the others read what is there.
#
# **Predict:** which of the six blocks does the model miss most? And what happens to a model that
# replaces, the one of three blocks, when one is taken out?


# %%
def losses_without(model: Model) -> list[float]:
    blocks = model.blocks
    losses = []
    for missing in range(len(blocks)):
        rest = [block for i, block in enumerate(blocks) if i != missing]
        model.blocks = nn.Sequential(*rest)
        losses.append(exact_loss(model, validation))
    model.blocks = blocks
    return losses


# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, width_ratios=(2, 1))
for panel, key, colour in ((axes[0], (6, True), BLUE), (axes[1], (3, False), ORANGE)):
    whole = curves[key][-1][1]
    losses = losses_without(trained[key])
    panel.bar(range(1, len(losses) + 1), losses, color=colour)
    panel.axhline(whole, color="black", linewidth=1)
    panel.text(len(losses) + 0.8, whole, "whole", va="center")
    panel.set_xlim(0.3, len(losses) + 0.7)
    panel.axhline(frequency_loss, color=GREY, linestyle="--")
    panel.set_xticks(range(1, len(losses) + 1))
    kind = "added" if key[1] else "replaced"
    panel.set(xlabel="block taken out", title=f"{key[0]} blocks, {kind}")
    print(f"{kind:8}: whole {whole:.2f}, without one", *[f"{loss:.2f}" for loss in losses])
axes[0].text(0.6, frequency_loss + 0.08, "frequencies alone", color=GREY)
axes[0].set(ylabel="validation loss")
plt.show()

# %% [markdown]
# Where blocks add, each is missed, and none badly: the rest still read a stream that is much like
# the one they know. Where blocks replace, every block speaks a language that only the next one
# knows. Take one out and the model is worse than the frequencies alone.
#
# ## A sample
#
# Six blocks, with and without additions.

# %%
for residual, label in ((True, "added"), (False, "replaced")):
    sample = "".join(generate(trained[6, residual], tokenizer, length=200))
    print(f"--- {label} ---\n{sample}\n")

# %% [markdown]
# The first makes up words. The second draws characters about as often as they occur in the text,
# and has noticed little else; perhaps that capitals stand beside capitals.

# %% [markdown]
# ## The script
#
# `residual.py` is the classes above and the same `main` as before.
# `python residual.py --no-residual` trains the model without additions.


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
# ### 1 · The two additions
#
# Write what a block does with its input, given its two parts as functions.


# %% tags=["exercise"]
def block_forward(x: Tensor, attention: nn.Module, feed_forward: nn.Module) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    one = torch.ones(1)
    y = given(block_forward(one, lambda x: 10 * x, lambda x: 100 * x)).item()
    hints = {
        1000: "nothing is added",
        1001: "there is one addition, after both parts: each part needs its own",
        1010: "the attention replaces x: its result must be added to x",
        1011: "the feed-forward reads the attention's result alone: it must read the sum",
        1101: "add to what the attention has left in the stream, not to its input alone",
        111: "the feed-forward reads the old x: it must see what the attention has added",
        1100: "the feed-forward replaces: its result must be added to what it read",
        1110: "the first x is lost: add it before the feed-forward",
        1112: "x is added twice: after the attention it is already in the sum",
    }
    wrong = hints.get(round(y), "x, then x + attention(x) for x, then the same with feed_forward")
    assert round(y) == 1111, f"1 becomes {y:g}, not 1111: {wrong}"
    block = Block(Config())
    x = torch.randn(2, 8, 32)  # (B, T, C)
    y = block_forward(x, block.attention, block.feed_forward)
    assert torch.allclose(y, block(x), atol=1e-5), "a real block gives another result"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def block_forward(x: Tensor, attention: nn.Module, feed_forward: nn.Module) -> Tensor:
#     x = x + attention(x)
#     x = x + feed_forward(x)
#     return x
# ```
#
# </details>
#
# ### 2 · The gradient through a chain
#
# A chain of links, whose slopes $f'$ are given. A gradient of 1 comes in at the top. How much of it
# reaches the input?


# %% tags=["exercise"]
def gradient_at_input(slopes: Tensor, residual: bool) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    for slopes in (torch.tensor([0.5]), torch.tensor([0.1, -0.3, 0.2]), torch.full((12,), 0.1)):
        for residual in (False, True):
            start = x = torch.ones(1, requires_grad=True)
            for slope in slopes:
                x = x + slope * x if residual else slope * x
            x.backward()
            found = float(given(gradient_at_input(slopes, residual)))
            expected = start.grad.item()
            hint = "each link has its own 1: multiply the (1 + f')" if residual else "multiply"
            assert abs(found - expected) <= 1e-4 * abs(expected), (
                f"slopes {[round(s, 2) for s in slopes.tolist()]}, residual={residual}: "
                f"{found:.4g}, but autograd finds {expected:.4g}: {hint}"
            )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gradient_at_input(slopes: Tensor, residual: bool) -> Tensor:
#     return (1 + slopes if residual else slopes).prod()
# ```
#
# </details>
#
# ### 3 · Who wrote the last stream
#
# `written` is a list of the summands, `(B, T, C)` each. Return the share of each in their sum, so
# that all shares add up to 1. Lengths do not serve: they do not add up, since one part may undo
# what another wrote. What adds up is the component along the sum: the dot product of a summand with
# the sum, divided by the dot product of the sum with itself (both over all positions and channels).


# %% tags=["exercise"]
def shares(written: list[Tensor]) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    parts = [torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[1.0, -1.0]]]), torch.zeros(1, 1, 2)]
    found = given(shares(parts))
    assert tuple(found.shape) == (3,), f"three summands, but the shape is {tuple(found.shape)}"
    total = found.sum().item()
    assert abs(total - 1) < 1e-4, (
        f"the shares add up to {total:.2f}, not 1: use dot products with the sum, not lengths"
    )
    assert torch.allclose(found, torch.tensor([0.75, 0.25, 0.0])), f"{found} for {parts}"
    of_parts = shares(written)
    for i in range(n_layer):
        print(f"block {i + 1}: {of_parts[2 * i + 1 : 2 * i + 3].sum():.2f} of the last stream")
    print(f"embedding: {of_parts[0]:.2f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def shares(written: list[Tensor]) -> Tensor:
#     parts = torch.stack(written)  # (parts, B, T, C)
#     total = parts.sum(dim=0)  # (B, T, C)
#     return (parts * total).sum(dim=(1, 2, 3)) / total.square().sum()
# ```
#
# </details>
#
# ### 4 · A gate that starts closed
#
# Let a block begin as if it were not there: $x + g \cdot f(x)$, where $g$ is one number that is
# learnt and starts at 0. Fill in both places.


# %% tags=["exercise"]
class Gated(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.gate = ...

    def forward(self, x: Tensor) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    torch.manual_seed(1)
    gated = Gated(FeedForward(Config()))
    given(gated.gate)
    x = torch.randn(2, 8, 32)  # (B, T, C)
    y = given(gated(x))
    assert torch.equal(y, x), "at the start it must give back its input: is the gate 0?"
    assert "gate" in dict(gated.named_parameters()), (
        "an optimizer would not find the gate: make it an nn.Parameter"
    )
    assert gated.gate.numel() == 1, f"the gate has {gated.gate.numel()} numbers, not one"
    y.square().sum().backward()
    gradient = gated.gate.grad
    assert gradient is not None and gradient.abs().item() > 0, "the gate gets no gradient"
    with torch.no_grad():
        gated.gate.fill_(0.5)
        assert torch.allclose(gated(x), x + 0.5 * gated.part(x), atol=1e-5), (
            "with an open gate it must be x + g * f(x): only f(x) goes through the gate"
        )
    print(f"gradient at the start: gate {gradient.item():.2f}, ", end="")
    print(f"part {gated.part.down_proj.weight.grad.abs().max().item():.2f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# class Gated(nn.Module):
#     def __init__(self, part: nn.Module) -> None:
#         super().__init__()
#         self.part = part
#         self.gate = nn.Parameter(torch.zeros(1))
#
#     def forward(self, x: Tensor) -> Tensor:
#         return x + self.gate * self.part(x)
# ```
#
# At the first step only the gate gets a gradient: what reaches the part is multiplied by $g = 0$.
# Once the gate has opened a little, the part learns too. If you set both the gate and the part to
# 0, neither would ever move.
#
# </details>
#
# [The next notebook](06_layer_norm.ipynb) keeps the stream that a part reads at one size.
