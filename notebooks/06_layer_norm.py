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
# # 6 · Layer normalization
#
# You build LayerNorm by hand, forward and backward, and put it before every sublayer. Then you see
# what it enables: a deeper stack at a higher learning rate. Allow 45 minutes to read and run, plus
# one to two hours for the exercises; you can skip the challenge.
#
# ![The model of layer_norm.py](../results/diagrams/layer_norm.svg)
#
# The validation loss drops only slightly, from about 2.08 to about 2.06 nats per character, because
# three blocks hardly need norms. Six blocks at a high learning rate do.

# %%
import sys

sys.path.insert(0, "..")

import math

import residual
from common import LanguageModel, Tokenizer, draw_batch
from layer_norm import Config
from residual import FeedForward, MultiHeadAttention
from sample import generate
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GRAY, ORANGE, PINK, check, given, heat_map, plt, reveal, steps, visible
from matplotlib.colors import LogNorm
from torch import Tensor, nn
from torch.nn import functional as F

torch.set_printoptions(precision=2, sci_mode=False)
corpus = open_corpus(None)
training, validation = corpus.train, corpus.validation
tokenizer = Tokenizer(corpus.vocabulary)
V = len(corpus.vocabulary)
C = 32  # channels
idx, targets = draw_batch(training, 8, 256, torch.Generator().manual_seed(1))  # (B, T) each

# %% [markdown]
# ## The residual stream grows
#
# Each sublayer adds its output to the residual stream. Take an untrained `residual.py` with 16
# blocks instead of 3.
#
# **Predict before you run.** By what factor does the stream's standard deviation grow between the
# embeddings and the output of block 16?


# %%
@torch.no_grad()
def states(model: LanguageModel, idx: Tensor) -> list[Tensor]:
    """The residual stream: the embeddings, then the output of each block."""
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(idx.shape[1]))
    stream = [x]  # (B, T, C) each
    for block in model.blocks:
        stream.append(block(stream[-1]))
    return stream


# %%
guess = ...  # a number

# %% tags=["prediction"]
torch.manual_seed(1)
deep = residual.Model(residual.Config(vocab_size=V, n_layer=16))
deviations = [x.std().item() for x in states(deep, idx)]
reveal(guess, deviations[-1] / deviations[0], within=0.5)
figure, axes = plt.subplots(figsize=(7, 2.8))
axes.plot(deviations, marker="o")
axes.set(xlabel="blocks so far", ylabel="standard deviation", ylim=(0, None))
plt.show()

# %% [markdown]
# Before training, a sublayer's output is nearly uncorrelated with the stream, so their variances
# add. Late blocks therefore read larger values than early ones, and their own outputs are larger.
#
# ## LayerNorm on one vector
#
# **LayerNorm** subtracts the mean of a position's vector and divides by its standard deviation.
# A small ε avoids division by zero:
#
# $$\hat{x} = \frac{x - \mu}{\sigma}, \qquad \sigma = \sqrt{\text{var}(x) + \varepsilon}$$

# %%
x = torch.tensor([2.0, 4, 4, 4, 5, 5, 7, 9])  # one position with 8 channels
mean = x.mean()
variance = (x - mean).square().mean()  # divided by C, not C - 1
x_hat = (x - mean) / (variance + 1e-5).sqrt()  # (C)
print(f"mean {mean}, variance {variance}, standard deviation {variance.sqrt()}")
print("by hand        ", x_hat)
print("nn.LayerNorm   ", nn.LayerNorm(8)(x).detach())
print("of 100 * x + 7 ", nn.LayerNorm(8)(100 * x + 7).detach())

# %% [markdown]
# A positive factor or an added constant changes almost nothing: LayerNorm keeps only the pattern
# across channels.
#
# To let training rescale and offset channels, LayerNorm ends with a learned **scale** and **shift**
# per channel, called `weight` and `bias` in PyTorch. They start at 1 and 0.

# %%
weight = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 3])  # triples the last channel
bias = torch.tensor([10.0, 0, 0, 0, 0, 0, 0, 0])  # adds 10 to the first
print("by hand     ", weight * x_hat + bias)
print("F.layer_norm", F.layer_norm(x, (8,), weight, bias))

# %% [markdown]
# ### Exercise 1 · LayerNorm
#
# Write LayerNorm for inputs of any shape, such as `(B, T, C)`. Each position has its own mean and
# standard deviation.


