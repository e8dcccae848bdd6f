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
# # 3 · Several heads
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/character-gpt/course/blob/main/notebooks/03_multihead_attention.ipynb)
#
# One head of attention finds one mixture of what came before. Here four small heads share the work,
# first one after the other, then all at once. After this notebook you can
#
# - say what one head cannot do, and show it with two characters;
# - follow the shapes from `(B, T, 3*C)` to `(3, B, H, T, D)` and back, without guessing;
# - show that a list of heads and all heads at once give the same numbers, and which one is faster;
# - look at what each head of a trained model looks at;
# - take a head out of the model and measure what it was worth.
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
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from trainer import Divides, Run
from common import LanguageModel, Tokenizer, draw_batch, split
from sample import generate
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GREEN, ORANGE, PINK, check, given, heat_map, plt, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

# %%
text = Path(open_corpus(None).path).read_text(encoding="utf-8")
tokenizer = Tokenizer(text)
vocabulary, V = tokenizer.vocabulary, len(tokenizer.vocabulary)
training, validation = split(torch.tensor(tokenizer.encode(text)))
print(f"{V} characters; {len(training):,} to train on, {len(validation):,} to validate with")

# %% [markdown]
# ## Why one head is not enough
#
# What comes next depends on the last two characters, and on which of them came last. So give a head
# two positions, and let it take half of each. Here are two texts with the same two characters in
# opposite order. Each position is its token vector plus its position vector, as in stage 2.

# %%
torch.manual_seed(1)
pair = "th" if set("th") <= set(vocabulary) else vocabulary[:2]
token, position = torch.randn(V, 32), torch.randn(2, 32)  # (V, C) and (T, C)
there, back = (token[tokenizer.encode(each)] + position for each in (pair, pair[::-1]))  # (T, C)

to_value = torch.randn(32, 16) / 32**0.5  # (C, D) with D = 16
half = torch.tensor([0.5, 0.5])  # (T), what the last position takes from each
mixed = [half @ (x @ to_value) for x in (there, back)]  # (D) both

# %% [markdown]
# **Predict before you run the next cell:** the two texts differ, and each position knows where it
# stands. How far apart are the two mixtures?

# %%
print(f"one head, largest difference between {pair!r} and {pair[::-1]!r}:", end=" ")
print(f"{(mixed[0] - mixed[1]).abs().max():.7f}")

# %% [markdown]
# They are the same, up to rounding. A value is a matrix times (token + position), and the head adds
# the values up: $\tfrac12 W(a + p_0) + \tfrac12 W(b + p_1)$. Swap $a$ and $b$, and the sum is the
# same. With 0.7 and 0.3 the order would leave a trace, but then one of the two is faint. Softmax
# gives a position **one** set of shares, and they add up to 1: more for one means less for another.
#
# Two heads of half the size need not share. One takes all of the first position, the other all of
# the second, and their findings are put side by side.

# %%
first, second = to_value[:, :8], to_value[:, 8:]  # (C, D) each, with D = 8
side_by_side = [torch.cat([x[0] @ first, x[1] @ second]) for x in (there, back)]  # (H*D)
rows = torch.stack([*mixed, *side_by_side])  # (4, 16)

figure, axes = plt.subplots(figsize=(8, 2.6))
names = [f"{kind}: {each}" for kind in ("one head", "two heads") for each in (pair, pair[::-1])]
heat_map(axes, rows, names, [str(i) for i in range(16)], cmap="PuOr", vmin=-2.5, vmax=2.5)
axes.axhline(1.5, color="white", linewidth=6)
axes.set(xlabel="channel of what is handed on")
plt.show()

# %% [markdown]
# The upper two rows are equal, the lower two are not: whatever comes after two heads can tell the
# texts apart. Both hand on 16 numbers.
#
# ## A list of heads
#
# The script's config has one new line, `n_head`.


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


# %% [markdown]
# The head itself is that of the notebook before, unchanged. Only its size will be smaller.


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
# Several of them in a list, their outputs concatenated, and one matrix at the end, the **output
# projection**. More about that one later.


