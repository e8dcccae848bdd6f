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
# # 8 · A modern GPT
#
# `modern_gpt.py` is `gpt.py` with eleven ideas, each behind a switch such as `--no-rope`. You will
# try each idea on a few numbers, build the model, and learn to measure what an idea is worth. Allow
# 45 minutes to read and run, one to two hours more for all exercises; you can skip the challenge.
#
# The validation loss of the `small` preset drops from about 1.63 (`gpt.py`) to about 1.46 nats per
# character. Part of this may be due to the longer context, 256 characters instead of 64.
#
# ![The model of modern_gpt.py](../results/diagrams/modern_gpt.svg)
#
# The baseline is the lecture's model, not GPT-2 itself: see the table in notebook 7.

# %%
import sys

sys.path.insert(0, "..")

import copy
import math
from collections.abc import Callable
from dataclasses import fields, replace

from trainer import UserError
from common import LanguageModel, Tokenizer, draw_batch
from gpt import Config as OldConfig
from gpt import Model as OldModel
from modern_gpt import Config
from sample import generate
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss
from trainer.layers import Dropout, attention, rms_norm

import torch
from lesson import BLUE, GRAY, ORANGE, causal, check, given, heat_map, plt, reveal, steps
from torch import Tensor, nn
from torch.nn import functional as F

torch.set_printoptions(precision=2, sci_mode=False)
corpus = open_corpus(None)
tokenizer = Tokenizer(corpus.vocabulary)
held_out = corpus.validation[: steps(20_000)]  # enough to compare short runs

V = len(corpus.vocabulary)  # vocabulary size
sizes = {"vocab_size": V, "block_size": 32, "n_embd": 64, "n_head": 4, "n_layer": 3, "dropout": 0}
tiny = Config(**sizes, max_iters=300, warmup_iters=15)
T, D = tiny.block_size, tiny.n_embd // tiny.n_head  # context length, head size
IDEAS = [field.name for field in fields(Config) if field.type is bool]
no_ideas = replace(tiny, **dict.fromkeys(IDEAS, False))
print(len(IDEAS), "ideas:", ", ".join(IDEAS))

# %% [markdown]
# ## Norms: `rms_norm`, `qk_norm`, `embedding_norm`
#
# **RMSNorm** divides a vector by its root mean square (RMS):
#
# $$\text{RMSNorm}(x) = \frac{x}{\sqrt{\frac{1}{C}\sum_c x_c^2}}$$
#
# LayerNorm also subtracts the mean and has a learned scale and bias. The published RMSNorm keeps
# the scale; here it is left out, because a linear layer usually follows and absorbs it.

# %%
# rms_norm also adds 1e-6 under the root, so that it never divides by zero.
x = torch.tensor([1.0, -1.0, 5.0, 3.0])  # (C)
rms = x.square().mean().sqrt()
print("mean", x.mean().item(), " RMS", rms.item())
print("x / RMS  ", x / rms)
print("rms_norm ", rms_norm(x))
print("LayerNorm", nn.LayerNorm(4)(x).detach())
print("rms_norm(x) equals x / RMS:", torch.allclose(rms_norm(x), x / rms))