# %% tags=["exercise"]
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalize over the last dimension, then apply scale and shift."""
    return ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    torch.manual_seed(1)
    x = 4 * torch.randn(2, 3, 8) + 1  # (B, T, C)
    ones, zeros = torch.ones(8), torch.zeros(8)  # (C) each
    plain = given(layer_norm(x, ones, zeros))
    assert plain.shape == x.shape, f"the shape is {tuple(plain.shape)}, not {tuple(x.shape)}"
    mean = plain[0, 0].mean()
    assert mean.abs() < 1e-5, f"the first position's mean is {mean:.2f}, not 0"
    variance = plain[0, 0].var(unbiased=False)
    assert (variance - 1).abs() < 1e-3, f"the first position's variance is {variance:.2f}, not 1"
    assert layer_norm(zeros, ones, zeros).isfinite().all(), "a vector of zeros gives NaN"
    small = x / 1000
    same = torch.allclose(layer_norm(small, ones, zeros), F.layer_norm(small, (8,)), atol=1e-4)
    assert same, "it is off where the variance is as small as ε: look at where you add ε"
    weight, bias = torch.randn(2, 8)  # (C) each
    wanted = F.layer_norm(x, (8,), weight, bias)  # (B, T, C)
    same = torch.allclose(layer_norm(x, weight, bias), wanted, atol=1e-4)
    assert same, "it is right without scale and shift, but not with them"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def layer_norm(x, weight, bias, eps=1e-5):
#     mean = x.mean(dim=-1, keepdim=True)
#     variance = x.var(dim=-1, keepdim=True, unbiased=False)
#     return weight * (x - mean) / (variance + eps).sqrt() + bias
# ```
#
# </details>
#
# ### Challenge · Exercise 2 · The backward pass
#
# Given `grad_y`, the gradient of the output, find the gradients of `x`, `weight` and `bias`. All
# positions share `weight` and `bias`, so their gradients are sums over positions.
#
# For `x`, start with the gradient of x̂, `g = grad_y * weight`. A channel xⱼ affects x̂ in three
# ways, whose gradients add up: directly, through μ, and through σ, where ∂σ/∂xⱼ = x̂ⱼ / C.


# %% tags=["exercise"]
def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = ...  # (C)
    grad_weight = ...  # (C)
    grad_x = ...  # (B, T, C)
    return grad_x, grad_weight, grad_bias


# %% tags=["check"]
@check
def exercise_2() -> None:
    torch.manual_seed(1)
    x, grad_y = torch.randn(2, 2, 3, 8, dtype=torch.float64)  # (B, T, C) each
    weight, bias = torch.randn(2, 8, dtype=torch.float64)  # (C) each
    leaves = [each.requires_grad_() for each in (3 * x, weight.clone(), bias)]
    x_hat = F.layer_norm(leaves[0].detach(), (8,))  # (B, T, C)
    wanted = torch.autograd.grad(F.layer_norm(leaves[0], (8,), *leaves[1:]), leaves, grad_y)
    found = layer_norm_backward(grad_y, leaves[0].detach(), weight)
    for name, mine, theirs in list(zip(("x", "weight", "bias"), found, wanted, strict=True))[::-1]:
        shape, right = tuple(given(mine).shape), tuple(theirs.shape)
        assert shape == right, f"the gradient of {name} has the shape {shape}, not {right}"
        if name == "x":
            mean, along = mine[0, 0].mean(), (mine * x_hat)[0, 0].mean()
            why = "adding a constant to x changes nothing, so it must be 0"
            assert mean.abs() < 1e-9, f"the mean of grad_x is {mean:.2f}; {why}"
            why = "scaling x changes almost nothing, so it must be near 0"
            assert along.abs() < 1e-3, f"the mean of grad_x * x_hat is {along:.2f}; {why}"
        error = (mine - theirs).abs().max()
        assert error < 1e-9, f"the gradient of {name} differs from autograd's by {error:.2g}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def layer_norm_backward(grad_y, x, weight, eps=1e-5):
#     sigma = (x.var(dim=-1, keepdim=True, unbiased=False) + eps).sqrt()
#     x_hat = (x - x.mean(dim=-1, keepdim=True)) / sigma
#     g = grad_y * weight
#     grad_bias = grad_y.sum(dim=(0, 1))
#     grad_weight = (grad_y * x_hat).sum(dim=(0, 1))
#     through_sigma = x_hat * (g * x_hat).mean(dim=-1, keepdim=True)
#     grad_x = (g - g.mean(dim=-1, keepdim=True) - through_sigma) / sigma
#     return grad_x, grad_weight, grad_bias
# ```
#
# </details>
#
# ## Why not BatchNorm?
#
# **BatchNorm** came first, for images. Its formula is the same, but it averages over different
# values: one channel, at all positions of all sequences in the batch. The shaded values share a
# mean and standard deviation.
#
# A module has two modes, set by `model.train()` and `model.eval()`. In the first, BatchNorm
# averages over the batch; in the second, it uses stored averages.


# %%
def embed(idx: Tensor) -> Tensor:
    return deep.token_embedding(idx) + deep.position_embedding(torch.arange(8))  # (B, T, C)


few = idx[:4]  # (B, T)
corner = embed(few)[0, :6, :6].detach()  # six positions of sequence 0, six channels
figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.7))
for panel, kind in zip(axes, ("BatchNorm", "LayerNorm"), strict=True):
    shade = torch.zeros_like(corner)
    (shade[:, 2] if kind == "BatchNorm" else shade[2]).fill_(1)
    panel.imshow(shade, cmap="Blues", vmax=2.5, aspect="auto")
    for t, row in enumerate(corner.tolist()):
        for c, value in enumerate(row):
            text = f"{value:.1f}".replace("-", "−")
            panel.text(c, t, text, ha="center", va="center", size=10)
    panel.set_yticks(range(6), visible(tokenizer.decode(few[0, :6].tolist())))
    panel.tick_params(length=0)
    panel.set(title=kind, xlabel="channel", ylabel="position")
plt.show()

# %% [markdown]
# Take a batch of 4 sequences of 8 characters. Change the character at position 5 of sequence 1. The
# embeddings go straight into the norm, without attention.
#
# **Predict before you run.** At how many of the 32 positions does the output of BatchNorm, in
# training mode, change?


# %%
class BatchNorm(nn.Module):
    """nn.BatchNorm1d for (B, T, C): each of the B*T positions is one sample."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)  # (B, T, C)


