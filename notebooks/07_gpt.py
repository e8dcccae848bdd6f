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
# # 7 · GPT
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/character-gpt/course/blob/main/notebooks/07_gpt.ipynb)
#
# The model has been complete since the notebook before. This one makes it larger, and a larger
# model needs care to learn well. After this notebook you can
#
# - say what dropout, initialisation, weight decay, warm-up and clipping each do, and measure what
#   each is worth at a size that trains in seconds;
# - count the parameters and the FLOPs of a GPT with pencil and paper;
# - show that more context makes the next character easier;
# - sample with a temperature and with top-k;
# - explain the key-value cache, and why the text is the same with it;
# - say what lies between this model and ChatGPT, and fine-tune a small one yourself.
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
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from trainer import Divides, Fraction, NonNegative, NonNegativeInt, Run
from common import LanguageModel, Tokenizer, draw_batch, pick_device
from data import pocket_play
from sample import generate, load
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss
from trainer.layers import Dropout, attention
from trainer.machine import fast_dtype

import torch
from lesson import BLUE, GREY, ORANGE, QUICK, check, given, heat_map, plt, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

# %%
corpus = open_corpus(None)
vocabulary = corpus.vocabulary
V = len(vocabulary)
tokenizer = Tokenizer(vocabulary)
training, validation = corpus.train, corpus.validation
held = validation[: steps(20_000)]  # enough of it to compare short trainings
print(f"{len(training):,} characters to train on, {V} different ones")

# %% [markdown]
# ## Two sizes
#
# All hyperparameters are in one place. The preset `full` is for a GPU: 384 channels in 6 layers,
# and 256 characters of context. `small` learns on a laptop in minutes, and it is the one that
# writes in this notebook.


# %%
@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 256  # T: context length, in characters
    n_embd: int = 384  # C: embedding dimension (channels per character)
    n_head: Annotated[int, Divides("n_embd")] = 6  # H: attention heads, each of size D = C/H
    n_layer: int = 6  # number of blocks
    dropout: Fraction = 0.2  # probability that an activation is zeroed during training
    batch_size: int = 64  # B: sequences per training step
    max_iters: int = 5000  # training steps
    eval_interval: int = 250  # steps between evaluations
    learning_rate: float = 1e-3  # size of AdamW's steps, at its peak
    warmup_iters: NonNegativeInt = 100  # steps over which the learning rate rises to its peak
    weight_decay: NonNegative = 0.1  # each step shrinks matrices by this times the learning rate
    gradient_clip: float = 1.0  # maximum gradient norm


# %%
PRESETS = {
    "full": Config(),
    "small": Config(
        block_size=64,
        n_embd=128,
        n_head=4,
        n_layer=4,
        dropout=0.0,
        batch_size=32,
        max_iters=2000,
        learning_rate=3e-3,
    ),
}

# %% [markdown]
# Most experiments below take a model that trains in seconds.

# %%
tiny = Config(
    vocab_size=V,
    block_size=32,
    n_embd=64,
    n_head=4,
    n_layer=2,
    dropout=0.0,
    batch_size=16,
    max_iters=150,
    warmup_iters=15,
    learning_rate=3e-3,
)

# %% [markdown]
# ## Dropout
#
# A large model can learn a small text by heart. Dropout makes that hard: while training, each
# number is silenced with probability $p$. No channel can rely on another one being there.
#
# If a share $p$ is missing, what remains is too small. So it is scaled up by $1/(1-p)$, and the
# mean stays.
#
# `Dropout` comes from `trainer.layers`. It equals PyTorch's `nn.Dropout`, with faster random
# numbers on a CPU.

# %%
torch.manual_seed(1)
dropout = Dropout(0.2)
masked = dropout(torch.ones(16, 40))  # a mask, since 1 goes in everywhere
figure, axes = plt.subplots(figsize=(8, 3.4))
image = axes.imshow(masked, cmap="cividis")
figure.colorbar(image, ax=axes, ticks=[0, 1, 1.25], label="what becomes of a 1", shrink=0.9)
axes.set(xlabel="channel", ylabel="position in the block")
plt.show()
print(f"silenced {(masked == 0).float().mean():.3f}, largest {masked.max():.2f}")

# %% [markdown]
# Dark is silenced, about one number in five. The bright ones have become 1.25. The next forward
# pass draws another mask.
#
# **Predict before you run the next cell:** the mean of a million ones after dropout with $p = 0.2$,
# in training and when the model is used?

# %%
ones = torch.ones(1_000_000)
dropout.train()
print(f"training: mean {dropout(ones).mean():.3f}, different {dropout(ones).unique().tolist()}")
dropout.eval()
print(f"in use:   mean {dropout(ones).mean():.3f}, different {dropout(ones).unique().tolist()}")

# %% [markdown]
# `model.train()` and `model.eval()` are this switch. Forget `eval` and your samples are written by
# a model with a fifth of its numbers missing.
#
# ## The parts
#
# Nothing here is new but the dropout and the `cache`, which comes further down. First the
# attention: dropout falls on its weights, so that a position now and then must do without one that
# it would have listened to.


# %%
class KVCache:
    """The keys and values of the characters so far, so that none is computed twice."""

    def __init__(self) -> None:
        self.length = 0  # S: how many characters are in it

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.length:
            key = torch.cat((self.key, key), dim=2)  # (B, H, S, D)
            value = torch.cat((self.value, value), dim=2)  # (B, H, S, D)
        self.key, self.value, self.length = key, value, key.shape[2]
        return key, value


# %%
class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads at once: the heads are one more batch dimension."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        # No biases: a key bias cancels in softmax, and out_proj's bias absorbs a value bias.
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)  # of attention weights

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        x = self.qkv_proj(x)  # (B, T, 3*C)
        x = x.view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        query, key, value = x.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            key, value = cache.extend(key, value)  # (B, H, S, D) each
        # The scores, mask, softmax and weighted average of layer_norm.py, as fast as possible.
        x = attention(query, key, value, self.dropout)  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.out_proj(x)


# %% [markdown]
# `attention` stands for the lines that you know: scores, mask, softmax, weighted average. It is in
# `trainer.layers`, because it computes them in the way that is fastest on this machine. On a GPU it
# calls PyTorch's `scaled_dot_product_attention`, which never stores the `(B, H, T, S)` weights. All
# three give the same.