# %%
class RMSNorm(nn.Module):
    """Divides a vector by its root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)  # x / sqrt(mean(x²))


torch.manual_seed(1)
embeddings = 0.02 * torch.randn(3, tiny.n_embd)  # (T, C), initialized as in gpt.py
print("RMS of three embeddings   ", embeddings.square().mean(dim=-1).sqrt())
print("RMS with `embedding_norm` ", RMSNorm()(embeddings).square().mean(dim=-1).sqrt())

# %% [markdown]
# With `embedding_norm` the residual stream starts at an RMS of 1, like the input of every sublayer.
#
# ### Queries and keys
#
# A score $q \cdot k / \sqrt D$ grows with the norms of $q$ and $k$. Large scores saturate the
# softmax: nearly all the weight goes to one position, and the gradient vanishes. `qk_norm` applies
# RMSNorm to every query and key. Each then has norm $\sqrt D$, so no score exceeds $\sqrt D$. No
# linear layer follows, so a learned scale would not be redundant: it would set the softmax's
# temperature. [Henry et al.](https://arxiv.org/abs/2010.04245) learn it; here it is fixed.
#
# **Predict before you run:** without the norm, multiply the weights that make queries and keys by
# 3. By what factor do the scores grow?

# %%
guess = ...  # a number

# %% tags=["prediction"]
torch.manual_seed(1)
x = torch.randn(6, D)  # (T, C)
query_key_weight = torch.randn(2, D, D) / D**0.5  # (2, C, D)


def scores_for(factor: float, norm: nn.Module) -> Tensor:
    query, key = norm(x @ (factor * query_key_weight))  # (T, D) each
    return query @ key.T / D**0.5  # (T, T)


ratio = scores_for(3, nn.Identity()) / scores_for(1, nn.Identity())  # (T, T)
reveal(guess, ratio.mean(), within=0.1)

# %%
figure, panels = plt.subplots(1, 4, figsize=(7.2, 2.2))
none, norm, labels = nn.Identity(), RMSNorm(), [str(position) for position in range(6)]
cases = [("× 1", 1, none), ("× 3", 3, none)]
cases += [("× 1, norm", 1, norm), ("× 3, norm", 3, norm)]
for axes, (title, factor, each) in zip(panels, cases, strict=True):
    mask = torch.full((6, 6), float("-inf")).triu(1)  # (T, T)
    weights = F.softmax(scores_for(factor, each) + mask, dim=-1)  # (T, T)
    heat_map(axes, causal(weights), labels, labels, title, vmin=0, vmax=1)
    axes.set(xlabel="key position")
panels[0].set(ylabel="query position")
figure.colorbar(panels[0].images[0], ax=panels, label="attention weight", shrink=0.8)
plt.show()

# %% [markdown]
# Without the norm, larger weights make most rows nearly one-hot. With it, only the directions of
# queries and keys matter.
#
# ### Exercise 1 · Bounded scores
#
# Return the scores of normalized queries and keys, without mask or RoPE.


# %% tags=["exercise"]
def bounded_scores(query: Tensor, key: Tensor) -> Tensor:
    """Queries and keys (H, T, D) to scores (H, T, T), one row per query."""
    H, T, D = query.shape
    scores = ...  # RMSNorm() normalizes
    return scores


# %% tags=["check"]
@check
def exercise_1() -> None:
    query, key = torch.randn(2, 3, 6, 16, generator=torch.Generator().manual_seed(1))  # (H, T, D)
    scores = given(bounded_scores(query, key))  # (H, T, T)
    assert scores.shape == (3, 6, 6), f"the shape is {tuple(scores.shape)}, not (3, 6, 6)"
    for name, each in (("queries", (9 * query, key)), ("keys", (query, 9 * key))):
        longer = bounded_scores(*each)
        assert torch.allclose(longer, scores, atol=1e-3), f"longer {name} change the scores"
    itself = bounded_scores(query, query)[0, 0, 0].item()
    assert abs(itself - 4) < 1e-3, f"q with itself as the key scores {itself:.2f}, not √D = 4"
    expected = 4 * F.cosine_similarity(query[0, 0], key[0, 1], dim=0)
    assert torch.isclose(scores[0, 0, 1], expected, atol=1e-3), "a row must belong to a query"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def bounded_scores(query, key):
#     norm = RMSNorm()
#     return norm(query) @ norm(key).transpose(-2, -1) / query.shape[-1] ** 0.5
# ```
#
# </details>
#
# ## Positions: `rope`
#
# `gpt.py` adds a learned vector for each position, from a table that ends at `block_size`.
# **Rotary position embedding** (RoPE) has no table. It treats channels $i$ and $i + D/2$ of a query
# as a point $(a, b)$ in a plane and rotates it by an angle proportional to its position $p$:
#
# $$(a,\ b) \to (a\cos p\omega_i - b\sin p\omega_i,\ \ b\cos p\omega_i + a\sin p\omega_i)
# \qquad \omega_i = 10000^{-2i/D}$$
#
# Keys are rotated in the same way; values are not. Here is one plane, at 30° per position:

# %%
angles = torch.deg2rad(30.0 * torch.arange(5))  # (T)
points = torch.stack((angles.cos(), angles.sin()), dim=1)  # (T, 2)
print("the vector (1, 0) at positions 0 to 4:\n", points)
print("scores of each query position (row) with each key position (column):\n", points @ points.T)

# %% [markdown]
# Each diagonal of the scores holds one value. Rotating a query and a key by the same angle does not
# change their dot product, so **the score depends on the two positions only through their
# distance**.
#
# ### Exercise 2 · Rotate
#
# Rotate all planes at once.


# %% tags=["exercise"]
def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates vectors (T, D) by angles (T, D/2), one for each position and plane."""
    a, b = x.chunk(2, dim=-1)  # (T, D/2) each
    rotated = ...  # angles.cos() and angles.sin() are (T, D/2)
    return rotated