changed = few.clone()
changed[1, 5] = (changed[1, 5] + 1) % V

# %%
guess = ...  # a number

# %% tags=["prediction"]
before, after = (BatchNorm(C)(embed(each)) for each in (few, changed))  # (B, T, C) each
reveal(guess, ((before - after).abs().amax(dim=-1) > 1e-6).sum())


# %%
def change(norm: nn.Module) -> Tensor:
    """How much the outputs change (RMS over channels); blank where they do not."""
    difference = norm(embed(few)) - norm(embed(changed))  # (B, T, C)
    rms = difference.square().mean(dim=-1).sqrt()  # (B, T)
    return rms.masked_fill(rms < 1e-6, float("nan"))


batch_norm, generator = BatchNorm(C), torch.Generator().manual_seed(2)
with torch.no_grad():
    for _ in range(100):  # collect the running averages that eval mode uses
        batch_norm(embed(draw_batch(training, 8, 32, generator)[0]))
    in_training = batch_norm(embed(few))  # (B, T, C)
    maps = {"BatchNorm, training": change(batch_norm)}
    batch_norm.eval()
    maps |= {"BatchNorm, eval": change(batch_norm), "LayerNorm": change(nn.LayerNorm(C))}
    gap = (in_training - batch_norm(embed(few))).abs().max()

figure, axes = plt.subplots(1, 3, figsize=(7.4, 1.9))
for panel, (title, values) in zip(axes, maps.items(), strict=True):
    bar = "change (RMS)" if title == "LayerNorm" else ""
    heat_map(panel, values, "0123", "01234567", title, bar, norm=LogNorm(1e-3, 3))
    panel.set(xlabel="position", ylabel="sequence")
plt.show()
print(f"BatchNorm of the same input in training and eval mode: outputs differ by up to {gap:.2f}")

