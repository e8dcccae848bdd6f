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
# # 4 · Feed-forward
#
# Attention gathers information from earlier positions. The **feed-forward network**, a small MLP,
# then processes what each position has gathered. On Tiny Shakespeare, it lowers the validation loss
# from about 2.27 to about 2.20 nats per character.
#
# Allow about 45 minutes to read and run, plus one to two hours for the exercises.
#
# ![The model of feed_forward.py](../results/diagrams/feed_forward.svg)

# %%
import sys

sys.path.insert(0, "..")

from batched_attention import Config, MultiHeadAttention
from batched_attention import Model as AttentionModel
from common import LanguageModel, Tokenizer, draw_batch
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GRAY, ORANGE, check, given, heat_map, plt, reveal, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

# %%
corpus = open_corpus(None)
training, validation = corpus.train, corpus.validation
tokenizer = Tokenizer(corpus.vocabulary)
config = Config(vocab_size=len(corpus.vocabulary))
B, T, C, V = config.batch_size, config.block_size, config.n_embd, config.vocab_size
print(f"{len(training):,} characters to train on, {len(validation):,} for validation")
print(f"B = {B} sequences, T = {T} positions, C = {C} channels, V = {V} characters")

# %% [markdown]
# ## What an average cannot compute
#
# Attention mixes positions: each output is a weighted average of value vectors. The softmax that
# makes the weights is non-linear. But the values themselves pass only through averages and linear
# layers, `lm_head` included.
#
# With fixed attention weights, that is not enough even for a simple question: *is exactly one of
# the last two characters a vowel?* Let the value be 1 for a vowel and 0 otherwise. Attention with
# two equal weights computes the mean $m$.

# %%
pairs = ("th", "he", "er", "ea")
values = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # 1: a vowel
weights = torch.tensor([0.5, 0.5])  # attention weights
mean = values @ weights  # (4)
target = torch.tensor([0.0, 1.0, 1.0, 0.0])  # 1: exactly one vowel
for pair, m, wanted in zip(pairs, mean, target, strict=True):
    print(f"{pair}   mean {m:.1f}   exactly one vowel: {wanted:.0f}")

# %% [markdown]
# **Predict before you run.** A linear layer reads the mean and answers $a m + b$. Choose $a$ and
# $b$ for the smallest sum of squared errors over these four pairs. At $m = 0.5$, 1 is right. What
# does the layer answer?

# %%
guess = ...  # a number

# %% tags=["prediction"]
inputs = torch.stack([mean, torch.ones(4)], dim=1)  # (4, 2)
a, b = torch.linalg.lstsq(inputs, target[:, None]).solution.flatten()
reveal(guess, a * 0.5 + b, within=0.05)

# %% [markdown]
# The best line is flat: no line is low, then high, then low. One kink is enough. The **ReLU**,
# $\text{relu}(z) = \max(0, z)$, is the simplest **activation function**: a non-linear function that
# is applied to each value separately. With it, $2\,\text{relu}(m) - 4\,\text{relu}(m - 0.5)$
# is right for all four pairs.
#
# ## An MLP on tiny numbers
#
# This formula is a two-layer MLP. The linear layer `up_proj` turns one input into two **hidden
# units**, ReLU sets negative values to 0, and the linear layer `down_proj` combines them.

# %%
x = torch.tensor([[0.0], [0.5], [1.0]])  # (3, 1), the three possible means
up_weight, up_bias = torch.tensor([[1.0], [1.0]]), torch.tensor([0.0, -0.5])
down_weight = torch.tensor([[2.0, -4.0]])
before = F.linear(x, up_weight, up_bias)  # (3, 2)
hidden = F.relu(before)  # (3, 2)
output = F.linear(hidden, down_weight)  # (3, 1)
for row in zip(x, before, hidden, output, strict=True):
    m, z, h, y = (each.tolist() for each in row)
    print(f"m = {m[0]}   up_proj {z!s:12}   ReLU {h!s:11}   down_proj {y}")