# %% tags=["check"]
@check
def exercise_2() -> None:
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))  # (D) each
    angles = torch.arange(12)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.02])  # (T, D/2)
    queries = given(rotate(query.expand(12, 8), angles))  # (T, D)
    assert queries.shape == (12, 8), f"the shape is {tuple(queries.shape)}, not (12, 8)"
    assert torch.allclose(queries[0], query), "at angle 0 nothing should change"
    assert not torch.allclose(queries, query.expand(12, 8)), "nothing is rotated"
    norms = queries.norm(dim=-1)  # (T)
    assert torch.allclose(norms, query.norm().expand(12), atol=1e-4), (
        f"norms run from {norms.min():.2f} to {norms.max():.2f}; rotation keeps {query.norm():.2f}"
    )
    scores = queries @ rotate(key.expand(12, 8), angles).T  # (T, T)
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        gap = (diagonal.max() - diagonal.min()).item()
        assert gap < 1e-4, f"scores at distance {-distance} differ by up to {gap:.3f}"
    ones = torch.cat((torch.ones(12, 4), torch.zeros(12, 4)), dim=1)  # (T, D): (1, 0) in each plane
    b = rotate(ones, angles)[:, 4:]  # (T, D/2)
    assert not torch.allclose(b, -angles.sin(), atol=1e-5), "you rotate in the other direction"
    assert torch.allclose(b, angles.sin(), atol=1e-5), "the planes are channels i and i + D/2"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rotate(x, angles):
#     a, b = x.chunk(2, dim=-1)  # (T, D/2) each
#     cos, sin = angles.cos(), angles.sin()  # (T, D/2) each
#     return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
# ```
#
# </details>
#
# The class also computes the angles; `start` is the position of the first vector. The picture shows
# a query in a fast plane and in a slow one, and its scores with one key.


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


torch.manual_seed(1)
rope, labels = RoPE(D), [str(position) for position in range(9)]
queries, keys = rope(torch.randn(2, 1, D).expand(2, 9, D), 0)  # (T, D) each
figure, panels = plt.subplots(1, 3, figsize=(7.2, 2.6), width_ratios=(1, 1, 1.4))
for axes, plane, count, labeled in ((panels[0], 0, 6, 1), (panels[1], 2, 9, 4)):
    a, b = queries[:count, plane], queries[:count, plane + D // 2]  # (T) each
    radius = math.hypot(a[0], b[0])
    axes.add_patch(plt.Circle((0, 0), radius, fill=False, color=GRAY, alpha=0.4))
    axes.plot(a, b, "o", color=BLUE)
    for p in range(0, count, labeled):
        axes.text(1.3 * a[p], 1.3 * b[p], labels[p], ha="center", va="center")
    axes.set(xlim=(-1.5 * radius, 1.5 * radius), ylim=(-1.5 * radius, 1.5 * radius))
    axes.set(xlabel=f"channel {plane}", ylabel=f"channel {plane + D // 2}", aspect="equal")
    axes.set_title(f"{math.degrees(rope.inv_freq[plane]):.0f}° per position", fontsize=11)
heat_map(panels[2], causal(queries @ keys.T / D**0.5), labels, labels, bar="score")
panels[2].set(xlabel="key position", ylabel="query position")
plt.show()

# %% [markdown]
# Fast planes tell neighbors apart; slow planes tell near from far.
#
# **A cache that slides.** A rotation exists for every position. So when the KV cache is full, it
# can drop its oldest key and continue: only distances matter. The kept keys of deeper layers still
# carry information from dropped characters, so this is sliding-window attention over a growing
# text; training never went beyond `block_size`.

# %%
kept = []
for position in range(5):
    kept = [*kept, position]
    print(f"a cache of size 2: query position {position} attends to {kept}")
    kept = kept[-2:]

# %% [markdown]
# ## Small changes
#
# - `bias_free`: no biases in linear layers.
# - `squared_relu`: the square of ReLU. Its slope has no jump at 0.
# - `token_shift`: a learned multiple of the previous character's embedding, one factor per channel,
#   is added to each embedding. The first block then sees pairs of characters. RWKV shifts the input
#   of every sublayer instead.
# - `zero_init`: `out_proj` and `down_proj` start at zero, so every block starts as the identity.
# - `embedding_skip`: each block first adds λ · embedding to the residual stream, with λ learned.
#
# `embedding_norm` and `embedding_skip` are from
# [modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt).

# %%
x = torch.tensor([-2.0, 0.5, 2.0])
print("ReLU        ", F.relu(x))
print("squared ReLU", F.relu(x) ** 2)

embedding = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])  # (T, C)
previous = F.pad(embedding, (0, 0, 1, -1))  # (T, C): shifted by one position, zeros first
factors = torch.tensor([0.5, 0.0])  # (C)
print("\ntoken_shift adds half of the previous first channel:\n", embedding + factors * previous)