# %%
class MultiHeadAttention(nn.Module):
    """Several heads side by side; a linear layer mixes their outputs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        head_size = config.n_embd // config.n_head
        self.heads = nn.ModuleList(Head(config, head_size) for _ in range(config.n_head))
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, H*D)
        return self.out_proj(x)  # (B, T, C)


# %% [markdown]
# Send four blocks of the text through it, one step at a time.

# %%
torch.manual_seed(1)
config = Config(vocab_size=V)
B, T, C, H = 4, config.block_size, config.n_embd, config.n_head
D = C // H
token_embedding, position_embedding = nn.Embedding(V, C), nn.Embedding(T, C)
idx, _ = draw_batch(training, T, B, torch.Generator().manual_seed(1))
x = (token_embedding(idx) + position_embedding(torch.arange(T))).detach()  # (B, T, C)

listed = MultiHeadAttention(config)
found = [head(x) for head in listed.heads]  # H times (B, T, D)
merged = torch.cat(found, dim=-1)  # (B, T, C), as H*D = C
print("x                   ", tuple(x.shape))
print("found by each head  ", *(tuple(each.shape) for each in found))
print("side by side        ", tuple(merged.shape))
print("after the projection", tuple(listed.out_proj(merged).shape))

# %% [markdown]
# What goes in has `C` channels, and so has what comes out. That is why `D` is `C / H`.
#
# **Predict before you run the next cell:** how many numbers does the attention learn with 1, 2, 4
# and 8 heads? Does it grow with `H`?

# %%
for n_head in (1, 2, 4, 8):
    attention = MultiHeadAttention(Config(n_head=n_head))
    count = sum(parameter.numel() for parameter in attention.parameters())
    print(f"H = {n_head}, D = {C // n_head:2}: {count:,} numbers")

# %% [markdown]
# More heads are not more numbers. They are the same numbers, cut differently: $H$ heads with
# matrices of $C \times C/H$ make $C \times C$ again.
#
# ## All heads at once
#
# Each head asks for three small matrix products, and a computer does one large product faster than
# twelve small ones. All twelve begin with the same `x`. So put their matrices below one another:
# one product then makes every query, key and value of every head.

# %%
torch.manual_seed(2)
qkv_proj = nn.Linear(C, 3 * C, bias=False)
together = qkv_proj(x).detach()  # (B, T, 3*C)
print(tuple(x.shape), "->", tuple(together.shape))

# %%
characters = visible(tokenizer.decode(idx[0].tolist()))
figure, axes = plt.subplots(figsize=(11, 2.2))
axes.imshow(together[0], cmap="PuOr", vmin=-2.5, vmax=2.5, aspect="auto")
axes.set_yticks(range(T), characters)
axes.set_xticks(
    [D * i + (D - 1) / 2 for i in range(3 * H)], [f"head {i % H}" for i in range(3 * H)]
)
axes.tick_params(length=0)
for i in range(1, 3 * H):
    axes.axvline(D * i - 0.5, color="black", linewidth=3 if i % H == 0 else 0.8)
for i, name in enumerate(("query", "key", "value")):
    axes.text(C * (i + 0.5), -0.9, name, ha="center")
axes.set(ylabel="character")
plt.show()

# %% [markdown]
# Block 0 of the batch: a row for each character, 96 channels across. The first third are queries,
# then keys, then values, and in each third the heads follow one another, 8 channels each. So far
# these borders are only drawn. Three steps make them real.
#
# **Step 1, cut.** `view` reads the last dimension, 96, as 3 times 4 times 8. No number moves.

# %%
cut = together.view(B, T, 3, H, D)  # (B, T, 3, H, D)
print(tuple(together.shape), "->", tuple(cut.shape))

# %% [markdown]
# **Predict before you run the next cell:** where does channel 44 lie now? Work out which third it
# is in, which head, and which channel of the head.

# %%
third, head, channel = 44 // C, 44 % C // D, 44 % D
print(f"channel 44 = {third} * {C} + {head} * {D} + {channel}")
print("is", ("a query", "a key", "a value")[third], f"of head {head}, its channel {channel}:")
print(f"{together[0, 5, 44]:.4f} and {cut[0, 5, third, head, channel]:.4f} are one number")

# %% [markdown]
# **Step 2, reorder.** A matrix product works on the last two dimensions and goes through all
# others as a batch. For attention these last two must be `T` and `D`. `permute` names, for each new
# place, the old dimension that goes there: 2 (the three kinds), 0 (`B`), 3 (`H`), 1 (`T`), 4 (`D`).

# %%
parts = cut.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
print(tuple(cut.shape), "->", tuple(parts.shape))

# %% [markdown]
# **Step 3, unpack.** The first dimension has length 3, so three names take it apart.

# %%
query, key, value = parts  # (B, H, T, D) each
print("query", tuple(query.shape), "key", tuple(key.shape), "value", tuple(value.shape))

figure, axes = plt.subplots(3, H, figsize=(8, 6.2))
for panels, part, name in zip(axes, parts, ("query", "key", "value"), strict=True):
    for h, panel in enumerate(panels):
        labels = [str(channel) for channel in range(D)]
        heat_map(panel, part[0, h], characters, labels, cmap="PuOr", vmin=-2.5, vmax=2.5)
        panel.set_title(f"{name}, head {h}", fontsize=10)
        panel.tick_params(labelsize=8)
for panel in axes[2]:
    panel.set_xlabel("channel of the head", fontsize=9)
plt.show()

# %% [markdown]
# The wide picture, cut along its lines into twelve tiles: a row of tiles for each kind, a column
# for each head. Each tile is `(T, D)`, what one head of stage 2 had.
#
# From here it is stage 2 with one more dimension in front. The heads are like the batch: computed
# at the same time, and they know nothing of each other.

# %%
mask = torch.ones(T, T, dtype=torch.bool).tril()  # (T, T)
scores = query @ key.transpose(2, 3) * D**-0.5  # (B, H, T, T)
weights = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)  # (B, H, T, T)
found = weights @ value  # (B, H, T, D)
print("scores ", tuple(scores.shape))
print("weights", tuple(weights.shape), "one mask does for all: it is stretched over B and H")
print("found  ", tuple(found.shape))

# %% [markdown]
# Now back: a position's findings lie in `H` different places, and should stand side by side.
# `transpose` brings `H` next to `D`, then the two become one dimension.

# %%
swapped = found.transpose(1, 2)  # (B, T, H, D)
merged = swapped.reshape(B, T, C)  # (B, T, C)
print(tuple(found.shape), "->", tuple(swapped.shape), "->", tuple(merged.shape))
print("head 1 is in channels 8 to 15:", torch.equal(merged[:, :, 8:16], found[:, 1]))

# %% [markdown]
# Why `reshape` and not `view`? `transpose` moves no number either, it only changes the order of
# reading. `view` can only cut and join what lies one after the other in memory, so it would refuse
# here. `reshape` copies where it must.
#
# The class of the next script, `batched_attention.py`, is these steps and nothing else. It replaces
# the list and has the same name, `MultiHeadAttention`. Here we need both, so first the list gets
# another name.

# %%
HeadList = MultiHeadAttention


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
# ### The same numbers
#
# Does it compute what the list computes? Give both the same weights. The weight of an `nn.Linear`
# has a row for each channel that comes out. The first 8 channels out are the query of head 0, so
# the first 8 rows are that head's query matrix. Then head 1's, and so on; then keys; then values.

# %%
batched = MultiHeadAttention(config)
small = [
    getattr(head, name).weight for name in ("query", "key", "value") for head in listed.heads
]  # 3*H times (D, C)
with torch.no_grad():
    batched.qkv_proj.weight.copy_(torch.cat(small))  # (3*C, C)
    batched.out_proj.load_state_dict(listed.out_proj.state_dict())
print(len(small), "matrices of", tuple(small[0].shape), "are now one of", end=" ")
print(tuple(batched.qkv_proj.weight.shape))

# %%
one_after_the_other, at_once = listed(x), batched(x)  # (B, T, C) both
print(f"numbers like         {at_once[0, 0, 0]:.4f}")
print(f"largest difference   {(one_after_the_other - at_once).abs().max():.9f}")

# %% [markdown]
# The same, up to the last digit or so of a 32-bit number: large and small products may add up in
# another order. It is one computation, written in two ways.
#
# ### The time of both
#
# So the choice is free, and speed may decide. Time a forward and a backward pass of both, in turn,
# and take the median of several rounds, since now and then something else disturbs one of them.


# %%
def milliseconds(attention: nn.Module, x: Tensor, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        attention(x).sum().backward()
    return (time.perf_counter() - began) / repeats * 1000


# %%
head_counts = [1, 2, 4, 8, 16]
medians = []
inputs = torch.randn(config.batch_size, T, C)  # (B, T, C)
for n_head in head_counts:
    both = [kind(Config(n_head=n_head)) for kind in (HeadList, MultiHeadAttention)]
    rounds = [[milliseconds(each, inputs, steps(10)) for each in both] for _ in range(9)]
    medians.append([statistics.median(times) for times in zip(*rounds, strict=True)])
    slow, fast = medians[-1]
    print(f"H = {n_head:2}: the list takes {slow / fast:.1f} times as long as all at once")

# %%
figure, axes = plt.subplots(figsize=(7, 3.2))
for times, name, color in zip(
    zip(*medians, strict=True), ("a list of heads", "all at once"), (ORANGE, BLUE), strict=True
):
    axes.plot(range(len(times)), times, color=color, marker="o", linewidth=2)
    axes.text(len(times) - 0.9, times[-1], name, color=color, va="center")
axes.set_xticks(range(len(head_counts)), head_counts)
axes.set(xlabel="H, number of heads", ylabel="ms, forward and backward", ylim=0)
axes.set_xlim(-0.2, len(head_counts) + 0.3)
plt.show()

# %% [markdown]
# Each step to the right doubles the heads. With one head there is nothing to gain. But the list
# pays for each further head with some ten small operations, and its line climbs faster. That is
# why every later script has the batched class.
#
# ## Training
#
# The rest of the model is that of stage 2.


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
# Train it four times, with 1, 2, 4 and 8 heads. All have the same number of weights and see the
# same batches; only the cut differs. This is the longest cell of the notebook.
#
# **Predict before you run the next cell:** which is best? Is 8 twice as good as 4?

# %%
models, curves = {}, {}
for n_head in (1, 2, 4, 8):
    config = Config(vocab_size=V, n_head=n_head)
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    model = Model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    curves[n_head] = []
    for step in range(steps(config.max_iters)):
        if step % steps(1000) == 0:
            curves[n_head].append((step, exact_loss(model, validation)))
        idx, targets = draw_batch(training, config.block_size, config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    curves[n_head].append((step + 1, exact_loss(model, validation)))
    models[n_head] = model
    print(f"H = {n_head}: validation loss {curves[n_head][-1][1]:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(3, 2))
colors = dict(zip(models, (ORANGE, PINK, BLUE, GREEN), strict=True))
for n_head, curve in curves.items():
    axes[0].plot(*zip(*curve[1:], strict=True), color=colors[n_head], marker="o", linewidth=2)
axes[0].set(xlabel="training steps", ylabel="validation loss (nats per character)")
axes[0].set_title("on the way", fontsize=11)
last = [curve[-1][1] for curve in curves.values()]
axes[1].bar(range(len(last)), last, color=list(colors.values()))
for i, loss in enumerate(last):
    axes[1].text(i, loss, f"{loss:.3f}", ha="center", va="bottom")
axes[1].set_xticks(range(len(last)), [f"H = {n_head}" for n_head in models])
axes[1].set(ylim=(min(last) - 0.1, max(last) + 0.05), ylabel="loss, cut off below")
axes[1].set_title("at the end", fontsize=11)
plt.show()

# %% [markdown]
# Each line, from step 1000 on, has the color of its bar on the right. The second head helps most,
# four are a little better still, and eight bring next to nothing more: each further cut makes the
# heads smaller, and with 8 of them each has 4 channels left. Another seed moves these losses by
# 0.01 to 0.02, so do not make much of small gaps.
#
# ## What each head looks at
#
# To see the weights, walk the steps of the class once more and keep them.


# %%
@torch.no_grad()
def look(model: Model, idx: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of all heads, (B, H, T, T), and what they find, (B, H, T, D)."""
    B, T = idx.shape
    attention = model.attention
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(T))  # (B, T, C)
    x = attention.qkv_proj(x)  # (B, T, 3*C)
    query, key, value = x.view(B, T, 3, attention.n_head, -1).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(2, 3) * key.shape[-1] ** -0.5  # (B, H, T, T)
    scores = scores.masked_fill(~attention.causal_mask[:T, :T], float("-inf"))
    weights = F.softmax(scores, dim=-1)  # (B, H, T, T)
    return weights, weights @ value


