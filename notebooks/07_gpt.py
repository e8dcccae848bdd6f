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
# # 7 · GPT
#
# You scale the model up and add dropout, careful initialization, AdamW with a schedule, gradient
# clipping, and a KV cache for faster sampling.
#
# With `gpt.py`'s preset `small`, the validation loss drops from about 2.06 to about 1.63 nats per
# character, probably thanks more to size, context and characters seen than to these techniques.
#
# Allow 45 minutes to read and run, two hours more for all exercises; you can skip the challenge.
#
# ![The model of gpt.py](../results/diagrams/gpt.svg)

# %%
import sys

sys.path.insert(0, "..")
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from trainer import Divides, Fraction, NonNegative, NonNegativeInt
from common import LanguageModel, Tokenizer, draw_batch
from data import pocket_play
from layer_norm import FeedForward
from sample import generate, load
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss
from trainer.layers import Dropout, attention

import torch
from lesson import BLUE, GRAY, ORANGE, QUICK, check, given, plt, reveal, steps
from torch import Tensor, nn
from torch.nn import functional as F

corpus = open_corpus(None)
tokenizer = Tokenizer(corpus.vocabulary)
V = len(tokenizer.vocabulary)
training, held_out = corpus.train, corpus.validation[: steps(20_000)]

# %% [markdown]
# ## Scaling up
#
# `full` is the lecture's model and needs a GPU; `small` trains in minutes on a laptop; `tiny` is
# for experiments. A block has about $12C^2$ parameters: $3C^2$ in `qkv_proj`, $C^2$ in `out_proj`
# and $8C^2$ in the MLP.


# %%
# Annotated, Divides, Fraction, NonNegative and NonNegativeInt only let the command line refuse
# impossible values. Read them as int and float.
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
    learning_rate: float = 1e-3  # AdamW's step size, at the peak of the schedule
    warmup_iters: NonNegativeInt = 100  # steps over which the learning rate rises to its peak
    weight_decay: NonNegative = 0.1  # each step shrinks matrices by this times the learning rate
    gradient_clip: float = 1.0  # maximum gradient norm


full = Config(vocab_size=V)
small = Config(V, 64, 128, 4, 4, dropout=0.0, batch_size=32, max_iters=2000, learning_rate=3e-3)
tiny = replace(small, block_size=32, n_embd=64, n_layer=2, batch_size=16)
tiny = replace(tiny, max_iters=150, warmup_iters=15)
for name, config in (("full", full), ("small", small), ("tiny", tiny)):
    print(f"{name:5} about {12 * config.n_embd**2 * config.n_layer:10,} parameters in its blocks")

# %% [markdown]
# ## Dropout
#
# A large model can memorize a small text. **Dropout** makes that harder: during training, each
# activation is zeroed with probability $p$, so no unit can rely on another one being present. The
# rest are divided by $1-p$, which preserves the expected value.

# %%
torch.manual_seed(1)
x = torch.arange(1.0, 9.0)
dropout = Dropout(0.5)  # nn.Dropout, but faster on a CPU
print("input          ", x.tolist())
for _ in range(3):
    print("training       ", dropout(x).tolist())
mean = dropout(x.expand(1_000_000, 8)).mean(dim=0)
print("mean of draws  ", [round(each, 1) for each in mean.tolist()])
dropout.eval()
print("evaluation     ", dropout(x).tolist())

# %% [markdown]
# `model.train()` and `model.eval()` turn dropout on and off. `gpt.py` applies it to attention
# weights, sublayer outputs and the sum of the embeddings.
#
# ## KV cache
#
# To sample character 51, attention needs the keys and values of the 50 before it. They never
# change: under the causal mask, no position depends on a later one. The **KV cache** keeps them, so
# each step computes only one new key and value.


# %%
class KVCache:
    """The keys and values of the characters so far, for reuse while sampling."""

    def __init__(self) -> None:
        self.length = 0  # S: how many characters are in it

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.length:
            key = torch.cat((self.key, key), dim=2)  # (B, H, S, D)
            value = torch.cat((self.value, value), dim=2)  # (B, H, S, D)
        self.key, self.value, self.length = key, value, key.shape[2]
        return key, value


cache = KVCache()
for t in range(3):
    new = torch.full((1, 1, 1, 2), float(t))  # (B, H, 1, D): the key of position t, say
    keys, values = cache.extend(new, new)  # (B, H, S, D) each
    print(f"position {t} attends to {cache.length} keys: {keys[0, 0].tolist()}")

# %% [markdown]
# ## Attention and block
#
# `attention` (`trainer/layers.py`) computes what `layer_norm.py` did, plus dropout on the weights.
# It also accepts fewer queries than keys, as the cache requires.


# %%
class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads at once: the heads are one more batch dimension."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        # No biases, as in the lecture; a key bias would cancel in softmax anyway.
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)  # drops attention weights

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        x = self.qkv_proj(x)  # (B, T, 3*C)
        x = x.view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        query, key, value = x.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            key, value = cache.extend(key, value)  # (B, H, S, D) each
        # Scores, mask, softmax and weighted average as in layer_norm.py, but faster.
        x = attention(query, key, value, self.dropout)  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.out_proj(x)


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