# %%
torch.manual_seed(1)
query, key, value = torch.randn(3, 2, 4, 32, 16)  # (B, H, T, D) each
scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5  # (B, H, T, T)
mask = torch.ones(32, 32, dtype=torch.bool).tril()  # (T, T)
plain = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ value  # (B, H, T, D)
for name, fast in (
    ("trainer.layers", attention(query, key, value, Dropout(0.0))),
    ("PyTorch's", F.scaled_dot_product_attention(query, key, value, is_causal=True)),
):
    print(f"{name:14} largest difference {(fast - plain).abs().max().item():.1e}")

# %% [markdown]
# That is rounding. Then the feed-forward network, and the block: dropout again, on what each part
# adds to the sum.


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


# %%
class Block(nn.Module):
    """Attention, then feed-forward; each adds its output to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


# %%
class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.final_norm = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = Dropout(config.dropout)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight")):
                # The residual stream sums 2 * n_layer of these; the scale keeps its std fixed.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: list[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        start = cache[0].length if cache else 0
        positions = torch.arange(start, start + T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        logits = self.lm_head(self.final_norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def new_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.blocks]


# %% [markdown]
# ## Initialisation
#
# `Model` initializes every matrix with a standard deviation of 0.02. Small weights make small
# logits, and with small logits every character is nearly as likely as any other. You know which
# loss that is.
#
# **Predict before you run the next cell:** what is the first loss of a model whose weights are all
# drawn with a spread of 1?


# %%
def as_pytorch_does(model: nn.Module) -> None:
    """Draw the weights again, the way PyTorch would have done it unasked."""
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.reset_parameters()


def with_spread_1(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter)


# %%
idx, targets = draw_batch(training, tiny.block_size, 64, torch.Generator().manual_seed(1))
for name, change in (
    ("as in gpt.py", lambda model: None),
    ("PyTorch's own", as_pytorch_does),
    ("spread 1", with_spread_1),
):
    torch.manual_seed(1)
    model = Model(tiny)
    change(model)
    print(f"{name:14} first loss {model(idx, targets)[1].item():6.2f}")
print(f"{'ln V':14}            {math.log(V):6.2f}")

# %% [markdown]
# A model that begins sure of wrong things spends its first steps on unlearning them.
#
# ### Smaller where the stack is deep
#
# The blocks add to one sum, the **residual stream**. Each of the `n_layer` blocks adds twice, and
# what is drawn independently adds up in its variance: $2 \cdot n_\text{layer}$ parts of spread $s$
# make a spread of $s\sqrt{2 \cdot n_\text{layer}}$. So the two matrices of a block that write into
# the sum, `out_proj` and `down_proj`, are initialized smaller by $1/\sqrt{2 \cdot n_\text{layer}}$.
# Here is the stream of a model with 24 layers, with that factor and without.


# %%
def without_factor(model: nn.Module) -> None:
    """Undo the factor that makes the residual parts smaller."""
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "down_proj.weight")):
            parameter.data *= math.sqrt(2 * len(model.blocks))


def spreads(model: nn.Module, idx: Tensor) -> list[float]:
    """The standard deviation of the residual stream before the first block and after each."""
    x = model.token_embedding(idx) + model.position_embedding.weight  # (B, T, C)
    result = [x.std().item()]
    for block in model.blocks:
        x = block(x)  # (B, T, C)
        result.append(x.std().item())
    return result


# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
for name, colour in (("with the factor", BLUE), ("without", ORANGE)):
    torch.manual_seed(1)
    model = Model(replace(tiny, n_layer=24, n_embd=128))
    if name == "without":
        without_factor(model)
    with torch.no_grad():
        stream = spreads(model, idx)
    axes.plot(stream, "o-", color=colour)
    axes.annotate(
        name, (24, stream[-1]), (-6, 9), textcoords="offset points", color=colour, ha="right"
    )
    print(f"{name:16} {stream[0]:.3f} before the blocks, {stream[-1]:.3f} after 24")
axes.set(xlabel="blocks passed", ylabel="spread of the residual stream", ylim=(0, None))
axes.margins(y=0.2)
plt.show()

# %% [markdown]
# With the factor, all blocks together make the spread about twice as large. Without it, it grows on
# and on, to more than ten times, and what the embeddings said about the character becomes a small
# part of the sum. The factor takes the depth out of it:

# %%
for depth in (6, 24, 96):
    torch.manual_seed(1)
    model = Model(replace(tiny, n_layer=depth, n_embd=128))
    with torch.no_grad():
        print(f"{depth:2} layers: spread after the last {spreads(model, idx[:4])[-1]:.3f}")

# %% [markdown]
# ## Weight decay
#
# Every step draws the matrices a little towards zero, whatever the gradient says:
#
# $$w \leftarrow w - \text{learning rate} \cdot \text{weight decay} \cdot w - \dots$$
#
# A weight stays large only if the text keeps asking for it. Biases and the scales of the norms are
# left alone: they have one dimension, and that is how `make_optimizer` tells them apart.


# %%
def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices and embeddings, none for biases and norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    lr, weight_decay = config.learning_rate, config.weight_decay
    # beta2 = 0.99 averages squared gradients over ~100 steps; the default 0.999 takes ~1,000.
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


# %%
def learning_rate_at(step: int, config: Config) -> float:
    """Linear warm-up, then half a cosine from the peak down to a tenth of it."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


# %%
torch.manual_seed(1)
model = Model(tiny)
for group in make_optimizer(model, tiny).param_groups:
    count = sum(parameter.numel() for parameter in group["params"])
    decay, tensors = group["weight_decay"], len(group["params"])
    print(f"weight decay {decay}: {tensors:2} tensors, {count:7,} numbers")

# %% [markdown]
# To see the decay alone, set every gradient to 0 and take steps. Each one multiplies a matrix by
# $1 - \text{learning rate} \cdot \text{weight decay}$.

# %%
optimizer = make_optimizer(model, tiny)
matrix, vector = model.blocks[0].attention.out_proj.weight, model.final_norm.weight
for group in optimizer.param_groups:
    group["lr"] = 1e-2
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
lengths = []
for _ in range(1000):
    lengths.append((matrix.norm().item(), vector.norm().item()))
    optimizer.step()