# %% [markdown]
# Take a line of the validation text, one of a good length to look at, and of it the first 8
# characters.

# %%
held_back = tokenizer.decode(validation.tolist())
candidates = [each for each in held_back[T:].split("\n")[1:] if 28 <= len(each) <= 36]
line = candidates[0] if candidates else held_back[100:132]
model = models[4]
block = torch.tensor([tokenizer.encode(line[:T])])  # (1, T)
weights, found = look(model, block)  # (1, H, T, T) and (1, H, T, D)
print(repr(line))

# %%
labels = visible(line[:T])
figure, axes = plt.subplots(1, H, figsize=(11, 3.1), sharey=True)
for h, panel in enumerate(axes):
    heat_map(panel, weights[0, h], labels, labels, f"head {h}", vmin=0, vmax=1)
    panel.set(xlabel="looks at")
axes[0].set(ylabel="this position")
plt.show()

# %% [markdown]
# A row is a position and what it takes from each before it: dark is 0, light is 1. Four heads,
# four pictures of the same 8 characters. Light on the diagonal means that a position looks at
# itself; light further to the left, that it looks back. Head 0 spreads its looks over several
# characters, head 2 nearly always stays on the diagonal.
#
# Now the whole line. Each of its characters gets the block that ends with it, and its column shows
# what it takes from 0, 1, 2, … steps back.