# %% [markdown]
# In training mode all positions change. This causes two problems:
#
# - **Other sequences change.** The prediction for a text depends on the texts in the same batch.
# - **Earlier positions change.** Positions 0 to 4 of sequence 1 receive information about
#   position 5, and position 4 must predict that character. The causal mask closes this path in
#   attention; BatchNorm opens another.
#
# In eval mode nothing leaks, but BatchNorm computes a different function than in training, as the
# printed gap shows. LayerNorm computes the same function in both modes, and each position depends
# only on itself.
#
# ## Pre-norm and post-norm
#
# | | sublayer | skip path |
# |---|---|---|
# | **post-norm** (Transformer, 2017) | `x = norm(x + f(x))` | goes through every norm |
# | **pre-norm** (GPT-2, 2019) | `x = x + f(norm(x))` | has no norm on it |
#
# With pre-norm the stream still grows, but each sublayer reads a normalized copy. One more norm
# precedes `lm_head`. With post-norm the stream itself is normalized.


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
# Here is the stack of 16 blocks without norms ("none" is `residual.py`) and with both kinds. The
# dotted line is what pre-norm attention reads.


# %%
def make(kind: str, seed: int = 1, n_layer: int = 3) -> LanguageModel:
    torch.manual_seed(seed)
    if kind == "none":
        return residual.Model(residual.Config(vocab_size=V, n_layer=n_layer))
    return Model(Config(vocab_size=V, n_layer=n_layer, norm=kind))


COLORS = {"none": GRAY, "pre": BLUE, "post": ORANGE, "post, warm-up": PINK}


def label_ends(axes: plt.Axes, curves: dict[str, list[float]]) -> None:
    """Each curve's name at its right end, far enough apart to read."""
    low, high = axes.get_ylim()
    y = -float("inf")
    for name, values in sorted(curves.items(), key=lambda item: item[1][-1]):
        y = max(min(values[-1], high), y + 0.09 * (high - low))
        blended = axes.get_yaxis_transform()  # x from 0 to 1 across the axes, y as in the data
        axes.text(1.01, y, name, color=COLORS[name], va="center", transform=blended)


def deviations_by_depth(models: dict[str, LanguageModel]) -> dict[str, list[float]]:
    return {kind: [x.std().item() for x in states(model, idx)] for kind, model in models.items()}


# %%
untrained = {kind: make(kind, n_layer=16) for kind in ("none", "pre", "post")}
curves = deviations_by_depth(untrained)
entering = zip(untrained["pre"].blocks, states(untrained["pre"], idx)[:-1], strict=True)
read = [block.attention_norm(x).std().item() for block, x in entering]
figure, axes = plt.subplots(figsize=(6.8, 2.8))
for kind, values in curves.items():
    axes.plot(values, color=COLORS[kind], marker="o")
axes.plot(read, color=BLUE, linestyle=":", linewidth=2)
axes.set(xlabel="blocks so far", ylabel="standard deviation", ylim=(0, None))
label_ends(axes, curves)
plt.show()

# %% [markdown]
# ## Gradients at initialization
#
# These are gradient norms of each block's last matrix before training, averaged over three seeds:
# with PyTorch's default weights, and with Xavier's larger ones (variance 2 / (inputs + outputs)),
# which Xiong et al. (2020) analyze.


# %%
def first_gradients(kind: str, xavier: bool) -> list[float]:
    """The norm of the gradient of each block's down_proj, averaged over three seeds."""
    norms = torch.zeros(3, 16)
    for seed in range(3):
        model = make(kind, seed, n_layer=16)
        for part in model.modules():
            if xavier and isinstance(part, nn.Linear):
                nn.init.xavier_normal_(part.weight)
        _, loss = model(idx, targets)
        loss.backward()
        grads = [block.feed_forward.down_proj.weight.grad for block in model.blocks]
        norms[seed] = torch.stack([grad.norm() for grad in grads])
    return norms.mean(dim=0).tolist()


figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.7), sharey=True)
gradients = [
    {kind: first_gradients(kind, xavier) for kind in ("pre", "post")} for xavier in (False, True)
]
for panel, curves in zip(axes, gradients, strict=True):
    for kind, values in curves.items():
        panel.plot(range(1, 17), values, color=COLORS[kind], marker="o")
    panel.set(xlabel="block, of 16", xticks=(1, 4, 8, 12, 16))
axes[0].set(title="PyTorch's weights", ylabel="gradient norm", ylim=(0, None))
axes[1].set(title="Xavier weights")
for panel, curves in zip(axes, gradients, strict=True):
    label_ends(panel, curves)
