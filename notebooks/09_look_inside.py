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
# # 9 · Look inside
#
# You have built a GPT. Now you find out how a trained one works, with the methods that researchers
# use: ablation, direct logit attribution, the logit lens and activation patching. Then you grow an
# **induction head**, which copies text that it has seen once, and find the head that makes verbs
# agree with nouns in Pocket Play.
#
# Allow 75 minutes. Training takes about three of them.
#
# ![The model of gpt.py](../results/diagrams/gpt.svg)

# %%
import sys

sys.path.insert(0, "..")

import math
from collections.abc import Callable
from dataclasses import replace as with_changes
from functools import partial
from pathlib import Path
from random import Random

from trainer.corpus import open_corpus
from common import Tokenizer, draw_batch, split
from data import pocket_play
from explorer.hooks import off, record, replace
from gpt import PRESETS, Config, Model, learning_rate_at, make_optimizer
from sample import load
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GRAY, GREEN, ORANGE, check, given, heat_map, plt, reveal, say, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def train(config: Config, draw: Draw, seed: int = 1) -> Model:
    """A trained model; `draw` returns the inputs and targets of a batch."""
    torch.manual_seed(seed)
    model, generator = Model(config), torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, config)
    config = with_changes(config, max_iters=steps(config.max_iters))
    for step in range(config.max_iters):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        loss = model(*draw(generator))[1]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
    return model.eval().requires_grad_(False)


# %% [markdown]
# ## Your model
#
# If you have trained `gpt.py`, this cell loads your run. If not, it trains a small model. The
# saved outputs below are from such a small model; yours will differ.

# %%
corpus = open_corpus(None)
tokenizer = Tokenizer(corpus.vocabulary)
run = Path("../runs/gpt")
model = None
if (run / "best.pt").exists():
    model, own = load(run, "cpu")
    model = model.requires_grad_(False) if own.vocabulary == corpus.vocabulary else None
if model is None:
    small = with_changes(PRESETS["small"], vocab_size=len(corpus.vocabulary), n_embd=96, n_layer=3)
    small = with_changes(small, batch_size=16, max_iters=1500, learning_rate=4e-3)
    model = train(small, partial(draw_batch, corpus.train, small.block_size, small.batch_size))

T, L, H = model.block_size, len(model.blocks), model.blocks[0].attention.n_head
C = model.token_embedding.embedding_dim
D = C // H
count = max(2, 8192 // T)
windows = corpus.validation[: count * T + 1].long()
idx, targets = windows[:-1].view(count, T), windows[1:].view(count, T)  # (B, T) each


def loss_of(model: Model) -> float:
    return model(idx, targets)[1].item()


normal = loss_of(model)
print(f"{L} layers of {H} heads, C = {C}, D = {D}; loss on {idx.numel():,} characters {normal:.3f}")

# %% [markdown]
# ## Record
#
# A **hook** is a function that PyTorch calls whenever a module has run. `explorer/hooks.py` is a
# small module built on hooks. Its `record` returns the output of every module by name, plus each
# layer's attention weights and head outputs:

# %%
found = record(model, idx)
for name in ("token_embedding", "blocks.0.attention.weights", "blocks.0.attention.heads"):
    print(f"{name:27}{tuple(found[name].shape)}")
for name in ("blocks.0.feed_forward", "blocks.0", "logits"):
    print(f"{name:27}{tuple(found[name].shape)}")

stream = found["token_embedding"] + found["position_embedding"]  # (B, T, C)
for i in range(L):
    stream = stream + found[f"blocks.{i}.attention"] + found[f"blocks.{i}.feed_forward"]
gap = (stream - found[f"blocks.{L - 1}"]).abs().max().item()
print(f"\nembeddings + all sublayers miss the output of the last block by {gap:.0e}")

# %% [markdown]
# The residual stream is a sum, and each sublayer adds one term. Everything below builds on this.
#
# ## Ablation
#
# `off` replaces the output of a head or sublayer by zeros:

# %%
heads = [(i, h) for i in range(L) for h in range(H)]
sublayers = [f"blocks.{i}.{name}" for i in range(L) for name in ("attention", "feed_forward")]


def without(part: str) -> float:
    """How much the loss rises when a part is off."""
    with off(model, part):
        return loss_of(model) - normal


zeroed = torch.tensor([without(f"blocks.{i}.attention.head {h}") for i, h in heads]).view(L, H)
rises = [without(name) for name in sublayers]
figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.8), width_ratios=(1, 1.2))
layers = [f"layer {i}" for i in range(L)]
heat_map(axes[0], zeroed, layers, range(H), "one head", "increase of the loss", vmin=0)
axes[0].set(xlabel="head")
axes[1].barh(range(2 * L), rises, color=[BLUE, ORANGE] * L)
labels = [name.removeprefix("blocks.").replace("feed_forward", "MLP") for name in sublayers]
axes[1].set_yticks(range(2 * L), labels)
axes[1].invert_yaxis()
axes[1].set(title="one sublayer", xlabel="increase of the loss")
plt.show()