# %%
begin = held_back.index(line, T)
around = held_back[begin - T + 1 : begin + len(line)]  # the line and the T - 1 characters before
windows = torch.tensor(tokenizer.encode(around)).unfold(0, T, 1)  # (B, T), a block a row
ends = look(model, windows)[0][:, :, -1].flip(-1)  # (B, H, T), T is now the steps back
figure, axes = plt.subplots(H, 1, figsize=(10, 7.6), sharex=True)
for h, panel in enumerate(axes):
    steps_back = [str(step) for step in range(T)]
    heat_map(panel, ends[:, h].T, steps_back, visible(line), f"head {h}", vmin=0, vmax=1)
    panel.set(aspect="auto", ylabel="steps back")
axes[-1].set(xlabel="this character looks back")
plt.show()

# %% [markdown]
# Head 2 stays with the character itself. Head 0 mostly takes from one and two steps back. Head 1
# does not go by distance: find the vowels and the spaces below, and see that it mostly stays on
# them, and from most consonants steps back to the last one (not always: look at `neighbour`).
# Nobody told it what a vowel is.
#
# ### How far back, on average
#
# One line may be a chance. Take 2000 blocks of the validation text, and the mean of the weights of
# their last positions. The mean distance is $\sum_d d \cdot \text{weight}(d)$: 0 for a head that
# only looks at its own character.