plt.show()

# %% [markdown]
# With post-norm, the gradients are largest near the output. With pre-norm they do not grow: the
# skip path carries the gradient past every block, and each sublayer reads a normalized input. The
# final norm also divides them all by the stream's standard deviation, which grows with depth. Xiong
# et al. conclude that large gradients make post-norm unstable at a high learning rate, so it needs
# a **warm-up**: the learning rate starts near 0 and rises over the first steps.
#
# ## Training
#
# Train three blocks, as in the script, but for fewer steps.


# %%
def train(model: LanguageModel, count: int, learning_rate: float, warm_up: int = 1) -> list[float]:
    """Train on random batches; the learning rate rises linearly over the first steps."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    losses = []
    for step in range(count):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / warm_up)
        idx, targets = draw_batch(training, Config.block_size, Config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# The three models take about half a minute on two cores.
models = {kind: make(kind) for kind in ("none", "pre", "post")}
for kind, model in models.items():
    train(model, steps(1500), Config.learning_rate)
    print(f"{kind:4}  validation loss {exact_loss(model, validation):.3f}")
print("".join(generate(models["pre"], tokenizer, length=200)))

# %% [markdown]
# These are single runs, and two seeds differ by about 0.01, so they cannot rank pre-norm and
# post-norm. Over five seeds of the script, post-norm is worse by 0.006 ± 0.002 (standard error).
#
# ## Inside the trained models
#
# Left: the stream after training. Right: the learned scales of the pre-norm model, one dot per
# channel. All started at 1.

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.4, 3))
curves = deviations_by_depth(models)
for kind, values in curves.items():
    axes[0].plot(values, color=COLORS[kind], marker="o")
axes[0].set(xlabel="blocks so far", ylabel="standard deviation", xticks=range(4), ylim=(0, None))
label_ends(axes[0], curves)
norms = [(name, m) for name, m in models["pre"].named_modules() if isinstance(m, nn.LayerNorm)]
for i, (_, norm) in enumerate(norms):
    axes[1].plot(norm.weight.detach(), [i] * C, "o", color=BLUE, alpha=0.4)
axes[1].axvline(1, color=GRAY, linestyle="--")
labels = [name.removeprefix("blocks.").replace("_norm", "").replace("_", "-") for name, _ in norms]
axes[1].set_yticks(range(len(norms)), [label.replace(".", ", ") for label in labels])
axes[1].invert_yaxis()
axes[1].set(xlabel="scale", ylabel="block, norm before")
plt.show()

# %% [markdown]
# Training makes the sublayers' outputs larger, so the stream ends larger than before. Only "none"
# passes this growth on to its sublayers. Most scales have grown, especially in the final norm,
# which makes the logits larger and the predictions more confident.
#
# ### Exercise 3 · Fold scale and shift away
#
# In a pre-norm block a linear layer follows each norm. After training, that layer can absorb scale
# and shift. Return `weight` and `bias` so that `F.linear(x_hat, weight, bias)` equals
# `linear(norm(x))`, where `x_hat` has no scale and shift. A linear layer without a bias, such as
# `qkv_proj`, gets one.


# %% tags=["exercise"]
def fold(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = ...
    bias = ...
    return weight, bias


# %% tags=["check"]
@check
def exercise_3() -> None:
    torch.manual_seed(1)
    norm, linear, x = nn.LayerNorm(6), nn.Linear(6, 6), torch.randn(4, 6)
    nn.init.uniform_(norm.weight, 0.5, 2)
    x_hat, wanted = F.layer_norm(x, (6,)), linear(norm(x))  # (B, C) each
    weight, bias = map(given, fold(norm, linear))
    assert torch.equal(wanted, linear(norm(x))), "leave norm and linear as they were"
    assert tuple(weight.shape) == (6, 6), f"weight has the shape {tuple(weight.shape)}, not (6, 6)"
    outputs_scaled = torch.allclose(weight, linear.weight * norm.weight[:, None])
    assert not outputs_scaled, "this scales the outputs of linear; the norm scales its inputs"
    off = (F.linear(x_hat, weight, bias) - wanted).abs().max()
    assert off < 1e-4, f"with a shift of 0 the results differ by up to {off:.2f}"
    nn.init.uniform_(norm.bias, -1, 1)
    off = (F.linear(x_hat, *fold(norm, linear)) - linear(norm(x))).abs().max()
    assert off < 1e-4, f"with a shift the results differ by {off:.2f}: which path does it take?"
    linear.bias = None
    off = (F.linear(x_hat, *fold(norm, linear)) - linear(norm(x))).abs().max()
    assert off < 1e-4, f"for a linear layer without a bias the results differ by {off:.2f}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def fold(norm, linear):
#     weight = linear.weight * norm.weight  # scales the columns, one per input channel
#     bias = linear.weight @ norm.bias
#     if linear.bias is not None:
#         bias = bias + linear.bias
#     return weight, bias
# ```
#
# </details>
#
# ## Break it: thirty times the learning rate
#
# Train six blocks at a learning rate of 0.03 instead of 0.001. Without norms, the loss starts near
# 5.
#
# **Predict before you run.** What is the highest loss that "none" reaches in 200 steps? Give a
# power of ten: 1 for 10, 2 for 100.

# %%
guess = ...  # a number

# %% tags=["prediction"]
# This takes about 5 seconds on two cores; the next cell takes about 10.
six = {kind: make(kind, n_layer=6) for kind in ("none", "pre")}
high = {kind: train(model, steps(200), 0.03) for kind, model in six.items()}
reveal(guess, math.log10(max(high["none"])), within=2)

# %%
lower = {kind: train(make(kind, n_layer=6), steps(300), 0.01) for kind in ("pre", "post")}
lower["post, warm-up"] = train(make("post", n_layer=6), steps(300), 0.01, warm_up=steps(200))
frequencies = torch.bincount(training, minlength=V) / len(training)  # (V)
unigram = -torch.xlogy(frequencies, frequencies).sum().item()
window = 10 if steps(300) > 10 else 1
figure, axes = plt.subplots(1, 2, figsize=(7.4, 3))
for panel, runs, rate in ((axes[0], high, 0.03), (axes[1], lower, 0.01)):
    panel.set(title=f"learning rate {rate}", xlabel="training step")
    smooth = {}
    for kind, losses in runs.items():
        smooth[kind] = torch.tensor(losses).unfold(0, window, 1).mean(dim=1).tolist()
        panel.plot(range(window, len(losses) + 1), smooth[kind], color=COLORS[kind])
    if runs is high:
        panel.set(yscale="log", ylabel=f"loss, mean of {window} steps\n(nats per character)")
    label_ends(panel, smooth)
axes[1].axhline(unigram, color="black", linestyle="--", linewidth=1)
blended = axes[1].get_yaxis_transform()  # x from 0 to 1 across the axes, y as in the data
label = "character\nfrequencies only"  # above the curve of post-norm, right of the others
axes[1].text(0.98, unigram + 0.15, label, ha="right", transform=blended)
plt.show()
for kind, values in deviations_by_depth(six).items():
    print(f"{kind:4}  learning rate 0.03: standard deviation after block 6 is {values[-1]:.2g}")

# %% [markdown]
# - **Left.** Without norms, each sublayer amplifies values that earlier ones made too large. With
#   pre-norm the stream has grown too, but every sublayer reads it normalized.
# - **Right** (one seed). Without a warm-up, post-norm stays near character frequencies alone. With
#   one it learns; pre-norm needs none here. AdamW divides each gradient by its own RMS, so the size
#   of the first gradients is not the whole explanation.
#
# ### Exercise 4 · RMSNorm
#
# **RMSNorm** (Zhang & Sennrich, 2019) does not subtract the mean and has no shift. It divides by
# the root mean square:
#
# $$y_c = w_c \, \frac{x_c}{\sqrt{\frac{1}{C} \sum_i x_i^2 + \varepsilon}}$$


# %% tags=["exercise"]
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Divide by the root mean square of the last dimension, then apply the scale."""
    return ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    torch.manual_seed(1)
    x, weight, ones = 2 * torch.randn(3, 4, 8) + 1, torch.rand(8) + 0.5, torch.ones(8)
    plain = given(rms_norm(x, ones))
    assert plain.shape == x.shape, f"the shape is {tuple(plain.shape)}, not {tuple(x.shape)}"
    assert plain.mean(dim=-1).abs().max() > 1e-3, "the mean is 0: this norm does not subtract it"
    rms = plain[0, 0].square().mean().sqrt()
    assert (rms - 1).abs() < 1e-3, f"the first position's root mean square is {rms:.2f}, not 1"
    assert rms_norm(torch.zeros(1, 8), ones).isfinite().all(), "a vector of zeros gives NaN"
    small = x / 1000
    same = torch.allclose(rms_norm(small, ones), F.rms_norm(small, (8,), ones, 1e-5), atol=1e-4)
    assert same, "it is off where the mean square is as small as ε: look at where you add ε"
    same = torch.allclose(rms_norm(x, weight), F.rms_norm(x, (8,), weight, 1e-5), atol=1e-5)
    assert same, "it is right without a scale, but not with one"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rms_norm(x, weight, eps=1e-5):
