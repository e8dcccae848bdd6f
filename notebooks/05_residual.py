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
# **Goal:** stack blocks of attention and feed-forward, and find out why a deep stack trains so much
# better when each sublayer *adds* its output to its input. Allow 45 minutes to read and run, plus
# one to two hours for the exercises; you can skip the challenge.
#
# ![The model: three blocks, each with two skip connections](../results/diagrams/residual.svg)
#
# `feed_forward.py` reaches a loss of about 2.20 nats per character. Three blocks with skip
# connections reach about 2.08; without them, they end near 2.29, worse than where we started.

# %%
import sys

sys.path.insert(0, "..")

from dataclasses import dataclass

import feed_forward
from common import LanguageModel, Tokenizer, draw_batch
from feed_forward import FeedForward, MultiHeadAttention
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GRAY, GREEN, ORANGE, PINK, check, given, plt, reveal, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

corpus = open_corpus(None)
training = corpus.train
validation = corpus.validation[: len(corpus.validation) // 4]  # a quarter: many models to evaluate
tokenizer = Tokenizer(corpus.vocabulary)
V = len(corpus.vocabulary)

# %% [markdown]
# ## Replace or add
#
# A layer $f$ usually replaces its input: the next layer sees only $f(x)$. A **skip connection**
# carries the input past the layer and adds it: $x + f(x)$. Here are both, with small weights.

# %%
x = torch.tensor([1.0, -2.0, 3.0])
weight = torch.tensor([[0.1, 0.0, 0.1], [0.0, 0.1, 0.0], [0.1, -0.1, 0.0]])
replaced, added = x, x
for layer in (1, 2):
    replaced = weight @ replaced
    added = added + weight @ added
    print(f"after layer {layer}:  replaced {replaced.numpy().round(3)}", end="")
    print(f"  added {added.numpy().round(2)}")

# %% [markdown]
# After two layers, almost nothing is left of the replaced vector. The other one still resembles its
# input. A vector that is passed along and added to is called the **residual stream**.
#
# A **block** has two **sublayers**, attention and feed-forward. Each gets its own skip connection.
#
# ### Exercise 1: a block
#
# Write the forward pass of a block, given its two sublayers as functions.


# %% tags=["exercise"]
def block_forward(x: Tensor, attention: nn.Module, feed_forward: nn.Module) -> Tensor:
    """The block's output: first attention, then feed-forward, each with a skip connection."""
    ...  # the stream after attention
    return ...  # the stream after feed-forward


# %% tags=["check"]
@check
def exercise_1() -> None:
    one = torch.ones(1)
    y = given(block_forward(one, lambda x: 10 * x, lambda x: 100 * x)).item()
    hints = {
        1000: "no input is carried past anything",
        1001: "there is a single skip connection; a block has two",
        1010: "the input of attention is lost",
        1011: "feed-forward does not read what is in the stream after attention",
        1100: "the input of feed-forward is lost",
        1101: "what attention wrote is lost",
        111: "feed-forward cannot see what attention has found out",
        1112: "the block's input is counted twice",
    }
    hint = hints.get(round(y), "draw the two sublayers with their arrows, as in the diagram")
    assert round(y) == 1111, f"with 10x and 100x as sublayers, 1 becomes {y:g}, not 1111: {hint}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def block_forward(x, attention, feed_forward):
#     after_attention = x + attention(x)
#     after_feed_forward = after_attention + feed_forward(after_attention)
#     return after_feed_forward
# ```
#
# </details>
#
# ## The model
#
# Attention and feed-forward come from `feed_forward.py`. The configuration gets two new fields;
# `residual=False` leaves out the skip connections.


# %%
@dataclass
class Config(feed_forward.Config):
    n_layer: int = 3  # number of blocks
    residual: bool = True  # skip connections around attention and feed-forward


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
# A block's output has the shape of its input, `(B, T, C)`, so blocks can be stacked with
# `nn.Sequential`. Skip connections add no parameters.


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
# ## Depth, with and without skip connections
#
# Train six models: one, three and six blocks, with and without skip connections. All use the same
# seed and batches.
#
# **Predict before you run:** without skip connections, one block ends near 2.4. Where do six blocks
# end? (A model that knows only how frequent each character is would have a loss of about 3.3.)


# %%
def train(model: Model, count: int, seed: int = 1) -> float:
    """Train for `count` steps and return the validation loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(count):
        idx, targets = draw_batch(training, model.block_size, 32, generator)
        _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return exact_loss(model, validation)


# %%
guess = ...  # nats per character

# %% tags=["prediction"]
# This takes about 40 seconds on two cores.
depths, trained, loss_of = (1, 3, 6), {}, {}
for residual in (True, False):
    for n_layer in depths:
        torch.manual_seed(1)
        model = Model(Config(vocab_size=V, n_layer=n_layer, residual=residual))
        loss_of[residual, n_layer] = train(model, steps(1000))
        trained[residual, n_layer] = model
reveal(guess, loss_of[False, 6], within=0.3)

# %%
counts = torch.bincount(training, minlength=V) + 1
frequency_loss = -(counts / counts.sum()).log()[validation].mean().item()  # no context at all
figure, axes = plt.subplots(figsize=(7, 3.4))
print("blocks   ", *(f"{n_layer:5}" for n_layer in depths))
for residual, color, label in ((True, BLUE, "skips"), (False, ORANGE, "no skips")):
    values = [loss_of[residual, n_layer] for n_layer in depths]
    axes.plot(depths, values, color=color, marker="o")
    axes.text(6.15, values[-1], label, color=color, va="center")
    print(f"{label:9}", *(f"{value:.3f}" for value in values))
axes.axhline(frequency_loss, color=GRAY, linestyle="--")
axes.text(1, frequency_loss - 0.02, "character frequencies only", color=GRAY, va="top")
axes.set_xticks(depths)
axes.set(xlabel="blocks", ylabel="validation loss (nats per character)")
plt.show()

# %% [markdown]
# With skip connections, the loss falls with depth (one seed; the step from three to six blocks is
# small). Without them it rises: six blocks end closer to the character frequencies than to a single
# block.
#
# ## The direct path of the gradient
#
# Compare the derivatives of both kinds of layer:
#
# $$\frac{d}{dx}\, f(x) = f'(x) \qquad \frac{d}{dx}\, \bigl(x + f(x)\bigr) = 1 + f'(x)$$
#
# The 1 is a direct path around $f$. A stack multiplies the derivatives of its layers. With twelve
# sublayers of slope 0.1:

# %%
for residual in (False, True):
    start = x = torch.tensor(1.0, requires_grad=True)
    for _ in range(12):
        x = x + 0.1 * x if residual else 0.1 * x
    x.backward()
    print(f"residual={residual!s:5}  gradient at the input: {start.grad.item():.3g}")

# %% [markdown]
# These are $0.1^{12}$ and $1.1^{12}$. Multiply out two layers to see the paths:
#
# $$(1 + f_1')(1 + f_2') = 1 + f_1' + f_2' + f_1' f_2'$$
#
# The gradient goes around both layers, through one of them, or through both. Without skip
# connections only the last path exists.
#
# ### Exercise 2: the gradient by hand
#
# For vectors, slopes become matrices and the 1 becomes the identity. Going back through $Wx$
# multiplies the gradient by $W^\top$. If a value is used in several places, its gradients add up.
#
# The sublayer is a small MLP, $f(x) = W_2\, \mathrm{relu}(W_1 x)$. Given `upstream`, the gradient
# at $y = x + f(x)$, compute the gradient at $x$ without autograd.


# %% tags=["exercise"]
def gradient_at_input(x: Tensor, w1: Tensor, w2: Tensor, upstream: Tensor) -> Tensor:
    """dL/dx for y = x + w2 @ relu(w1 @ x)."""
    ...  # the gradient at the ReLU's output
    ...  # the gradient at the ReLU's input
    return ...  # the gradient at x


# %% tags=["check"]
@check
def exercise_2() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((4,), (6, 4), (4, 6), (4,))
    x, w1, w2, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    found = given(gradient_at_input(x, w1, w2, upstream))
    assert found.shape == x.shape, f"x has shape (4,), your gradient {tuple(found.shape)}"
    x.requires_grad_()
    (x + w2 @ F.relu(w1 @ x)).backward(upstream)
    wrong = {
        "one of the two paths is missing": x.grad - upstream,
        "this is the direct path alone": upstream,
        "not every hidden unit passes the gradient on": upstream + w1.T @ w2.T @ upstream,
    }
    for hint, value in wrong.items():
        assert not torch.allclose(found, value), hint
    error = (found - x.grad).abs().max().item()
    assert error < 1e-9, f"off by {error:.2g} from autograd: go back through the layers one by one"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gradient_at_input(x, w1, w2, upstream):
#     at_hidden = w2.T @ upstream
#     at_hidden_input = at_hidden * (w1 @ x > 0)
#     return upstream + w1.T @ at_hidden_input
# ```
#
# </details>
#
# ## Why the gradient vanishes here
#
# Where do small slopes come from? PyTorch initializes the weights of `nn.Linear` with variance
# $1/(3 \cdot \text{fan\_in})$, where **fan_in** is the number of inputs. An output sums fan_in
# products, so its variance is a third of the input's. ReLU zeroes half of the values, which halves
# the mean square. In each block, a signal passes through four linear layers and one ReLU:

# %%
torch.manual_seed(1)
C = 32
layers = {
    "value projection": nn.Linear(C, C, bias=False),
    "out_proj": nn.Linear(C, C, bias=False),
    "up_proj": nn.Linear(C, 4 * C, bias=False),
    "ReLU": nn.ReLU(),
    "down_proj": nn.Linear(4 * C, C, bias=False),
}
x, expected = torch.randn(1000, C), 1.0  # 1,000 vectors with standard deviation 1
for name, layer in layers.items():
    x = layer(x)
    expected *= (1 / 2 if name == "ReLU" else 1 / 3) ** 0.5
    print(f"after {name:16}  RMS {x.square().mean().sqrt():.3f}  expected {expected:.3f}")

# %% [markdown]
# The expected factor per block is $(1/\sqrt3)^4 / \sqrt2 \approx 0.08$. The gradient goes back
# through the same matrices and shrinks by about the same factor.
#
# **Predict before you run:** in a stack of twelve blocks without skip connections, the gradient
# crosses eleven blocks on its way from the last to the first. By what power of ten does it shrink?


# %%
def gradient_by_block(model: Model) -> Tensor:
    """The norm of the gradient of each block's parameters, on one batch."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    idx, targets = draw_batch(training, model.block_size, 256, generator)
    _, loss = model(idx, targets)
    loss.backward()
    return torch.stack(
        [torch.cat([p.grad.flatten() for p in block.parameters()]).norm() for block in model.blocks]
    )


torch.manual_seed(1)
default_gradient = gradient_by_block(Model(Config(vocab_size=V, n_layer=12, residual=False)))

# %%
guess = ...  # such as -3 for a thousandth

# %% tags=["prediction"]
reveal(guess, (default_gradient[0] / default_gradient[-1]).log10(), within=1.5)

# %% [markdown]
# ### Exercise 3: Kaiming initialization
#
# **Kaiming initialization** (He et al. 2015, *Rectifiers*) chooses the variance so that the signal
# keeps its RMS: $2/\text{fan\_in}$ for a layer that reads the output of a ReLU, $1/\text{fan\_in}$
# otherwise, and biases of 0. Initialize the four linear layers of each block in this way.


# %% tags=["exercise"]
@torch.no_grad()
def kaiming(model: Model) -> Model:
    """Initialize the four linear layers of each block in model.blocks; return the model."""
    ...  # qkv_proj and out_proj of block.attention, up_proj and down_proj of block.feed_forward
    ...  # sample each weight with the right variance; set the bias to 0 where there is one
    return ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    torch.manual_seed(1)
    model = given(kaiming(Model(Config(vocab_size=V, n_layer=12, residual=False))))
    gradient = gradient_by_block(model)
    ratio = (gradient[0] / gradient[-1]).item()
    assert 0.1 < ratio < 10, (
        f"the first block's gradient is {ratio:.2g} times the last block's, which is not within "
        "10x: does each block, ReLU included, keep the RMS?"
    )
    for name, layer in model.blocks[-1].named_modules():
        if isinstance(layer, nn.Linear):
            rms = 2**0.5 if name == "feed_forward.down_proj" else 1.0
            found = (layer.weight.var() * layer.in_features).sqrt().item()
            assert abs(found / rms - 1) < 0.1, f"{name} starts with the wrong variance"
            assert layer.bias is None or not layer.bias.any(), f"{name}.bias is not 0"
    print(f"first block / last block: {ratio:.2f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# @torch.no_grad()
# def kaiming(model):
#     for block in model.blocks:
#         attention, mlp = block.attention, block.feed_forward
#         for layer in (attention.qkv_proj, attention.out_proj, mlp.up_proj, mlp.down_proj):
#             variance = (2 if layer is mlp.down_proj else 1) / layer.in_features
#             layer.weight.normal_(0, variance**0.5)
#             if layer.bias is not None:
#                 layer.bias.zero_()
#     return model
# ```
#
# </details>
#
# PyTorch has this as `kaiming_normal_`. Here are all three stacks.

# %%
KINDS = {"skips": BLUE, "no skips, default": ORANGE, "no skips, Kaiming": GREEN}


def new_model(kind: str, n_layer: int, seed: int = 1) -> Model:
    torch.manual_seed(seed)
    model = Model(Config(vocab_size=V, n_layer=n_layer, residual=kind == "skips"))
    if kind == "no skips, Kaiming":
        for name, layer in model.blocks.named_modules():
            if isinstance(layer, nn.Linear):
                after = "relu" if name.endswith("down_proj") else "linear"
                nn.init.kaiming_normal_(layer.weight, nonlinearity=after)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return model


figure, axes = plt.subplots(figsize=(7.4, 3.4))
for kind, color in KINDS.items():
    gradient = gradient_by_block(new_model(kind, 12))
    axes.semilogy(range(1, 13), gradient, color=color, marker="o")
    per_block = (gradient[0] / gradient[-1]).item() ** (1 / 11)
    print(f"{kind:26} first block {gradient[0]:.1e}, last {gradient[-1]:.1e}", end="")
    print(f", mean factor per block {per_block:.2f}")
axes.text(8.2, default_gradient[7], "no skips, default", color=ORANGE, va="top")
axes.text(12.3, gradient[-1] * 2, "no skips,\nKaiming", color=GREEN)
axes.text(12.3, gradient[-1] / 2, "skips", color=BLUE, va="top")
axes.set_xticks(range(1, 13))
axes.set(xlabel="block", ylabel="gradient norm")
plt.show()

# %% [markdown]
# With the default initialization, the mean factor per block is the predicted one. With Kaiming
# initialization, the gradient in the first block is about as large as in the last, without any skip
# connection. So the gradient vanishes here because of the default initialization.
#
# AdamW rescales small gradients, as long as they are well above its ε of 1e-8; in the first blocks
# of this stack they are not. On the way forward, the part of the signal that depends on the input
# shrinks like the gradient, and nothing rescales it. Only the biases keep the RMS up.
#
# Does the stack with Kaiming initialization train as well as the one with skip connections? Train
# all three briefly, with three blocks and five seeds. Runs with the same seed see the same batches.
#
# **Predict before you run:** what percentage of the difference between the default stack and the
# stack with skip connections does Kaiming initialization remove?

# %%
guess = ...  # percent

# %% tags=["prediction"]
# This takes about 40 seconds on two cores.
seeds = range(1, 6)
losses = {
    kind: torch.tensor([train(new_model(kind, 3, seed), steps(500), seed) for seed in seeds])
    for kind in KINDS
}
skips, default, corrected = (each.mean().item() for each in losses.values())
reveal(guess, 100 * (default - corrected) / (default - skips), within=10)


# %%
def show_losses(losses: dict[str, Tensor]) -> None:
    """One point per seed, one row per kind of model."""
    figure, axes = plt.subplots(figsize=(7.4, 0.6 + 0.5 * len(losses)))
    for row, (kind, values) in enumerate(losses.items()):
        axes.plot(values, [row] * len(values), "o", color=KINDS.get(kind, PINK), alpha=0.7)
        print(
            f"{kind:{max(map(len, losses))}}",
            *(f"{loss:.3f}" for loss in values),
            f"  mean {values.mean():.3f}",
        )
    axes.set_yticks(range(len(losses)), losses)
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set(xlabel="validation loss (nats per character), one point per seed")
    plt.show()


show_losses(losses)

# %% [markdown]
# Kaiming initialization removes more than half of the difference, but not all: with every seed, the
# stack with skip connections is ahead. After 5,000 steps (not shown; two seeds), about half
# remains, and the stack matches a single block. He et al. (2015, *ResNet*) also saw deep stacks
# without skip connections train worse although their gradients had healthy norms. They considered
# vanishing gradients unlikely to be the cause.
#
# ### Challenge · Exercise 4: a paired comparison
#
# Is the remaining difference more than chance? `a[i]` and `b[i]` are losses with the same seed.
# Compare pair by pair: take the mean $m$ of the differences `b - a`. Five runs are few, so this
# mean is itself a little random. Its **standard error** $s = \text{std} / \sqrt{n}$ estimates by
# how much. The interval $m \pm 2.776\, s$ contains the true mean in 95 of 100 such experiments;
# 2.776 is Student's $t$ for five runs, from a table.


# %% tags=["exercise"]
def paired_interval(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """The mean difference b - a, and the lower and upper end of its 95% interval."""
    ...  # the differences and their mean
    ...  # the standard error
    return ...  # mean, lower end, upper end


# %% tags=["check"]
@check
def exercise_4() -> None:
    a = torch.tensor([2.0, 2.1, 2.2, 2.3, 2.4])
    b = a + torch.tensor([0.09, 0.11, 0.10, 0.12, 0.08])
    mean, low, high = (float(each) for each in given(paired_interval(a, b)))
    assert abs(mean - 0.1) < 1e-5, f"b is 0.1 above a on average; your mean is {mean:.3f}"
    assert abs((low + high) / 2 - mean) < 1e-5, "the mean must be in the middle of the interval"
    width, expected = high - low, 0.0392637
    hints = {
        5**0.5: "this is for one difference, not for the mean of five",
        0.8**0.5: "the standard deviation of a sample divides by n - 1",
        1 / 2.776: "this is the standard error, not yet the 95% interval",
        1.96 / 2.776: "1.96 is for many runs, not for five",
    }
    for factor, hint in hints.items():
        assert abs(width - factor * expected) > 1e-4, hint
    assert width < 2 * expected, (
        f"{width:.3f} wide: the seed's own effect should cancel in each pair"
    )
    assert abs(width - expected) < 1e-4, f"the interval is {width:.4f} wide; check each factor"
    for kind in list(KINDS)[1:]:
        mean, low, high = paired_interval(losses["skips"], losses[kind])
        print(f"{kind:25} {mean:+.3f} nats against skips, 95% interval {low:+.3f} to {high:+.3f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def paired_interval(a, b):
#     differences = b - a
#     mean = differences.mean().item()
#     standard_error = differences.std().item() / len(differences) ** 0.5
#     margin = 2.776 * standard_error
#     return mean, mean - margin, mean + margin
# ```
#
# An interval that excludes 0 shows a difference.
#
# </details>
#
# ### What remains
#
# Attention returns a weighted average over positions. Without a skip connection, the average
# *replaces* each position's own vector. Measure how much the positions of a window still differ
# after each block, before training.


# %%
@torch.no_grad()
def position_differences(model: Model) -> list[float]:
    """RMS distance of a window's vectors from their mean: of the embedding, then of each block."""
    model = model.double()  # in float32, rounding would hide the smallest differences
    idx, _ = draw_batch(training, 8, 256, torch.Generator().manual_seed(1))
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(8))
    result = []
    for block in [nn.Identity(), *model.blocks]:
        x = block(x)
        result.append((x - x.mean(dim=1, keepdim=True)).square().mean().sqrt().item())
    return result


figure, axes = plt.subplots(figsize=(7.4, 3.4))
for kind, color in KINDS.items():
    values = position_differences(new_model(kind, 12))
    axes.semilogy(values, color=color, marker="o")
    axes.text(12.3, values[-1], kind.replace(", ", ",\n"), color=color, va="center")
axes.margins(y=0.1)
axes.set_xticks(range(13))
axes.set(xlabel="after block (0: the embedding)", ylabel="differences (RMS)")
plt.show()

# %% [markdown]
# Without skip connections, the positions become more alike with each block. With Kaiming
# initialization, this is **rank collapse** ([Dong et al. 2021](https://arxiv.org/abs/2103.03404)).
# If it is what hurts, skip connections around attention alone should help that stack, and those
# around feed-forward alone should not.


# %%
class Skip(nn.Module):
    def __init__(self, sublayer: nn.Module) -> None:
        super().__init__()
        self.sublayer = sublayer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sublayer(x)


def one_skip(around: str, seed: int) -> Model:
    model = new_model("no skips, Kaiming", 3, seed)
    for i, block in enumerate(model.blocks):
        pair = block.attention, block.feed_forward
        wrap = (Skip(pair[0]), pair[1]) if around == "attention" else (pair[0], Skip(pair[1]))
        model.blocks[i] = nn.Sequential(*wrap)
    return model


# The ten models take about half a minute on two cores.
partly = {
    f"Kaiming, {around} skips": torch.tensor(
        [train(one_skip(around, seed), steps(500), seed) for seed in seeds]
    )
    for around in ("feed-forward", "attention")
}
kaiming_only = "no skips, Kaiming"
show_losses({"skips": losses["skips"], kaiming_only: losses[kaiming_only]} | partly)

# %% [markdown]
# That is what happens: those around attention recover most of the remaining difference, though not
# all. So skip connections do two things here. They make up for the default initialization, and
# around attention they keep each position's own vector.
#
# ## The residual stream
#
# Between embedding and `lm_head`, sublayers only add to the residual stream. It works like a shared
# memory: a sublayer reads a position's whole vector and writes by adding. What others have written
# stays, unless a sublayer cancels it. Here is a stream of three channels with sublayers written by
# hand.

# %%
stream = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [2.0, 0.0, 0.0]])  # 3 positions


def attention(x: Tensor) -> Tensor:
    """Reads channel 0 of the previous position; writes to channel 1."""
    write = torch.zeros_like(x)
    write[1:, 1] = x[:-1, 0]
    return write


def mlp(x: Tensor) -> Tensor:
    """Reads channels 0 and 1 of its own position; writes to channel 2."""
    write = torch.zeros_like(x)
    write[:, 2] = F.relu(x[:, 0] - x[:, 1])
    return write


print(f"embedding:\n{stream.numpy()}")
for sublayer in (attention, mlp):
    stream = stream + sublayer(stream)
    print(f"after {sublayer.__name__}:\n{stream.numpy()}")

# %% [markdown]
# The MLP could use what attention wrote, and the embedding is still there for later blocks. Now
# record what each sublayer of the trained six-block model writes:


# %%
@torch.no_grad()
def read_stream(model: Model, idx: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What the embedding and the sublayers write, and the stream after each; (B, T, C) each."""
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(idx.shape[1]))
    written, streams = [x], [x]
    for block in model.blocks:
        for sublayer in (block.attention, block.feed_forward):
            written.append(sublayer(x))
            x = x + written[-1]
            streams.append(x)
    return written, streams


model = trained[True, 6]
idx, targets = draw_batch(validation, 8, 2000, torch.Generator().manual_seed(1))
written, streams = read_stream(model, idx)
with torch.no_grad():
    difference = (model.lm_head(sum(written)) - model(idx)[0]).abs().max().item()
print(f"{len(written)} writes; lm_head of their sum gives the model's logits: {difference < 1e-3}")

# %%
names = ["embedding"] + [f"{sub} {i}" for i in range(1, 7) for sub in ("attention", "feed-forward")]
figure, axes = plt.subplots(figsize=(7.4, 3.8))
colors = [GRAY] + [BLUE, GREEN] * 6
rms = [[x.square().mean().sqrt().item() for x in each] for each in (written, streams)]
axes.bar(range(13), rms[0], color=colors)
axes.plot(rms[1], color=ORANGE, marker="o")
axes.text(8, rms[1][8] * 1.1, "stream so far", color=ORANGE, ha="right")
axes.text(1, rms[1][0] * 1.25, "bars: what is written")
axes.set_xticks(range(13), names, rotation=40, ha="right", rotation_mode="anchor")
axes.set(ylabel="RMS")
plt.show()

# %% [markdown]
# Each write is smaller than the stream that it is added to. After block 1, the stream grows.
# [The next notebook](06_layer_norm.ipynb) normalizes what a sublayer reads.
#
# ## The logit lens
#
# `lm_head` reads the stream at the end. It can also read it earlier, because the channels stay the
# same. This is the **logit lens**: what would the model predict if it stopped here?

# %%
with torch.no_grad():
    lens = [model.lm_head(x) for x in streams]  # (B, T, V) each
lens_losses = [F.cross_entropy(each.flatten(0, 1), targets.flatten()).item() for each in lens]
figure, axes = plt.subplots(figsize=(7.4, 3.6))
axes.plot(lens_losses, color=GRAY)
axes.scatter(range(13), lens_losses, color=colors, zorder=3, s=45)
axes.axhline(frequency_loss, color=GRAY, linestyle="--")
axes.text(12, frequency_loss + 0.05, "character frequencies only", color=GRAY, ha="right")
axes.set_xticks(range(13), names, rotation=40, ha="right", rotation_mode="anchor")
axes.set(ylabel="loss (nats per character)")
plt.show()

# %% [markdown]
# The loss falls with each sublayer. At first it is above the character frequencies: `lm_head` was
# trained only on the final stream. Of 16,000 predictions, this one improves most:

# %%
log_probability = [F.log_softmax(each, -1).gather(2, targets[..., None])[..., 0] for each in lens]
row, t = divmod((log_probability[-1] - log_probability[0]).argmax().item(), 8)  # improves most
print("context", "".join(visible(tokenizer.decode(idx[row, : t + 1].tolist()))), end="")
print(", next", *visible(tokenizer.decode([targets[row, t].item()])))
top = [F.softmax(each[row, t], dim=-1).topk(4) for each in lens]
figure, axes = plt.subplots(figsize=(7, 5))
image = axes.imshow(
    torch.stack([each.values for each in top]), aspect="auto", cmap="cividis", vmin=0
)
for depth, (values, ids) in enumerate(top):
    for i, character in enumerate(visible(tokenizer.decode(ids.tolist()))):
        ink = "white" if values[i] < 0.4 else "black"
        label = f"{character}  {values[i]:.2f}"
        axes.text(i, depth, label, color=ink, ha="center", va="center")
axes.set_yticks(range(13), names)
axes.set_xticks(range(4), ["1st", "2nd", "3rd", "4th"])
axes.set(xlabel="most probable next characters", ylabel="lm_head reads after")
figure.colorbar(image, label="probability")
plt.show()

# %% [markdown]
# In the saved run, the context ends with a capital letter. The middle blocks favor a second
# capital, the last ones a lowercase letter.
#
# ## The script
#
# `git diff --no-index feed_forward.py residual.py` shows the whole change, and
# `python residual.py --no-residual` trains without skip connections.
#
# ## Quiz
#
# **1.** How many skip connections does a model of six blocks have?
#
# <details><summary>Answer</summary>
#
# Twelve: one around each attention and one around each feed-forward.
#
# </details>
#
# **2.** Why must a sublayer return as many channels as it reads?
#
# <details><summary>Answer</summary>
#
# Its output is added to its input, so both need the same shape.
#
# </details>
#
# **3.** What does the 1 in $1 + f'(x)$ stand for?
#
# <details><summary>Answer</summary>
#
# The direct path: the gradient at the output reaches the input unchanged, whatever the weights of
# $f$ are.
#
# </details>
#
# **4.** A stack without skip connections has a vanishing gradient at initialization. Does that show
# that skip connections are needed to fix it?
#
# <details><summary>Answer</summary>
#
# No. Here the default initialization causes it, and Kaiming initialization removes it without a
# skip connection.
#
# </details>
#
# **5.** Why can `lm_head` read the stream after any block, although it was trained on the last one?
#
# <details><summary>Answer</summary>
#
# All blocks write to the same channels by addition.
#
# </details>

# %% [markdown]
# ## Papers
#
# - He et al., [Deep Residual Learning for Image Recognition](https://arxiv.org/abs/1512.03385)
#   (2015): ResNet, with batch normalization. See section 4.1.
# - He et al., [Delving Deep into Rectifiers](https://arxiv.org/abs/1502.01852) (2015): Kaiming
#   initialization.
# - Elhage et al., [A Mathematical Framework for Transformer
#   Circuits](https://transformer-circuits.pub/2021/framework/index.html) (2021): the residual
#   stream as a shared memory.
# - nostalgebraist, [interpreting GPT: the logit
#   lens](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens) (2020).

# %% [markdown]
# **Next →** [06_layer_norm](06_layer_norm.ipynb)