# %%
many = validation[: len(validation[:16_000]) // T * T].view(-1, T).long()  # (B, T)
names, shares = [], []
for n_head in (1, 4):
    mean = look(models[n_head], many)[0][:, :, -1].mean(dim=0).flip(-1)  # (H, T)
    names += [f"four heads: {h}" if n_head > 1 else "one head" for h in range(n_head)]
    shares += mean.unbind()
shares = torch.stack(shares)  # (5, T)
distances = shares @ torch.arange(float(T))  # (5)
for name, distance in zip(names, distances, strict=True):
    print(f"{name:13} looks back {distance:.2f} characters")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(3, 2), sharey=True)
heat_map(axes[0], shares, names, [str(step) for step in range(T)], vmin=0, vmax=1)
for i, row in enumerate(shares):
    for step, share in enumerate(row.tolist()):
        color = "black" if share > 0.5 else "white"
        axes[0].text(step, i, f"{share:.2f}", ha="center", va="center", size=9, color=color)
axes[0].set(xlabel="steps back", aspect="auto")
axes[1].barh(range(len(names)), distances, color=[ORANGE] + [BLUE] * H)
axes[1].set(xlabel="mean distance")
plt.show()

# %% [markdown]
# The orange bar is the model with one head, which gives about three quarters to its own character.
# It must: `x` itself does not go round the attention, so a head has to carry the character on, and
# only the rest is free for looking back. Among four, heads 2 and 3 do most of the carrying and head
# 0 can look further. Which number has which job is chance: another seed deals them out anew.
#
# ### At what kind of character
#
# Distance is not all. Compare what a kind of character gets with what it would get if only the
# distance counted, which is the mean weights you just saw. 1 is no preference, 2 twice as much.

# %%
kinds = {
    "vowel": [each in "aeiou" for each in vocabulary],
    "consonant": [each.islower() and each not in "aeiou" for each in vocabulary],
    "capital": [each.isupper() for each in vocabulary],
    "␣ or ↵": [each.isspace() for each in vocabulary],
}
kinds["the rest"] = [not any(each) for each in zip(*kinds.values(), strict=True)]
weights = look(model, many)[0][:, :, -1]  # (B, H, T)
expected = weights.mean(dim=0)  # (H, T)
factors = torch.ones(H, len(kinds))
for i, is_kind in enumerate(kinds.values()):
    there_is = torch.tensor(is_kind)[many].float()[:, None]  # (B, 1, T)
    gets, would_get = ((each * there_is).sum(dim=(0, 2)) for each in (weights, expected))  # (H)
    factors[:, i] = gets / would_get.clamp(min=1e-9)

# %%
figure, axes = plt.subplots(figsize=(7, 3))
names = [f"head {h}" for h in range(H)]
shades = factors.clamp(min=0.1).log2()
heat_map(axes, shades, names, list(kinds), cmap="PuOr", vmin=-1.5, vmax=1.5)
for h, row in enumerate(factors.tolist()):
    for i, factor in enumerate(row):
        axes.text(i, h, f"{factor:.2f}", ha="center", va="center")
axes.set(xlabel="kind of character looked at", aspect="auto")
plt.show()

# %% [markdown]
# Violet is more than the distance explains, orange is less. Head 1 likes vowels and spaces and
# gives consonants about half; head 0 gives spaces less and likes the rest, which is mostly
# punctuation; heads 2 and 3 hardly care.
#
# ## The output projection
#
# After the heads comes `out_proj`, a `(C, C)` matrix. Concatenated and multiplied is the same as:
# each head has its own `D` columns of that matrix, and the results are added.
#
# $$P \,[f_0; f_1; f_2; f_3] = P_0 f_0 + P_1 f_1 + P_2 f_2 + P_3 f_3$$