# %% [markdown]
# The heads differ a lot. But zeros are not what a "missing" head would give: the layers above were
# trained on its usual output, so zeros take the model **off its distribution**. **Mean ablation**
# replaces the output by its mean instead. It removes what depends on the text and keeps the rest.
#
# ### Exercise 1 · Replace a head
#
# `replace(model, {"NAME": tensor})` sets a module's output. `out_proj` mixes all heads, so we need
# its output with another value for one head. Head `h` uses the columns `h * D` to `(h + 1) * D`.


# %% tags=["exercise"]
def with_head(model: Model, found: dict[str, Tensor], i: int, h: int, z: Tensor) -> Tensor:
    """out_proj's output in layer i, (B, T, C), if head h gave z, which broadcasts to (B, T, D)."""
    name = f"blocks.{i}.attention"
    attention = model.blocks[i].attention
    D = attention.out_proj.in_features // attention.n_head
    # found[f"{name}.out_proj"] is the recorded output, found[f"{name}.heads"] the recorded input.
    return ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    some = record(model, idx[:3])
    for i, h in ((0, 0), (L - 1, H - 1)):
        name = f"blocks.{i}.attention"
        unchanged = some[f"{name}.out_proj"]
        own = some[f"{name}.heads"][..., h * D : (h + 1) * D]  # (B, T, D)
        same = given(with_head(model, some, i, h, own))
        assert same.shape == unchanged.shape, f"the shape is {tuple(same.shape)}"
        gap = (same - unchanged).abs().max().item()
        assert gap < 1e-4, f"with the head's own output, nothing may change, but {gap:.2f} does"
        with off(model, f"{name}.head {h}"):
            expected = record(model, idx[:3])[f"{name}.out_proj"]
        gap = (with_head(model, some, i, h, torch.zeros(D)) - expected).abs().max().item()
        assert gap < 1e-4, f"with zeros, layer {i} differs from `off` by {gap:.2f}"
        moved = (with_head(model, some, i, h, own + 1) - unchanged)[0, 0]  # (C)
        expected = model.blocks[i].attention.out_proj.weight[:, h * D : (h + 1) * D].sum(dim=1)
        assert torch.allclose(moved, expected, atol=1e-3), "z does not go through `out_proj`"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def with_head(model: Model, found: dict[str, Tensor], i: int, h: int, z: Tensor) -> Tensor:
#     name = f"blocks.{i}.attention"
#     attention = model.blocks[i].attention
#     D = attention.out_proj.in_features // attention.n_head
#     own = slice(h * D, (h + 1) * D)
#     change = z - found[f"{name}.heads"][..., own]
#     return found[f"{name}.out_proj"] + change @ attention.out_proj.weight[:, own].T
# ```
#
# `out_proj` is linear: only the change of its input matters, and the bias stays.
#
# </details>
#
# **Predict before you run.** In how many of the heads does mean ablation raise the loss less than
# zeros?

# %%
guess = ...  # a number


# %% tags=["prediction"]
def head_output(model: Model, found: dict[str, Tensor], i: int, h: int, z: Tensor) -> Tensor:
    """The solution of exercise 1."""
    name, projection = f"blocks.{i}.attention", model.blocks[i].attention.out_proj
    D = projection.in_features // model.blocks[i].attention.n_head
    own = slice(h * D, (h + 1) * D)
    change = z - found[f"{name}.heads"][..., own]  # (B, T, D)
    return found[f"{name}.out_proj"] + change @ projection.weight[:, own].T  # (B, T, C)


def mean_ablated(model: Model, found: dict[str, Tensor], i: int, h: int) -> dict[str, Tensor]:
    """What `replace` needs so that a head gives its mean over texts and positions."""
    z = found[f"blocks.{i}.attention.heads"].unflatten(-1, (-1, D_of(model)))[..., h, :]
    z = z.mean(dim=(0, 1))  # (D)
    return {f"blocks.{i}.attention.out_proj": head_output(model, found, i, h, z)}


def D_of(model: Model) -> int:
    attention = model.blocks[0].attention
    return attention.out_proj.in_features // attention.n_head


means = torch.zeros(L, H)
for i, h in heads:
    with replace(model, mean_ablated(model, found, i, h)):
        means[i, h] = loss_of(model) - normal
reveal(guess, (means < zeroed).sum(), within=1)

# %%
figure, axes = plt.subplots(figsize=(5, 3.6))
axes.axline((0, 0), slope=1, color=GRAY, linestyle="--", linewidth=1)
axes.plot(zeroed.flatten(), means.flatten(), "o", color=BLUE)
for i, h in heads:
    axes.annotate(f" {i}.{h}", (zeroed[i, h], means[i, h]), fontsize=9, color=GRAY)
axes.set(xlabel="increase with zeros", ylabel="increase with the mean")
plt.show()

# %% [markdown]
# Below the dashed line, zeros hurt more than the mean. Both methods measure how much *this* model
# relies on a head. Neither says what the head does.