grid = torch.linspace(0, 1, 101)[:, None]  # (101, 1)
mlp = F.linear(F.relu(F.linear(grid, up_weight, up_bias)), down_weight)  # (101, 1)
figure, axes = plt.subplots(figsize=(6.5, 3))
axes.plot(grid, a * grid + b, color=GRAY, linewidth=2)
axes.plot(grid, mlp, color=BLUE, linewidth=2)
axes.scatter(mean, target, color=ORANGE, s=60, zorder=3)
axes.text(1.03, a + b, "best line", color=GRAY, va="center")
axes.text(1.03, 0, "MLP", color=BLUE, va="center")
axes.text(0.53, 1.02, "right answers", color=ORANGE, va="center")
axes.set(xlabel="mean of the two values, m", ylabel="exactly one vowel", xlim=(-0.05, 1.25))
axes.set(xticks=[0, 0.5, 1], yticks=[0, 1], yticklabels=["no: 0", "yes: 1"])
plt.show()

# %% [markdown]
# ### Exercise 1 · Set the weights
#
# Choose weights by hand so that an MLP with two hidden units and no biases computes $|a - b|$ from
# the input $(a, b)$. Row $j$ of `up` holds the weights of hidden unit $j$.


# %% tags=["exercise"]
def distance_weights() -> tuple[list, list]:
    up = ...  # two rows of two numbers
    down = ...  # one row of two numbers
    return up, down


# %% tags=["check"]
@check
def exercise_1() -> None:
    up, down = (torch.tensor(given(each), dtype=torch.float32) for each in distance_weights())
    assert up.shape == (2, 2), f"up has the shape {tuple(up.shape)}, not (2, 2)"
    assert down.shape == (1, 2), f"down has the shape {tuple(down.shape)}, not (1, 2)"
    for a, b in ((3, 1), (1, 3), (2, 2), (-1, 4)):
        hidden = F.relu(torch.tensor([a, b]).float() @ up.T)  # (2)
        y = (hidden @ down.T).item()
        units = [round(each, 2) for each in hidden.tolist()]
        assert abs(y - abs(a - b)) < 1e-5, (
            f"a = {a}, b = {b}: hidden units {units}, output {y:.2f}, should be {abs(a - b)}"
        )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def distance_weights():
#     up = [[1, -1], [-1, 1]]
#     down = [[1, 1]]
#     return up, down
# ```
#
# One unit is active if $a > b$, the other if $b > a$.
#
# </details>
#
# ## The general code
#
# In the model each position has a vector of $C$ channels, and the MLP has $4C$ hidden units. The
# factor 4 is a convention that dates from the first transformer.
#
# $$\text{FeedForward}(x) = W_2 \, \text{relu}(W_1 x + b_1) + b_2$$


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
# The model gains two lines, both with `self.feed_forward`.