# %%
P = model.attention.out_proj.weight.detach()  # (C, C)
bias = model.attention.out_proj.bias.detach()  # (C)
added = sum(found[0, h] @ P[:, h * D : (h + 1) * D].T for h in range(H)) + bias  # (T, C)
merged = found.transpose(1, 2).reshape(1, T, C)  # (1, T, C)
projected = model.attention.out_proj(merged).detach()[0]  # (T, C)
print(f"largest difference {(added - projected).abs().max():.7f}")

# %% [markdown]
# So each head writes into all `C` channels, not only into the `D` it was cut from. Without the
# projection the findings of head 0 would stay in channels 0 to 7. From stage 6 on, the result is
# added to `x`, and it is the projection that lets every head reach every channel of it.
#
# In this stage `lm_head` follows at once, and it is a matrix too. So you can follow each head's
# share up to the logits: each head casts a **vote** for each character, and the logits are the sum.

# %%
W = model.lm_head.weight.detach()  # (V, C)
votes = [W @ P[:, h * D : (h + 1) * D] @ found[0, h, -1] for h in range(H)]  # H times (V)
votes = torch.stack([*votes, W @ bias])  # (H+1, V)
logits = model(block)[0][0, -1].detach()  # (V)
print(f"largest difference {(votes.sum(dim=0) - logits).abs().max():.7f}")

# %%
best = logits.topk(min(12, V)).indices
shown = torch.cat([votes, votes.sum(dim=0, keepdim=True)])  # (H+2, V)
shown = shown - shown.mean(dim=1, keepdim=True)  # softmax ignores what all have in common
names = [*(f"head {h}" for h in range(H)), "bias", "sum"]
figure, axes = plt.subplots(figsize=(9, 4))
limit = shown[:-1, best].abs().max().item()  # the sum may be beyond it
labels = visible(tokenizer.decode(best.tolist()))
heat_map(axes, shown[:, best], names, labels, cmap="PuOr", vmin=-limit, vmax=limit)
axes.set_title(f"after {''.join(visible(line[:T]))}", fontsize=11)
for i, row in enumerate(shown[:, best].tolist()):
    for j, vote in enumerate(row):
        color = "white" if abs(vote) > 0.6 * limit else "black"
        axes.text(j, i, f"{vote:.1f}", ha="center", va="center", size=9, color=color)
axes.axhline(H + 0.5, color="black")
axes.set(xlabel="next character, likeliest first", ylabel="votes of", aspect="auto")
plt.show()


# %% [markdown]
# Violet is for a character, orange against it; down a column the votes add up to the last row. The
# heads do not agree: what one is for, another is against, and the likeliest character is not the
# first choice of all. A logit is a compromise.
#
# ## What is a head worth?
#
# A head whose `D` columns of `P` are 0 says nothing. So take the heads out of the trained model,
# one at a time, and measure.
# %%
@torch.no_grad()
def loss_with(model: Model, heads: list[int]) -> float:
    """The validation loss when only these heads are heard."""
    weight = model.attention.out_proj.weight  # (C, C)
    saved = weight.clone()
    by_head = weight.view(C, model.attention.n_head, -1)  # (C, H, D)
    for h in range(model.attention.n_head):
        if h not in heads:
            by_head[:, h] = 0
    loss = exact_loss(model, validation)
    weight.copy_(saved)
    return loss


# %% [markdown]
# **Predict before you run the next cell:** the model with one head had a loss not far above that of
# four. How much does it hurt to take one of the four away?

# %%
whole = loss_with(model, [0, 1, 2, 3])
without = [loss_with(model, [h for h in range(H) if h != left_out]) for left_out in range(H)]
first_ones = [loss_with(model, list(range(count))) for count in range(H + 1)]
for h, loss in enumerate(without):
    print(f"without head {h}: {loss:.3f}, that is {loss - whole:.3f} more")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
axes[0].bar(range(H), without, color=BLUE)
axes[0].set_xticks(range(H), [f"head {h}" for h in range(H)])
axes[0].set(xlabel="left out", ylabel="validation loss")
axes[1].bar(range(H + 1), first_ones, color=BLUE)
axes[1].set_xticks(range(H + 1), ["none", "0", "0, 1", "0, 1, 2", "all"])
axes[1].set(xlabel="heads that are heard")
for panel, losses in zip(axes, (without, first_ones), strict=True):
    for i, loss in enumerate(losses):
        panel.text(i, 0.12, f"{loss:.2f}", ha="center", color="white")
    panel.axhline(curves[1][-1][1], color=ORANGE, linestyle="--")
    panel.axhline(whole, color="black", linestyle=":")
axes[0].text(-0.4, 3.75, "dashed: the model that has one head", color=ORANGE)
axes[0].text(-0.4, 3.45, "dotted: all four heads", color="black")
plt.show()