# %% [markdown]
# ## Initialization
#
# Every matrix is initialized with standard deviation 0.02. Small weights make small logits, so an
# untrained model gives all characters about the same probability.
#
# The residual stream sums $2 \cdot n_\text{layer}$ sublayer outputs. Variances of independent
# terms add up, so its standard deviation grows like $\sqrt{2 \cdot n_\text{layer}}$. The layers
# that write to it, `out_proj` and `down_proj`, start smaller by that factor.


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
                # The stream sums 2 * n_layer outputs; scaled, its std doesn't grow with n_layer.
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


# %%
def unscaled(model: nn.Module) -> None:
    """Undo the division by √(2 · n_layer): the embeddings become a small part of the stream."""
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "down_proj.weight")):
            parameter.data *= math.sqrt(2 * len(model.blocks))


@torch.no_grad()
def stream_stds(model: nn.Module, idx: Tensor) -> list[float]:
    """The standard deviation of the residual stream before the first block and after each."""
    x = model.token_embedding(idx) + model.position_embedding.weight  # (B, T, C)
    stds = [x.std().item()]
    for block in model.blocks:
        x = block(x)  # (B, T, C)
        stds.append(x.std().item())
    return stds


idx, targets = draw_batch(training, tiny.block_size, 16, torch.Generator().manual_seed(1))
figure, axes = plt.subplots(figsize=(7, 3.2))
for name, change, color in (("unscaled", unscaled, ORANGE), ("scaled", lambda _: None, BLUE)):
    torch.manual_seed(1)
    model = Model(replace(tiny, n_layer=24, n_embd=128))
    change(model)
    stds = stream_stds(model, idx)
    axes.plot(stds, color=color)
    axes.text(24.3, stds[-1], name, color=color, va="center")
axes.set(xlabel="blocks passed", ylabel="std of the residual stream", ylim=(0, None), xlim=(0, 28))
plt.show()

model = Model(tiny)
print(f"first loss {model(idx, targets)[1].item():.2f}, ln V = {math.log(V):.2f}")
for parameter in model.parameters():
    if parameter.dim() == 2:
        parameter.data *= 50
print(f"with matrices 50 times as large, first loss {model(idx, targets)[1].item():.2f}")

# %% [markdown]
# ## AdamW and weight decay
#
# Adam keeps two running averages for each parameter: $m$ of its gradients and $v$ of their squares,
# both corrected for starting at 0. The step is $\text{learning rate} \cdot m / \sqrt{v}$.
# Multiply all gradients by 1,000, and the steps stay the same: Adam is **scale-invariant**, as long
# as gradients are well above ε = 10⁻⁸, which the formula leaves out.
#
# AdamW adds **weight decay**: each step also multiplies the weights by
# $1 - \text{learning rate} \cdot \text{weight decay}$. Matrices and embeddings decay; biases and
# norms do not.


# %%
def adam_steps(gradients: Tensor) -> Tensor:
    """What AdamW subtracts from parameters with these gradients, at learning rate 1."""
    parameters, results = nn.Parameter(torch.zeros_like(gradients[0])), []
    optimizer = torch.optim.AdamW([parameters], 1.0, betas=(0.9, 0.99), weight_decay=0.0)
    for gradient in gradients:
        before, parameters.grad = parameters.detach().clone(), gradient.clone()
        optimizer.step()
        results.append(before - parameters.detach())
    return torch.stack(results)


gradients = torch.tensor([[1.0], [1.0], [-1.0], [1.0]])  # of one parameter, at four steps
print("gradients        ", [f"{each:.3f}" for each in adam_steps(gradients).flatten()])
print("gradients × 1,000", [f"{each:.3f}" for each in adam_steps(gradients * 1000).flatten()])


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


model = Model(tiny)
optimizer = make_optimizer(model, replace(tiny, learning_rate=0.01))
absent = min(set(range(V)) - set(idx.flatten().tolist()))  # a character that the batch lacks
norms = [model.token_embedding.weight[absent].norm().item()]
for _ in range(100):
    optimizer.zero_grad()
    model(idx, targets)[1].backward()
    optimizer.step()
    norms.append(model.token_embedding.weight[absent].norm().item())
name = repr(tokenizer.decode([absent]))
print(f"norm of the embedding of {name}: {norms[0]:.4f}, then {norms[-1]:.4f}")
print(f"ratio {norms[-1] / norms[0]:.4f}, and (1 - 0.01 * 0.1) ** 100 = {0.999**100:.4f}")