shares = torch.tensor(lengths) / torch.tensor(lengths[0])  # (1000, 2)
print(
    f"matrix, after 999 steps: {shares[-1, 0]:.3f}; by the formula: {(1 - 1e-2 * 0.1) ** 999:.3f}"
)

# %%
figure, axes = plt.subplots(figsize=(8, 3))
for i, (name, colour) in enumerate((("a matrix", BLUE), ("a norm's scales", ORANGE))):
    axes.plot(shares[:, i], color=colour, linewidth=2)
    axes.annotate(name, (620, shares[620, i] + 0.04), color=colour)
axes.set(xlabel="steps without gradient", ylabel="length, as a share", ylim=(0, 1.15))
plt.show()

# %% [markdown]
# The matrix shrinks towards 0; the norm's scales stay where they were.
#
# ## Warm-up and decay
#
# The learning rate is not one number any more. It rises in a straight line, because the first
# gradients are large and the optimizer does not yet know their usual size. Then it falls along half
# a cosine, because a model that is nearly there needs small steps to settle.

# %%
small = replace(PRESETS["small"], vocab_size=V)
rates = [learning_rate_at(step, small) for step in range(small.max_iters)]
figure, axes = plt.subplots(figsize=(8, 3))
axes.plot(rates, color=BLUE, linewidth=2)
axes.annotate("warm-up", (small.warmup_iters + 20, 0.0002), color=GREY)
axes.axvspan(0, small.warmup_iters, color=GREY, alpha=0.2)
axes.set(xlabel="training steps", ylabel="learning rate", ylim=(0, None))
plt.show()
print(f"first {rates[0]:.5f}, highest {max(rates):.5f}, last {rates[-1]:.5f}")

# %% [markdown]
# Up for 100 steps, then down to a tenth.
#
# ## Clipping
#
# Now and then a batch has a gradient that is far longer than usual. Clipping keeps its direction
# and cuts its length back to at most 1:
#
# $$g \leftarrow g \cdot \min\left(1, \frac{1}{\lVert g \rVert}\right)$$
#
# Here the length is that of all gradients of the model taken as one long vector.
#
# ## What is each of them worth?
#
# Train a tiny model for a few seconds, and switch off one thing at a time. This is the training
# loop of the script, with a switch for each.