# %% [markdown]
# Left: whichever head you take out, the rest is worse than the model that has one head only. Right:
# alone, head 0 takes some off, and it is a long way down to all four. The fourth head still takes
# off as much as the first did: its votes complete the sum.
#
# Yet two trained heads are nearly as good as four: you saw it above. This is no contradiction. The
# four heads learned together, and their votes are right as a sum; what is left after one falls
# silent is a sum with a part missing. A model trained without that head would have shared the work
# differently. So the bars say how much this model leans on a head, not how good three heads can be.
# It leans more on head 2, which mostly carries the character itself, than on head 0, which looks
# back the furthest.
#
# ## A sample
#
# The same seed, one head and four. Below each: how many of the words it writes occur in the
# training text, measured on a longer sample.

# %%
known = set("".join(c if c.isalpha() else " " for c in tokenizer.decode(training.tolist())).split())
for n_head in (1, 4):
    sample = "".join(generate(models[n_head], tokenizer, length=steps(6000)))
    written = "".join(c if c.isalpha() else " " for c in sample).split()
    share = sum(word in known for word in written) / max(1, len(written))
    print(f"H = {n_head}\n{sample[:160].strip()}\n[{share:.0%} of the words exist]\n")

# %% [markdown]
# More of the words exist, and still nothing makes sense. At most eight characters are a
# short memory.
#
# ## The script
#
# `multihead_attention.py` has the list of heads, and `batched_attention.py` has all heads at once.
# Their configs, their models and this function are the same.


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
# ### 1 · Split and merge
#
# Cut `x`, `(B, T, C)`, into `H` heads, `(B, H, T, D)`: head 0 gets the first `D` channels of each
# position. Then write the way back.


# %% tags=["exercise"]
def split_heads(x: Tensor, H: int) -> Tensor: ...


def merge_heads(x: Tensor) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    x = torch.arange(2 * 5 * 12.0).view(2, 5, 12)  # (B, T, C)
    heads = given(split_heads(x, 3))
    assert tuple(heads.shape) == (2, 3, 5, 4), f"the shape is {tuple(heads.shape)}"
    mixed = torch.equal(heads, x.view(2, 3, 5, 4))
    assert not mixed, "head 0 has channels of several positions: view as (B, T, H, D), then swap"
    wanted = torch.stack(x.chunk(3, dim=-1), dim=1)  # (B, H, T, D)
    assert torch.equal(heads, wanted), "head 0 must hold the first D channels of each position"
    merged = given(merge_heads(wanted))
    assert tuple(merged.shape) == (2, 5, 12), f"merged, the shape is {tuple(merged.shape)}"
    assert torch.equal(merged, x), "merged, the channels are stirred: swap H and T back first"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def split_heads(x: Tensor, H: int) -> Tensor:
#     B, T, C = x.shape
#     return x.view(B, T, H, C // H).transpose(1, 2)
#
#
# def merge_heads(x: Tensor) -> Tensor:
#     B, H, T, D = x.shape
#     return x.transpose(1, 2).reshape(B, T, H * D)
# ```
#
# `view(B, H, T, D)` gives the right shape and the wrong numbers: no error, only a model that
# mixes up its positions. A shape that fits proves little.
#
# </details>
#
# ### 2 · Count by hand
#
# How many numbers does multi-head attention learn, with its projection? `C` channels, `H` heads;
# `C` is a multiple of `H`. Write a formula: `nn` and `numel` are not needed.


# %% tags=["exercise"]
def count_numbers(C: int, H: int) -> int: ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    for C, H in ((32, 1), (32, 4), (384, 6)):
        answer = given(count_numbers(C, H))
        attention = MultiHeadAttention(Config(n_embd=C, n_head=H))
        truth = sum(parameter.numel() for parameter in attention.parameters())
        where = f"C = {C}, H = {H}: {answer:,} is too {'many' if answer > truth else 'few'}"
        assert answer != H * 3 * C * C + C * C + C or H == 1, f"{where}: a head has D = C / H"
        assert answer != truth - C, f"{where}: the projection has a bias"
        assert answer != 3 * C * C, f"{where}: the projection is missing"
        assert answer == truth, where


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def count_numbers(C: int, H: int) -> int:
#     D = C // H
#     heads = H * 3 * C * D  # which is 3 * C * C
#     projection = C * C + C
#     return heads + projection
# ```
#
# </details>
#
# ### 3 · Take a head out of the matrix
#
# Above, the matrices of the list went into one, `(3*C, C)`. Go the other way: return the query, key
# and value matrix of head `h`, `(D, C)` each.


