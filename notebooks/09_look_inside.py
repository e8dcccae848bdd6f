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
# You have built a GPT. Now find out how a trained one works, with four methods from research:
# ablation, direct logit attribution, the logit lens and activation patching. Then you grow an
# **induction head**, which continues a text that it has seen once before, and find the head that
# makes verbs agree with nouns in Pocket Play.
#
# Allow 75 minutes. If you have trained `gpt.py`, the notebook opens your run; if not, it trains a
# small model. The saved outputs are from such a small model with one seed; yours will differ.
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

# trainer sets how PyTorch's threads wait for each other, so it comes before torch.
import trainer  # noqa: F401
from common import Tokenizer, draw_batch, split
from data import pocket_play
from explore import show
from explorer.hooks import off, record, replace
from gpt import PRESETS, Config, Model, learning_rate_at, make_optimizer
from sample import load
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GRAY, ORANGE, causal, check, given, heat_map, plt, reveal, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

corpus = open_corpus(None)
tokenizer = Tokenizer(corpus.vocabulary)
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]
Recording = dict[str, Tensor]  # the output of each module


# %%
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


folder, model = Path("../runs/gpt"), None
if (folder / "best.pt").exists():
    model, its_tokenizer = load(folder, "cpu")
    if its_tokenizer.vocabulary != corpus.vocabulary:
        model = None  # trained on another text
if model is None:
    small = with_changes(PRESETS["small"], vocab_size=len(corpus.vocabulary), n_embd=96, n_layer=3)
    small = with_changes(small, batch_size=16, max_iters=1200, learning_rate=4e-3)
    model = train(small, partial(draw_batch, corpus.train, small.block_size, small.batch_size))