# %%
def short_training(rate: float, seed: int, off: str) -> tuple[float, list[float]]:
    """The loss on held-back text, and the gradient's length at each step before it is cut."""
    config = replace(tiny, learning_rate=rate)
    if off == "weight decay":
        config = replace(config, weight_decay=0.0)
    if off == "warm-up":
        config = replace(config, warmup_iters=0)
    torch.manual_seed(seed)
    model = Model(config)
    if off == "initialisation":
        as_pytorch_does(model)
    if off == "factor by depth":
        without_factor(model)
    optimizer = make_optimizer(model, config)
    generator, norms = torch.Generator().manual_seed(seed), []
    for step in range(steps(config.max_iters)):
        for group in optimizer.param_groups:
            # Without the fall, what is left of the schedule is the warm-up.
            stop = min(step, config.warmup_iters) if off == "falling rate" else step
            group["lr"] = learning_rate_at(stop, config)
        idx, targets = draw_batch(training, config.block_size, config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        limit = math.inf if off == "clipping" else config.gradient_clip
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
    return exact_loss(model, held), norms


# %% [markdown]
# Chance plays a part too: another seed gives other weights and other batches. So each training runs
# with two seeds, and at two learning rates, the usual one and a bold one. A difference that is
# smaller than that between two seeds says nothing.

# %%
SWITCHES = [
    "nothing",
    "initialisation",
    "factor by depth",
    "weight decay",
    "warm-up",
    "falling rate",
    "clipping",
]
RATES = {0.003: BLUE, 0.01: ORANGE}
short_runs = {
    (off, rate, seed): short_training(rate, seed, off)
    for off in SWITCHES
    for rate in RATES
    for seed in (1, 2)
}

# %%
print("switched off      " + "".join(f"   rate {rate}, two seeds" for rate in RATES))
for off in SWITCHES:
    losses = [[short_runs[off, rate, seed][0] for seed in (1, 2)] for rate in RATES]
    print(f"{off:18}" + "".join(f"{first:15.3f} {second:.3f}  " for first, second in losses))

# %%
figure, axes = plt.subplots(figsize=(8, 3.8))
for row, off in enumerate(SWITCHES):
    for (rate, colour), lift in zip(RATES.items(), (-0.13, 0.13), strict=True):
        losses = [short_runs[off, rate, seed][0] for seed in (1, 2)]
        axes.plot(losses, [row + lift] * 2, "o-", color=colour, markersize=7, linewidth=1)
axes.set_yticks(range(len(SWITCHES)), SWITCHES)
axes.invert_yaxis()
axes.grid(axis="x", alpha=0.4)
axes.set(xlabel="loss on held-back text after a short training", ylabel="switched off")
for (rate, colour), place in zip(RATES.items(), (0.0, 0.35), strict=True):
    axes.text(place, 1.04, f"learning rate {rate}", color=colour, transform=axes.transAxes)
plt.show()

# %% [markdown]
# Each dot is one training, a line joins the two seeds. What to see, from the top:
#
# - *Initialisation*: PyTorch's own is worse at the usual rate, yet better at the bold one. A likely
#   reason: a step of AdamW is about as large as the rate, whatever the weights, and PyTorch begins
#   with larger weights. And 0.02 is meant for models wider than these 64 channels.
# - *Factor by depth* and *weight decay*: nothing that the seeds would not do too. Two layers are
#   not deep, and so few steps decay little.
# - *Warm-up*: nothing at the usual rate, and by far the most at the bold one.
# - *Falling rate*: the same pattern, only weaker.
# - *Clipping*: at the bold rate perhaps a little, but two seeds are too few to say so.
#
# So at this size most of them change little. They are not there to make a good training better, but
# to keep a large, deep or bold one from going wrong, and such a one takes more than seconds.
#
# How long are the gradients, if nobody cuts them?

# %%
figure, axes = plt.subplots(figsize=(8, 3.2))
for rate, colour in RATES.items():
    norms = short_runs["clipping", rate, 1][1]
    axes.plot(norms, color=colour)
    print(f"rate {rate}: longest {max(norms):.2f}, median {sorted(norms)[len(norms) // 2]:.2f}")
axes.axhline(tiny.gradient_clip, color=GREY, linestyle="--")
for (rate, colour), place in zip(RATES.items(), (0.45, 0.75), strict=True):
    axes.text(place, 0.9, f"rate {rate}", color=colour, transform=axes.transAxes)
axes.set(xlabel="training steps", ylabel="length of the gradient", ylim=(0, None))
plt.show()

# %% [markdown]
# At the start they are nearly three times as long as allowed, and after some twenty steps mostly
# below the dashed line, where clipping does nothing. It is an insurance against the odd batch.
#
# ### And dropout?
#
# Dropout helps against learning by heart, so let the model have something to learn by heart: only
# 10,000 characters, many times over.

# %%
few = training[:10_000]


def few_characters(p: float) -> list[tuple[int, float, float]]:
    """Step, loss on what it trains on, loss on what it does not, again and again."""
    config = replace(tiny, dropout=p, max_iters=800)
    torch.manual_seed(1)
    model = Model(config)
    optimizer = make_optimizer(model, config)
    generator, rows = torch.Generator().manual_seed(1), []
    for step in range(steps(config.max_iters)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        idx, targets = draw_batch(few, config.block_size, config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        if (step + 1) % steps(100) == 0:
            rows.append((step + 1, exact_loss(model, few), exact_loss(model, held)))
    return rows


# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for axes, p in zip(panels, (0.0, 0.2), strict=True):
    rows = torch.tensor(few_characters(p))  # (evaluations, 3)
    axes.plot(rows[:, 0], rows[:, 1], "o-", color=GREY)
    axes.plot(rows[:, 0], rows[:, 2], "o-", color=BLUE)
    axes.annotate("held back", (rows[-1, 0], rows[-1, 2] + 0.09), color=BLUE, ha="right")
    axes.annotate("trained on", (rows[-1, 0], rows[-1, 1] - 0.18), color=GREY, ha="right")
    axes.set(title=f"dropout {p}", xlabel="training steps")
    axes.margins(y=0.15)
    print(f"dropout {p}: trained on {rows[-1, 1]:.2f}, held back {rows[-1, 2]:.2f}", end="")
    print(f", at its lowest {rows[:, 2].min():.2f}")
panels[0].set_ylabel("loss (nats per character)")
plt.show()

# %% [markdown]
# On the left the model learns its 10,000 characters ever better, while from the middle on it gets
# worse on others: it learns by heart. On the right the two curves stay closer, and the blue one
# hardly turns up by the end. But its lowest point is no better than that on the left: dropout
# makes this long training harmless, it does not replace text. The preset `small` sees its million
# characters only about four times and has no dropout at all; `full` sees them about eighty times.
#
# ## What makes it fast
#
# Two things change speed or memory, and hardly the result. First, **micro-batches**: a batch that
# does not fit in memory is processed in parts. The gradients add up over `backward` until
# `zero_grad`. If each loss is multiplied by its part's fraction of the batch, their sum is the
# gradient of the whole.

# %%
torch.manual_seed(1)
model = Model(tiny)
idx, targets = draw_batch(training, tiny.block_size, 16, torch.Generator().manual_seed(1))
model(idx, targets)[1].backward()
whole = model.lm_head.weight.grad.clone()  # (V, C)
model.zero_grad()
for part, its_targets in zip(idx.tensor_split(3), targets.tensor_split(3), strict=True):
    weight = len(part) / len(idx)
    loss = model(part, its_targets)[1]
    (weight * loss).backward()
difference = (model.lm_head.weight.grad - whole).abs().max() / whole.abs().max()
print(f"largest difference, as a fraction of the largest gradient: {difference:.1e}")

# %% [markdown]
# In the script, `run.micro_batches(batch)` yields such parts, each with its weight. It decides how
# many suit the machine; `--grad-accumulation` asks for more. When several processes train together,
# it also averages their gradients after the last part.
#
# Second, **mixed precision**. In `bfloat16` a number keeps only two to three decimal digits, but
# half the bytes have to be moved, and GPUs multiply such numbers several times as fast. Inside
# `autocast` only the matrix products are computed so; the weights stay in `float32`.

# %%
print("1.001 in bfloat16:", torch.tensor(1.001).bfloat16().item())
print("1.01 in bfloat16: ", torch.tensor(1.01).bfloat16().item())
up_proj = model.blocks[0].feed_forward.up_proj.weight  # (4*C, C)
x = torch.randn(2, tiny.block_size, tiny.n_embd)  # (B, T, C)
product = x @ up_proj.T  # (B, T, 4*C)
error = (x.bfloat16() @ up_proj.bfloat16().T).float() - product  # (B, T, 4*C)
print(f"a product is off by {error.norm() / product.norm():.2%}")
exact = model(idx, targets)[1].item()
with torch.autocast("cpu", torch.bfloat16):
    rounded = model(idx, targets)[1].item()
print(f"loss in float32 {exact:.4f}, with products in bfloat16 {rounded:.4f}")

# %% [markdown]
# Single products are a little off, now up, now down; in the mean over many it hardly shows. In the
# script, `run.autocast()` does this with the dtype that the machine is fast in, or the one that
# `--precision` names. `trainer.machine.fast_dtype` says which that is: `bfloat16` where the
# hardware multiplies it, `float16` on older GPUs, otherwise `float32`. The range of `float16` is so
# small that small gradients would become 0. With it, the weights from `run.micro_batches` contain a
# large factor, the **loss scale**, and after the last part the gradients are divided by it.
#
# ## Counting
#
# How many numbers does a GPT learn? Go through its parts with pencil and paper. In each block:
# attention has $3C^2 + C^2 + C$, feed-forward $8C^2 + 5C$, the two norms $4C$. Around the blocks
# there are $VC$ and $TC$ in the embeddings, $2C$ in the last norm, and $CV$ in `lm_head`.

# %%
T, C, L = small.block_size, small.n_embd, small.n_layer
by_hand = {
    "token_embedding": V * C,
    "position_embedding": T * C,
    "attention": L * (3 * C**2 + C**2 + C),
    "feed_forward": L * (C * 4 * C + 4 * C + 4 * C * C + C),
    "norm": (2 * L + 1) * 2 * C,
    "lm_head": C * V,
}
measured = dict.fromkeys(by_hand, 0)
model = Model(small)
for name, parameter in model.named_parameters():
    part = "norm" if "norm" in name else next(part for part in by_hand if f"{part}." in name)
    measured[part] += parameter.numel()
for part, count in by_hand.items():
    print(f"{part:19} {count:9,} by hand {measured[part]:9,} measured")
print(f"{'together':19} {sum(by_hand.values()):9,} by hand {sum(measured.values()):9,} measured")

# %%
figure, axes = plt.subplots(figsize=(8, 2.8))
bars = axes.barh(list(by_hand), list(by_hand.values()), color=BLUE)
axes.bar_label(
    bars, [f"{count / sum(by_hand.values()):.1%}" for count in by_hand.values()], padding=4
)
axes.invert_yaxis()
axes.margins(x=0.12)
axes.xaxis.set_major_formatter("{x:,.0f}")
axes.set(xlabel="parameters of the small preset")
plt.show()

# %% [markdown]
# Nearly everything is in the blocks, and two thirds of a block are feed-forward. A rule to
# remember: $12\,C^2$ parameters per layer.
#
# ### FLOPs
#
# **FLOPs** are floating-point operations. Each weight of a matrix takes part in one multiplication
# and one addition per character: 2 FLOPs. The backward pass costs twice as much, for the gradient
# of the input and that of the weights. That makes 6 per weight. Attention adds scores and weighted
# sums, $2TC$ FLOPs each per character and layer, 6 times $2TC$ with the backward pass.
#
# $$\text{FLOPs per character} = 6\,N_\text{matrices} + 12\,n_\text{layer}\,T\,C$$
#
# $N_\text{matrices}$ leaves out the embeddings: looking up a row multiplies nothing.

# %%
for name in PRESETS:
    config = replace(PRESETS[name], vocab_size=V)
    model = Model(config)
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    formula = 6 * weights + 12 * config.n_layer * config.block_size * config.n_embd
    idx = torch.zeros(1, config.block_size, dtype=torch.long)  # (B, T)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    counted = counter.get_total_flops() / config.block_size
    characters = config.batch_size * config.block_size * config.max_iters
    print(f"{name:5}: {sum(each.numel() for each in model.parameters()):,} parameters")
    print(f"       {formula:11,} by the formula, {counted:13,.0f} counted by PyTorch")
    print(f"       times {characters:,} characters: {formula * characters:.1e} in a training")
print(f"GPT-3: 6 x 175 billion weights x 300 billion tokens: {6 * 175e9 * 300e9:.1e}")

# %% [markdown]
# The formula is exact, since PyTorch counts the same products. The last line is the same pencil and
# paper for a model of 2020.
#
# ## Training
#
# Now the small preset. If you have trained it already, with `python gpt.py --preset small`, the
# notebook takes that run. Otherwise it trains here, for two or three minutes on a laptop, in
# `bfloat16` where that is faster.


# %%
def finished_run(config: Config) -> tuple[Path, nn.Module] | None:
    """A run of just this size on just this text, if there is one."""
    compared = Path("../runs/compare/tinyshakespeare/gpt-preset-small-seed-1")
    for folder in (Path("../runs/gpt"), compared):
        if QUICK or not (folder / "sample.txt").exists():
            continue
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if settings["config"] == asdict(config):
            found, its_tokenizer = load(folder, "cpu")
            if its_tokenizer.vocabulary == vocabulary:
                return folder, found
    return None


# %%
torch.manual_seed(1)
model = Model(small)
found = finished_run(small)
if found:
    model.load_state_dict(found[1].state_dict())  # the same names and shapes as in this notebook
    print("weights from", found[0].as_posix())
else:
    print("no finished run: the next cell trains")

# %%
device = pick_device()
model.to(device)
is_faster = fast_dtype(device) == torch.bfloat16
generator = torch.Generator().manual_seed(1)
optimizer = make_optimizer(model, small)
for step in range(0 if found else steps(small.max_iters)):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, small)
    optimizer.zero_grad()
    idx, targets = draw_batch(training, small.block_size, small.batch_size, generator)
    with torch.autocast(device.type, torch.bfloat16, enabled=is_faster):
        logits, loss = model(idx.to(device), targets.to(device))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), small.gradient_clip)
    optimizer.step()
    if (step + 1) % steps(small.eval_interval) == 0:
        print(f"step {step + 1:4}   loss of this batch {loss.item():.3f}")