#     mean_square = x.square().mean(dim=-1, keepdim=True)
#     return weight * x / (mean_square + eps).sqrt()
# ```
#
# </details>
#
# ## Teach it to add
#
# This exercise is from the lecture: train the model on sums of two numbers below 100, and test it
# on unseen sums.
#
# ### Exercise 5 · A fair split
#
# `a` and `b` hold one number per sum. Return, for each sum, whether it is held out: `True` for
# about a tenth. Use `chance[i, j]`, a fixed random number for each pair. A held-out `12+34` is not
# unseen if training contains `34+12`.


# %% tags=["exercise"]
chance = torch.rand(100, 100, generator=torch.Generator().manual_seed(1))  # each from 0 to 1


def held_out(a: Tensor, b: Tensor) -> Tensor:
    """For each sum a + b, whether it is held out."""
    return ...


# %% tags=["check"]
@check
def exercise_5() -> None:
    a, b = torch.cartesian_prod(torch.arange(100), torch.arange(100)).T  # (N) each
    unseen = given(held_out(a, b))
    assert unseen.dtype == torch.bool, f"the dtype is {unseen.dtype}, not torch.bool"
    assert unseen.shape == a.shape, f"the shape is {tuple(unseen.shape)}, not {tuple(a.shape)}"
    part = unseen.float().mean()
    assert 0.08 < part < 0.12, f"{part:.0%} of the sums are held out, not about 10%"
    leaked = unseen & ~held_out(b, a)
    assert not leaked.any(), f"{leaked.sum()} held-out sums have their mirror image in training"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def held_out(a, b):
