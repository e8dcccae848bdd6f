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
# # 8 · A modern GPT
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/character-gpt/course/blob/main/notebooks/08_modern_gpt.ipynb)
#
# The ladder is climbed. This notebook goes on from its top: the same model with eleven ideas that
# GPT-2 did not have; most of them are younger. After it you can
#
# - say what is left of LayerNorm in today's models;
# - rotate queries and keys by their position, and show that only the distance of positions counts;
# - explain why normalised queries and keys keep every score in bounds;
# - say which weights learn first when every block starts by changing nothing;
# - orthogonalise an update by hand, and say what that does to its singular values;
# - look into a trained model: zeros, norms, learned λ;
# - let a model write beyond its block without computing anything twice.
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
import copy
import math
from dataclasses import dataclass, fields, replace
from typing import Annotated

from trainer import (
    Divides,
    Fraction,
    NonNegative,
    NonNegativeInt,
    PositiveFraction,
    Run,
    UserError,
)
from common import LanguageModel, Tokenizer, draw_batch
from sample import generate
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss
from trainer.layers import Dropout, attention, causal_mask, rms_norm

import torch
from lesson import BLUE, GREY, ORANGE, check, given, plt, steps
from torch import Tensor, nn
from torch.nn import functional as F

# %%
corpus = open_corpus(None)
vocabulary = corpus.vocabulary
V = len(vocabulary)
tokenizer = Tokenizer(vocabulary)
training, validation = corpus.train, corpus.validation
held = validation[: steps(20_000)]  # enough of it to compare short trainings
print(f"{len(training):,} characters to train on, {V} different ones")

# %% [markdown]
# ## Eleven ideas, eleven names
#
# | name | `gpt.py` | here | a place to read of it |
# |---|---|---|---|
# | `rms_norm` | LayerNorm | divide by the RMS, nothing else | RMSNorm, 2019 |
# | `rope` | a position embedding is added | queries and keys are rotated | RoFormer, 2021 |
# | `qk_norm` | scores as large as they get | normalized queries and keys | QKNorm, 2020 |
# | `bias_free` | biases of the linear layers | none | T5, 2019 |
# | `squared_relu` | ReLU | ReLU, squared | Primer, 2021 |
# | `zero_init` | what a block adds starts small | it starts at zero | Fixup, 2019 |
# | `token_shift` | each embedding alone | and some of the previous one | RWKV, 2023 |
# | `embedding_norm` | the embedding as it is | a normalized embedding | BLOOM, 2022 |
# | `embedding_skip` | the embedding comes in once | again in every block | modded-nanoGPT, 2024 |
# | `muon` | AdamW for all | another optimizer for the matrices inside | Muon, 2024 |
# | `linear_decay` | a cosine | hold, then decay linearly | Hägele et al., 2024 |
#
# None depends on another, so each is a switch: `replace(config, rope=False)` here, `--no-rope` for
# the script.


# %%
@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 256  # T: context length, in characters
    n_embd: int = 384  # C: embedding dimension (channels per character)
    n_head: Annotated[int, Divides("n_embd")] = 6  # H: attention heads, each of size D = C/H
    n_layer: int = 6  # number of blocks
    dropout: Fraction = 0.1  # probability that an activation is zeroed during training
    batch_size: int = 16  # B: sequences per training step
    max_iters: int = 1400  # training steps
    eval_interval: int = 350  # steps between evaluations
    learning_rate: float = 3e-3  # size of AdamW's steps, at its peak
    muon_learning_rate: float = 1e-2  # size of Muon's steps, at its peak
    muon_momentum: Fraction = 0.9  # Muon's momentum coefficient
    warmup_iters: NonNegativeInt = 20  # steps over which the learning rates rise to their peak
    cooldown: PositiveFraction = 0.7  # fraction of steps over which learning rates decay to zero
    weight_decay: NonNegative = 0.1  # each step shrinks matrices by this times the learning rate
    gradient_clip: float = 1.0  # maximum gradient norm
    rms_norm: bool = True  # RMSNorm instead of LayerNorm
    rope: bool = True  # rotary position embedding instead of a learned table
    qk_norm: bool = True  # normalized queries and keys
    bias_free: bool = True  # no biases in linear layers
    squared_relu: bool = True  # ReLU squared instead of ReLU
    zero_init: bool = True  # start blocks as identities: zero their output projections
    token_shift: bool = True  # add a multiple of the previous character's embedding
    embedding_norm: bool = True  # normalize the embedding
    embedding_skip: bool = True  # add λ times the embedding in every block
    muon: bool = True  # Muon for the matrices in the blocks
    linear_decay: bool = True  # decay learning rates linearly to zero, not as a cosine


# %%
PRESETS = {
    "full": Config(),
    "middle": Config(
        n_embd=192,
        n_head=2,
        n_layer=4,
        dropout=0.0,
        batch_size=8,
        max_iters=2500,
        eval_interval=500,
    ),
    "small": Config(
        n_embd=128,
        n_head=2,
        n_layer=4,
        dropout=0.0,
        batch_size=8,
        max_iters=2000,
        eval_interval=250,
    ),
}

# %% [markdown]
# The presets are for the script. This notebook needs a model that trains in seconds, so it has
# sizes and rates of its own.

# %%
tiny = Config(
    vocab_size=V,
    block_size=32,
    n_embd=64,
    n_head=4,
    n_layer=3,
    dropout=0.0,
    batch_size=16,
    max_iters=300,
    learning_rate=3e-3,
    muon_learning_rate=1e-2,
    muon_momentum=0.85,
    warmup_iters=15,
    cooldown=0.7,
    weight_decay=0.1,
)
IDEAS = [field.name for field in fields(Config) if field.type is bool]
old = replace(tiny, **dict.fromkeys(IDEAS, False))  # no idea at all: the model of gpt.py
D = tiny.n_embd // tiny.n_head  # D: channels of a head
print(f"C = {tiny.n_embd} channels, H = {tiny.n_head} heads of D = {D}, T = {tiny.block_size}")

# %% [markdown]
# ## RMSNorm
#
# You wrote RMSNorm in notebook 06: it divides by the root of the mean square, takes no mean away
# and adds no bias, but keeps a gain. Here the gain goes too, since the layer behind can take it
# over, as you showed there. With $C$ channels this is left:
#
# $$\text{RMSNorm}(x) = \frac{x}{\sqrt{\frac{1}{C}\sum_c x_c^2}}$$
#
# Afterwards the mean square is 1, so every vector has the length $\sqrt{C}$.