# %% [markdown]
# Embeddings decay at every step, even those of rare characters, which get few gradients.
#
# ## Warm-up and cosine
#
# The learning rate rises linearly during **warm-up**. Then it decays along half a **cosine** to a
# tenth of its peak: small steps average out the noise of single batches.
#
# Notebook 6 gave Xiong's reason for warm-up, large first gradients. That alone cannot be it, since
# Adam divides by their size. Two other explanations:
#
# - At first, $m$ and $v$ are estimated from few gradients. At step 1, $m/\sqrt{v}$ is ±1 for every
#   parameter, even if its gradient is pure noise, so early steps are large (left panel;
#   [Ma & Yarats](https://arxiv.org/abs/1910.04209)).
# - Early in training the loss surface is sharp: a large step overshoots
#   ([Gilmer et al.](https://arxiv.org/abs/2110.04369)).


# %%
def learning_rate_at(step: int, config: Config) -> float:
    """Linear warm-up, then half a cosine from the peak down to a tenth of it."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


noise = torch.randn(100, 10_000, generator=torch.Generator().manual_seed(1))
figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.2))
left.plot(range(1, 101), adam_steps(noise).square().mean(dim=1).sqrt())
left.set(xlabel="training step", ylabel="RMS of Adam's step", ylim=(0, 1.05))
left.set_title("gradients that are pure noise", fontsize=11)
right.plot([learning_rate_at(step, small) for step in range(small.max_iters)])
right.set(xlabel="training step", ylabel="learning rate", ylim=(0, None))
right.set_title("the small preset", fontsize=11)
plt.show()

# %% [markdown]
# ### Exercise 1: a trapezoid
#
# Write another schedule: linear warm-up as above, then a constant rate, then over the last fifth of
# `max_iters` a linear decay that would reach 0 at step `max_iters`.


# %% tags=["exercise"]
def trapezoid(step: int, config: Config) -> float:
    """Linear warm-up, then constant, then linear decay over the last fifth."""
    if step < config.warmup_iters:
        return ...
    return ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    config = Config(max_iters=1000, warmup_iters=10, learning_rate=0.5)
    rate = {step: given(trapezoid(step, config)) for step in (0, 4, 9, 10, 500, 799, 800, 900, 999)}
    assert rate[0] != 0, "a rate of 0 wastes the first step"
    assert math.isclose(rate[0], 0.05), f"the first of 10 steps up is 0.05, yours {rate[0]:.4f}"
    assert math.isclose(rate[9], 0.5), f"the tenth step should be at the peak, not {rate[9]:.4f}"
    for step in (10, 500, 799, 800):
        assert math.isclose(rate[step], 0.5), f"step {step}: {rate[step]:.4f}, not the peak"
    assert math.isclose(rate[900], 0.25), f"step 900 is halfway down, yours {rate[900]:.4f}"
    assert math.isclose(rate[999], 0.0025), f"the last rate is {rate[999]:.4f}, not 0.0025"
    rate = given(trapezoid(0, replace(config, warmup_iters=0)))
    assert math.isclose(rate, 0.5), f"without warm-up, the first rate is the peak, not {rate:.4f}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def trapezoid(step, config):
#     rising = (step + 1) / max(1, config.warmup_iters)
#     decaying = (config.max_iters - step) / (0.2 * config.max_iters)
#     return config.learning_rate * min(rising, 1.0, decaying)
# ```
#
# </details>
#
# ## Gradient clipping
#
# **Clipping** scales the gradient of the whole model down to a norm of at most 1. If all gradients
# shrink alike, little changes: Adam is scale-invariant. What matters is a **spike**, one gradient
# far larger than the others. Below, all gradients are 1, except for −100 at step 50.

# %%
gradients = torch.ones(200, 1)
gradients[50] = -100
figure, axes = plt.subplots(figsize=(7, 3.2))
for name, values, color in (
    ("clipped", gradients.clamp(-1, 1), BLUE),
    ("not clipped", gradients, ORANGE),
):
    moves = adam_steps(values).flatten().tolist()
    axes.plot(moves, color=color)
    axes.text(202, moves[-1], name, color=color, va="center")
axes.axhline(0, color=GRAY, linewidth=0.8)
axes.set(xlabel="training step", ylabel="Adam's step / learning rate", xlim=(0, 245))
axes.set_xticks(range(0, 201, 50))
plt.show()

# %% [markdown]
# Without clipping, the spike turns $m$ the wrong way for 22 steps. It stays in $v$ for longer, so
# the steps after that are small.
#
# ## Micro-batches
#
# A batch too large for memory is split into **micro-batches**. `backward` adds to `.grad`, so
# several passes can give the gradient of the whole batch.
#
# ### Exercise 2: the same gradient
#
# Process the batch in `count` parts, which may differ in size.


# %% tags=["exercise"]
def accumulate(model: nn.Module, idx: Tensor, targets: Tensor, count: int) -> float:
    """Return the loss of the batch; leave its gradient in the parameters' .grad."""
    model.zero_grad()
    for rows, answers in zip(idx.tensor_split(count), targets.tensor_split(count), strict=True):
        _, loss = model(rows, answers)
        ...
    return ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    torch.manual_seed(1)
    model, sizes = Model(tiny), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for rows, parts in ((4, [2, 2]), (5, [3, 2])):
        _, loss = model(idx[:rows], targets[:rows])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        sizes.clear()
        answer = given(accumulate(model, idx[:rows], targets[:rows], 2))
        assert sizes == parts, f"forward passes got {sizes} rows, expected {parts}"
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient: call backward"
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        wanted = torch.cat([gradient.flatten() for gradient in gradients])
        ratio, off = found.norm() / wanted.norm(), (found - wanted).norm() / wanted.norm()
        message = f"the gradient of parts of {parts} rows is not that of the batch"
        assert off < 1e-4, f"{message}: its norm is {ratio:.3f} times as large"
        message = f"the loss is {float(answer):.4f}, that of the batch {loss.item():.4f}"
        assert abs(answer - loss.item()) < 1e-4, message


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def accumulate(model, idx, targets, count):
#     model.zero_grad()
#     total = 0.0
#     for rows, answers in zip(idx.tensor_split(count), targets.tensor_split(count), strict=True):
#         loss = len(rows) / len(idx) * model(rows, answers)[1]
#         loss.backward()
#         total += loss.item()
#     return total
# ```
#
# </details>
#
# ## Training
#
# `main` in `gpt.py` adds micro-batches and **mixed precision** (matrix products in 16 bits) to this
# loop.