#     return chance[torch.minimum(a, b), torch.maximum(a, b)] < 0.1
# ```
#
# </details>
#
# ### Exercise 6 · Sums as text
#
# Write 7 + 5 = 12 as `07+05=210`: two digits per number and three for the result, **reversed**
# unless `reverse` is false. Return `idx` and `targets`, shifted by one. The loss must count only
# the result, so replace the other targets with -100, which `F.cross_entropy` ignores.
#
# Why reversed? You add from the last digit and carry to the left. In that order, each digit needs
# one column and a carry; in the usual order, the first digit already needs every carry.


# %% tags=["exercise"]
digits = Tokenizer("0123456789+=")


def addition_batch(a: Tensor, b: Tensor, reverse: bool = True) -> tuple[Tensor, Tensor]:
    """The texts' idx and targets, (N, 8) each, with -100 for what belongs to the question."""
    idx = ...
    targets = ...
    return idx, targets


# %% tags=["check"]
@check
def exercise_6() -> None:
    a, b = torch.tensor([12, 7, 99]), torch.tensor([34, 5, 1])
    idx, targets = map(given, addition_batch(a, b))
    shapes = tuple(idx.shape), tuple(targets.shape)
    assert shapes == ((3, 8), (3, 8)), f"idx and targets have the shapes {shapes}, not (3, 8) each"
    read = [digits.decode(row) for row in idx.tolist()]
    assert read[1][:6] == "07+05=", f"the second question is {read[1][:6]!r}, not '07+05='"
    assert read[0][6:] != "04", "the digits of the result are not reversed"
    assert [each[6:] for each in read] == ["64", "21", "00"], f"idx decodes to {read}"
    asked = (targets != -100).int()  # (B, T)
    first = int(asked[0].argmax())
    assert first == 5, f"the first target that counts is at position {first}: what does = predict?"
    assert asked.sum() == 9, f"{asked.sum()} targets count in all, not the 9 digits of the results"
    answers = [digits.decode(row) for row in targets[:, 5:].tolist()]
    assert answers == ["640", "210", "001"], f"the targets of the results decode to {answers}"
    usual = digits.decode(addition_batch(a, b, reverse=False)[1][1, 5:].tolist())
    assert usual == "012", f"with reverse=False the targets of the second result are {usual!r}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def addition_batch(a, b, reverse=True):