down_proj = nn.Linear(2, 2, bias=False)
nn.init.zeros_(down_proj.weight)
x = embedding + down_proj(embedding)  # (T, C)
print("\nzero_init, the block is the identity:", torch.equal(x, embedding))
print("\nembedding_skip with λ = 0.1:\n", (x + 0.1 * embedding).detach())

# %% [markdown]
# ## The model
#
# The cache comes first. Its `length` also counts the dropped positions, because it is the next
# position for RoPE. Attention gains `qk_norm`, `rope` and a **window**, the last argument of
# `attention`: keys beyond the last `block_size` are masked, as if the cache had dropped them.


# %%
class KVCache:
    """Keeps the keys and values that later positions attend to; with RoPE the window slides.

    For `token_shift`, the first block's cache also keeps the last embedding.
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
        self.dropout = Dropout(config.dropout)  # drops attention weights

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
        # Scores, mask, softmax and weighted average as in layer_norm.py, but faster.
        x = attention(query, key, value, self.dropout, self.block_size)  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.out_proj(x)


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
            x = x.square()
        return self.down_proj(x)  # (B, T, C)


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
                # The stream sums 2 * n_layer outputs; scaled, its std doesn't grow with n_layer.
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


# %%
idx, targets = draw_batch(corpus.train, T, tiny.batch_size, torch.Generator().manual_seed(1))
models = []
for model_class, config in ((OldModel, OldConfig(**sizes)), (Model, no_ideas), (Model, tiny)):
    torch.manual_seed(1)
    models.append(model_class(config))
counts = [sum(parameter.numel() for parameter in each.parameters()) for each in models]
same = torch.equal(models[0](idx)[0], models[1](idx)[0])
print("without any idea, the same logits as gpt.py's model:", same)
print(f"parameters without ideas {counts[1]:,}, with all {counts[2]:,}")

# %% [markdown]
# **Predict before you run:** `zero_init` sets two of a block's four matrices to zero. How many of
# the four have a nonzero gradient in the first step?

# %%
guess = ...  # a number from 0 to 4

# %% tags=["prediction"]
model = models[2]
optimizer, norms = torch.optim.AdamW(model.parameters(), lr=1e-3), []
matrices = {name: p for name, p in model.blocks[0].named_parameters() if p.dim() == 2}
for _ in range(3):
    optimizer.zero_grad()
    model(idx, targets)[1].backward()
    norms.append([p.grad.norm().item() for p in matrices.values()])
    optimizer.step()
reveal(guess, sum(norm > 0 for norm in norms[0]))
print("gradient norm in step         0        1        2")
for name, row in zip(matrices, zip(*norms, strict=True), strict=True):
    print(f"{name.removesuffix('.weight'):22}" + "".join(f"{each:9.5f}" for each in row))

# %% [markdown]
# No gradient passes through a matrix of zeros. In step 0 only `out_proj` and `down_proj` learn.
# From step 1 on they are no longer zero, and all four learn.
#
# ## Training: `muon`, `linear_decay`
#
# A matrix maps directions to directions. The **singular value decomposition** (SVD) lists them:
# input direction $v_i$ becomes output direction $u_i$, stretched by the singular value $\sigma_i$.
#
# $$G = U \Sigma V^\top = \sum_i \sigma_i\, u_i v_i^\top$$
#
# A gradient usually has a few large singular values; the others are small. **Muon** orthogonalizes
# the update: it keeps the directions and makes every singular value about 1, which may help learn
# rare directions.
#
# Muon needs no SVD. $X X^\top X$ has the directions of $X$ and singular values $\sigma^3$, so a
# polynomial of the matrix changes only the singular values. Each **Newton-Schulz iteration** maps
# $\sigma$ to $a\sigma + b\sigma^3 + c\sigma^5$:

# %%
a, b, c = 3.4445, -4.7750, 2.0315  # those of PyTorch's Muon, which takes five iterations


def newton_schulz(G: Tensor, count: int) -> Tensor:
    X = G / G.norm()  # (M, N): no singular value above 1
    for _ in range(count):
        square = X.T @ X  # (N, N)
        X = a * X + b * X @ square + c * X @ square @ square
    return X


G = torch.tensor([[2.0, 1.8], [1.8, 2.0]])
print("singular values of G", torch.linalg.svdvals(G))
for count in range(6):
    print(f"after {count} iterations  ", torch.linalg.svdvals(newton_schulz(G, count)))

# %% [markdown]
# ### Challenge · Exercise 3 · Orthogonalize exactly
#
# The check compares your result with five Newton-Schulz iterations.


# %% tags=["exercise"]
def orthogonalize(G: Tensor) -> Tensor:
    """The matrix with G's directions whose singular values are all 1."""
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)  # Vh: V transposed
    return ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    for shape in ((12, 5), (5, 12)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        exact = given(orthogonalize(G))
        assert exact.shape == G.shape, f"the shape is {tuple(exact.shape)}, not {shape}"
        sigma = torch.linalg.svdvals(exact)
        assert torch.allclose(sigma, torch.ones(5), atol=1e-4), (
            f"singular values run from {sigma.min():.2f} to {sigma.max():.2f}, but all must be 1"
        )
        overlap = (exact * G).sum() / torch.linalg.svdvals(G).sum()
        assert overlap > 0.999, "all singular values are 1, but the directions have changed"
        roughly = newton_schulz(G, 5)
        sigma, error = torch.linalg.svdvals(roughly), (roughly - exact).norm() / exact.norm()
        print(f"Newton-Schulz: {sigma.min():.2f} to {sigma.max():.2f}, relative error {error:.0%}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def orthogonalize(G):
#     U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
#     return U @ Vh
# ```
#
# </details>
#
# Here is a real gradient, that of `up_proj` in the first block:

# %%
torch.manual_seed(1)
model = Model(replace(tiny, zero_init=False))  # with it, this gradient would be 0
model(idx, targets)[1].backward()
G = model.blocks[0].feed_forward.up_proj.weight.grad  # (4*C, C)
figure, axes = plt.subplots(figsize=(7.2, 3.2))
for count, color in ((0, GRAY), (2, ORANGE), (5, BLUE)):
    sigma = torch.linalg.svdvals(newton_schulz(G, count))  # (C)
    axes.plot(sigma, color=color, linewidth=2)
    end = (len(sigma) - 1, sigma[-1])
    axes.annotate(f"{count} iterations", end, (6, -4), textcoords="offset points", color=color)
    print(f"{count} iterations: largest {sigma[0]:.2f}, middle {sigma[len(sigma) // 2]:.2f}")
print("different characters in the batch:", len(idx.unique()))
axes.set(yscale="log", xlabel="index, from the largest to the smallest", ylabel="singular value")
plt.show()

# %% [markdown]
# After five iterations most singular values are nearly equal, about 0.7 to 1.2, not exactly 1. The
# lines drop after as many directions as there are distinct characters: in the first step, `up_proj`
# sees little more than their embeddings.
#
# Muon orthogonalizes a running average of gradients. It trains the matrices in the blocks; AdamW
# trains the embedding, `lm_head` and all vectors.
#
# `linear_decay` is the schedule: hold the learning rate, then decay it linearly to zero over the
# last 70% of the steps.


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


for optimizer in make_optimizers(Model(tiny), tiny):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    print(f"{type(optimizer).__name__:5} trains {sum(p.numel() for p in parameters):,} parameters")


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


figure, axes = plt.subplots(figsize=(7.2, 2.6))
for on, name, color, shift in (
    (True, "linear_decay", BLUE, (8, 4)),
    (False, "cosine", ORANGE, (-52, -10)),
):
    config = replace(tiny, linear_decay=on)
    factors = [learning_rate_factor(step, config) for step in range(config.max_iters)]
    axes.plot(factors, color=color, linewidth=2)
    step = len(factors) // 2
    axes.annotate(name, (step, factors[step]), shift, textcoords="offset points", color=color)
axes.set(xlabel="training step", ylabel="fraction of the peak", ylim=(0, 1.12))
plt.show()

# %% [markdown]
# The rate is constant for under 30% of the steps, so this is nearly linear decay
# ([Defazio et al.](https://arxiv.org/abs/2310.07831)). It is related to
# [warmup-stable-decay](https://arxiv.org/abs/2404.06395), which holds the rate for most steps.
#
# ## Train
#
# This is notebook 7's loop, with an inner loop over the optimizers. Both runs below get the same
# batches.


# %%
def train(
    config: Config, seed: int = 1, change: Callable[[Model], None] | None = None
) -> tuple[Model, list[tuple[int, float]]]:
    """A trained model, and its losses on held-out text; `change` may alter the untrained model."""
    torch.manual_seed(seed)
    model, generator = Model(config), torch.Generator().manual_seed(seed)
    if change:
        change(model)
    optimizers, evaluations = make_optimizers(model, config), []
    config = replace(config, max_iters=steps(config.max_iters))
    for step in range(config.max_iters):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * learning_rate_factor(step, config)
            optimizer.zero_grad()
        idx, targets = draw_batch(corpus.train, config.block_size, config.batch_size, generator)
        logits, loss = model(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % steps(50) == 0 or step + 1 == config.max_iters:
            evaluations.append((step + 1, exact_loss(model, held_out)))
    return model, evaluations


# %%
# The two runs take about 15 seconds on two cores.
old, old_losses = train(no_ideas)
modern, modern_losses = train(tiny)
figure, axes = plt.subplots(figsize=(7.2, 3.2))
for name, losses, color in (("no ideas", old_losses, GRAY), ("all ideas", modern_losses, BLUE)):
    axes.plot(*zip(*losses, strict=True), "o-", color=color)
    axes.annotate(name, losses[-1], (8, -4), textcoords="offset points", color=color)
axes.set(xlabel="training step", ylabel="loss on held-out text\n(nats per character)")
plt.show()

# %% [markdown]
# This is one seed, a tiny model and a short run. It does not show which idea helps. For that,
# `python compare.py --modern --seeds 5 --max-iters 1000` trains the `small` preset with all ideas
# and without each of them, in pairs with equal seeds:
#
# ![Loss of modern_gpt.py without each of its ideas](../results/ideas/staircase.svg)
#
# [docs/results.md](../docs/results.md) has the table. A difference smaller than two standard errors
# counts as "no difference shown". This rule is lenient: with five pairs, chance alone exceeds that
# in 12% of comparisons.
#
# ## Look inside, and break it
#
# λ and the factors of `token_shift` started at 0. The training context was 32; without a position
# table the model reads on, attending to the last 32. Orange: the same model without rotations.

# %%
print("λ in each block:", ", ".join(f"{block.skip_lambda.item():.2f}" for block in modern.blocks))
shift = modern.shift_scale.detach()
print(f"token_shift factors: from {shift.min():.2f} to {shift.max():.2f}, mean {shift.mean():.2f}")
windows = corpus.validation[: steps(100_000)].unfold(0, 4 * T + 1, 4 * T)  # (N, 4*T+1)
try:
    old(windows[:1, :-1])
except IndexError as error:
    print("without ideas:", error)

broken = copy.deepcopy(modern)
for block in broken.blocks:
    block.attention.rope = None
figure, axes = plt.subplots(figsize=(7.2, 3.4))
for each, name, color in ((modern, "all ideas", BLUE), (broken, "without rotations", ORANGE)):
    with torch.inference_mode():
        logits = torch.cat([each(some[:, :-1])[0] for some in windows.split(128)])  # (N, 4*T, V)
    losses = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=0)
    axes.plot(losses, "o", color=color, markersize=3)
    axes.annotate(
        name, (4 * T, losses[-9:].mean()), (4, -4), textcoords="offset points", color=color
    )
axes.axvline(T - 0.5, color=GRAY, linestyle="--")
top = losses.max().item() + 0.2
axes.annotate(" end of the trained context", (T, top), color=GRAY, va="top")
axes.set(xlabel="position", ylabel="loss (nats per character)", ylim=(None, top))
plt.show()

# %%
text = "".join(generate(modern, tokenizer, length=200))
uncached = copy.copy(modern)  # the same weights
uncached.new_cache = lambda: None
print("same text without the cache:", "".join(generate(uncached, tokenizer, length=200)) == text)
print(text.strip())

# %% [markdown]
# Switching an idea off in a trained model does not measure its worth: a model trained without it
# would have learned something else. For that you need an **ablation study**: train without it, with
# several seeds. Two runs with the same seed form a pair. They share their batches, which cancels
# part of the noise.

# %%
small = replace(tiny, n_embd=32, n_layer=2, max_iters=200)


def final_losses(config: Config, change: Callable[[Model], None] | None = None) -> Tensor:
    return torch.tensor([train(config, seed, change)[1][-1][1] for seed in range(1, 6)])  # (5)


def interval(differences: Tensor) -> tuple[float, float]:
    """The 95% confidence interval of the mean of five differences."""
    t = 2.776  # Student's t for 95% and 5 - 1 degrees of freedom
    standard_error = differences.std() / 5**0.5
    mean = differences.mean()
    return (mean - t * standard_error).item(), (mean + t * standard_error).item()


# The fifteen runs take about 40 seconds on two cores.
with_all, ablated = final_losses(small), ("muon", "bias_free")  # (5)
figure, axes = plt.subplots(figsize=(7.2, 2.2))
for row, idea in enumerate(ablated):
    differences = final_losses(replace(small, **{idea: False})) - with_all  # (5)
    low, high = interval(differences)
    axes.plot(differences, torch.full((5,), row - 0.15), "o", color=BLUE, alpha=0.7)
    axes.plot((low, high), (row + 0.15,) * 2, color=ORANGE, linewidth=4)
    print(f"without {idea:9}: 95% interval of the mean difference {low:+.3f} to {high:+.3f}")
axes.axvline(0, color=GRAY, linestyle="--")
axes.set_yticks(range(2), [f"without {idea}" for idea in ablated])
axes.set(ylim=(1.6, -0.6), xlabel="loss without minus with the idea (nats per character)")
plt.show()

# %% [markdown]
# Each dot is one pair; a bar is the 95% **confidence interval** of the mean. If it contains 0, no
# difference is shown.
#
# ### Exercise 4 · A feature from a paper
#
# You know [SwiGLU](https://arxiv.org/abs/2002.05202) from notebook 4:
# $\text{down}(\text{silu}(\text{gate}(x)) \odot \text{up}(x))$. Now measure it here. Choose
# `hidden` so that its parameter count is within 1% of `FeedForward`'s. The check then trains it
# with five seeds, for about 15 seconds, and compares the pairs.


# %% tags=["exercise"]
class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        C = config.n_embd
        hidden = 4 * C  # change this
        self.gate_proj = nn.Linear(C, hidden, bias=False)
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return ...


# %% tags=["check"]
def with_swiglu(model: Model) -> None:
    for block in model.blocks:
        block.feed_forward = SwiGLU(small)
        for name, parameter in block.feed_forward.named_parameters():
            nn.init.normal_(parameter, std=0.0 if name.startswith("down") else 0.02)


@check
def exercise_4() -> None:
    layer, x = SwiGLU(small), torch.randn(2, 3, small.n_embd)  # (B, T, C)
    y = given(layer(x))
    assert y.shape == x.shape, f"the shape is {tuple(y.shape)}, not {tuple(x.shape)}"
    gate, up, down = (p.weight for p in (layer.gate_proj, layer.up_proj, layer.down_proj))
    g = x @ gate.T
    expected = (g * g.sigmoid() * (x @ up.T)) @ down.T  # (B, T, C)
    assert torch.allclose(y, expected, atol=1e-5), "forward computes something else"
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (layer, FeedForward(small)))
    assert abs(ours / theirs - 1) < 0.01, f"{ours:,} parameters against {theirs:,} is not fair"
    change = final_losses(small, with_swiglu) - with_all  # (5)
    low, high = interval(change)
    verdict = "no difference shown" if low < 0 < high else "a difference"
    print(f"SwiGLU minus squared ReLU: {low:+.3f} to {high:+.3f}, {verdict}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# class SwiGLU(nn.Module):
#     def __init__(self, config):
#         super().__init__()
#         C = config.n_embd
#         hidden = round(8 * C / 3)
#         self.gate_proj = nn.Linear(C, hidden, bias=False)
#         self.up_proj = nn.Linear(C, hidden, bias=False)
#         self.down_proj = nn.Linear(hidden, C, bias=False)
#
#     def forward(self, x):
#         return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
# ```
#
# </details>
#
# The result holds for this tiny model only. Another feature to try is soft-capping: replace the
# logits with `30 * torch.tanh(logits / 30)`.
#
# ## The script
#
# `git diff --no-index gpt.py modern_gpt.py` shows one switch per idea in `Config` and the lines
# that it turns on.
#
# **What this model lacks.** Large models often let several heads share keys and values
# ([grouped-query attention](https://arxiv.org/abs/2305.13245)), and many have a
# [mixture of experts](https://arxiv.org/abs/1701.06538), several MLPs of which each token uses a
# few.
#
# ## Quiz
#
# 1. Why can RMSNorm do without a learned scale?
#    <details><summary>Answer</summary>The linear layer after it can absorb the scale into its
#    weights. After `qk_norm` there is none, so the softmax's temperature is fixed.</details>
# 2. A query at position 7 attends to a key at position 3. With RoPE, what happens to the score if
#    both move by 100 positions?
#    <details><summary>Answer</summary>Nothing: the distance is still 4.</details>
# 3. With `qk_norm` and a head size of 64, what is the largest possible score?
#    <details><summary>Answer</summary>√64 = 8, for a query and a key in the same
#    direction.</details>
# 4. An update has singular values 0.8, 0.5 and 0.1. What are they after Muon's five iterations?
#    <details><summary>Answer</summary>Nearly equal, about 0.7 to 1.2. The directions are
#    unchanged.</details>
# 5. Without an idea the loss is 0.004 ± 0.003 higher (mean ± standard error of five pairs). What
#    can you conclude?
#    <details><summary>Answer</summary>No difference shown: the 95% interval, 0.004 ± 2.776 · 0.003,
#    contains 0.</details>

# %% [markdown]
# ## Papers
#
# - Norms: [RMSNorm](https://arxiv.org/abs/1910.07467), [QK norm](https://arxiv.org/abs/2010.04245)
# - Positions: [RoFormer](https://arxiv.org/abs/2104.09864)
# - Small changes: [Primer](https://arxiv.org/abs/2109.08668) (squared ReLU),
#   [Fixup](https://arxiv.org/abs/1901.09321) (zero initialization),
#   [RWKV](https://arxiv.org/abs/2305.13048) (token shift)
# - Training: [Muon](https://kellerjordan.github.io/posts/muon/),
#   [Muon is Scalable for LLM Training](https://arxiv.org/abs/2502.16982)
#
# You have now built every part of this model. Take an idea from a paper, add a switch to `Config`,
# and measure it.
#
# **Next →** [09_look_inside](09_look_inside.ipynb)