model.cpu().eval()
print("ready")

# %% [markdown]
# ## Loss by position
#
# The first prediction in a block is made from one character, the last from the whole block. Is
# that any use?
#
# **Predict before you run the next cell:** draw the curve with your finger: loss upwards, position
# to the right.


# %%
@torch.inference_mode()
def loss_by_position(model: nn.Module, tokens: Tensor) -> Tensor:
    T = model.block_size
    windows = tokens.unfold(0, T + 1, T).long()  # (N, T+1)
    losses = []
    for some in windows.split(128):
        logits, _ = model(some[:, :-1])  # (B, T, V)
        losses.append(F.cross_entropy(logits.transpose(1, 2), some[:, 1:], reduction="none"))
    return torch.cat(losses).mean(dim=0)  # (T)


# %%
by_position = loss_by_position(model, validation[: steps(len(validation))])
seen = torch.arange(1, small.block_size + 1)
smooth = F.avg_pool1d(by_position[None, 2:], 9, 1)[0]
figure, axes = plt.subplots(figsize=(8, 3.4))
axes.plot(seen, by_position, "o", color=BLUE, markersize=4)
axes.plot(seen[6:-4], smooth, color=ORANGE, linewidth=2)
axes.axhline(by_position.mean().item(), color=GREY, linestyle="--")
axes.annotate("mean over all", (1, by_position.mean() + 0.03), color=GREY)
axes.set_xscale("log", base=2)
axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
axes.set(xlabel="characters that the model sees", ylabel="loss (nats per character)")
plt.show()
print(f"validation loss {by_position.mean():.3f}")
for first, last in ((1, 1), (2, 2), (3, 8), (9, 32), (33, 64)):
    print(f"seeing {first:2} to {last:2}: {by_position[first - 1 : last].mean():.3f}")