# %%
def train(
    config: Config,
    tokens: Tensor = training,
    seed: int = 1,
    schedule: Callable[[int, Config], float] = learning_rate_at,
    change: Callable[[nn.Module], None] = lambda model: None,  # alters the initial weights
    watch: tuple[Tensor, ...] = (),  # texts evaluated ten times
) -> tuple[nn.Module, list[tuple[float, ...]]]:
    """A trained model, and at each evaluation the step and the losses."""
    torch.manual_seed(seed)
    model, rows = Model(config), []
    change(model)
    optimizer, generator = make_optimizer(model, config), torch.Generator().manual_seed(seed)
    for step in range(config.max_iters):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, config)
        idx, targets = draw_batch(tokens, config.block_size, config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        if watch and (step + 1) % math.ceil(config.max_iters / 10) == 0:
            rows.append((step + 1, *(exact_loss(model, text) for text in watch)))
    return model, rows


config = replace(small, block_size=32, n_layer=2, batch_size=16, learning_rate=4e-3)
config = replace(config, max_iters=steps(1500))
model, rows = train(config, watch=(held_out,))  # about 40 seconds on two cores
for step, loss in rows:
    print(f"step {step:4}: validation loss {loss:.3f}")

writer, source = (model, tokenizer), "the model above"
if Path("../runs/gpt/best.pt").exists() and not QUICK:  # you have run gpt.py: use that
    writer, source = load("../runs/gpt", "cpu"), "your run runs/gpt"
print(f"\nwritten by {source}:")
print("".join(generate(*writer, length=300)))

# %% [markdown]
# ## Inside: what the context is worth
#
# The first prediction in a window sees one character; the last one sees 32.

# %%
T = config.block_size
windows = corpus.validation[: steps(100_000)].unfold(0, T + 1, T).long()  # (N, T+1)
with torch.inference_mode():
    logits = model.eval()(windows[:, :-1])[0]  # (N, T, V)
losses = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=0)
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.plot(range(1, T + 1), losses, "o", markersize=4)
axes.axhline(losses.mean().item(), color=GRAY, linestyle="--")
axes.text(1, losses.mean() + 0.03, "mean", color=GRAY)
axes.set_xscale("log", base=2)
axes.set_xticks([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32])
axes.set(xlabel="visible characters", ylabel="loss (nats per character)")
plt.show()

# %% [markdown]
# The first few characters help most.
#
# ## The same text, faster
#
# **Predict before you run:** a model with `small`'s layers and a context of 512 has read 500
# characters. How many times as long does the next one take without the cache?

# %%
guess = ...  # times

# %% tags=["prediction"]
uncached = copy.copy(model)
uncached.new_cache = lambda: None  # the same weights, no cache
texts = ["".join(generate(each, tokenizer, length=100)) for each in (model, uncached)]
print("same text:", texts[0] == texts[1])

long, text = Model(replace(small, block_size=512)).eval(), corpus.train[None, :512].long()
seconds = {"with cache": [math.inf] * 32, "without cache": [math.inf] * 32}
with torch.inference_mode():
    for _ in range(3):  # the fastest of three: nothing else disturbed it
        for i in range(32):
            cache, end = long.new_cache(), 16 * i + 5
            long(text[:, : end - 1], cache=cache)
            for name, options in (("with cache", {"cache": cache}), ("without cache", {})):
                start = time.perf_counter()
                long(text[:, end - 1 if options else 0 : end], **options)
                seconds[name][i] = min(seconds[name][i], time.perf_counter() - start)
factor = seconds["without cache"][-1] / seconds["with cache"][-1]
reveal(guess, factor, within=factor / 3)