model.requires_grad_(False)
T, L, H = model.block_size, len(model.blocks), model.blocks[0].attention.n_head
C = model.token_embedding.embedding_dim
D = C // H
count = max(2, 8192 // T)
windows = corpus.validation[: count * T + 1].long()
idx, targets = windows[:-1].view(count, T), windows[1:].view(count, T)  # (B, T) each
normal = model(idx, targets)[1].item()
print(f"{L} layers of {H} heads, C = {C}, D = {D}; loss on {idx.numel():,} characters {normal:.3f}")

# %% [markdown]
# ## Record
#
# A **hook** is a function that PyTorch calls whenever a module has run. `explorer/hooks.py` is a
# small module built on hooks. Its `record` returns the output of every module by name, plus each
# layer's attention weights and head outputs:

# %%
found = record(model, idx)
shown = ["token_embedding", "blocks.0.attention.weights", "blocks.0.attention.heads"]
for name in (*shown, "blocks.0.attention", "blocks.0.feed_forward", "blocks.0", "logits"):
    print(f"{name:27}{tuple(found[name].shape)}")

stream = found["token_embedding"] + found["position_embedding"]  # (B, T, C)
for i in range(L):
    stream = stream + found[f"blocks.{i}.attention"] + found[f"blocks.{i}.feed_forward"]
gap = (stream - found[f"blocks.{L - 1}"]).abs().max().item()
print(f"\nembeddings + all sublayers − output of the last block: {gap:.0e}")

# %% [markdown]
# The residual stream is a sum, and each sublayer adds one term to it.
#
# ## Ablation
#
# **Ablation** removes a part, to see how much the model relies on it. `off` sets the output of a
# head or sublayer to zero:

# %%
heads = [(i, h) for i in range(L) for h in range(H)]
sublayers = [f"blocks.{i}.{name}" for i in range(L) for name in ("attention", "feed_forward")]


def without(part: str) -> float:
    """How much the loss rises when a part is off."""
    with off(model, part):
        return model(idx, targets)[1].item() - normal


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
axes[1].set(xlabel="increase of the loss")
axes[1].set_title("one sublayer", fontsize=11)
plt.show()

# %% [markdown]
# Some parts matter far more than others. But zeros are not what later layers were trained on: they
# are **out of distribution**. **Mean ablation** sets the output to its mean instead. It removes
# what varies and keeps the constant part.
#
# ### Exercise 1 · Replace a head
#
# `replace(model, {"NAME": tensor})` sets a module's output. A head is only a slice of the input of
# `out_proj`: channels `h * D` to `(h + 1) * D`. What does `out_proj` return if head `h` gives
# another output `z`?


# %% tags=["exercise"]
def with_head(model: Model, found: Recording, i: int, h: int, z: Tensor) -> Tensor:
    """out_proj's output in layer i, (B, T, C), if head h gave z, which broadcasts to (B, T, D)."""
    # model.blocks[i].attention.out_proj got found[f"blocks.{i}.attention.heads"] as its input,
    # and its output was found[f"blocks.{i}.attention.out_proj"].
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
        assert gap < 1e-4, f"the head's own output must change nothing; the gap is {gap:.2f}"
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
# def with_head(model: Model, found: Recording, i: int, h: int, z: Tensor) -> Tensor:
#     name, projection = f"blocks.{i}.attention", model.blocks[i].attention.out_proj
#     own = slice(h * z.shape[-1], (h + 1) * z.shape[-1])
#     change = z - found[f"{name}.heads"][..., own]
#     return found[f"{name}.out_proj"] + change @ projection.weight[:, own].T
# ```
#
# `out_proj` is linear: only the change of its input matters, and the bias stays.
#
# </details>
#
# Now compare zeros with means, for heads and whole sublayers:


# %%
def head_changed(model: Model, found: Recording, i: int, h: int, z: Tensor) -> Tensor:
    """The solution of exercise 1."""
    name, projection = f"blocks.{i}.attention", model.blocks[i].attention.out_proj
    own = slice(h * z.shape[-1], (h + 1) * z.shape[-1])
    change = z - found[f"{name}.heads"][..., own]  # (B, T, D)
    return found[f"{name}.out_proj"] + change @ projection.weight[:, own].T  # (B, T, C)


def loss_with(outputs: Recording) -> float:
    """How much the loss rises when modules give these outputs."""
    with replace(model, outputs):
        return model(idx, targets)[1].item() - normal


means = torch.zeros(L, H)
for i, h in heads:
    z = found[f"blocks.{i}.attention.heads"].mean(dim=(0, 1))[h * D : (h + 1) * D]  # (D)
    output = head_changed(model, found, i, h, z)
    means[i, h] = loss_with({f"blocks.{i}.attention.out_proj": output})
mean_rises = []
for name in sublayers:
    average = found[name].mean(dim=(0, 1)).expand_as(found[name])  # (B, T, C)
    mean_rises.append(loss_with({name: average}))
print(f"last MLP: zeros {rises[-1]:+.3f}, mean {mean_rises[-1]:+.3f}")

figure, axes = plt.subplots(figsize=(5.6, 3.6))
axes.axline((0, 0), slope=1, color=GRAY, linestyle="--", linewidth=1)
for name, color, x, y in (
    ("a head", GRAY, zeroed.flatten(), means.flatten()),
    ("an attention sublayer", BLUE, rises[::2], mean_rises[::2]),
    ("an MLP", ORANGE, rises[1::2], mean_rises[1::2]),
):
    axes.plot(x, y, "o", color=color, label=name)
axes.annotate(" last MLP", (rises[-1], mean_rises[-1]), color=ORANGE)
axes.set(xlabel="increase of the loss with zeros", ylabel="increase with the mean")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# On the dashed line both methods agree, as they do for most parts of the saved model. Where they
# differ, neither is the truth: a mean can be as unusual at a given position as zeros are. And
# ablation does not say what a part *does*.
#
# ## Direct logit attribution
#
# After the last block come `final_norm` and `lm_head`. With the variance of the stream $x$ held
# fixed, both are linear. So each term $u$ of the stream adds separately to the logit of a token
# with row $w$ in `lm_head.weight`:
#
# $$w \cdot \left(\gamma \odot
# \frac{u - \text{mean}(u)}{\sqrt{\text{var}(x) + \varepsilon}}\right)$$
#
# The norm's bias $\beta$ adds $w \cdot \beta$.
#
# ### Exercise 2 · Direct effect


# %% tags=["exercise"]
def effect(model: Model, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """What term u of stream x, both (..., C), adds to the logit with row w, (C): (...)."""
    # model.final_norm has γ as .weight and ε as .eps; var(x) is x.var(correction=0, ...).
    return ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    toy = Model(with_changes(PRESETS["small"], n_embd=16))
    for parameter in (*toy.final_norm.parameters(), toy.lm_head.weight):
        nn.init.normal_(parameter, 1.0)
    toy_x = torch.randn(3, 9, 16)  # (B, T, C)
    for each, x in ((toy, toy_x), (model, found[f"blocks.{L - 1}"])):
        w = each.lm_head.weight[5]  # (C)
        whole, u = given(effect(each, x, x, w)), x.cos()  # (B, T), (B, T, C)
        assert whole.shape == x.shape[:2], f"the shape is {tuple(whole.shape)}, not (B, T)"
        gap = (effect(each, u, x, w) + effect(each, x - u, x, w) - whole).abs().max().item()
        assert gap < 1e-2, f"the effects of two terms and that of their sum differ by {gap:.2f}"
        moved = (effect(each, x + 3, x, w) - whole).abs().max().item()
        assert moved < 1e-2, "the norm removes the mean of u, but your result contains it"
        logit = each.lm_head(each.final_norm(x))[..., 5]  # (B, T)
        gap = (whole + w @ each.final_norm.bias - logit).abs().max().item()
        assert gap < 1e-2, f"all effects and w · β together miss the logit by up to {gap:.2f}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def effect(model: Model, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
#     norm = model.final_norm
#     deviation = (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()
#     return (norm.weight * (u - u.mean(dim=-1, keepdim=True)) / deviation) @ w
# ```
#
# </details>
#
# Which parts write the `l` of "should"? We take passages of the validation text that end in "shou".
# Softmax ignores what all logits have in common, so we look at a **difference**: the logit of `l`
# minus that of the space that would follow "thou".
#
# **Predict before you run:** which contribute most, the embeddings, the heads or the MLPs?

# %%
guess = ...  # "embeddings", "heads" or "MLPs"

# %% tags=["prediction"]
text = tokenizer.decode(corpus.validation.tolist())
ends = [i for i in range(24, len(text)) if text.startswith(" shou", i)][:32]
passages = [text[i - 18 : i] + " shou" for i in ends]
clean = torch.tensor([tokenizer.encode(each) for each in passages])  # (B, T)
right, wrong = tokenizer.ids["l"], tokenizer.ids[" "]
w = model.lm_head.weight[right] - model.lm_head.weight[wrong]  # (C)
clean_run = record(model, clean)
at_end = {name: y[:, -1] for name, y in clean_run.items() if y.shape[:2] == clean.shape}  # (B, C)
x = at_end[f"blocks.{L - 1}"]  # (B, C)


def direct(u: Tensor) -> float:
    """The solution of exercise 2: the mean effect on logit(l) − logit(space)."""
    norm, u = model.final_norm, u - u.mean(dim=-1, keepdim=True)
    deviation = (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()  # (B, 1)
    return ((norm.weight * u / deviation) @ w).mean().item()


position = model.position_embedding.weight[clean.shape[1] - 1]  # (C)
effects = {"token": direct(at_end["token_embedding"]), "position": direct(position)}
for i in range(L):
    projection = model.blocks[i].attention.out_proj
    z = at_end[f"blocks.{i}.attention.heads"].unflatten(-1, (H, D))  # (B, H, D)
    for h, columns in enumerate(projection.weight.split(D, dim=1)):  # (C, D) each
        effects[f"head {i}.{h}"] = direct(z[:, h] @ columns.T)
    effects[f"MLP {i}"] = direct(at_end[f"blocks.{i}.feed_forward"])
    effects[f"bias of out_proj {i}"] = direct(projection.bias)
effects["bias of final_norm"] = (w @ model.final_norm.bias).item()
sums = {"embeddings": effects["token"] + effects["position"]}
sums["heads"] = sum(value for name, value in effects.items() if name.startswith("head"))
sums["MLPs"] = sum(value for name, value in effects.items() if name.startswith("MLP"))
reveal(guess, max(sums, key=sums.get))

# %%
logits = at_end["logits"]
measured = (logits[:, right] - logits[:, wrong]).mean().item()
print(f"{len(effects)} effects sum to {sum(effects.values()):.4f}; measured {measured:.4f}")
largest = sorted(effects, key=lambda name: -abs(effects[name]))[:12]
figure, axes = plt.subplots(figsize=(6.4, 3.6))
values = [effects[name] for name in largest]
axes.barh(range(len(largest)), values, color=[BLUE if v > 0 else ORANGE for v in values])
axes.set_yticks(range(len(largest)), largest)
axes.axvline(0, color=GRAY, linewidth=1)
axes.invert_yaxis()
axes.set(xlabel="direct effect on logit(l) − logit(space)")
axes.set_title("the largest effects", fontsize=11)
plt.show()

# %% [markdown]
# The effects sum to the measured difference. But they are **direct** only: a head also acts through
# what later sublayers compute from its output. In the saved model the direct effects of block 0's
# heads are small, although removing its attention costs more than anything but its MLP.
#
# ## Logit lens
#
# What would the model predict if it stopped early? The **logit lens** feeds the stream after an
# early block to `final_norm` and `lm_head`.
#
# ### Exercise 3 · Lens


# %% tags=["exercise"]
def lens(model: Model, x: Tensor) -> Tensor:
    """Probabilities (..., V) of the next character, read from a residual stream x, (..., C)."""
    return ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    last = clean_run[f"blocks.{L - 1}"]
    probabilities = given(lens(model, last))  # (B, T, V)
    shape = tuple(probabilities.shape)
    assert shape == tuple(clean_run["logits"].shape), f"the shape is {shape}"
    total = probabilities.sum(dim=-1)
    assert torch.allclose(total, torch.ones_like(total)), "the probabilities do not sum to 1"
    gap = (probabilities - F.softmax(clean_run["logits"], dim=-1)).abs().max().item()
    assert gap < 1e-4, f"after the last block they miss the model's own by up to {gap:.2f}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def lens(model: Model, x: Tensor) -> Tensor:
#     return F.softmax(model.lm_head(model.final_norm(x)), dim=-1)
# ```
#
# </details>


# %%
def streams(run: Recording) -> list[Tensor]:
    """The residual stream before the first block and after each block, (B, T, C) each."""
    embedded = run["token_embedding"] + run["position_embedding"]  # (B, T, C)
    return [embedded, *(run[f"blocks.{i}"] for i in range(L))]


depths = ["embeddings", *(f"after block {i}" for i in range(L))]
rows = [model.lm_head(model.final_norm(x[0])).softmax(dim=-1) for x in streams(clean_run)]
best = torch.stack(rows).max(dim=-1)  # (L + 1, T) each
figure, axes = plt.subplots(figsize=(7.4, 2.4))
heat_map(axes, best.values, depths, visible(passages[0]), bar="probability", vmin=0, vmax=1)
axes.set(xlabel="position and its character", aspect="auto")
for row, ids in enumerate(best.indices.tolist()):
    for column, character in enumerate(visible(tokenizer.decode(ids))):
        color = "black" if best.values[row, column] > 0.5 else "white"
        axes.text(column, row, character, ha="center", va="center", color=color)
plt.show()

for name, x in zip(depths, streams(found), strict=True):
    logits = model.lm_head(model.final_norm(x))  # (B, T, V)
    print(f"{name:14} loss {F.cross_entropy(logits.flatten(0, 1), targets.flatten()):.2f}")

corrupted = torch.tensor([tokenizer.encode(each[:-4] + "thou") for each in passages])  # (B, T)
corrupted_run = record(model, corrupted)  # for the next section

# %% [markdown]
# A cell shows the most likely next character. The loss drops from block to block. But `lm_head` was
# trained for the last row only: a bad guess in an earlier row does not prove that the information
# is missing.
#
# ## Activation patching
#
# Where is the information that decides between "should" and "thou "? **Activation patching** runs
# the model on a **clean** prompt, "… shou", and a **corrupted** one, "… thou". Then it runs the
# corrupted prompt again with one activation copied from the clean run. If the clean answer comes
# back, that activation carries the difference.
#
# ### Exercise 4 · Patch


# %% tags=["exercise"]
def patch(model: Model, name: str, where: slice) -> Tensor:
    """Logits (B, T, V) of the corrupted prompts, with a module's output, (B, T, C), at the
    positions `where` taken from the clean run."""
    # Use clean_run, corrupted_run, and `with replace(model, {name: ...}):`
    return ...


# %% tags=["check"]
@check
def exercise_4() -> None:
    name = "blocks.0"
    before = corrupted_run[name].clone()
    none = given(patch(model, name, slice(0, 0)))
    assert torch.equal(none, corrupted_run["logits"]), "without positions: not the corrupted logits"
    every = patch(model, name, slice(None))
    changed, corrupted_run[name] = not torch.equal(corrupted_run[name], before), before
    assert not changed, "you changed `corrupted_run`: clone the output first"
    assert torch.equal(every, clean_run["logits"]), "with all positions: not the clean logits"
    last = patch(model, f"blocks.{L - 1}", slice(-1, None))
    assert torch.equal(last[:, -1], clean_run["logits"][:, -1]), "the last position was not patched"
    assert torch.equal(last[:, -4], corrupted_run["logits"][:, -4]), "other positions were patched"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def patch(model: Model, name: str, where: slice) -> Tensor:
#     output = corrupted_run[name].clone()
#     output[:, where] = clean_run[name][:, where]
#     with replace(model, {name: output}):
#         return model(corrupted)[0]
# ```
#
# </details>
#
# The picture scales the mean logit difference: 0 is the corrupted run, 1 the clean one.


# %%
def answer(logits: Tensor) -> float:
    """The mean of logit(l) − logit(space) at the last position."""
    return (logits[:, -1, right] - logits[:, -1, wrong]).mean().item()


start, end = answer(corrupted_run["logits"]), answer(clean_run["logits"])
print(f"logit(l) − logit(space): clean {end:.2f}, corrupted {start:.2f}")


def restored(name: str, where: slice) -> float:
    """0 for the corrupted answer, 1 for the clean one."""
    output = corrupted_run[name].clone()
    output[:, where] = clean_run[name][:, where]
    with replace(model, {name: output}):
        return (answer(model(corrupted)[0]) - start) / (end - start)


modules = ["token_embedding", *(f"blocks.{i}" for i in range(L))]
for name, where in (("nothing patched", slice(0, 0)), ("all positions", slice(None))):
    print(f"{name:15}", *(restored(each, where) for each in modules))
length = clean.shape[1]
grid = [[restored(name, slice(t, t + 1)) for t in range(length - 6, length)] for name in modules]
figure, axes = plt.subplots(figsize=(6, 2.8))
labels = ["…", "␣", "s / t", "h", "o", "u"]
heat_map(axes, torch.tensor(grid), depths, labels, bar="restored", vmin=0, vmax=1)
axes.set(xlabel="patched position", aspect="auto")
for row, values in enumerate(grid):
    for column, value in enumerate(values):
        color = "black" if value > 0.5 else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
plt.show()

# %% [markdown]
# Before the first block, the difference is all at one letter. After the last block, only the last
# position can count, since positions no longer interact. In the saved model, the attention of block
# 0 has already copied most of it to the end.
#
# ## Induction heads
#
# Take a text of random letters that repeats, such as `qvmxqvmxqv`. In the first copy, nobody can
# predict a letter. Later, a simple rule works: *find where this letter occurred before, and predict
# what came next*. A head that does this is an **induction head**.
#
# We train models of one and two layers on texts with periods of 4 to 12 different letters, three
# seeds each, and test them with period 12. Guessing one of 26 letters costs $\ln 26 \approx 3.26$;
# guessing one of the 12 in the text costs $\ln 12 \approx 2.48$.
#
# **Predict before you run.** What is the loss in the second copy with one layer?

# %%
guess = ...  # one layer, nats per character


# %% tags=["prediction"]
def repeated(
    count: int, shortest: int, longest: int, size: int, generator: torch.Generator
) -> Tensor:
    """Texts (B, T) of random letters with a period; the letters of a period all differ."""
    letters = torch.rand(count, 26, generator=generator).argsort(dim=1)  # (B, V): shuffled
    period = torch.randint(shortest, longest + 1, (count, 1), generator=generator)  # (B, 1)
    return letters.gather(1, torch.arange(size) % period)


def draw_repeated(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    texts = repeated(32, 4, 12, 49, generator)  # (B, T + 1)
    return texts[:, :-1], texts[:, 1:]


P = 12  # the period of the test texts: two copies
test = repeated(200, P, P, 2 * P + 1, torch.Generator().manual_seed(0))  # (B, T + 1)
config = Config(26, 48, 32, 2, 2, dropout=0.0, max_iters=600, learning_rate=5e-3)
SEEDS = (1, 2, 3)
one = [train(with_changes(config, n_layer=1), draw_repeated, seed) for seed in SEEDS]
two = [train(config, draw_repeated, seed) for seed in SEEDS]


def losses_at(model: Model) -> Tensor:
    """The loss at each position, (T)."""
    logits = model(test[:, :-1])[0]
    return F.cross_entropy(logits.transpose(1, 2), test[:, 1:], reduction="none").mean(dim=0)


reveal(guess, losses_at(one[0])[P:].mean(), within=0.3)

# %%
print(f"ln 26 = {math.log(26):.2f}, ln 12 = {math.log(12):.2f}")
for name, models in (("one layer ", one), ("two layers", two)):
    print(f"{name}, second copy:", *(f"{losses_at(each)[P:].mean():.3f}" for each in models))
figure, axes = plt.subplots(figsize=(7.2, 3))
for models, color, name in ((one, ORANGE, "one layer"), (two, BLUE, "two layers")):
    for each in models:
        axes.plot(losses_at(each), color=color, linewidth=1.5)
    axes.annotate(f" {name}", (2 * P - 1, losses_at(models[0])[-1]), color=color)
axes.axvline(P - 0.5, color=GRAY, linestyle="--", linewidth=1)
axes.text(P - 0.3, 3.3, "second copy", color=GRAY)
axes.set(xlabel="position", ylabel="loss (nats per character)", ylim=(-0.1, None), xlim=(0, 27.5))
axes.set_xticks(range(0, 2 * P, 5))
plt.show()

# %% [markdown]
# One layer beats 2.48, so it uses more than the set of letters, but only two layers get close to 0.
# Why? In the first layer, the score of a key depends on the key's own letter and position.
# Induction needs keys that say *which letter came before me*. A **previous-token head** in layer 0
# can write that into the stream, and a head in layer 1 can search for it.
#
# ### Exercise 5 · Induction score
#
# In a text with period $p$, an induction head at position $t \ge p$ attends to the position *after*
# the previous occurrence of its letter. Measure its mean weight there.


# %% tags=["exercise"]
def induction_score(weights: Tensor, period: int) -> Tensor:
    """From attention weights (B, H, T, T), row = query, to a mean for each head, (H)."""
    # weights.diagonal(offset, -2, -1) holds all entries with key = query + offset.
    return ...


# %% tags=["check"]
@check
def exercise_5() -> None:
    def attends(back: int, first: int) -> Tensor:
        """Weights of two heads, 1 and 0.5, on the key `back` positions back, from a query on."""
        rows = torch.arange(first, 10)
        weights = torch.zeros(2, 2, 10, 10)  # (B, H, T, T)
        weights[:, 0, rows, rows - back], weights[:, 1, rows, rows - back] = 1, 0.5
        return weights

    score = given(induction_score(attends(3, 4), 4))
    assert score.shape == (2,), f"the shape is {tuple(score.shape)}, not one value per head"
    same = induction_score(attends(4, 4), 4)[0].item()
    assert same < 0.01, f"the same letter, 4 back, scores {same:.2f}; use the one after it"
    assert not torch.allclose(score, torch.tensor([6 / 7, 3 / 7])), "position p - 1 is too early"
    assert torch.allclose(score, torch.tensor([1, 0.5])), f"perfect heads score {score.tolist()}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def induction_score(weights: Tensor, period: int) -> Tensor:
#     return weights.diagonal(1 - period, -2, -1)[..., 1:].mean(dim=(0, 2))
# ```
#
# The diagonal starts at query $p - 1$, the last letter of the first copy, which the slice skips.
#
# </details>


# %%
def scores_of(model: Model) -> tuple[Tensor, Tensor]:
    """Previous-token score in the first copy, induction score in the second: (L, H) each."""
    run = record(model, test[:, :-1])
    weights = torch.stack([run[f"blocks.{i}.attention.weights"] for i in range(2)])
    previous = weights.diagonal(-1, -2, -1)[..., :P].mean(dim=(1, 3))
    return previous, weights.diagonal(1 - P, -2, -1)[..., 1:].mean(dim=(1, 3))


def without_part(model: Model, part: str) -> float:
    with off(model, part):
        return losses_at(model)[P:].mean().item()


for seed, each in zip(SEEDS, two, strict=True):
    print(f"seed {seed}    previous-token   induction   loss without it")
    previous, induction = scores_of(each)
    for i, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        loss = without_part(each, f"blocks.{i}.attention.head {h}")
        print(f"head {i}.{h}  {previous[i, h]:9.2f}  {induction[i, h]:14.2f}  {loss:14.2f}")

previous, induction = scores_of(two[0])
run, letters = record(two[0], test[:1, :-1]), [chr(ord("a") + i) for i in test[0, :-1].tolist()]
figure, panels = plt.subplots(1, 2, figsize=(7.4, 3.6))
cases = ((previous, "previous-token"), (induction, "induction"))
for i, (axes, (score, name)) in enumerate(zip(panels, cases, strict=True)):
    h = score[i].argmax().item()
    weights = run[f"blocks.{i}.attention.weights"][0, h]  # (T, T)
    heat_map(axes, causal(weights), letters, letters, f"head {i}.{h}, {name}", vmin=0, vmax=1)
    axes.set(xlabel="key", ylabel="query")
    axes.tick_params(labelsize=8)
plt.show()

# %% [markdown]
# Each of the three seeds grows both kinds of heads. In the picture, the previous-token head is
# sharp only in the first copy, where the induction head's keys are.
#
# But compare the last two columns: some heads with a high induction score hardly matter. **An
# attention pattern is a hypothesis; ablation tests it.** A small effect is no proof either: another
# head may do the same job.
#
# **Break it, and predict before you run:** how does a head know which letter is the previous one?
# Switch off the position embedding. Is the loss in the second copy below 0.1 or above 1?

# %%
guess = ...  # "below 0.1" or "above 1"

# %% tags=["prediction"]
broken = without_part(two[0], "position_embedding")
reveal(guess, "above 1" if broken > 1 else "below 0.1")

# %%
for part in ("position_embedding", "blocks.0.attention"):
    with off(two[0], part):
        induction = scores_of(two[0])[1].max().item()
    loss = without_part(two[0], part)
    print(f"without {part:18}  best induction score {induction:.2f}, loss {loss:.2f}")

# %% [markdown]
# Without positions or without layer 0's attention, the induction heads lose their keys: layer 1
# depends on layer 0.
#
# ## A rule of Pocket Play, and its head
#
# In Pocket Play we know the grammar: after "The owl" the verb ends in `s`, after "The owls" it does
# not. We also know the **entropy** of the language, the lowest loss that any model can reach. Does
# a model learn the rule, and where is it?

# %%
play = pocket_play.play()
words = Tokenizer(play)
training, held_out = split(torch.tensor(words.encode(play)))
config = Config(
    len(words.vocabulary), 48, 96, 4, 2, dropout=0.0, max_iters=2000, learning_rate=4e-3
)
player = train(config, partial(draw_batch, training, 48, 16))
floor = pocket_play.entropy_per_character()
print(f"loss {exact_loss(player, held_out[:20_000]):.3f}, entropy {floor:.3f} nats per character")

verbs, dice = pocket_play.WORDS["transitive"] + pocket_play.WORDS["intransitive"], Random(1)
others = verbs + pocket_play.WORDS["adverb"]
# Short verbs that begin no other word: after them, the grammar is certain.
verbs = [v for v in verbs if len(v) == 4 and sum(each.startswith(v) for each in others) == 1]
nouns = pocket_play.WORDS["creature"]


def prompts(ending: str) -> Tensor:
    """Texts that end in "The", a noun and a verb without its ending, (B, T)."""
    texts = []
    while len(texts) < 100:
        noun = dice.choice([each for each in nouns if len(each + ending) == 4]) + ending
        before, _ = pocket_play.draw(("talk", "lantern", 4), dice)
        texts += [f"{before}\nThe {noun} {dice.choice(verbs)}"[-48:]]
        texts = [each for each in texts if len(each) == 48]
    return torch.tensor([words.encode(each) for each in texts])


def p_of_s(idx: Tensor) -> Tensor:
    """The probability that the verb gets an s, (B)."""
    return player(idx)[0][:, -1].softmax(dim=-1)[:, words.ids["s"]]


owl, owls = prompts(""), prompts("s")
for some, rule in ((owl, 1), (owls, 0)):
    example = words.decode(some[0].tolist())[-13:]
    print(f"{example!r}: P(s) is {rule}; the model says {p_of_s(some).mean():.2f} on average")

# %%
owl_run, owls_run = record(player, owl), record(player, owls)


def p_with(idx: Tensor, run: Recording, i: int, h: int, z: Tensor) -> Tensor:
    """p_of_s if head h of layer i gives z."""
    output = head_changed(player, run, i, h, z)
    with replace(player, {f"blocks.{i}.attention.out_proj": output}):
        return p_of_s(idx)


gaps = torch.zeros(2, 4)
for i in range(2):
    both = torch.cat([run[f"blocks.{i}.attention.heads"] for run in (owl_run, owls_run)])
    for h, z in enumerate(both.mean(dim=(0, 1)).split(24)):  # (D) each
        gaps[i, h] = (p_with(owl, owl_run, i, h, z) - p_with(owls, owls_run, i, h, z)).mean()
low, head = gaps.argmin(dim=1).tolist()  # the most important heads of layers 0 and 1
print(f"P(s) after owl − after owls: {(p_of_s(owl) - p_of_s(owls)).mean():.2f}")
for i, h in enumerate((low, head)):
    print(f"the same with head {i}.{h} at its mean: {gaps[i, h]:.2f}")
weights = torch.cat([run["blocks.0.attention.weights"] for run in (owl_run, owls_run)])
print(
    f"head 0.{low}: weight from the space on the letter before {weights[:, low, -5, -6].mean():.2f}"
)

figure, panels = plt.subplots(1, 2, figsize=(7.4, 2.8), width_ratios=(1, 1.4))
heat_map(panels[0], gaps, ["layer 0", "layer 1"], range(4), bar="difference of P(s)", vmin=0)
panels[0].set(xlabel="mean-ablated head")
for run, color, name in ((owl_run, ORANGE, "one owl"), (owls_run, BLUE, "several owls")):
    weights = run["blocks.1.attention.weights"][:, head, -1, -13:].mean(dim=0)  # (13)
    panels[1].plot(weights, "o-", color=color, label=name)
panels[1].set_xticks(range(13), [*"The", "␣", *"noun", "␣", *"verb"])
panels[1].set(ylabel="attention weight", xlabel="key position")
panels[1].set_title(f"head 1.{head}", fontsize=11)
panels[1].legend(frameon=False)
plt.show()

# %% [markdown]
# Left: the difference of P(s) that remains with a head mean-ablated. Right: from the end of the
# verb, the decisive head of layer 1 attends to the space after the noun only if it is plural.
# Hypothesis: layer 0 notes at the second space whether the letter before was an `s`, and this head
# carries it on.
#
# ### Exercise 6 · Swap the head
#
# The model needs this head. Does it carry *singular/plural*? At the last position, give it the
# output that it has in the other prompts.


# %% tags=["exercise"]
def swapped(run: Recording, other: Recording, i: int, h: int) -> Tensor:
    """Head h's output in layer i, (B, T, D): from `run`, at the last position from `other`."""
    # The outputs of all heads, 24 channels each, are in run[f"blocks.{i}.attention.heads"].
    return ...


# %% tags=["check"]
@check
def exercise_6() -> None:
    for i, h in ((0, 1), (1, 2)):
        name = f"blocks.{i}.attention.heads"
        before, source = (run[name].clone() for run in (owl_run, owls_run))  # (B, T, C)
        z = given(swapped(owl_run, owls_run, i, h))
        changed, owl_run[name] = not torch.equal(owl_run[name], before), before
        assert not changed, "you changed `owl_run`: clone the output first"
        assert z.shape == (*before.shape[:2], 24), f"the shape is {tuple(z.shape)}"
        columns = slice(h * 24, (h + 1) * 24)
        assert torch.equal(z[:, -1], source[:, -1, columns]), "the last position is not `other`'s"
        assert torch.equal(z[:, :-1], before[:, :-1, columns]), "other positions are not `run`'s"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def swapped(run: Recording, other: Recording, i: int, h: int) -> Tensor:
#     own, name = slice(h * 24, (h + 1) * 24), f"blocks.{i}.attention.heads"
#     z = run[name][..., own].clone()
#     z[:, -1] = other[name][:, -1, own]
#     return z
# ```
#
# </details>

# %%
for name, some, run, other in (("owl", owl, owl_run, owls_run), ("owls", owls, owls_run, owl_run)):
    z = run["blocks.1.attention.heads"].unflatten(-1, (4, 24))[:, :, head].clone()  # (B, T, D)
    z[:, -1] = other["blocks.1.attention.heads"].unflatten(-1, (4, 24))[:, -1, head]
    output = run["blocks.0"].clone()  # (B, T, C)
    output[:, -5] = other["blocks.0"][:, -5]
    with replace(player, {"blocks.0": output}):
        patched = p_of_s(some).mean()
    print(f"{name:4}  P(s) {p_of_s(some).mean():.2f}", end="  ")
    print(f"head 1.{head} swapped {p_with(some, run, 1, head, z).mean():.2f}", end="  ")
    print(f"block 0 at the space after the noun swapped {patched:.2f}")

# %% [markdown]
# Swapping the output of one head flips the answers, and so does swapping the stream after block 0
# at one space. In this model (one seed, one form of sentence), that is the route. The model is not
# perfect: the grammar says 1 and 0.
#
# ## On the page
#
# `explore.py` shows attention, head scores and the logit lens in the browser, and switches parts
# off. This line opens its page for your run:

# %%
show(folder) if (folder / "best.pt").exists() else print("first train one: python gpt.py")

# %% [markdown]
# ## Quiz
#
# 1. How do mean and zero ablation differ?
#    <details><summary>Answer</summary>The mean keeps the constant part, which later layers were
#    trained with.</details>
# 2. A head's direct effect on a logit is 0. Can you remove it?
#    <details><summary>Answer</summary>Not safely: later layers may use its output, as an induction
#    head uses a previous-token head.</details>
# 3. You patch the last block's output at an earlier position. Which logits change?
#    <details><summary>Answer</summary>Only those at that position.</details>
# 4. Why does induction need two layers here?
#    <details><summary>Answer</summary>The key must contain the letter before it, which attention in
#    an earlier layer has to bring there.</details>
# 5. A head attends to every noun. Does it detect nouns?
#    <details><summary>Answer</summary>Unknown. Ablate it, or swap its output between prompts that
#    differ in the noun.</details>
#
# ## Papers
#
# - nostalgebraist (2020), [Interpreting GPT: the logit
#   lens](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens)
# - Elhage et al. (2021), [A Mathematical Framework for Transformer
#   Circuits](https://transformer-circuits.pub/2021/framework/index.html): paths to the logits
# - Olsson et al. (2022), [In-context Learning and Induction
#   Heads](https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads/index.html)
# - Meng et al. (2022), [Locating and Editing Factual Associations in
#   GPT](https://arxiv.org/abs/2202.05262): activation patching, there called causal tracing
# - Wang et al. (2022), [Interpretability in the Wild](https://arxiv.org/abs/2211.00593): mean
#   ablation and patching find a circuit in GPT-2

# %% [markdown]
# **Next →** [10_byte_pairs](10_byte_pairs.ipynb)