# %%
class Model(LanguageModel):
    """Predicts the next character from all characters so far in the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.attention(x)
        x = self.feed_forward(x)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# %%
torch.manual_seed(1)
model = Model(config)
idx, targets = draw_batch(training, T, B, torch.Generator().manual_seed(1))  # (B, T) each
with torch.no_grad():
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(T))  # (B, T, C)
    gathered = model.attention(x)  # (B, T, C)
    hidden = F.relu(model.feed_forward.up_proj(gathered))  # (B, T, 4*C)
    output = model.feed_forward.down_proj(hidden)  # (B, T, C)
for name, each in (("attention", gathered), ("up_proj, ReLU", hidden), ("down_proj", output)):
    print(f"{name:14} {tuple(each.shape)}")
print(f"{(hidden == 0).float().mean():.0%} of the hidden activations are 0")

# %% [markdown]
# ## The same MLP at each position
#
# The MLP is **position-wise**: the same weights process each position, independently of all other
# positions. `nn.Linear` acts on the last dimension only, and ReLU acts on single values. Test it:
# change the input at one position and see which outputs change. The plot shows the **RMS** (root
# mean square) of the change: the root of the mean of its squares.


# %%
@torch.no_grad()
def influence(layer: nn.Module, x: Tensor) -> Tensor:
    """RMS change of each position's output (columns) when one position's input changes (rows)."""
    generator = torch.Generator().manual_seed(1)
    changes = []
    for t in range(len(x)):
        changed = x.clone()  # (T, C)
        changed[t] += torch.randn(C, generator=generator)
        difference = layer(changed[None]) - layer(x[None])  # (1, T, C)
        changes.append(difference[0].square().mean(dim=-1).sqrt())  # (T)
    return torch.stack(changes)  # (T, T)


positions = [str(t) for t in range(T)]
figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.2))
for panel, name in zip(axes, ("attention", "feed_forward"), strict=True):
    change = influence(getattr(model, name), x[0])  # (T, T)
    unchanged = change == 0
    change = change.masked_fill(unchanged, float("nan"))
    heat_map(panel, change, positions, positions, f"model.{name}", bar="RMS change of output")
    panel.set(xlabel="position of the output", ylabel="position of the changed input")
plt.show()

# %% [markdown]
# Blank squares are outputs that do not change at all. Attention also carries a change to later
# positions; the MLP keeps it where it is. Attention communicates; the MLP computes.
#
# ## Two thirds of a block
#
# Attention and MLP together form one **block** of a transformer. Attention has four $C \times C$
# matrices: query, key, value and output projection.
#
# **Predict before you run.** What percentage of the block's parameters is in the MLP?

# %%
guess = ...  # percent

# %% tags=["prediction"]
sizes = {
    name: sum(each.numel() for each in module.parameters())
    for name, module in model.named_children()
}
block = sizes["attention"] + sizes["feed_forward"]
reveal(guess, 100 * sizes["feed_forward"] / block, within=5)

# %%
for name, size in sizes.items():
    print(f"{name:19} {size:6,} parameters")

# %% [markdown]
# Biases aside, the MLP's two matrices have $8C^2$ parameters and attention's four have $4C^2$. So
# the MLP is two thirds of a block, whatever $C$ is. In GPT-2 small, with $C = 768$, it has 4.7 M of
# a block's 7.1 M parameters.
#
# ## Training
#
# This is the usual loop, in a function because several models use it. A run of 5,000 steps takes
# about 10 seconds on two cores.


# %%
def learn(
    model: LanguageModel, count: int, seed: int = 1, halvings: int = 0
) -> list[tuple[int, float]]:
    """Train; return step and validation loss at the last step, half of it, a quarter, and so on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    marks = {count // 2**i for i in range(halvings + 1)}
    history = []
    for step in range(1, count + 1):
        idx, targets = draw_batch(training, T, B, generator)  # (B, T) each
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in marks:
            history.append((step, exact_loss(model, validation)))
    return history


# %%
relu_history = learn(model, steps(5000), halvings=4)
for step, loss in relu_history:
    print(f"step {step:5,}   validation loss {loss:.3f}")

# %% [markdown]
# ### Challenge · Exercise 2: the backward pass
#
# `loss.backward()` also goes through the MLP. Do that part by hand. The forward pass is
#
# $$z = x W_1^\top + b_1, \qquad h = \text{relu}(z), \qquad y = h W_2^\top + b_2,$$
#
# with one position in each of $N$ rows. `grad_y` is the gradient of the loss with respect to $y$.
# Start from it and work backward. Each gradient has the shape of its tensor.


# %% tags=["exercise"]
def mlp_backward(grad_y: Tensor, h: Tensor, z: Tensor, x: Tensor, W2: Tensor, W1: Tensor) -> tuple:
    """The gradients of x, W1, b1, W2 and b2."""
    # As in notebook 2: if Y = A @ B, then dA = dY @ Bᵀ and dB = Aᵀ @ dY. If a value is used in
    # several places, its gradients add up, so a bias gets the sum over the rows.
    grad_W2, grad_b2 = ..., ...
    ...  # back through down_proj and ReLU
    grad_W1, grad_b1 = ..., ...
    grad_x = ...
    return grad_x, grad_W1, grad_b1, grad_W2, grad_b2


# %% tags=["check"]
@check
def exercise_2() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (6, 3), "W1": (12, 3), "b1": (12,), "W2": (3, 12), "b2": (3,)}
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }
    x, W1, b1, W2, b2 = tensors.values()
    z = x @ W1.T + b1  # (6, 12)
    h = F.relu(z)  # (6, 12)
    y = h @ W2.T + b2  # (6, 3)
    grad_y = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y.backward(grad_y)
    with torch.no_grad():
        answers = dict(zip(shapes, mlp_backward(grad_y, h, z, x, W2, W1), strict=True))
    for name in ("b2", "W2", "b1", "W1", "x"):  # the order of the backward pass
        answer, wanted = given(answers[name]), tensors[name].grad
        assert answer.shape == wanted.shape, (
            f"the gradient of {name} has the shape {tuple(answer.shape)}, not {shapes[name]}"
        )
        off = (answer - wanted).abs().max()
        assert off < 1e-12, (
            f"the gradient of {name} is off by up to {off:.2f}: either its own line is wrong, or "
            "a line between it and grad_y"
        )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mlp_backward(grad_y, h, z, x, W2, W1):