# %% [markdown]
# The first few characters help most: with one the model can know no more than a bigram, with eight
# it mostly knows the word it is in. The curve keeps falling to about twenty. The second half of
# the block adds next to nothing here: to use what stood a line ago takes a larger model and a
# longer training. The blue dots scatter, since each is a mean over fewer than two thousand
# characters; the orange line is the mean of nine neighbours.
#
# ## Sampling with care
#
# A model gives every character some probability, also the absurd ones. Each is unlikely, but there
# are many, and a text is long: sooner or later one is drawn. **Top-k** allows only the `k`
# likeliest. Here is the place in the first lines of the validation text where this model is least
# sure.

# %%
context = validation[None, : small.block_size]  # (1, T)
with torch.inference_mode():
    logits = model(context)[0][0]  # (T, V)
shares = F.softmax(logits, dim=-1)  # (T, V)
doubt = -(shares * shares.log()).sum(dim=-1)  # (T)
place = doubt.argmax().item()
print(f"after {''.join(visible(tokenizer.decode(context[0, : place + 1].tolist())))!r}")

ranked = logits[place].sort(descending=True)
cut = ranked.values.clone()
cut[5:] = float("-inf")
figure, panels = plt.subplots(3, 1, figsize=(9, 5.4), sharex=True, sharey=True)
for axes, values, title in zip(
    panels,
    (ranked.values, ranked.values / 0.5, cut),
    ("as the model says", "temperature 0.5", "top-k with k = 5"),
    strict=True,
):
    axes.bar(range(30), F.softmax(values, dim=-1)[:30], color=BLUE)
    axes.text(0.98, 0.75, title, transform=axes.transAxes, ha="right")
    axes.set_ylabel("probability")
axes.set_xticks(range(30), visible(tokenizer.decode(ranked.indices[:30].tolist())))
axes.set_xlabel("next character, the 30 likeliest")
plt.show()
print(f"outside the first 5 lies {F.softmax(ranked.values, dim=-1)[5:].sum():.2f}")

# %% [markdown]
# A temperature bends the whole curve. Top-k cuts off the tail and leaves the proportions of the
# rest as they were. The two can be combined.

# %%
for options in (
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.5},
    {"temperature": 1.5},
):
    print(", ".join(f"{name} {value}" for name, value in options.items()))
    print("".join(generate(model, tokenizer, length=160, **options)).strip(), end="\n\n")

# %% [markdown]
# The two in the middle keep to likelier letters. At 1.5 many more words are invented. Nothing here
# makes the model know more: it only chooses how much of its doubt you see.
#
# ## The cache
#
# To draw character 50, the model computes queries, keys and values of all 49 before it. To draw
# character 51 it computes them again, and they come out the same: a position never sees what comes
# later, so nothing that comes later can change its keys and values. The **key-value cache** keeps
# them. Then only the newest character goes through the model; its query meets the keys kept.

# %%
idx = validation[None, :20]  # (1, T)
with torch.inference_mode():
    at_once, _ = model(idx)  # (1, T, V)
    cache = model.new_cache()
    for t in range(20):
        one, _ = model(idx[:, t : t + 1], cache=cache)  # (1, 1, V)
print(f"largest difference in the last logits {(one[0, -1] - at_once[0, -1]).abs().max():.1e}")
print("keys of one layer, (B, H, S, D):", tuple(cache[0].key.shape))

# %% [markdown]
# **Predict before you run the next cell:** the same text with the cache and without. How many times
# as fast?

# %%
uncached = copy.copy(model)  # the same weights,
uncached.new_cache = lambda: None  # but no cache
seconds, texts = {}, {}
for each in (uncached, model):
    seconds[each] = math.inf
    for _ in range(3):
        began = time.perf_counter()
        texts[each] = "".join(generate(each, tokenizer, length=200, seed=2))
        seconds[each] = min(seconds[each], time.perf_counter() - began)
print("same text:", texts[model] == texts[uncached])
print(f"with the cache {seconds[uncached] / seconds[model]:.1f} times as fast")

# %% [markdown]
# Not one character differs. The gain in time is modest here, since this model sees 64
# characters at most: when the block is full, `generate` goes on from its second half, with new
# cache, as the positions have moved. A longer context gains more. Here is a model with the same
# layers, untrained, and room for 512 characters.

# %%
long = Model(replace(small, block_size=512)).eval()
idx = torch.zeros(1, 512, dtype=torch.long)  # (1, T)
places = range(0, 512, 16)
times = {True: [math.inf] * 512, False: [math.inf] * 512}
with torch.inference_mode():
    for _ in range(1 if QUICK else 3):  # the quickest of three counts: it was undisturbed
        cache = long.new_cache()
        for t in range(512):
            for cached in (True, False) if t in places else (True,):
                began = time.perf_counter()
                if cached:
                    long(idx[:, t : t + 1], cache=cache)
                else:
                    long(idx[:, : t + 1])
                times[cached][t] = min(times[cached][t], time.perf_counter() - began)

unit = sorted(times[True])[256]
figure, axes = plt.subplots(figsize=(8, 3.2))
for cached, name, colour in ((False, "without cache", ORANGE), (True, "with cache", BLUE)):
    shown = [times[cached][t] / unit for t in places]
    axes.plot(places, shown, "o-", color=colour)
    end = (places[20], shown[20])
    axes.annotate(name, end, (-10, 8), textcoords="offset points", color=colour, ha="right")
axes.set(xlabel="characters before the next one", ylabel="time for the next one", ylim=(0, None))
plt.show()