# %%
class RMSNorm(nn.Module):
    """Divides a vector by its root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)  # x / sqrt(mean(x²))


# %% [markdown]
# Here are 300 vectors of 64 channels, each with a mean and a spread of its own.

# %%
torch.manual_seed(1)
vectors = torch.randn(300, 64) * (torch.rand(300, 1) * 2 + 0.3) + torch.randn(300, 1)  # (300, C)
figure, axes = plt.subplots(figsize=(8, 3.6))
for norm, name, colour, at, place in (
    (nn.Identity(), "before", GREY, None, (-3.9, 27)),
    (RMSNorm(), "RMSNorm", ORANGE, (0.9, 7.7), (1.5, 5.5)),
    (nn.LayerNorm(64), "LayerNorm", BLUE, (0.05, 7.7), (1.2, 1.5)),
):
    out = norm(vectors).detach()  # (300, C)
    axes.plot(out.mean(dim=-1), out.norm(dim=-1), "o", color=colour, markersize=4, alpha=0.6)
    arrow = {"arrowstyle": "-", "color": colour} if at else None
    axes.annotate(name, at or place, place, color=colour, arrowprops=arrow)
axes.set(xlabel="mean of the channels", ylabel="length of the vector", ylim=(0, None))
plt.show()

# %% [markdown]
# Both norms bring all lengths to $\sqrt{64} = 8$. LayerNorm brings all means to 0 as well, so its
# dots lie on one point; RMSNorm leaves them a mean, and so scatters along the line.
#
# **Predict before you run the next cell:** add 3 to all channels of every vector. Which of the two
# norms lets the layers behind it notice?

# %%
for name, norm in (("LayerNorm", nn.LayerNorm(64)), ("RMSNorm", RMSNorm())):
    change = (norm(vectors + 3) - norm(vectors)).abs().max().item()
    print(f"{name:9} changes its output by at most {change:.4f}")
pytorchs = nn.RMSNorm(64, eps=1e-6, elementwise_affine=False)  # without the gain that it may have
print("as PyTorch's own:", torch.allclose(RMSNorm()(vectors), pytorchs(vectors), atol=1e-6))

# %% [markdown]
# LayerNorm throws the mean away. Does that matter in a trained model? You will look further down.
#
# ## RoPE: positions as rotations
#
# `gpt.py` adds a learnt vector for each position. There are as many as the block is long, and what
# position 7 means has nothing to do with what position 8 means until it is learnt.
#
# **Rotary position embedding** (RoPE) adds nothing. It takes the channels of a query in pairs, each
# pair is a point in a plane, and it rotates the point about the origin, by an angle that grows with
# the position $p$. Pair $i$ has its own frequency $\omega_i$:
#
# $$\begin{pmatrix} a \\ b \end{pmatrix} \to
# \begin{pmatrix} a\cos p\,\omega_i - b\sin p\,\omega_i \\
# b\cos p\,\omega_i + a\sin p\,\omega_i \end{pmatrix}
# \qquad \omega_i = 10000^{-2i/D}$$
#
# Keys are rotated in the same way, values are not.


# %%
class RoPE(nn.Module):
    """Rotates each query and key by angles that grow with its position."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        if head_size % 2:
            raise UserError(f"--rope needs an even head size, not {head_size}: change --n-head")
        # Channels i and i + D/2 are a point in a plane; each plane has its own frequency.
        inv_freq = 10_000.0 ** -(torch.arange(0, head_size, 2) / head_size)  # (D/2)
        self.register_buffer("inv_freq", inv_freq, persistent=False)  # a constant: not saved

    def forward(self, x: Tensor, start: int) -> Tensor:
        T = x.shape[-2]
        positions = torch.arange(start, start + T, device=x.device)  # (T)
        angles = positions[:, None] * self.inv_freq  # (T, D/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)  # (2, B, H, T, D/2) each
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# %% [markdown]
# `chunk` splits the channels into the $a$ of all pairs and the $b$ of all pairs: channel $i$ and
# channel $i + D/2$ belong together. `inv_freq` holds the $\omega_i$.
#
# Take one query and put it at the positions 0 to 15.

# %%
torch.manual_seed(1)
rope = RoPE(D)
query, key = torch.randn(2, D)  # (D) both
rotated = rope(query.expand(16, D), 0)  # (T, D)

figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.4))
for axes, pair in zip(panels, (0, 2, 3), strict=True):
    a, b = rotated[:, pair], rotated[:, pair + D // 2]  # (T) both
    radius = math.hypot(a[0], b[0])
    axes.add_patch(plt.Circle((0, 0), radius, fill=False, color=GREY, alpha=0.4))
    axes.scatter(a, b, c=range(16), cmap="cividis", s=45, zorder=2)
    for p in (0, 5, 10, 15) if pair else (0, 1, 2, 3):
        axes.text(1.22 * a[p], 1.22 * b[p], p, ha="center", va="center")
    axes.set(xlim=(-1.5 * radius, 1.5 * radius), ylim=(-1.5 * radius, 1.5 * radius))
    axes.set(xlabel=f"channel {pair}", ylabel=f"channel {pair + D // 2}", aspect="equal")
    frequency = rope.inv_freq[pair].item()
    axes.set_title(f"pair {pair}: {math.degrees(frequency):.1f}° a position", fontsize=11)
plt.show()

# %% [markdown]
# The numbers are positions; the brighter a point, the later. Pair 0 goes round more than twice,
# pair 3 has come no further than pair 0 does in a single step. Fast pairs tell neighbours apart,
# slow ones tell near from far. No norm changes. How many positions make a full turn?

# %%
full_turns = 2 * math.pi / rope.inv_freq  # (D/2)
print("positions:", ", ".join(f"{count:,.0f}" for count in full_turns.tolist()))

# %% [markdown]
# The slowest pair would come round only after a text far longer than any block here.
#
# ### Of positions, only the distance counts
#
# Rotate a query by the angle of its position $p$ and a key by that of its position $j$. Rotating
# both by the same angle does not change their product, so it depends on the difference, $p - j$.
#
# **Predict before you run the next cell:** the same query stands at every position, and so does
# the same key. Which pattern will the table of all scores have?

# %%
T = tiny.block_size
queries = rope(query.expand(T, D), 0)  # (T, D)
keys = rope(key.expand(T, D), 0)  # (T, D)
scores = queries @ keys.T * D**-0.5  # (T, T)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1, 1.3))
limit = scores.abs().max().item()
image = left.imshow(scores, cmap="PuOr", vmin=-limit, vmax=limit)
figure.colorbar(image, ax=left, label="score", shrink=0.8)
left.set(xlabel="position of the key", ylabel="position of the query")
for start, colour in ((0, BLUE), (10, ORANGE)):
    right.plot(range(start, T), scores[start:, start], color=colour, linewidth=2)
    above = right.get_xaxis_transform()
    right.text(start, 0.93, f"key at {start}", color=colour, transform=above)
    right.plot(start, scores[start, start], "o", color=colour)
right.axhline(0, color=GREY, linewidth=0.8)
right.margins(y=0.2)
right.set(xlabel="position of the query", ylabel="score")
plt.show()

# %% [markdown]
# Left: each diagonal is one distance, and has one colour. (The upper right half would be masked.)
# Right: the same key at two places makes the same curve, moved by ten.
#
# So move all positions by a thousand: the scores must stay.

# %%
there = rope(query.expand(T, D), 1000) @ rope(key.expand(T, D), 1000).T * D**-0.5  # (T, T)
print(f"largest change of a score {(there - scores).abs().max().item():.1e}")
print(f"largest score             {scores.abs().max().item():.1e}")

# %% [markdown]
# That is rounding. What does such a curve look like further out? Here are two keys: one is the
# query itself, the other one is the query rotated further, by 20 positions.

# %%
same, ahead = query, rope(query[None], 20)[0]  # (D) both
figure, axes = plt.subplots(figsize=(8, 3.4))
for its_key, name, colour, peak in (
    (same, "key = query", BLUE, 0),
    (ahead, "key = query, rotated by 20", ORANGE, 20),
):
    curve = rope(query.expand(101, D), 0) @ its_key * D**-0.5  # (101): the key is at position 0
    axes.plot(curve, color=colour, linewidth=2)
    axes.annotate(name, (peak, curve[peak]), (8, 2), textcoords="offset points", color=colour)
axes.axhline(0, color=GREY, linewidth=0.8)
axes.margins(y=0.15)
axes.set(xlabel="how far the key lies back", ylabel="score")
plt.show()

# %% [markdown]
# A query scores highest with its equal at distance 0. Rotated by 20, the key gets its highest score
# 20 characters back. So a head can learn to attend to a distance, by learning by which angle its
# keys are ahead of its queries.
#
# Without RoPE the model adds the position embedding that you know from `gpt.py`.
#
# ### A cache that slides
#
# A table ends with the block. Rotation does not end: position 1,000 is as good as position 10, as
# long as the distances are those that the model has learned with. So the cache may forget its
# oldest key and go on, without a new start. It only has to count all characters, seen or forgotten,
# since that count is the next position. And not all is lost with a key: what the second block reads
# was written when the first one still saw further back.


# %%
class KVCache:
    """Keeps the keys and values that later positions attend to; with RoPE the window slides.

    For `token_shift`, the first block's also keeps the last embedding.
    """

    def __init__(self, size: int) -> None:
        self.size = size  # how many earlier positions are visible
        self.length = 0  # number of positions so far, including dropped ones

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        T = key.shape[2]
        if self.length:
            key = torch.cat((self.key, key), dim=2)  # (B, H, S, D)
            value = torch.cat((self.value, value), dim=2)  # (B, H, S, D)
        self.length += T
        oldest = max(0, key.shape[2] - self.size)
        self.key, self.value = key[:, :, oldest:], value[:, :, oldest:]
        return key, value

    def shift(self, x: Tensor) -> Tensor:
        before = self.last if self.length else torch.zeros_like(x[:, :1])  # (B, 1, C)
        self.last = x[:, -1:]
        return torch.cat((before, x[:, :-1]), dim=1)  # (B, T, C)


# %%
slots = KVCache(size=3)
for number in range(6):
    kept, _ = slots.extend(*torch.full((2, 1, 1, 1, 1), float(number)))  # (B, H, S, D)
    print(f"character {number} sees {kept.flatten().int().tolist()}; so far {slots.length}")

# %% [markdown]
# With a block of 4, each character sees itself and three before it. From character 4 on the oldest
# is dropped.
#
# ## Normalized queries and keys
#
# A score is the product of a query and a key, so it grows with the length of both. If the weights
# grow in training, scores can run away: the softmax then puts everything on one character, and its
# gradient vanishes. Put an RMSNorm on both, and each has the length $\sqrt{D}$. A product of two
# vectors is at most the product of their lengths, so
#
# $$\left|\frac{q \cdot k}{\sqrt{D}}\right| \le \frac{\sqrt{D}\,\sqrt{D}}{\sqrt{D}} = \sqrt{D}$$
#
# This is the attention of `gpt.py` with that norm, RoPE, and a **window**: the last argument of
# `attention` hides what is further back than the block.


# %%
class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads at once: the heads are one more batch dimension."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.block_size = config.block_size
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.qk_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.rope = RoPE(config.n_embd // config.n_head) if config.rope else None
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=not config.bias_free)
        self.dropout = Dropout(config.dropout)  # of attention weights

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        x = self.qkv_proj(x)  # (B, T, 3*C)
        x = x.view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        x = x.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        value = x[2]  # (B, H, T, D)
        query_key = self.qk_norm(x[:2])  # (2, B, H, T, D)
        if self.rope:
            query_key = self.rope(query_key, cache.length if cache else 0)  # (2, B, H, T, D)
        query, key = query_key  # (B, H, T, D) each
        if cache is not None:
            key, value = cache.extend(key, value)  # (B, H, S, D) each
        # The scores, mask, softmax and weighted average of layer_norm.py, as fast as possible.
        x = attention(query, key, value, self.dropout, self.block_size)  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.out_proj(x)


# %% [markdown]
# The mask is now a band. Here it is for a block of 6 and a text twice as long.

# %%
after = torch.arange(12)[:, None] - torch.arange(12)  # (T, T)
seen = (after >= 0) & (after < 6)  # (T, T)
figure, axes = plt.subplots(figsize=(4.2, 3.6))
axes.imshow(seen, cmap="cividis", vmin=-0.3, vmax=1.2)
axes.set(xlabel="position of the key", ylabel="position of the query")
plt.show()
added_to_scores = causal_mask(12, 12, 6, torch.float32, torch.device("cpu"))  # (T, T)
print("as in trainer.layers:", torch.equal(seen, added_to_scores == 0))

# %% [markdown]
# Bright is visible. From the sixth row on, each position sees six: itself and five before it. The
# first six rows are the causal mask that you know.
#
# **Predict before you run the next cell:** make all weights of queries and keys 10 times as large.
# By which factor do the scores grow, without the norm and with it?


# %%
@torch.no_grad()
def largest_score(layer: nn.Module, x: Tensor) -> tuple[float, float]:
    """The largest score, and the mean of the largest weight that a position gives."""
    T, C = x.shape
    x = layer.qkv_proj(x)  # (T, 3*C)
    x = x.view(T, 3, tiny.n_head, D).permute(1, 2, 0, 3)  # (3, H, T, D)
    query, key = layer.qk_norm(x[:2])  # (H, T, D) both
    scores = query @ key.transpose(1, 2) * D**-0.5  # (H, T, T)
    return scores.abs().max().item(), scores.softmax(dim=-1).amax(dim=-1).mean().item()


# %%
x = torch.randn(T, tiny.n_embd, generator=torch.Generator().manual_seed(1))  # (T, C)
factors = [1, 3, 10, 30, 100]
figure, axes = plt.subplots(figsize=(8, 3.6))
for config, name, colour, height in ((old, "without", ORANGE, 0.35), (tiny, "with", BLUE, 0.45)):
    results = []
    for factor in factors:
        torch.manual_seed(1)
        layer = MultiHeadAttention(config)
        layer.qkv_proj.weight.data *= factor
        results.append(largest_score(layer, x))
        score, weight = results[-1]
        print(f"{name:7} the norm, weights times {factor:3}: largest score {score:9.2f}", end="")
        print(f", largest weight on average {weight:.2f}")
    axes.plot(factors, [score for score, _ in results], "o-", color=colour)
    axes.annotate(f"{name} the norm", (factors[2], results[2][0] * height), color=colour)
axes.axhline(math.sqrt(D), color=GREY, linestyle="--")
axes.annotate("bound √D", (factors[3], math.sqrt(D) * 1.3), color=GREY)
axes.set(ylim=(1, 1e5), xscale="log", yscale="log", xlabel="weights times", ylabel="largest score")
plt.show()

# %% [markdown]
# Both axes are logarithmic. Without the norm the scores grow with the square of the factor, since
# queries and keys both grow; in the end nearly every position looks at one place and nothing
# else. With the norm nothing changes: the length of a query says nothing, only its direction does.
# The price is that no head can be as sharp as it likes, since all scores lie within the bound. The
# paper therefore multiplies the scores by a number that is learnt; here it is left out.

# %% [markdown]
# ## Squared ReLU
#
# In the feed-forward network, what the ReLU lets through is squared.


# %%
inputs = torch.linspace(-2, 2, 401, requires_grad=True)  # (401)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for function, name, colour, places in (
    (F.relu, "ReLU", ORANGE, ((1.25, 0.55), (-0.15, 1.15))),
    (lambda x: F.relu(x).square(), "squared", BLUE, ((0.85, 2.6), (0.75, 3.2))),
):
    outputs = function(inputs)  # (401)
    (slope,) = torch.autograd.grad(outputs.sum(), inputs)  # (401)
    for axes, values, place in ((left, outputs, places[0]), (right, slope, places[1])):
        axes.plot(inputs.detach(), values.detach(), color=colour, linewidth=2)
        axes.annotate(name, place, color=colour)
left.set(xlabel="input", ylabel="output")
right.set(xlabel="input", ylabel="slope")
plt.show()

# %% [markdown]
# Both are zero to the left. To the right the square makes small values smaller and large ones
# larger, and its slope has no jump: a channel wakes up gently. What comes of that you will see in
# a trained model.


# %%
class FeedForward(nn.Module):
    """An MLP that processes each position separately."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.squared_relu = config.squared_relu
        self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd, bias=not config.bias_free)
        self.down_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=not config.bias_free)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up_proj(x))  # (B, T, 4*C)
        if self.squared_relu:
            x = x * x  # on a CPU several times as fast as x.square()
        return self.down_proj(x)  # (B, T, C)


# %% [markdown]
# ## The embedding again
#
# In `gpt.py` the embedding comes in at the bottom, and all blocks add to it. The more they add, the
# smaller its part. With `embedding_skip` each block learns a number λ, `skip_lambda`, and adds
# λ times the embedding once more. λ starts at zero. With that the block is complete.


# %%
def make_norm(config: Config) -> nn.Module:
    return RMSNorm() if config.rms_norm else nn.LayerNorm(config.n_embd)


class Block(nn.Module):
    """Attention, then feed-forward; each adds its output to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.skip_lambda = nn.Parameter(torch.zeros(1)) if config.embedding_skip else None
        self.attention_norm = make_norm(config)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, embedding: Tensor, cache: KVCache | None = None) -> Tensor:
        if self.skip_lambda is not None:
            x = x + self.skip_lambda * embedding
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