# %% tags=["exercise"]
def take_head(matrix: Tensor, h: int, H: int) -> tuple[Tensor, Tensor, Tensor]: ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    matrix = batched.qkv_proj.weight.detach()  # (3*C, C)
    for h, head in enumerate(listed.heads):
        answer = given(take_head(matrix, h, H))
        for name, taken in zip(("query", "key", "value"), answer, strict=True):
            wanted = getattr(head, name).weight
            shape = tuple(taken.shape)
            assert shape == (D, C), f"the {name} matrix of head {h} is {shape}, not {(D, C)}"
            rows = (matrix[:, None] == taken[0]).all(dim=-1).any(dim=-1).nonzero()
            begins = f"it begins at row {rows[0].item()}" if len(rows) else "its rows are changed"
            assert torch.equal(taken, wanted), f"not the {name} matrix of head {h}: {begins}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def take_head(matrix: Tensor, h: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
#     C = matrix.shape[1]
#     query, key, value = matrix.view(3, H, C // H, C)[:, h]
#     return query, key, value
# ```
#
# The rows are cut like the channels: first into 3, then into `H`.
#
# </details>
#
# ### 4 · Attention in n dimensions
#
# This is the first exercise that the lecture "Let's build GPT" leaves you with: make one of the
# single head and the list of heads, with the heads as a further batch dimension, masked and scaled
# as above. The weights are given,
# `(H, C, D)` each, so that `x @ query[h]` are the queries of head `h`. Return what the heads find,
# side by side, `(B, T, H*D)`, without a projection and without a loop. It must also do for `H = 1`.


# %% tags=["exercise"]
class HeadsAtOnce(nn.Module):
    def __init__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.query = nn.Parameter(query)  # (H, C, D)
        self.key = nn.Parameter(key)  # (H, C, D)
        self.value = nn.Parameter(value)  # (H, C, D)

    def forward(self, x: Tensor) -> Tensor: ...


# %% tags=["check"]
def merged_attention(parts: list[Tensor], swap: bool = True, **options: object) -> Tensor:
    found = F.scaled_dot_product_attention(*parts, **{"is_causal": True} | options)  # (B, H, T, D)
    return (found.transpose(1, 2) if swap else found).reshape(2, 5, 32)  # (B, T, H*D)


@check
def exercise_4() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 32)  # (B, T, C)
    slips = {
        "positions see what comes after them": {"is_causal": False},
        "the scale is D ** -0.5, not C ** -0.5": {"scale": 32**-0.5},
        "the scores are not scaled by D ** -0.5": {"scale": 1.0},
        "swap H and T before you merge": {"swap": False},
    }
    for n_head in (1, 4):
        heads = HeadList(Config(n_head=n_head)).heads
        matrices = [
            torch.stack([getattr(head, name).weight.detach().T * 3 for head in heads])
            for name in ("query", "key", "value")
        ]  # (H, C, D) each
        answer = given(HeadsAtOnce(*matrices)(x))
        where = f"with {n_head} head{'s' * (n_head > 1)}"
        assert tuple(answer.shape) == (2, 5, 32), f"{where} the shape is {tuple(answer.shape)}"
        parts = [x[:, None] @ each for each in matrices]  # (B, H, T, D) each
        if torch.allclose(answer, merged_attention(parts), atol=1e-4):
            continue
        for slip, options in slips.items():
            wrong = merged_attention(parts, **options)
            assert not torch.allclose(answer, wrong, atol=1e-4), f"{where}: {slip}"
        raise AssertionError(f"{where} the numbers are not those of the list")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# class HeadsAtOnce(nn.Module):
#     def __init__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
#         super().__init__()
#         self.query = nn.Parameter(query)  # (H, C, D)
#         self.key = nn.Parameter(key)  # (H, C, D)
#         self.value = nn.Parameter(value)  # (H, C, D)
#
#     def forward(self, x: Tensor) -> Tensor:
#         B, T, C = x.shape
#         x = x[:, None]  # (B, 1, T, C): the 1 is stretched to H
#         query, key, value = x @ self.query, x @ self.key, x @ self.value  # (B, H, T, D) each
#         scores = query @ key.transpose(2, 3) * key.shape[-1] ** -0.5  # (B, H, T, T)
#         mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()  # (T, T)
#         weights = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)  # (B, H, T, T)
#         found = weights @ value  # (B, H, T, D)
#         return found.transpose(1, 2).flatten(2)  # (B, T, H*D)
# ```
#
# With `H = 1` this is the head of stage 2. `batched_attention.py` makes all queries, keys and
# values with one product and cuts afterwards; here broadcasting does that. Both are one
# computation.
#
# The heads now gather. But nothing works on what they have gathered: after the attention come only
# the projection and the logits. [The next notebook](04_feed_forward.ipynb) gives each position a
# small network to do so.
#
# </details>