# %% [markdown]
# The unit of time is one character with the cache. With it the line stays nearly flat. Without it
# all characters before go through the model again, so the cost grows with their number. What one
# pays is memory: exercise 3.
#
# ## From here to ChatGPT
#
# You have seen every part of a GPT. What lies between this one and an assistant?
#
# **Pre-training** is what you have done: predict what comes next, on much text. The large ones
# differ in size more than in kind.
#
# | | layers | channels | heads | context | parameters | learns from |
# |---|---:|---:|---:|---:|---:|---|
# | `small` | 4 | 128 | 4 | 64 characters | 0.8 million | 1 million characters |
# | `full` | 6 | 384 | 6 | 256 characters | 10.8 million | 1 million characters |
# | GPT-2 (2019) | 48 | 1,600 | 25 | 1,024 tokens | 1.5 billion | 40 gigabytes of web pages |
# | GPT-3 (2020) | 96 | 12,288 | 96 | 2,048 tokens | 175 billion | 300 billion tokens |
#
# The last two read tokens of several characters. Small changes have come since: positions that turn
# queries and keys instead of being added, other activations and norms, heads that share keys and
# values so that the cache is smaller. The plan is the one that you have in front of you.
#
# What comes out continues texts. Ask it a question and it may go on with ten more questions, since
# that is how lists of questions look. An assistant takes more training, **fine-tuning**: go on from
# these weights, on other examples. It is done in steps.
#
# 1. *Demonstrations*: people write good answers to questions, some ten thousand in the work that
#    ChatGPT came from. The model trains on them with the same loss and the same loop.
# 2. *Preferences*: people are shown several answers of the model and rank them. A second model, the
#    reward model, learns to predict the ranks.
# 3. *Reinforcement*: the model writes answers, the reward model marks them, and the weights move
#    towards what gets good marks, but not far from where step 1 left them.
#
# The text of step 1 is small, many thousand times smaller than that of the pre-training. That it
# suffices shows where the knowledge is from: the language, the facts and the styles are
# there already, and fine-tuning says which of them are asked for. In exercise 4 you do step 1 at
# our size.
#
# ### Encoders and decoders
#
# GPT is a **decoder**: each position sees itself and what came before, so that it can write. The
# transformer of 2017 translated, and there the source text is known in full. An **encoder** reads
# it without a mask, and in **cross-attention** the decoder's queries meet keys and values made by
# the encoder.
#
# | kind | a position sees | good for | examples |
# |---|---|---|---|
# | encoder | all positions | understanding: search, sorting texts | BERT |
# | decoder | itself and those before | writing | GPT, this course |
# | both | itself and those before, and all of the source | translating | transformer of 2017, T5 |

# %%
source, output = "je dors", "i sleep"
masks = {
    "encoder": (source, source, torch.ones(7, 7)),
    "decoder": (output, output, torch.ones(7, 7).tril()),
    "cross-attention": (output, source, torch.ones(7, 7)),
}
figure, panels = plt.subplots(1, 3, figsize=(9, 3.3))
for axes, (title, (rows, columns, mask)) in zip(panels, masks.items(), strict=True):
    heat_map(axes, mask, visible(rows), visible(columns), title, vmin=-0.3, vmax=1.2)
    axes.set(xlabel="is seen", ylabel="sees")
plt.show()

# %% [markdown]
# Bright may be seen. Take away the left and the right panel, and the middle one is our causal mask.
#
# ## The script
#
# `gpt.py` is all the classes above and this function. `run.micro_batches` and `run.autocast` are
# what you saw under *What makes it fast*. The flags that belong to them, `--grad-accumulation`,
# `--precision` and `--compile`, are no hyperparameters, so they are not in `Config`.