# %% [markdown]
# And the model: `embedding_norm` after the look-up, no position embedding, and the output layers of
# the blocks, `out_proj` and `down_proj`, initialized to zero.


# %%
class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.slides = config.rope  # a position table ends at block_size; RoPE does not
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = (
            None if config.rope else nn.Embedding(config.block_size, config.n_embd)
        )
        self.shift_scale = nn.Parameter(torch.zeros(config.n_embd)) if config.token_shift else None
        self.embedding_norm = RMSNorm() if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.final_norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = Dropout(config.dropout)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight")):
                # The residual stream sums 2 * n_layer of these; the scale keeps its std fixed.
                std = 0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(parameter, std=std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: list[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        x = self.token_embedding(idx)  # (B, T, C)
        if self.position_embedding:
            start = cache[0].length if cache else 0
            positions = torch.arange(start, start + T, device=idx.device)  # (T)
            x = x + self.position_embedding(positions)  # (B, T, C)
        if self.shift_scale is not None:  # the first position has no previous character: zeros
            previous = cache[0].shift(x) if cache else F.pad(x, (0, 0, 1, -1))  # (B, T, C)
            x = x + self.shift_scale * previous  # (B, T, C)
        x = embedding = self.dropout(self.embedding_norm(x))
        for i, block in enumerate(self.blocks):
            x = block(x, embedding, cache[i] if cache else None)
        logits = self.lm_head(self.final_norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def new_cache(self) -> list[KVCache]:
        return [KVCache(self.block_size - 1) for _ in self.blocks]


# %% [markdown]
# ### What is gone
#
# No position embedding, no biases, no gains and biases of the norms. How many parameters was that?

# %%
torch.manual_seed(1)
model, old_model = Model(tiny), Model(old)
for name, each in (("old", old_model), ("modern", model)):
    sizes = {"in matrices": 0, "in positions": 0, "in biases": 0, "in norms": 0, "in λ": 0}
    sizes["in the shift"] = 0
    for parameter_name, parameter in each.named_parameters():
        kind = "matrices" if parameter.dim() == 2 else "biases"
        for word, its_kind in (
            ("position", "positions"),
            ("norm", "norms"),
            ("lambda", "λ"),
            ("shift", "the shift"),
        ):
            kind = its_kind if word in parameter_name else kind
        sizes[f"in {kind}"] += parameter.numel()
    print(f"{name:6}", ", ".join(f"{count:,} {kind}" for kind, count in sizes.items()))

# %% [markdown]
# Few: less than 3%, with the position embedding. They are not left out to save room, but because
# the model can do without. Gain and bias of a norm can be folded into the layer behind it, as you
# did in notebook 06; that a model does as well with no bias at all is experience, not proof. What
# remains is simpler: every parameter except the λ and the vector of the token shift is a matrix.
#
# ## Starting at zero
#
# What a block adds comes out of `out_proj` and `down_proj`. Both are zero at the start, so a block
# adds nothing: whatever comes in goes out. The logits must be those of the embedding alone.

# %%
idx, targets = draw_batch(training, T, tiny.batch_size, torch.Generator().manual_seed(1))  # (B, T)
with torch.no_grad():
    logits, loss = model(idx, targets)
    embedding = model.embedding_norm(model.token_embedding(idx))  # (B, T, C)
    alone = model.lm_head(model.final_norm(embedding))  # (B, T, V)
print(f"largest difference {(logits - alone).abs().max().item():.1e}")
print(f"first loss {loss.item():.3f}, ln V {math.log(V):.3f}")

# %% [markdown]
# Before the first step this deep model is no more than a bigram model. Can it learn at all?
#
# **Predict before you run the next cell:** the gradient of a weight comes back through everything
# that lies between it and the loss. Four matrices are in a block: `qkv_proj`, `out_proj`,
# `up_proj` and `down_proj`. Which of them have a gradient in the first step?

# %%
names = ["lm_head", "token_embedding", "out_proj", "down_proj", "qkv_proj", "up_proj"]
generator = torch.Generator().manual_seed(1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rows = []
for _ in range(6):
    batch = draw_batch(training, T, tiny.batch_size, generator)
    optimizer.zero_grad()
    model(*batch)[1].backward()
    named = [(name, each.grad.norm().item()) for name, each in model.named_parameters()]
    rows.append([math.hypot(*(size for name, size in named if part in name)) for part in names])
    optimizer.step()
gradients = torch.tensor(rows).T  # (6 parts, 6 steps)

# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
axes.imshow(gradients.clamp(min=1e-3).log(), cmap="cividis", aspect="auto", alpha=0.35)
for row, values in enumerate(gradients.tolist()):
    for step, value in enumerate(values):
        axes.text(step, row, f"{value:.3f}" if value else "0", ha="center", va="center")
axes.set_yticks(range(len(names)), names)
axes.set(xlabel="training step", title="length of the gradient, over all blocks")
plt.show()

# %% [markdown]
# In step 0 the output layers of the blocks learn, and the two ends. Behind a matrix of zeros no
# gradient comes through, so `qkv_proj` and `up_proj` wait. In step 1 the output layers are no
# longer zero, and everything learns. Each block begins by finding out what it should add, then
# learns what to look at for it.
#
# ### As long as all the rest
#
# What about the bottom? Embeddings are drawn with a spread of 0.02.

# %%
torch.manual_seed(1)
drawn = Model(tiny).token_embedding(idx).detach()  # (B, T, C)
print(f"length as drawn                {drawn.norm(dim=-1).mean():.2f}")
print(f"length after the norm          {RMSNorm()(drawn).norm(dim=-1).mean():.2f}")
print(f"length of all that layers read {math.sqrt(tiny.n_embd):.2f}")

# %% [markdown]
# (7.99, since the small number in the root counts a little for vectors as short as these.) A layer
# that reads vectors of length 8 can soon write vectors far longer than the drawn ones. A short
# embedding then drowns in the sum, or has to be made longer first. One that is as long as what
# layers read does not.
#
# ## Muon
#
# The next idea is not in the model but in its optimizer. Think of the gradient of a matrix as a
# list of directions: by the **singular value decomposition** every matrix is
#
# $$G = \sum_i \sigma_i\, u_i v_i^\top$$
#
# directions $v_i$ of what comes in, $u_i$ of what goes out, and the singular value $\sigma_i$ says
# how strongly the one is to be turned into the other. All $v_i$ have length 1 and are at right
# angles to each other, and so are all $u_i$. With these as the columns of $U$ and $V$ (here not the
# vocabulary) and the $\sigma_i$ on the diagonal of $\Sigma$, the sum is $U \Sigma V^\top$.
#
# Here is a real gradient: that of `up_proj` in the first block, before the first step, in a model
# with no new idea but RMSNorm. (Behind a LayerNorm one singular value would be 0: no mean comes
# in.)

# %%
torch.manual_seed(1)
plain = Model(replace(old, rms_norm=True))
plain(idx, targets)[1].backward()
up_proj = plain.blocks[0].feed_forward.up_proj.weight  # (4*C, C)
G = up_proj.grad  # (4*C, C)
sigma = torch.linalg.svdvals(G)  # (C)
share = sigma.square() / sigma.square().sum()  # (C)
print(
    f"{len(sigma)} singular values, the largest {sigma[0] / sigma[len(sigma) // 2]:.0f} times",
    end="",
)
print(" the one in the middle")
print(f"the first 3 make up {share[:3].sum():.0%} of the squared length")

# %% [markdown]
# Three directions of 64 have about half of it. A step along $G$ would move the matrix mostly in
# those. AdamW does not step along $G$: it divides each entry by its usual size. But it looks at one
# entry at a time and knows nothing of directions; its steps too are said to lie mostly in a few
# ([Jordan, 2024](https://kellerjordan.github.io/posts/muon/)). Muon looks at the matrix as a whole
# and moves it alike in all: it keeps the directions and sets every singular value to about 1. That
# is to **orthogonalise** the matrix.
#
# $$U \Sigma V^\top \to U V^\top$$
#
# The decomposition is slow to compute. But a polynomial of the matrix will do, since
# $X X^\top X$ has the same directions as $X$, with singular values $\sigma^3$. So in
#
# $$X \leftarrow a X + b\,X (X^\top X) + c\,X (X^\top X)^2$$
#
# each singular value goes through $a\sigma + b\sigma^3 + c\sigma^5$, and no other thing happens.
# This is a **Newton-Schulz** iteration. It begins with $X = G / \lVert G \rVert$, so that no
# singular value is above 1. PyTorch's Muon takes five of them, with these numbers:

# %%
a, b, c = 3.4445, -4.7750, 2.0315


def newton_schulz(G: Tensor, count: int) -> Tensor:
    X = G / G.norm()  # (M, N)
    for _ in range(count):
        square = X.T @ X  # (N, N)
        X = a * X + b * X @ square + c * X @ square @ square
    return X


# %% [markdown]
# **Predict before you run the next cell:** one singular value is 0.001, another one 0.9. Where are
# they after five iterations?

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
s = torch.linspace(0, 1.2, 200)
left.plot(s, s, color=GREY, linestyle="--")
left.plot(s, a * s + b * s**3 + c * s**5, color=BLUE, linewidth=2)
left.annotate("unchanged", (0.42, 0.3), color=GREY)
left.annotate("one iteration", (0.74, 1.12), color=BLUE)
left.set(xlabel="singular value before", ylabel="after", ylim=(0, 1.35))
for count in range(6):
    values = torch.linalg.svdvals(newton_schulz(G, count))  # (C)
    colour = plt.get_cmap("viridis")(0.9 - count * 0.16)
    right.plot(values, color=colour, linewidth=2)
    end = (len(values) - 1, values[-1])
    lift = {4: -9, 5: 0}.get(count, -4)
    right.annotate(count, end, (5, lift), textcoords="offset points", color=colour)
right.set(yscale="log", xlabel="singular values, by size", ylabel="value after so many iterations")
plt.show()

# %% [markdown]
# Left: near zero the curve is steep, so small values more than triple each time; those near 1 jump
# up and down between about 0.7 and 1.2. Right: the gradient's own singular values, on a logarithmic
# axis. The number at a line says after how many iterations; the lines become ever flatter.

# %%
for value in (0.00001, 0.001, 0.9):
    path = [value]
    for _ in range(5):
        path.append(a * path[-1] + b * path[-1] ** 3 + c * path[-1] ** 5)
    print(f"{value:.5f} -> ", " -> ".join(f"{each:.3f}" for each in path[1:]))
after = torch.linalg.svdvals(newton_schulz(G, 5))  # (C)
print(f"the gradient's: largest {after[0]:.2f}, middle {after[len(after) // 2]:.2f}", end="")
print(f", smallest {after[-1]:.2f}")

# %% [markdown]
# The 0.9 jumps about and happens to end at 0.68. The 0.001 has grown almost five hundredfold:
# before, it was a nine-hundredth of the other, now it is two thirds of it. The first line is too
# small for five iterations. The gradient above has no such value: after five, all of its own are
# between about 0.7 and 1.2. They are not exactly 1, and that is on purpose: numbers $a$, $b$, $c$
# that make the curve steep at zero were worth more than some that end at one.
#
# What is the step, then? A matrix of $M \times N$ whose singular values are all 1 has entries of
# about $1/\sqrt{\max(M, N)}$. Times $0.2\sqrt{\max(M, N)}$ they are about 0.2, and times the
# learning rate that is about as large as the steps that AdamW usually takes. Take one step with
# PyTorch's Muon, without momentum and decay, and one by hand.

# %%
weight = nn.Parameter(up_proj.detach().clone())  # (4*C, C)
before = weight.detach().clone()  # (4*C, C)
weight.grad = G.clone()
muon = torch.optim.Muon(
    [weight], lr=0.01, momentum=0, weight_decay=0, adjust_lr_fn="match_rms_adamw"
)
muon.step()
theirs = weight.detach() - before  # (4*C, C)
ours = -0.01 * 0.2 * math.sqrt(max(G.shape)) * newton_schulz(G, 5)  # (4*C, C)
print(f"difference, as a share of the step: {(theirs - ours).norm() / ours.norm():.3f}")
size = ours.square().mean().sqrt() / 0.01
print(f"root mean square of its entries, divided by the rate: {size:.2f}")

# %% [markdown]
# PyTorch's iterates in `bfloat16`, which is fast and a little rough; that is the difference. With
# momentum, it is not the gradient of one batch that is orthogonalised, but a running mean of them
# (to which the newest is added once more). The weights of query, key and value count as one matrix.
#
# Only the matrices inside the blocks are moved so. The embedding and `lm_head` are more like
# tables, with a row for each character; they stay with AdamW, and so do the few vectors.


# %%
def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the blocks, AdamW for everything else."""
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    for_muon = [p for name, p in matrices if config.muon and name.startswith("blocks.")]
    for_adamw = [p for name, p in matrices if not (config.muon and name.startswith("blocks."))]
    groups = [{"params": for_adamw}, {"params": vectors, "weight_decay": 0.0}]
    lr, weight_decay = config.learning_rate, config.weight_decay
    # beta2 = 0.99 averages squared gradients over ~100 steps; the default 0.999 takes ~1,000.
    adamw = torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    if not config.muon:
        return [adamw]
    muon = torch.optim.Muon(
        for_muon,
        lr=config.muon_learning_rate,
        weight_decay=weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",  # same update RMS as AdamW, for any matrix shape
    )
    return [adamw, muon]


# %%
for optimizer in make_optimizers(Model(tiny), tiny):
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    count = sum(each.numel() for each in parameters)
    print(f"{type(optimizer).__name__:5} moves {len(parameters):2} tensors, {count:,} numbers")

# %% [markdown]
# ## Hold, then fall
#
# The last idea is a schedule, `linear_decay`; without it the learning rate follows the cosine of
# `gpt.py`. The function gives a factor, since there are now two learning rates to multiply.


# %%
def learning_rate_factor(step: int, config: Config) -> float:
    """Fraction of the peak: warm-up, constant, linear decay to zero; or gpt.py's cosine."""
    warmup = (step + 1) / max(1, config.warmup_iters)
    if config.linear_decay:
        return min(warmup, 1.0, (config.max_iters - step) / (config.cooldown * config.max_iters))
    if step < config.warmup_iters:
        return warmup
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


# %%
by_cosine = replace(tiny, linear_decay=False)
figure, axes = plt.subplots(figsize=(8, 3))
for config, name, colour, place in (
    (tiny, "hold, then fall", BLUE, (0.22, 1.03)),
    (by_cosine, "cosine", ORANGE, (0.33, 0.66)),
):
    rates = [learning_rate_factor(step, config) for step in range(config.max_iters)]
    axes.plot(rates, color=colour, linewidth=2)
    axes.annotate(name, (place[0] * config.max_iters, place[1]), color=colour)
    print(f"{name:15} mean factor {sum(rates) / len(rates):.2f}, last {rates[-1]:.3f}")
axes.set(xlabel="training steps", ylabel="learning-rate factor", ylim=(0, 1.15))
plt.show()

# %% [markdown]
# The cosine ends at a tenth, the straight line at zero. Level as long as there is much to learn,
# then down to the end: the smaller the steps, the less the weights jitter around the place where
# they want to be.

# %% [markdown]
# ## Training
#
# The training loop of the script, on the tiny model. What is new is that there are two optimizers,
# so each line about one becomes a loop over both.


# %%
def short_training(config: Config, seed: int = 1) -> tuple[nn.Module, list[tuple[int, float]]]:
    """A trained model, and its losses on held-back text on the way."""
    torch.manual_seed(seed)
    model = Model(config)
    optimizers = make_optimizers(model, config)
    config = replace(config, max_iters=steps(config.max_iters))
    generator, evaluations = torch.Generator().manual_seed(seed), []
    for step in range(config.max_iters):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * learning_rate_factor(step, config)
            optimizer.zero_grad()
        idx, targets = draw_batch(training, config.block_size, config.batch_size, generator)
        logits, loss = model(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % steps(30) == 0 or step + 1 == config.max_iters:
            evaluations.append((step + 1, exact_loss(model, held)))
    return model, evaluations


# %% [markdown]
# Both models get the same batches and equally many steps. The old one may choose between two
# learning rates, the usual one and a bold one, and each training runs with two seeds.
#
# **Predict before you run the next cells:** which model ends lower, and by how much, seen against
# the difference between two seeds?

# %%
bold = replace(old, learning_rate=1e-2)
trained, curves = {}, {}
for name, config in (("modern", tiny), ("old", old), ("old, bold rate", bold)):
    for seed in (1, 2):
        trained[name, seed], curves[name, seed] = short_training(config, seed)
    losses = [curves[name, seed][-1][1] for seed in (1, 2)]
    print(f"{name:15} loss on held-back text, two seeds: {losses[0]:.3f} {losses[1]:.3f}")

# %%
colours = {"modern": BLUE, "old": GREY, "old, bold rate": ORANGE}
figure, axes = plt.subplots(figsize=(8, 3.8))
for (name, _), curve in curves.items():
    axes.plot(*zip(*curve, strict=True), "o-", color=colours[name], markersize=3, alpha=0.8)
for place, (name, colour) in zip(
    ((0.3, 0.2), (0.45, 0.75), (0.55, 0.75)), colours.items(), strict=True
):
    axes.text(*place, name, color=colour, transform=axes.transAxes)
axes.set(xlabel="training steps", ylabel="loss on held-back text")
plt.show()

# %% [markdown]
# Each line is one training. The modern model is ahead at every point, and ends about 0.3 lower; two
# seeds differ by a tenth of that or less. The bold rate helps the old model only a little.
#
# Now be careful with this picture. It says that *this* model of about 150,000 numbers, on
# *this* text, is ahead after three hundred steps. It does not say
#
# - which of the eleven ideas did it, or whether one of them does harm;
# - what happens in a training fifty times as long, where a fast start counts for less;
# - what it costs: with Muon a step takes longer;
# - what other settings would have done for either.
#
# For such questions there is a real measurement: `python compare.py --modern` trains a larger model
# with all ideas and, idea by idea, without it, for the same number of steps.
#
# **Predict:** which of the eleven ideas does it miss most? How many make no difference that five
# seeds can show?
#
# <details><summary>What it found</summary>
#
# ![The loss with all ideas, and without each of them](../results/ideas/staircase.svg)
#
# A bar to the left is what leaving out an idea costs, with its standard error. An idea whose bar is
# shorter than two standard errors may do nothing in this model of 800,000 parameters. Deep stacks
# and long trainings, for which some of the ideas were made, do not come up here. The table is in
# `docs/results.md`.
#
# </details>
#
# ### The schedule alone
#
# One comparison is cheap enough for here: all ideas, and all but `linear_decay`. The optimizers and
# the batches are the same.

# %%
for seed in (1, 2):
    trained["cosine", seed], curves["cosine", seed] = short_training(by_cosine, seed)
figure, axes = plt.subplots(figsize=(8, 3.4))
for name, label, colour in (("modern", "hold, then fall", BLUE), ("cosine", "cosine", ORANGE)):
    ends = [curves[name, seed][-1][1] for seed in (1, 2)]
    print(f"{label:15} two seeds: {ends[0]:.3f} {ends[1]:.3f}")
    for seed in (1, 2):
        curve = [(step, loss) for step, loss in curves[name, seed] if step >= steps(90)]
        axes.plot(*zip(*curve, strict=True), "o-", color=colour, markersize=3, alpha=0.8)
    axes.text(0.6, 0.95 - 0.1 * (colour == ORANGE), label, color=colour, transform=axes.transAxes)
axes.set(xlabel="training steps", ylabel="loss on held-back text")
plt.show()

# %% [markdown]
# With both seeds the straight fall ends lower, and up to the middle hardly anything tells the two
# apart. But the gain is about as small as the difference between two seeds. Two seeds are a hint,
# not a result.
#
# ## Inside the trained model
#
# ### Few strong activations
#
# The activations of a feed-forward network are what `down_proj` reads. Train once more without
# the square, then look at both models: how many activations are exactly zero, and how is the rest
# shared out?


# %%
@torch.no_grad()
def read_by(model: nn.Module, part: str, idx: Tensor) -> list[Tensor]:
    """What comes into this part of every block."""
    inputs = []
    hooks = [
        block.get_submodule(part).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        for block in model.blocks
    ]
    model(idx)
    for hook in hooks:
        hook.remove()
    return inputs


# %%
modern, gpt_like = trained["modern", 1].eval(), trained["old", 1].eval()
with_relu, _ = short_training(replace(tiny, squared_relu=False))
idx, targets = draw_batch(validation, T, 64, torch.Generator().manual_seed(1))  # (B, T) both
statistics = {}
for name, each in (("ReLU", with_relu), ("squared", modern)):
    for layer, active in enumerate(read_by(each, "feed_forward.down_proj", idx)):  # (B, T, 4*C)
        zero = (active == 0).float().mean().item()
        largest = active.flatten().topk(active.numel() // 100).values
        statistics[name, layer] = zero, (largest.sum() / active.sum().clamp(min=1e-9)).item()

# %%
figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.3))
titles = ("activations that are exactly zero", "share of the sum in the largest 1 %")
for column, (axes, title) in enumerate(zip(panels, titles, strict=True)):
    for shift, name, colour in ((-0.2, "ReLU", ORANGE), (0.2, "squared", BLUE)):
        values = [statistics[name, layer][column] for layer in range(tiny.n_layer)]
        bars = axes.bar(torch.arange(tiny.n_layer) + shift, values, 0.36, color=colour)
        axes.bar_label(bars, [f"{value:.0%}" for value in values], padding=2)
        axes.text(-0.2 + 0.5 * (shift > 0), 1.08, name, color=colour)
    axes.set_xticks(range(tiny.n_layer), range(1, tiny.n_layer + 1))
    axes.set_yticks([0, 0.5, 1])
    axes.set(xlabel="block", ylabel="share", ylim=(0, 1.2))
    axes.set_title(title, fontsize=11)
plt.show()

# %% [markdown]
# Left: more than half of all activations are zero, in every block and with both functions. That the
# square makes more zeros cannot be said. Right: what is not zero is shared out far less evenly with
# the square. In each block the largest hundredth carries more than twice as much of the sum. That
# is what squaring does: a channel that is twice as active counts four times. Few activations are
# strong, and those are heard.
#
# ### What the sum is made of
#
# The residual stream is a sum: the embedding, and what each attention and each feed-forward network
# adds. How long are these vectors in the trained models?


# %%
@torch.no_grad()
def added(model: nn.Module, idx: Tensor) -> list[tuple[str, float]]:
    """The parts of the sum and their mean lengths, in the order in which they come in."""
    parts, hooks = [], []
    sources = [("embedding", model.dropout)]
    for i, block in enumerate(model.blocks, start=1):
        sources += [(f"attention {i}", block.attention), (f"feed-forward {i}", block.feed_forward)]
    for name, source in sources:

        def note(_: nn.Module, __: object, out: Tensor, name: str = name) -> None:
            parts.append((name, out.norm(dim=-1).mean().item()))

        hooks.append(source.register_forward_hook(note))
    model(idx)
    for hook in hooks:
        hook.remove()
    return parts


# %%
figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.2), sharey=True)
for axes, each, title in zip(panels, (gpt_like, modern), ("old", "modern"), strict=True):
    parts = added(each, idx)
    bars = axes.barh(
        [name for name, _ in parts],
        [size for _, size in parts],
        color=[ORANGE if name == "embedding" else BLUE for name, _ in parts],
    )
    axes.bar_label(bars, [f"{size:.1f}" for _, size in parts], padding=3)
    axes.margins(x=0.15)
    axes.set(xlabel="mean length of what is added", title=title)
panels[0].invert_yaxis()
plt.show()
for i, block in enumerate(modern.blocks, start=1):
    print(f"block {i}: it adds the embedding again, times λ = {block.skip_lambda.item():+.2f}")
left_over = 1 + sum(block.skip_lambda.item() for block in modern.blocks)
print(f"in the sum at the end: {left_over:.2f} of the embedding")

# %% [markdown]
# On the left the embedding (with its position) is short, and the first feed-forward network adds a
# vector more than ten times as long. What is it for? If it is no more than a longer embedding, it
# depends on the character alone, not on those before. So take away what it adds everywhere, and
# take the mean of the rest for each character: how much of what varies is that mean?


# %%
@torch.no_grad()
def by_character(model: nn.Module, idx: Tensor) -> tuple[float, float]:
    """Of the first feed-forward network's output: the length of what is the same everywhere, and
    the share of the rest that the character alone decides."""
    inputs = read_by(model, "feed_forward", idx)[0]  # (B, T, C)
    out = model.blocks[0].feed_forward(inputs).flatten(0, 1)  # (B*T, C)
    same = out.mean(dim=0)  # (C)
    out = out - same  # (B*T, C)
    sums = torch.zeros(V, out.shape[1]).index_add(0, idx.flatten(), out)  # (V, C)
    means = sums / idx.flatten().bincount(minlength=V).clamp(min=1)[:, None]  # (V, C)
    share = means[idx.flatten()].square().sum() / out.square().sum()
    return same.norm().item(), share.item()


# %%
for name, each in (("old", gpt_like), ("modern", modern)):
    same, share = by_character(each, idx)
    print(f"{name:6} the same everywhere: length {same:.1f}; ", end="")
    print(f"of what varies, the character alone decides {share:.0%}")

# %% [markdown]
# In the old model nearly all that varies follows from the character: to a good part it is a second,
# longer embedding. In the modern one, whose embedding is long from the start, the character decides
# less, and all that this network adds is short.
#
# The λ are a surprise: they are negative. Asked how much more of the embedding they want, the
# blocks of this model say: less. In block 1 the sum is still the embedding alone, so λ = -0.19
# only makes it shorter, and whatever is added later weighs more. At the end half of it is
# left. Why, one model does not tell. Another one, trained for longer, may learn other values; that
# it can choose is the idea.
#
# ### Was anything lost?
#
# The old model has means that LayerNorm takes away, and biases. Look at the one that is trained.
# How much of its vectors' squared length is their mean, and how much in the modern one? And what
# happens to the old one's loss if all biases of the linear layers are set to zero?

# %%
for name, each in (("old", gpt_like), ("modern", modern)):
    inputs = read_by(each, "feed_forward_norm", idx)  # n_layer times (B, T, C)
    shares = [x.mean(dim=-1).square() / x.square().mean(dim=-1) for x in inputs]  # (B, T) each
    words = ", ".join(f"{share.mean():.1%}" for share in shares)
    print(f"{name:6} the mean's share of the squared length, block by block: {words}")
print(f"by chance, one direction of {tiny.n_embd}: {1 / tiny.n_embd:.1%}")

bare = copy.deepcopy(gpt_like)
for part in bare.modules():
    if isinstance(part, nn.Linear) and part.bias is not None:
        nn.init.zeros_(part.bias)
with_biases, set_to_zero = exact_loss(gpt_like, held), exact_loss(bare, held)
print(f"loss with biases {with_biases:.3f}, set to zero {set_to_zero:.3f}")

# %% [markdown]
# In the old model the mean is less than one direction gets by chance. No wonder: every layer that
# reads the sum takes the mean away, so nothing teaches the model to write one. On such vectors
# LayerNorm and RMSNorm do nearly the same. In the modern model, whose norms leave the mean in, it
# is a direction like any other. The biases do something, but little: without them the loss rises by
# 0.01, although this model was trained with them. What a model does that has been trained without
# is another question; that takes a training of its own.
#
# ## Writing beyond the block
#
# The model was trained on blocks of 32. Let it predict texts four times as long, and take the mean
# loss at each position. The old model has no such positions.

# %%
windows = validation[: steps(100_000)].unfold(0, 4 * T + 1, 4 * T).long()  # (N, 4*T+1)
with torch.inference_mode():
    logits = torch.cat([modern(some[:, :-1])[0] for some in windows.split(128)])  # (N, 4*T, V)
by_position = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=0)
smooth = F.avg_pool1d(by_position[None], 9, 1)[0]  # (4*T-8): nine neighbours at a time
figure, axes = plt.subplots(figsize=(8, 3.2))
axes.plot(by_position, "o", color=BLUE, markersize=3, alpha=0.5)
axes.plot(range(4, 4 * T - 4), smooth, color=ORANGE, linewidth=2)
axes.axvline(T - 0.5, color=GREY, linestyle="--")
axes.text(T + 1, by_position.max(), "the block ends", color=GREY, va="top")
axes.set(xlabel="position", ylabel="loss (nats per character)")
plt.show()
for first in range(0, 4 * T, T):
    print(f"positions {first:3} to {first + T - 1:3}: {by_position[first : first + T].mean():.3f}")

# %% [markdown]
# Each dot is a mean over several hundred texts, the orange line one of nine neighbours. After the
# first few characters it is level, and it does not notice where the block ends: for this model no
# distance is new out there.
#
# **Predict before you run the next cell:** both models write 150 characters with their caches. How
# many characters go through each of them? Remember that the old one, when its block is full, starts
# again from the second half.

# %%
sizes = []
for name, each in (("old", gpt_like), ("modern", modern)):
    sizes.clear()
    hook = each.token_embedding.register_forward_hook(lambda _, x, __: sizes.append(x[0].numel()))
    text = "".join(generate(each, tokenizer, length=150))
    hook.remove()
    print(f"{name:6} computes {sum(sizes)} characters, at most {max(sizes)} at once")
uncached = copy.copy(modern)  # the same weights,
uncached.new_cache = lambda: None  # but no cache
same = "".join(generate(uncached, tokenizer, length=150)) == text
print("modern without a cache, same text:", same, end="\n\n")
print(text.strip())

# %% [markdown]
# The modern model computes every character once, and only one at a time. The old one goes back by
# half a block again and again. And as in the notebook before, the cache changes the cost, not the
# text.
#
# ## The script
#
# `modern_gpt.py` is all the classes above and this function. It differs from that of `gpt.py` in
# one thing: there are two optimizers, each with a learning rate of its own, and one factor for
# both. Each idea has a flag that leaves it out, as in `python modern_gpt.py --no-rope --no-muon`.


# %%
def main() -> None:
    run = Run(Config, PRESETS)
    model = Model(run.config).to(run.device)
    optimizers = make_optimizers(model, run.config)
    for batch in run.batches(model, *optimizers):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * learning_rate_factor(run.step, run.config)
            optimizer.zero_grad()
        for idx, targets, weight in run.micro_batches(batch):  # weight: fraction of the batch
            with run.autocast():  # mixed precision: matrix products in the run's dtype
                logits, loss = model(idx, targets)
            (weight * loss).backward()
            run.log(loss)
        nn.utils.clip_grad_norm_(model.parameters(), run.config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
    run.finish()


# %% [markdown]
# ## Exercises
#
# Fill in a cell, run it, then run the one below: it says whether the answer is right, or what is
# off. A solution is folded under each.
#
# ### 1 · Scores that cannot run away
#
# For queries and keys, `(…, T, D)` both, return the scores of attention with normalised queries and
# keys, `(…, T, T)`: a row for each query, without mask and without RoPE. You may use `RMSNorm`.


# %% tags=["exercise"]
def bounded_scores(query: Tensor, key: Tensor) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    query, key = torch.randn(2, 3, 6, 16, generator=torch.Generator().manual_seed(1))  # (H, T, D)
    scores = given(bounded_scores(query, key))  # (H, T, T)
    assert scores.shape == (3, 6, 6), f"the shape is {tuple(scores.shape)}, not (3, 6, 6)"
    for name, each in (("queries", (9 * query, key)), ("keys", (query, 9 * key))):
        longer = bounded_scores(*each)
        assert torch.allclose(longer, scores, atol=1e-3), f"longer {name} change the scores"
    itself = bounded_scores(query, query).diagonal(dim1=1, dim2=2)  # (H, T)
    assert torch.allclose(itself, torch.full((3, 6), 4.0), atol=1e-3), (
        f"a query that meets itself as a key scores {itself[0, 0]:.2f}, not √D = 4: both have the "
        "length √D, and their product is divided by √D"
    )
    first = F.cosine_similarity(query[0, 0], key[0, 1], dim=0) * 4
    assert torch.isclose(scores[0, 0, 1], first, atol=1e-3), "a row must belong to a query"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def bounded_scores(query: Tensor, key: Tensor) -> Tensor:
#     norm = RMSNorm()
#     return norm(query) @ norm(key).transpose(-2, -1) * query.shape[-1] ** -0.5
# ```
#
# This is √D times the cosine of the angle between the two: never above √D.
#
# </details>
#
# ### 2 · Rotate with complex numbers
#
# A pair is also a complex number, $a + ib$, and to rotate it by an angle $\theta$ is to multiply it
# by $e^{i\theta}$. Rotate the vectors `x`, `(T, D)`, in this way: the first half of the channels
# are the $a$ of all pairs, the second half the $b$. `angles` is `(T, D/2)`, an angle for each
# position and pair. `torch.complex` makes complex numbers from their parts, `torch.polar` from norm
# and angle.


# %% tags=["exercise"]
def rotate(x: Tensor, angles: Tensor) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 8, generator=generator)  # (D) both
    angles = torch.arange(12)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.02])  # (T, D/2)
    queries = given(rotate(query.expand(12, 8), angles))  # (T, D)
    assert queries.shape == (12, 8), f"the shape is {tuple(queries.shape)}, not (12, 8)"
    assert torch.allclose(queries[0], query), "at angle 0 nothing may change"
    assert not torch.allclose(queries, query.expand(12, 8)), "nothing is rotated"
    lengths = queries.norm(dim=-1)  # (T)
    assert torch.allclose(lengths, query.norm().expand(12), atol=1e-4), (
        f"norms run from {lengths.min():.2f} to {lengths.max():.2f}, but a rotation keeps them all "
        f"at {query.norm():.2f}: multiply by a number of norm 1"
    )
    scores = queries @ rotate(key.expand(12, 8), angles).T  # (T, T)
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        spread = (diagonal.max() - diagonal.min()).item()
        assert spread < 1e-4, f"scores at distance {-distance} differ by {spread:.3f}: which pairs?"
    right = torch.cat((angles.cos(), angles.sin()), dim=1)  # (T, D)
    ones = torch.cat((torch.ones(12, 4), torch.zeros(12, 4)), dim=1)  # (T, D)
    backwards = torch.allclose(rotate(ones, -angles), right, atol=1e-5)
    assert not backwards, "you rotate in the other direction"
    assert torch.allclose(rotate(ones, angles), right, atol=1e-5), (
        "you rotate other pairs: channel i belongs to channel i + D/2"
    )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rotate(x: Tensor, angles: Tensor) -> Tensor:
#     pairs = torch.complex(*x.chunk(2, dim=-1))  # (T, D/2)
#     pairs = pairs * torch.polar(torch.ones_like(angles), angles)  # (T, D/2)
#     return torch.cat((pairs.real, pairs.imag), dim=-1)  # (T, D)
# ```
#
# </details>
#
# ### 3 · Look back
#
# Given a query and a distance, return the key that gets this query's highest score at just that
# distance, among all keys with the query's norm. `query` is `(D)`, and so is the key, both before
# they are rotated by their positions. You may use `RoPE`.


# %% tags=["exercise"]
def key_for(query: Tensor, distance: int) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    query = torch.randn(16, generator=torch.Generator().manual_seed(1))  # (D)
    rope = RoPE(16)
    for distance in (0, 1, 5, 17):
        key = given(key_for(query, distance))
        assert key.shape == query.shape, f"the key has the shape {tuple(key.shape)}, not (16,)"
        assert torch.isclose(key.norm(), query.norm()), "the key must be as long as the query"
        keys = rope(key.expand(40, 16), 0)  # (T, D)
        scores = rope(query[None], 39)[0] @ keys.T  # (T): the query stands at the last position
        best = 39 - scores.argmax().item()
        assert best == distance, f"for distance {distance} the best score is at distance {best}"
        highest = query.square().sum()  # what equal directions give
        assert torch.isclose(scores.max(), highest, rtol=1e-4), (
            f"a score of {scores.max():.2f}, but {highest:.2f} can be had"
        )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def key_for(query: Tensor, distance: int) -> Tensor:
#     return RoPE(len(query))(query[None], distance)[0]
# ```
#
# The key is `distance` positions behind, so it is rotated less. Rotate it ahead by as much, and the
# two point the same way.
#
# </details>
#
# ### 4 · Orthogonalise exactly
#
# Return $U V^\top$ of a matrix, by `torch.linalg.svd`. The check compares it with
# five iterations of Newton-Schulz.


# %% tags=["exercise"]
def orthogonalised(G: Tensor) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    for shape in ((12, 5), (5, 12)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        exact = given(orthogonalised(G))
        assert exact.shape == G.shape, f"the shape is {tuple(exact.shape)}, not {shape}"
        sigma = torch.linalg.svdvals(exact)
        assert torch.allclose(sigma, torch.ones(5), atol=1e-4), (
            f"singular values run from {sigma.min():.2f} to {sigma.max():.2f}, but all must be 1"
        )
        overlap = (exact * G).sum() / torch.linalg.svdvals(G).sum()
        assert overlap > 0.999, "all singular values are 1, but the directions are others"
    roughly = newton_schulz(G, 5)
    print(f"Newton-Schulz differs by {(roughly - exact).norm() / exact.norm():.0%} of the length")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def orthogonalised(G: Tensor) -> Tensor:
#     U, _, Vh = torch.linalg.svd(G, full_matrices=False)
#     return U @ Vh
# ```
#
# </details>
#
# ### 5 · What was saved
#
# How many parameters fewer does the model have with all ideas than without any? Go by pencil and
# paper: the position embedding, the biases of three linear layers in a block, the gains and biases
# of all norms, and what is new.


# %% tags=["exercise"]
def saved(config: Config) -> int: ...


# %% tags=["check"]
@check
def exercise_5() -> None:
    for T, C, L in ((8, 12, 2), (32, 24, 3)):
        config = replace(tiny, block_size=T, n_embd=C, n_head=2, n_layer=L)
        answer = given(saved(config))
        counts = [
            sum(each.numel() for each in Model(replace(config, **ideas)).parameters())
            for ideas in (dict.fromkeys(IDEAS, False), {})
        ]
        right = counts[0] - counts[1]
        off = right - answer
        words = f"block_size {T}, n_embd {C}, n_layer {L}"
        assert off != T * C, f"{words}: the position embedding is missing"
        assert off != 6 * L * C, f"{words}: three layers in a block have biases, 6 * C together"
        assert off != 2 * (2 * L + 1) * C, f"{words}: each norm has a gain and a bias"
        assert off != 2 * C, f"{words}: there is one more norm, before the logits"
        assert off != -L, f"{words}: each block has a new parameter, its λ"
        assert off != -C, f"{words}: the token shift has a vector of its own"
        assert off == 0, f"{words}: {right} are saved, not {answer}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def saved(config: Config) -> int:
#     T, C, L = config.block_size, config.n_embd, config.n_layer
#     biases = L * (C + 4 * C + C)
#     norms = (2 * L + 1) * 2 * C
#     return T * C + biases + norms - L - C
# ```
#
# </details>

# %% [markdown]
# This closes the course. You began with a table of pairs and have now taken apart a model in the
# way that models are built today; every line of it is yours to change. Take an idea that you have
# read of, give it a field in `Config`, and measure what it is worth.