#     rows = []
#     for x, y in zip(a.tolist(), b.tolist(), strict=True):
#         result = f"{x + y:03}"
#         text = f"{x:02}+{y:02}=" + (result[::-1] if reverse else result)
#         rows.append(digits.encode(text))
#     tokens = torch.tensor(rows)
#     idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
#     targets[:, :5] = -100
#     return idx, targets
# ```
#
# </details>


# %%
# Once both exercises are solved, this trains a model for each order (20 seconds on two cores).
def train_adder(reverse: bool) -> None:
    a, b = torch.cartesian_prod(torch.arange(100), torch.arange(100)).T  # (N) each
    idx, targets = addition_batch(a, b, reverse)  # (N, T) each
    unseen = held_out(a, b)  # (N)
    seen = (~unseen).nonzero().flatten()
    torch.manual_seed(1)
    model = Model(Config(vocab_size=len(digits.vocabulary)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for step in range(1, steps(1000) + 1):
        rows = seen[torch.randint(len(seen), (64,))]  # (B)
        logits, loss = model(idx[rows], targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % steps(250) == 0:
            right = answers_right(model, idx, targets)
            parts = f"{right[~unseen].mean():.1%} in training, {right[unseen].mean():.1%} held out"
            print(f"{'reversed' if reverse else 'usual':8}  step {step:4}: right on {parts}")


@torch.no_grad()
def answers_right(model: LanguageModel, idx: Tensor, targets: Tensor) -> Tensor:
    """For each sum, 1 if all three digits are right, written one after the other."""
    written = idx[:, :6]  # the question, up to the equals sign
    for _ in range(3):
        logits, _ = model(written)  # (N, T, V)
        written = torch.cat([written, logits[:, -1:].argmax(dim=-1)], dim=1)
    return (written[:, 6:] == targets[:, 5:]).all(dim=1).float()  # (N)


one = torch.tensor([1])
if held_out(one, one) is ... or ... in addition_batch(one, one):
    print("Solve exercises 5 and 6 first, then run this cell.")
else:
    for reverse in (True, False):
        train_adder(reverse)

# %% [markdown]
# ## The script
#
# `git diff --no-index residual.py layer_norm.py` shows the whole change.
#
# ## Quiz
#
# **1.** You multiply a position's vector by 10. What happens to the output of LayerNorm?
#
# <details><summary>Answer</summary>
#
# Almost nothing, because mean and standard deviation grow by the same factor. Only ε does not.
#
# </details>
#
# **2.** A causal model with BatchNorm reaches a suspiciously low training loss. Why could that be?
#
# <details><summary>Answer</summary>
#
# In training mode the averages include later positions and leak the characters to predict. In eval
# mode they do not.
#
# </details>
#
# **3.** Why does pre-norm, unlike post-norm, need a final norm before `lm_head`?
#
# <details><summary>Answer</summary>
#
# With pre-norm, no norm has been applied to the stream itself. With post-norm, the last block ends
# with one.
#
# </details>
#
# **4.** Which parts of LayerNorm can the next linear layer absorb after training?
#
# <details><summary>Answer</summary>
#
# Scale and shift. Mean and standard deviation depend on the input.
#
# </details>
#
# **5.** A post-norm model stays at the loss of the character frequencies. What do you try first?
#
# <details><summary>Answer</summary>
#
# A warm-up of the learning rate, a lower learning rate, or pre-norm.
#
# </details>

# %% [markdown]
# ## Papers
#
# - Ba, Kiros & Hinton (2016), [Layer Normalization](https://arxiv.org/abs/1607.06450)
# - Ioffe & Szegedy (2015), [Batch Normalization](https://arxiv.org/abs/1502.03167)
# - Xiong et al. (2020),
#   [On Layer Normalization in the Transformer Architecture](https://arxiv.org/abs/2002.04745)
# - Zhang & Sennrich (2019),
#   [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467)
#
# **Next →** [07_gpt](07_gpt.ipynb)