figure, axes = plt.subplots(figsize=(7, 3.2))
for (name, values), color in zip(seconds.items(), (BLUE, ORANGE), strict=True):
    axes.plot([16 * i + 4 for i in range(32)], [1000 * each for each in values], color=color)
    axes.text(510, 1000 * values[-1], name, color=color, va="center")
axes.set(xlabel="characters before the next one", ylabel="time for the next one (ms)")
axes.set(ylim=(0, None), xlim=(0, 620), xticks=range(0, 501, 100))
plt.show()

# %% [markdown]
# The price is memory: a key and a value of $C$ channels per character and layer.
#
# ## Overfitting
#
# **Overfitting** means that the loss keeps falling on the training text while it rises on other
# text. To provoke it, train on only 5,000 characters, and validate on the next 20,000.
#
# **Predict before you run:** after how many of 500 steps is the validation loss lowest without
# dropout?

# %%
guess = ...  # steps

# %% tags=["prediction"]
# This takes about 20 seconds on two cores.
few, other = training[:5000], training[5000:25000]
wide = replace(tiny, n_embd=128, n_layer=1, learning_rate=4e-3, warmup_iters=50)
wide, dropouts = replace(wide, max_iters=steps(500)), (0.0, 0.3)
overfit = [train(replace(wide, dropout=p), few, watch=(few, other))[1] for p in dropouts]
reveal(guess, min(overfit[0], key=lambda row: row[2])[0], within=100)