# %%
def main() -> None:
    run = Run(Config, PRESETS)
    model = Model(run.config).to(run.device)
    optimizer = make_optimizer(model, run.config)
    for batch in run.batches(model, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(run.step, run.config)
        optimizer.zero_grad()
        for idx, targets, weight in run.micro_batches(batch):  # weight: fraction of the batch
            with run.autocast():  # mixed precision: matrix products in the run's dtype
                logits, loss = model(idx, targets)
            (weight * loss).backward()
            run.log(loss)
        nn.utils.clip_grad_norm_(model.parameters(), run.config.gradient_clip)
        optimizer.step()
    run.finish()


# %% [markdown]
# ## Exercises
#
# Fill in a cell, run it, then run the one below: it says whether the answer is right, or what is
# off. A solution is folded under each.
#
# ### 1 · Another schedule
#
# Many models now train with a simpler learning rate: up in a straight line as in
# `learning_rate_at`, then constant, and over the last fifth of `max_iters` down in a straight line
# that would reach 0 at step `max_iters`.


# %% tags=["exercise"]
def trapezoid(step: int, config: Config) -> float: ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    config = Config(max_iters=1000, warmup_iters=10, learning_rate=0.5)
    rate = {step: given(trapezoid(step, config)) for step in (0, 4, 9, 10, 500, 799, 800, 900, 999)}
    assert rate[0] != 0, "the first step must not be wasted on a rate of 0: count from step + 1"
    assert math.isclose(rate[0], 0.05), f"the first of 10 steps up is 0.05, yours {rate[0]:.4f}"
    assert math.isclose(rate[9], 0.5), f"after 10 steps it is up at 0.5, yours {rate[9]:.4f}"
    for step in (10, 500, 799):
        assert math.isclose(rate[step], 0.5), f"step {step}: {rate[step]:.4f}, not the full 0.5"
    assert math.isclose(rate[900], 0.25), f"step 900 is half-way down: 0.25, not {rate[900]:.4f}"
    assert math.isclose(rate[999], 0.0025), f"the last step's rate is {rate[999]:.4f}, not 0.0025"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def trapezoid(step: int, config: Config) -> float:
#     up = (step + 1) / max(1, config.warmup_iters)
#     down = (config.max_iters - step) / (0.2 * config.max_iters)
#     return config.learning_rate * min(up, 1.0, down)
# ```
#
# </details>
#
# ### 2 · Top-k
#
# Return the logits with all but the `k` largest of each row made impossible. There may be any
# number of rows: the last dimension is that of the vocabulary.


# %% tags=["exercise"]
def keep_top_k(logits: Tensor, k: int) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    logits = torch.tensor([[-3.0, -1.0, -2.0, -4.0], [5.0, 0.5, 1.0, 2.0]])
    before = logits.clone()
    kept = given(keep_top_k(logits, 2))
    assert torch.equal(logits, before), "the logits that came in have changed: make new ones"
    assert kept.shape == logits.shape, f"the shape is {tuple(kept.shape)}, not (2, 4)"
    probabilities = F.softmax(kept, dim=-1)
    allowed = (probabilities > 0).tolist()
    for row, expected in zip(
        allowed, ([False, True, True, False], [True, False, False, True]), strict=True
    ):
        assert sum(row) == 2, f"{sum(row)} characters are possible, not 2: exp of what is 0?"
        assert row == expected, "the wrong ones are kept: each row has its own k largest"
    assert torch.equal(kept[probabilities > 0], before[probabilities > 0]), "keep those as they are"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def keep_top_k(logits: Tensor, k: int) -> Tensor:
#     smallest_kept = logits.topk(k).values[..., -1:]
#     return logits.masked_fill(logits < smallest_kept, float("-inf"))
# ```
#
# </details>
#
# ### 3 · How much does a cache hold?
#
# Say how many values the cache holds, all layers together, for `B` texts with `S` characters seen
# so far.


# %% tags=["exercise"]
def cache_numbers(config: Config, B: int, S: int) -> int: ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    for config, B, S in ((replace(tiny, n_layer=3), 2, 7), (tiny, 1, 1)):
        answer = given(cache_numbers(config, B, S))
        cache = Model(config).new_cache()
        Model(config)(torch.zeros(B, S, dtype=torch.long), cache=cache)
        held = sum(layer.key.numel() + layer.value.numel() for layer in cache)
        layers, heads = config.n_layer, config.n_head
        assert answer * layers != held, f"that is one layer's, but there are {layers}"
        assert answer * 2 != held, "keys and values: both are kept"
        assert answer != held * heads, "a head has C / H channels: all heads together have C"
        words = f"{layers} layers, {config.n_embd} channels, B = {B}, S = {S}"
        assert answer == held, f"{words}: the cache holds {held:,} values, not {answer:,}"
    large = Config(n_embd=12288, n_head=96, n_layer=96)
    gigabytes = 2 * cache_numbers(large, 1, 2048) / 1e9
    print(f"GPT-3, one text of 2,048 tokens, 2 bytes a value: {gigabytes:.1f} gigabytes")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cache_numbers(config: Config, B: int, S: int) -> int:
#     return config.n_layer * 2 * B * S * config.n_embd
# ```
#
# The number of heads does not matter: more heads are smaller ones.
#
# </details>
#
# ### 4 · Pre-train and fine-tune
#
# Pocket Play is a text drawn from a grammar: as much as you like, and easy. This cell pre-trains a
# model on it. Its vocabulary has the characters of the other text too, so that it can go on there.

# %%
own_text = Path(corpus.path).read_text(encoding="utf-8")
play = pocket_play.play(100_000)
both = Tokenizer(play + own_text)
play_tokens = torch.tensor(both.encode(play))
little = torch.tensor(both.encode(own_text[:20_000]))
held_back = torch.tensor(both.encode(own_text[-10_000:]))
play_config = replace(tiny, vocab_size=len(both.vocabulary))

torch.manual_seed(1)
generator = torch.Generator().manual_seed(1)
pretrained = Model(play_config)
optimizer = make_optimizer(pretrained, play_config)
for _ in range(300):  # in quick mode too, or there would be nothing to go on from
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    idx, targets = draw_batch(play_tokens, 32, 16, generator)
    logits, loss = pretrained(idx, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"on Pocket Play {exact_loss(pretrained, play_tokens[:20_000]):.3f}")
print(f"on the other text {exact_loss(pretrained, held_back):.3f}")

# %% [markdown]
# Write the loop that goes on from the weights that `model` has, for so many steps at a constant
# learning rate. Take `torch.optim.AdamW`, batches of 16 pieces of
# `model.block_size` characters from `draw_batch`, and a generator with a
# seed. Return the list of the losses.


# %% tags=["exercise"]
def fine_tune(
    model: nn.Module, tokens: Tensor, steps: int, learning_rate: float
) -> list[float]: ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    tuned = copy.deepcopy(pretrained)
    losses = given(fine_tune(tuned, little, 2, 0.0))
    assert len(losses) == 2, f"2 steps make 2 losses, not {len(losses)}"
    same = torch.equal(tuned.lm_head.weight, pretrained.lm_head.weight)
    assert same, "with a learning rate of 0 nothing may change: is it the one that is given?"
    before = exact_loss(tuned, held_back)
    fine_tune(tuned, little, 100, 1e-3)
    same = torch.equal(tuned.lm_head.weight, pretrained.lm_head.weight)
    assert not same, "the model's weights are as before: train the model that is given, no other"
    torch.manual_seed(1)
    scratch = Model(play_config)
    fine_tune(scratch, little, 100, 1e-3)
    after, without = exact_loss(tuned, held_back), exact_loss(scratch, held_back)
    print(f"held-back text: before {before:.3f}, after {after:.3f}, from scratch {without:.3f}")
    print(f"and on Pocket Play, after: {exact_loss(tuned, play_tokens[:20_000]):.3f}")
    assert after < before - 0.1, "it has hardly learnt: does each step forget the old gradients?"
    assert after < without - 0.1, "no better than from scratch: do you begin with fresh weights?"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def fine_tune(
#     model: nn.Module, tokens: Tensor, steps: int, learning_rate: float
# ) -> list[float]:
#     optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
#     generator = torch.Generator().manual_seed(1)
#     losses = []
#     for _ in range(steps):
#         idx, targets = draw_batch(tokens, model.block_size, 16, generator)
#         _, loss = model(idx, targets)
#         optimizer.zero_grad()
#         loss.backward()
#         optimizer.step()
#         losses.append(loss.item())
#     return losses
# ```
#
# From the pre-trained weights it comes further in the same number of steps: line breaks, spaces and
# the frequent letters are much the same in both texts. And look at the last number: on Pocket Play
# it has become worse. What is not practised is forgotten.
#
# `python gpt.py --init-from RUN_FOLDER --data FILE` does the same with a whole run
# (`--extend-vocabulary` where the file has new characters).
#
# </details>
#
# The ladder ends here. [08_modern_gpt](08_modern_gpt.ipynb) asks what has changed since GPT-2.