#     grad_W2 = grad_y.T @ h  # (C, 4*C)
#     grad_b2 = grad_y.sum(dim=0)  # (C)
#     grad_h = grad_y @ W2  # (N, 4*C)
#     grad_z = grad_h * (z > 0)  # (N, 4*C)
#     grad_W1 = grad_z.T @ x  # (4*C, C)
#     grad_b1 = grad_z.sum(dim=0)  # (4*C)
#     grad_x = grad_z @ W1  # (N, C)
#     return grad_x, grad_W1, grad_b1, grad_W2, grad_b2
# ```
#
# ReLU passes the gradient on for active units and blocks it for inactive ones.
#
# </details>
#
# ## Break it: no activation
#
# Remove the ReLU and keep everything else, including the number of parameters. For comparison, also
# train the previous stage's model, which has attention only. Together, they take about 20 seconds.


# %%
class NoActivation(FeedForward):
    """The same two linear layers, without the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x))


def model_with(mlp: type[nn.Module], seed: int = 1) -> Model:
    """A new model with another MLP; all other initial weights depend only on the seed."""
    torch.manual_seed(seed)
    model = Model(config)
    model.feed_forward = mlp(config)
    return model


def losses_by_seed(mlp: type[nn.Module], count: int, seeds: range) -> Tensor:
    """Validation losses halfway and at the end, (seeds, 2)."""
    histories = [learn(model_with(mlp, seed), count, seed, halvings=1) for seed in seeds]
    return torch.tensor(histories)[:, :, 1]


linear = model_with(NoActivation)
linear_history = learn(linear, steps(5000), halvings=4)
torch.manual_seed(1)
attention_only = AttentionModel(config)
attention_history = learn(attention_only, steps(5000), halvings=4)

# %% [markdown]
# **Predict before you run.** What validation loss does the model without ReLU reach? The loss with
# ReLU is printed above; attention alone reaches about 2.27.

# %%
guess = ...  # a loss

# %% tags=["prediction"]
reveal(guess, linear_history[-1][1], within=0.02)

# %%
curves = [
    ("attention only", attention_history, GRAY),
    ("no activation", linear_history, ORANGE),
    ("ReLU", relu_history, BLUE),
]
curves.sort(key=lambda curve: curve[1][-1][1])  # the lowest loss first
figure, axes = plt.subplots(figsize=(7.2, 3.4))
for i, (name, history, color) in enumerate(curves):
    axes.plot(*zip(*history, strict=True), color=color, marker="o", markersize=4)
    shift = {"xytext": (8, 12 * i - 6), "textcoords": "offset points", "va": "center"}
    axes.annotate(name, history[-1], color=color, **shift)
    print(f"{name:15} validation loss {history[-1][1]:.3f}")
axes.set_xscale("log")
marks = [step for step, _ in relu_history]
axes.set_xticks(marks, [f"{step:,}" for step in marks])
axes.minorticks_off()
axes.set(xlabel="training step", ylabel="validation loss\n(nats per character)")
plt.show()

# %% [markdown]
# Without ReLU, the MLP does not help: the loss ends about where it ends with attention only.
# (This is one run each, and the seed alone moves these losses by about 0.01.) The reason is that
# matrix products are associative:
#
# $$W_2 (W_1 x) = (W_2 W_1) x$$
#
# Two linear layers are one linear layer, with a $C \times C$ matrix. More layers collapse in the
# same way, and `out_proj` absorbs the one that is left. Depth needs a non-linearity between layers.
#
# ### Exercise 3 · Collapse two layers into one
#
# Return the weight `(C, C)` and the bias `(C)` of the one linear layer that equals `down_proj`
# after `up_proj`.


# %% tags=["exercise"]
@torch.no_grad()
def collapse(up_proj: nn.Linear, down_proj: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = ...
    bias = ...
    return weight, bias


# %% tags=["check"]
@check
def exercise_3() -> None:
    up_proj, down_proj = linear.feed_forward.up_proj, linear.feed_forward.down_proj
    weight, bias = (given(each) for each in collapse(up_proj, down_proj))
    assert weight.shape == (C, C), f"the weight has the shape {tuple(weight.shape)}, not {(C, C)}"
    assert bias.shape == (C,), f"the bias has the shape {tuple(bias.shape)}, not {(C,)}"
    with torch.no_grad():
        at_zero = linear.feed_forward(torch.zeros(C))  # (C)
        off = (linear.feed_forward(gathered) - at_zero - gathered @ weight.T).abs().max()
    assert off < 1e-3, f"the weight is off: leaving biases aside, outputs differ by up to {off:.3f}"
    off = (at_zero - bias).abs().max()
    assert off < 1e-4, f"the bias is off by up to {off:.3f}: what is the output for the input 0?"
    one_layer = model_with(lambda config: nn.Linear(config.n_embd, config.n_embd))
    one_layer.load_state_dict(
        {"feed_forward.weight": weight, "feed_forward.bias": bias}
        | {k: v for k, v in linear.state_dict().items() if not k.startswith("feed_forward")}
    )
    two, one = (exact_loss(each, validation) for each in (linear, one_layer))
    print(f"validation loss with two layers {two:.5f}, with one {one:.5f}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# @torch.no_grad()
# def collapse(up_proj, down_proj):
#     weight = down_proj.weight @ up_proj.weight
#     bias = down_proj.weight @ up_proj.bias + down_proj.bias
#     return weight, bias
# ```
#
# </details>
#
# ## Look inside: which inputs activate which units
#
# Row $j$ of `up_proj` decides when hidden unit $j$ is active. Column $j$ of `down_proj` is the
# vector that the unit then adds to the output. In this model only `lm_head` follows. So an active
# unit adds its activation times `lm_head.weight @ down_proj.weight[:, j]` to the logits. This
# vector says how much the unit raises each character's logit: its **direct logit attribution**.


# %%
@torch.no_grad()
def hidden_units(windows: Tensor) -> Tensor:
    """Hidden activations at the last position of each window."""
    x = model.token_embedding(windows) + model.position_embedding(torch.arange(T))  # (N, T, C)
    return F.relu(model.feed_forward.up_proj(model.attention(x)[:, -1]))  # (N, 4*C)


windows = validation[:20_000].unfold(0, T, 1)  # (N, T)
hidden = hidden_units(windows)  # (N, 4*C)
direct = (model.lm_head.weight @ model.feed_forward.down_proj.weight).detach()  # (V, 4*C)
direct -= direct.mean(dim=0)  # softmax ignores what all logits have in common
frequent = torch.bincount(windows[:, -1], minlength=V).topk(28).indices  # (28)
labels = visible(tokenizer.decode(frequent.tolist()))
print(f"{(hidden > 0).float().mean():.0%} of the units are active at an average position")

# %%
effect = hidden.topk(1000, dim=0).values.mean(dim=0) * direct[frequent]  # (28, 4*C)
units = {}  # next character: the unit that raises it most
for unit in effect.max(dim=0).values.argsort(descending=True).tolist():
    units.setdefault(effect[:, unit].argmax().item(), unit)
units = list(units.values())[:6]
print("unit  active  most active after                          raises most")
for unit in units:
    contexts = {}
    for n in hidden[:, unit].topk(200).indices.tolist():
        context = "".join(visible(tokenizer.decode(windows[n, -5:].tolist())))
        contexts.setdefault(context[-3:], context)  # contexts with different endings
    raised = " ".join(labels[i] for i in direct[frequent, unit].topk(4).indices)
    active = (hidden[:, unit] > 0).float().mean()
    print(f"{unit:4} {active:6.0%}   {'  '.join(list(contexts.values())[:6]):43} {raised}")

# %%
by_character = [hidden[windows[:, -1] == i][:, units].mean(dim=0) for i in frequent]
names = [f"unit {unit}" for unit in units]
figure, axes = plt.subplots(2, 1, figsize=(7.5, 3.9))
heat_map(axes[0], torch.stack(by_character, dim=1), names, labels, bar="mean\nactivation")
axes[0].set(xlabel="current character")
added = direct[frequent][:, units].T  # (6, 28)
limit = added.abs().max().item()
colors = {"cmap": "PuOr", "vmin": -limit, "vmax": limit}
heat_map(axes[1], added, names, labels, bar="logit per unit\nof activation", **colors)
axes[1].set(xlabel="next character")
plt.show()

# %% [markdown]
# Read a unit's two rows as a rule: after *these* characters, *those* become likelier. One unit
# above is most active at the end of a sentence and line, and raises newline and capitals. Another
# is active after `c` and raises `l` and `r`. Geva et al. (2020) call row $j$ of `up_proj` a key and
# column $j$ of `down_proj` its value. But these six units were selected for large effects. About
# half of all units are active at once, so a prediction is a sum of many contributions.
#
# ## Smoother activation functions
#
# ReLU has gradient 0 for all negative inputs. **GELU** is $x \, \Phi(x)$, where $\Phi(x)$ is the
# probability that a standard normal variable is less than $x$; GPT-2 uses an approximation of it.
# **SiLU**, $x \, \sigma(x)$ with the logistic function $\sigma$, has a similar shape.

# %%
grid = torch.linspace(-4, 0.6, 231)
figure, axes = plt.subplots(figsize=(6.5, 3))
for function, name, color, position in (
    (F.relu, "ReLU", GRAY, (-3.9, 0.05)),
    (F.gelu, "GELU", BLUE, (-1.9, -0.13)),
    (F.silu, "SiLU", ORANGE, (-2.6, -0.27)),
):
    axes.plot(grid, function(grid), color=color, linewidth=2)
    axes.text(*position, name, color=color, va="center")
axes.set(xlabel="input x", ylabel="activation", ylim=(-0.36, 0.6))
plt.show()

# %% [markdown]
# ### Challenge · Exercise 4: GELU
#
# Write GELU from its definition, without `F.gelu`. PyTorch has the integral
#
# $$\text{torch.erf}(z) = \frac{2}{\sqrt{\pi}} \int_0^z e^{-t^2} dt, \quad \text{and you need} \quad
# \Phi(x) = \frac{1}{\sqrt{2\pi}} \int_{-\infty}^x e^{-t^2/2} dt.$$


# %% tags=["exercise"]
def gelu(x: Tensor) -> Tensor:
    """x times the probability that a standard normal variable is less than x."""
    # Φ is an integral from -∞, of which the part up to 0 is ½. In the rest, substitute u = t / √2.
    return ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)
    y, wanted = given(gelu(x)), F.gelu(x)
    assert y.shape == x.shape, f"the shape is {tuple(y.shape)}, not that of x, {tuple(x.shape)}"
    assert abs(y[0]) < 0.01, f"far to the left GELU is near 0; yours is {y[0]:.3f} at -4"
    assert abs(y[-1] - 4) < 0.01, f"far to the right GELU is near x; yours is {y[-1]:.3f} at 4"
    off, i = (y - wanted).abs().max(dim=0)
    assert off < 1e-12, (
        f"at {x[i]:.2f} yours is {y[i]:.4f} and PyTorch's {wanted[i]:.4f}: is Φ right?"
    )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gelu(x):
#     phi = 0.5 * (1 + torch.erf(x / 2**0.5))
#     return x * phi
# ```
#
# </details>
#
# ## A gate: SwiGLU
#
# LLaMA and many later models use **SwiGLU**. A second linear layer, followed by SiLU, is the gate:
# it multiplies the hidden units element by element (⊙). There are no biases.
#
# $$\text{SwiGLU}(x) = W_\text{down} \left( \text{silu}(W_\text{gate}\, x) \odot
# W_\text{up}\, x \right)$$
#
# ### Exercise 5 · SwiGLU with the same number of parameters
#
# SwiGLU has three matrices instead of two. Choose the number of hidden units so that the parameter
# count stays within 3% of `FeedForward`'s. The check then trains both with five seeds (about 20
# seconds). The two runs with one seed form a pair: they share batches and initial weights outside
# the MLP.


# %% tags=["exercise"]
class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = ...
        self.up_proj = ...
        self.down_proj = ...

    def forward(self, x: Tensor) -> Tensor:
        return ...


# %% tags=["check"]
@check
def exercise_5() -> None:
    for each in (config, Config(n_embd=96), Config(n_embd=256)):
        mlp = SwiGLU(each)
        projections = [given(p) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        assert all(p.bias is None for p in projections), "SwiGLU has no biases"
        own, wanted = (sum(p.numel() for p in m.parameters()) for m in (mlp, FeedForward(each)))
        assert abs(own / wanted - 1) < 0.03, (
            f"with C = {each.n_embd} it has {own:,} parameters, {own / wanted - 1:+.0%} compared "
            f"with {wanted:,}: choose another number of hidden units"
        )
    mlp = SwiGLU(config)
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    with torch.no_grad():
        y = given(mlp(gathered))  # (B, T, C)
        assert y.shape == gathered.shape, f"its output has the shape {tuple(y.shape)}"
        wanted = F.linear(F.silu(gate(gathered)) * up(gathered), down.weight)  # (B, T, C)
    assert torch.allclose(y, wanted, atol=1e-5), "forward is not the formula above"
    count, seeds = steps(600), range(1, 6)
    relu, swiglu = (losses_by_seed(each, count, seeds) for each in (FeedForward, SwiGLU))
    print("Mean differences ± standard error:")
    for i, step in enumerate((count // 2, count)):
        difference = swiglu[:, i] - relu[:, i]  # (5)
        mean, error = difference.mean(), difference.std() / len(seeds) ** 0.5
        print(f"step {step}: ReLU {relu[:, i].mean():.3f}, SwiGLU {swiglu[:, i].mean():.3f}")
        print("  SwiGLU - ReLU, by seed:", "  ".join(f"{each:+.3f}" for each in difference))
        verdict = "a difference" if abs(mean) > 2 * error else "no difference shown"
        print(f"  mean {mean:+.3f} ± {error:.3f}: {verdict}")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# class SwiGLU(nn.Module):
#     def __init__(self, config):
#         super().__init__()
#         hidden = round(2 / 3 * 4 * config.n_embd)
#         self.gate_proj = nn.Linear(config.n_embd, hidden, bias=False)
#         self.up_proj = nn.Linear(config.n_embd, hidden, bias=False)
#         self.down_proj = nn.Linear(hidden, config.n_embd, bias=False)
#
#     def forward(self, x):
#         return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
# ```
#
# **What do the runs show?** In ours, SwiGLU's loss was higher by 0.076 ± 0.015 (standard error)
# after 300 steps and by 0.038 ± 0.010 after 600. So it learns more slowly at first, with this
# initialization and learning rate. The gap shrinks, and the runs do not show which is better once
# trained. Shazeer (2020) found SwiGLU better, in a much larger model.
#
# </details>
#
# ## The script
#
# `git diff --no-index batched_attention.py feed_forward.py` shows the new class `FeedForward` and
# two new lines in `Model`.

# %% [markdown]
# ## Quiz
#
# 1. Attention contains a softmax. Why does the model need another non-linearity?
#
# <details><summary>Answer</summary>
#
# The softmax only decides the weights of the average. These weights make attention non-linear in
# its input, but the values are only averaged.
#
# </details>
#
# 2. You shuffle the positions of the MLP's input. What happens to its output?
#
# <details><summary>Answer</summary>
#
# It is shuffled in the same way: each position is processed separately, with the same weights.
#
# </details>
#
# 3. You double $C$. How do the parameters of attention and of the MLP grow?
#
# <details><summary>Answer</summary>
#
# Both grow about fourfold ($4C^2$ and $8C^2$), so the MLP is still two thirds of a block.
#
# </details>
#
# 4. Ten linear layers in a row have no activation function between them. What can they compute that
#    one cannot?
#
# <details><summary>Answer</summary>
#
# Nothing: their product is one matrix. If one of them is narrow, they can compute even less.
#
# </details>
#
# 5. A hidden unit with ReLU is inactive for every input. What gradient do its weights get?
#
# <details><summary>Answer</summary>
#
# Zero: its row of `up_proj` because ReLU's gradient is 0 there, its column of `down_proj` because
# its activation is 0. The unit is dead. With GELU, some gradient is left.
#
# </details>

# %% [markdown]
# ## Papers
#
# - Vaswani et al. 2017, [Attention Is All You Need](https://arxiv.org/abs/1706.03762), section 3.3.
# - Hendrycks and Gimpel 2016, [Gaussian Error Linear Units
#   (GELUs)](https://arxiv.org/abs/1606.08415).
# - Shazeer 2020, [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202).
# - Geva et al. 2020, [Transformer Feed-Forward Layers Are Key-Value
#   Memories](https://arxiv.org/abs/2012.14913).
#
# The next stage stacks several blocks.
#
# **Next →** [05_residual](05_residual.ipynb)