# %%
figure, panels = plt.subplots(1, 2, figsize=(7.4, 3.4), sharey=True)
for axes, p, rows in zip(panels, dropouts, overfit, strict=True):
    at, *curves = zip(*rows, strict=True)
    for name, losses, color in zip(("training", "validation"), curves, (GRAY, BLUE), strict=True):
        axes.plot(at, losses, "o-", markersize=4, color=color)
        axes.text(at[-1] * 1.03, losses[-1], name, color=color, va="center")
    axes.set(xlabel="training step", xlim=(0, at[-1] * 1.35), xticks=(0, at[-1] // 2, at[-1]))
    axes.set_title(f"dropout {p}", fontsize=11)
    best, last = min(curves[1]), curves[1][-1]
    print(f"dropout {p}: validation loss at best {best:.3f}, at the end {last:.3f}")
panels[0].set_ylabel("loss (nats per character)")
plt.show()

# %% [markdown]
# Dropout slows memorization; here, stopping early does as well.
#
# ## Break it
#
# Leave out one technique at a time, at two learning rates. Each dot compares two runs with the same
# seed.


# %%
def pytorch_default(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.reset_parameters()


def constant(step: int, config: Config) -> float:
    return learning_rate_at(min(step, config.warmup_iters), config)  # warm-up, but no decay


VARIANTS = {  # changes to the config, options for train
    "nothing changed": ({}, {}),
    "PyTorch's initialization": ({}, {"change": pytorch_default}),
    "no weight decay": ({"weight_decay": 0.0}, {}),
    "no warm-up": ({"warmup_iters": 0}, {}),
    "no cosine decay": ({}, {"schedule": constant}),
    "no clipping": ({"gradient_clip": math.inf}, {}),
}
final = {}  # the 36 short runs take about 40 seconds on two cores
for name, (changes, options) in VARIANTS.items():
    for rate in (0.003, 0.01):
        config = replace(tiny, block_size=16, learning_rate=rate, max_iters=steps(150), **changes)
        models = [train(config, seed=seed, **options)[0] for seed in (1, 2, 3)]
        final[name, rate] = torch.tensor([exact_loss(each, held_out) for each in models])

# %%
figure, axes = plt.subplots(figsize=(7.4, 3.4))
names = list(VARIANTS)[1:]
for rate, color, shift in ((0.003, BLUE, -0.12), (0.01, ORANGE, 0.12)):
    base = final["nothing changed", rate]
    print(f"learning rate {rate}: mean loss with everything {base.mean():.3f}")
    for row, name in enumerate(names):
        axes.plot(final[name, rate] - base, [row + shift] * 3, "o-", color=color, linewidth=1)
    axes.text(
        0.99,
        0.9 - shift / 2,
        f"learning rate {rate}",
        color=color,
        ha="right",
        transform=axes.transAxes,
    )
axes.axvline(0, color=GRAY, linewidth=0.8)
axes.set_yticks(range(len(names)), names)
axes.invert_yaxis()
axes.set(xlabel="increase of the validation loss (nats per character)")
plt.show()

# %% [markdown]
# At the higher rate, omitting warm-up or cosine decay hurts every seed, warm-up most. PyTorch's
# initialization is worse at the usual rate and better at the higher one. The rest is small or
# changes sign.
#
# ## The same model elsewhere
#
# [nanoGPT](https://github.com/karpathy/nanoGPT/blob/master/model.py) and
# [Hugging Face's GPT-2](https://huggingface.co/docs/transformers/model_doc/gpt2) use these names:
#
# `gpt.py`|nanoGPT|Hugging Face|difference
# ---|---|---|---
# `token_embedding`|`wte`|`wte`|
# `position_embedding`|`wpe`|`wpe`|
# `blocks`|`h`|`h`|
# `attention_norm`|`ln_1`|`ln_1`|
# `qkv_proj`|`attn.c_attn`|`attn.c_attn`|no bias here
# `out_proj`|`attn.c_proj`|`attn.c_proj`|
# `feed_forward_norm`|`ln_2`|`ln_2`|
# `up_proj`|`mlp.c_fc`|`mlp.c_fc`|
# ReLU|GELU|GELU (tanh)|smoother
# `down_proj`|`mlp.c_proj`|`mlp.c_proj`|
# `final_norm`|`ln_f`|`ln_f`|
# `lm_head`|`lm_head`|`lm_head`|not tied here
# `nn.Linear`|`nn.Linear`|`Conv1D`|weight transposed
# `KVCache`|none|`past_key_values`|
#
# nanoGPT's `train.py` leaves out all biases, those of LayerNorm too.
#
# **Weight tying**: GPT-2 uses one matrix as `wte` and as `lm_head`.
#
# ### Exercise 3: eight bugs
#
# A buggy GPT often trains, just worse. The next cell is correct; the one after it has eight bugs.
# Fix them there, then replace the dots in its last line.


# %%
class Layers(nn.Module):
    def __init__(self, V: int = 65, T: int = 16, C: int = 32, H: int = 4) -> None:
        super().__init__()
        self.H = H
        self.token_embedding = nn.Embedding(V, C)
        self.position_embedding = nn.Embedding(T, C)
        self.attention_norm = nn.LayerNorm(C)
        self.qkv_proj = nn.Linear(C, 3 * C, bias=False)
        self.out_proj = nn.Linear(C, C)
        self.feed_forward_norm = nn.LayerNorm(C)
        self.up_proj = nn.Linear(C, 4 * C)
        self.down_proj = nn.Linear(4 * C, C)
        self.final_norm = nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, V, bias=False)
        self.initialize([each for each in self.parameters() if each.dim() == 2])


# %% tags=["exercise"]
class GPT(Layers):
    def initialize(self, matrices: list[Tensor]) -> None:
        for matrix in matrices:
            nn.init.normal_(matrix)

    def attention(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        x = self.qkv_proj(x).view(B, T, 3, self.H, C // self.H)  # (B, T, 3, H, D)
        query, key, value = x.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        scores = query @ key.transpose(-2, -1) * C**-0.5  # (B, H, T, T)
        scores = scores.masked_fill(torch.ones(T, T).tril() == 0, 0.0)
        weights = F.softmax(scores, dim=-2)
        weights = F.dropout(weights, 0.2)
        return self.out_proj((weights @ value).transpose(1, 2).reshape(B, T, C))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.token_embedding(idx)  # (B, T, C)
        x = x + self.attention(self.attention_norm(x))
        x = self.down_proj(F.relu(self.up_proj(self.feed_forward_norm(x))))
        logits = self.lm_head(self.final_norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


fixed = ...  # GPT


# %% tags=["check"]
@check
def exercise_3() -> None:
    torch.manual_seed(1)
    model = given(fixed)()
    idx, targets = torch.randint(65, (2, 8, 16))
    logits, loss = model(idx, targets)
    assert loss < 4.4, f"the first loss is {loss.item():.1f}: worse than guessing"
    assert not torch.equal(logits, model(idx)[0]), "in training mode, two passes are the same"
    logits, loss = model.eval()(idx, targets)
    assert torch.equal(logits, model(idx)[0]), "in evaluation mode, two passes differ"
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.isclose(expected), "the loss does not compare position t with target t"
    for parameter in model.parameters():  # larger weights make differences visible
        parameter.data *= 5
    changed = idx.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 65
    earlier = [model(each)[0][:, :-1] for each in (idx, changed)]
    assert torch.allclose(*earlier, atol=1e-4), "the last character changes earlier predictions"
    x = torch.randn(1, 16, 32)
    value = model.qkv_proj(x)[..., 64:]
    same = model.attention(x[:, :1].expand_as(x))
    message = "with the same vector at all positions, attention should return its value everywhere"
    assert torch.allclose(same, model.out_proj(value[:, :1]).expand_as(x), atol=1e-4), message
    heads = model.qkv_proj(x).view(16, 3, 4, 8).permute(1, 2, 0, 3)
    mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1).reshape(x.shape)
    message = "attention is too sharp or too diffuse"
    assert torch.allclose(model.attention(x), model.out_proj(mixed), atol=1e-4), message
    first, *_, last = model(torch.zeros(1, 16, dtype=torch.long))[0][0]
    assert not torch.allclose(first, last, atol=0.01), "in a text of one character, order is lost"
    for layer in (model.out_proj, model.down_proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(16))
    message = "with both sublayers zeroed, the embeddings should reach final_norm unchanged"
    assert torch.allclose(model(idx)[0], model.lm_head(model.final_norm(x)), atol=1e-4), message


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# class GPT(Layers):
#     def initialize(self, matrices):
#         for matrix in matrices:
#             nn.init.normal_(matrix, std=0.02)
#
#     def attention(self, x):
#         B, T, C = x.shape
#         x = self.qkv_proj(x).view(B, T, 3, self.H, C // self.H)
#         query, key, value = x.permute(2, 0, 3, 1, 4)
#         scores = query @ key.transpose(-2, -1) * (C // self.H) ** -0.5
#         scores = scores.masked_fill(torch.ones(T, T).tril() == 0, float("-inf"))
#         weights = F.softmax(scores, dim=-1)
#         weights = F.dropout(weights, 0.2, self.training)
#         return self.out_proj((weights @ value).transpose(1, 2).reshape(B, T, C))
#
#     def forward(self, idx, targets=None):
#         x = self.token_embedding(idx) + self.position_embedding.weight[: idx.shape[1]]
#         x = x + self.attention(self.attention_norm(x))
#         x = x + self.down_proj(F.relu(self.up_proj(self.feed_forward_norm(x))))
#         logits = self.lm_head(self.final_norm(x))
#         if targets is None:
#             return logits, None
#         return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
#
#
# fixed = GPT
# ```
#
# </details>
#
# ### Challenge · Exercise 4: a scaling law
#
# With $N$ parameters, the loss is about $a + b \cdot N^{-c}$: a power law
# ([Kaplan et al.](https://arxiv.org/abs/2001.08361)) above a floor $a$
# ([Hoffmann et al.](https://arxiv.org/abs/2203.15556)). Fit it to three models, and predict a
# fourth. Three points determine $a$, $b$ and $c$, so only the fourth tests the law. For a given
# $c$, `torch.linalg.lstsq` finds $a$ and $b$.


# %%
def loss_of_width(n_embd: int) -> tuple[int, float]:
    """The number of parameters in the block, and the mean validation loss of three seeds."""
    config = replace(tiny, block_size=8, n_embd=n_embd, n_layer=1, batch_size=64)
    config = replace(config, max_iters=steps(500), warmup_iters=50, learning_rate=0.01)
    models = [train(config, seed=seed)[0] for seed in (1, 2, 3)]
    losses = [exact_loss(model, held_out) for model in models]
    return sum(p.numel() for p in models[0].blocks.parameters()), sum(losses) / 3


# The nine runs take about 20 seconds on two cores.
measured = [loss_of_width(n_embd) for n_embd in (8, 16, 32)]
for N, loss in measured:
    print(f"{N:6,} parameters: loss {loss:.3f}")


# %% tags=["exercise"]
def fit_power_law(sizes: list[int], losses: list[float]) -> tuple[float, float, float]:
    """The a, b and c with the smallest squared error."""
    laws = []
    for c in torch.linspace(0.01, 1.5, 1000).tolist():
        a, b, error = ..., ..., ...
        laws.append((error, a, b, c))
    return ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    def loss_at(N: float, a: float, b: float, c: float) -> float:
        return a + b * N**-c

    for sizes, law in (([1e3, 4e3, 16e3, 64e3], (1.5, 20, 0.4)), ([1e3, 3e3, 9e3], (0.9, 8, 0.2))):
        found = given(fit_power_law(sizes, [loss_at(N, *law) for N in sizes]))
        assert found[0] > 0.1, "your law lets an infinite model predict text without any loss"
        wanted, guess = loss_at(1e6, *law), loss_at(1e6, *found)
        message = f"the loss at a million parameters is {wanted:.3f}, yours {guess:.3f}"
        assert abs(guess - wanted) < 0.01, f"on exact data for {len(sizes)} sizes, {message}"
    a, b, c = fit_power_law(*map(list, zip(*measured, strict=True)))
    N, loss = loss_of_width(48)  # three more runs, about 10 seconds on two cores
    print(f"{a:.2f} + {b:.1f} * N ** -{c:.2f} predicts {a + b * N**-c:.3f}; measured: {loss:.3f}")
    print(f"off by {a + b * N**-c - loss:+.3f}; the noise of your three models is part of this")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def fit_power_law(sizes, losses):
#     N, loss, laws = torch.tensor(sizes).double(), torch.tensor(losses).double(), []
#     for c in torch.linspace(0.01, 1.5, 1000).tolist():
#         X = torch.stack((torch.ones_like(N), N**-c), dim=1)
#         a, b = torch.linalg.lstsq(X, loss[:, None]).solution.flatten().tolist()
#         error = (a + b * N**-c - loss).square().sum().item()
#         laws.append((error, a, b, c))
#     return min(laws)[1:]
# ```
#
# </details>
#
# ## After pre-training
#
# **Pre-training** is what you did: the model continues text. An assistant needs more:
#
# - **SFT**, supervised fine-tuning, continues training on prompts with answers that people wrote
#   ([Ouyang et al.](https://arxiv.org/abs/2203.02155)). The loss stays the same, usually counted on
#   the answer only.
# - **RLHF**: people rank answers, and a reward model learns to predict their ranking. Reinforcement
#   learning then raises the reward, with a penalty for moving far from the SFT model (same paper).
# - **DPO** needs only the rankings. Its loss raises the log-probability of the preferred answer,
#   relative to the SFT model, above that of the rejected one; only this difference counts
#   ([Rafailov et al.](https://arxiv.org/abs/2305.18290)).
#
# ### Exercise 5: pre-train, then fine-tune
#
# The next cell pre-trains on Pocket Play, a generated text. Fine-tune that model on the course's
# text with AdamW, a constant learning rate and batches of 16.

# %%
own_text = Path(corpus.path).read_text(encoding="utf-8")
play = pocket_play.play(100_000)
both = Tokenizer(play + own_text)  # a vocabulary for both texts
play_ids, little, other = (
    torch.tensor(both.encode(text)) for text in (play, own_text[:20_000], own_text[-10_000:])
)
play_config = replace(tiny, vocab_size=len(both.vocabulary), max_iters=300)
pretrained, _ = train(play_config, play_ids)  # all steps in quick mode too
print(f"loss on Pocket Play {exact_loss(pretrained, play_ids[:20_000]):.3f}")
print(f"loss on the other text {exact_loss(pretrained, other):.3f}")


# %% tags=["exercise"]
def fine_tune(model: nn.Module, tokens: Tensor, count: int, learning_rate: float) -> list[float]:
    """Train the given model for `count` steps, and return their losses."""
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(count):
        idx, targets = draw_batch(tokens, model.block_size, 16, generator)
        _, loss = model(idx, targets)
        losses.append(...)
    return ...


# %% tags=["check"]
@check
def exercise_5() -> None:
    tuned = copy.deepcopy(pretrained)
    losses = given(fine_tune(tuned, little, 2, 0.0))
    assert len(losses) == 2, f"2 steps make 2 losses, not {len(losses)}"
    same = torch.equal(tuned.lm_head.weight, pretrained.lm_head.weight)
    assert same, "the weights changed at a learning rate of 0"
    before = exact_loss(tuned, other)
    fine_tune(tuned, little, 100, 1e-3)
    same = torch.equal(tuned.lm_head.weight, pretrained.lm_head.weight)
    assert not same, "the weights of the given model did not change"
    torch.manual_seed(1)
    scratch = Model(play_config)
    fine_tune(scratch, little, 100, 1e-3)
    after, without = exact_loss(tuned, other), exact_loss(scratch, other)
    print(f"loss before {before:.3f}, after {after:.3f}, without pre-training {without:.3f}")
    print(f"on Pocket Play, after: {exact_loss(tuned, play_ids[:20_000]):.3f}")
    assert after < before - 0.1, "it has hardly learned: are old gradients still in .grad?"
    assert after < without - 0.1, "no better than without pre-training: are the weights fresh?"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def fine_tune(model, tokens, count, learning_rate):
#     generator, losses = torch.Generator().manual_seed(1), []
#     optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
#     for _ in range(count):
#         idx, targets = draw_batch(tokens, model.block_size, 16, generator)
#         _, loss = model(idx, targets)
#         optimizer.zero_grad()
#         loss.backward()
#         optimizer.step()
#         losses.append(loss.item())
#     return losses
# ```
#
# </details>
#
# ## Encoders and decoders
#
# GPT is a **decoder**: a causal mask lets it generate. An **encoder**, such as BERT, lacks this
# mask and reads a complete text. In **cross-attention**, a decoder's queries attend to keys and
# values from an encoder.
#
# ## The script
#
# `git diff --no-index layer_norm.py gpt.py` shows the whole change.
#

# %% [markdown]
# ## Quiz
#
# 1. Why does dropout divide by $1-p$?
#
# <details><summary>Answer</summary>
# Each activation keeps its expected value, so evaluation needs no correction.
# </details>
#
# 2. Adam ignores the scale of gradients. What is clipping for?
#
# <details><summary>Answer</summary>
# For spikes: a gradient far larger than the others would dominate m and v for many steps.
# </details>
#
# 3. Why warm up?
#
# <details><summary>Answer</summary>
# While m and v come from few gradients, steps are as large for noise as for signal.
# </details>
#
# 4. When is a cached key wrong?
#
# <details><summary>Answer</summary>
# When earlier positions can change: without a causal mask, or when the window moves and each
# character gets a different position embedding.
# </details>
#
# 5. The training loss falls while the validation loss rises. What now?
#
# <details><summary>Answer</summary>
# The model overfits: use more text, fewer steps, a smaller model, or more dropout.
# </details>
#
# ## Papers
#
# - Radford et al. 2019, [GPT-2](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
# - Srivastava et al. 2014, [Dropout](https://jmlr.org/papers/v15/srivastava14a.html)
# - Loshchilov & Hutter 2017, [AdamW](https://arxiv.org/abs/1711.05101)
# - Press & Wolf 2016, [weight tying](https://arxiv.org/abs/1608.05859)

# %% [markdown]
# **Next →** [08_modern_gpt](08_modern_gpt.ipynb)
