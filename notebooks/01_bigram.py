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
# # 1 · The bigram table
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/character-gpt/course/blob/main/notebooks/01_bigram.ipynb)
#
# The smallest language model there is, and everything that surrounds it up to the GPT. After this
# notebook you can
#
# - turn a text into numbers and back, and say what other tokenizers do instead;
# - say what a batch is, and how many examples it holds;
# - build a model of character pairs twice, by counting and by gradient descent, and show that both
#   come to the same table;
# - explain why an untrained model starts at a loss of ln 65;
# - sample from a model, colder or hotter.
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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainer import Run
from common import LanguageModel, Tokenizer, draw_batch, split
from sample import generate
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GREY, ORANGE, check, given, heat_map, plt, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

# %% [markdown]
# ## The text
#
# One file of plays, about a million characters. The first run downloads it.

# %%
corpus = open_corpus(None)
text = Path(corpus.path).read_text(encoding="utf-8")
print(f"{len(text):,} characters\n")
print(text[:250])

# %% [markdown]
# A model computes with numbers, so every character gets one: its place in the sorted list of all
# characters that occur. That list is the **vocabulary**, its length is `V`.

# %%
vocabulary = "".join(sorted(set(text)))
V = len(vocabulary)
print(V, "characters:", " ".join(visible(vocabulary)))

# %%
number = {character: i for i, character in enumerate(vocabulary)}
encoded = [number[character] for character in "hello there"]
decoded = "".join(vocabulary[i] for i in encoded)
print(encoded)
print(decoded)

# %% [markdown]
# That is a whole tokenizer. `common.py` has it as a class, `Tokenizer`, for all stages.
#
# ### What other tokenizers do
#
# The unit need not be a character. Bytes need only 256 numbers for any language. Words make the
# text short, but there are tens of thousands of them, and a new one has no number.

# %%
words = text.split()
print(f"characters: {len(text):9,} tokens, vocabulary {V:6,}")
print(f"bytes:      {len(text.encode('utf-8')):9,} tokens, vocabulary {256:6,}")
print(f"words:      {len(words):9,} tokens, vocabulary {len(set(words)):6,}")

# %% [markdown]
# Large models take the middle way, **byte pair encoding**: begin with bytes, find the pair of
# neighbors that is the most frequent, make it a token of its own, and repeat tens of
# thousands of times. Here are the first twelve such steps on a piece of the text.

# %%
tokens, steps_so_far = list(text[:50_000]), []
for _ in range(12):
    counts = {}
    for pair in pairwise(tokens):
        counts[pair] = counts.get(pair, 0) + 1
    best = max(counts, key=counts.get)
    merged, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == best:
            merged.append("".join(best))
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    tokens = merged
    steps_so_far.append("".join(visible(best[0] + best[1])))
print("   ".join(steps_so_far))
print(f"50,000 characters have become {len(tokens):,} tokens")

# %% [markdown]
# A larger vocabulary, a shorter text: that is the trade. This course stays with characters, since
# then every model fits a laptop and you can read each of its numbers.
#
# ## Split, blocks, batches
#
# The first 90 % of the text is for training. The rest is kept back: what a model has never seen
# tells whether it has learned the language or memorized the text.

# %%
tokenizer = Tokenizer(text)
training, validation = split(torch.tensor(tokenizer.encode(text)))
print(f"{len(training):,} to train on, {len(validation):,} to validate with")

# %% [markdown]
# A model reads a **block** of `T` characters at a time. In one block there are `T` examples: after
# one character comes this, after two comes that, and so on.

# %%
T = 8
block = training[: T + 1]
for t in range(T):
    context, target = tokenizer.decode(block[: t + 1].tolist()), vocabulary[block[t + 1]]
    print(f"after {''.join(visible(context)):8} comes {visible(target)[0]}")

# %% [markdown]
# So the targets are the same characters, moved by one. `draw_batch` cuts `B` blocks at random
# places and stacks them: a **batch**, `(B, T)` numbers. They are learned from at the same time, but
# know nothing of each other.

# %%
B = 4
idx, targets = draw_batch(training, T, B, torch.Generator().manual_seed(1))
print("idx", tuple(idx.shape), "and targets", tuple(targets.shape), "hold", B * T, "examples")

figure, axes = plt.subplots(1, 2, figsize=(9, 2.6))
for panel, numbers, title in zip(axes, (idx, targets), ("idx", "targets"), strict=True):
    panel.imshow(numbers, cmap="cividis", alpha=0.25)
    for b in range(B):
        for t, character in enumerate(visible(tokenizer.decode(numbers[b].tolist()))):
            panel.text(t, b, character, ha="center", va="center", size=13)
    panel.set(title=title, xlabel="t, place in the block", ylabel="b, which block")
    panel.set_yticks(range(B))
plt.show()

# %% [markdown]
# Read a row on the left, then the same row on the right: one step ahead, everywhere.
#
# ## A model by counting
#
# What follows a `q`? Count. A table with a row for each character and a column for the one after it
# holds everything that a **bigram** model knows.

# %%
pairs = torch.zeros(V, V)  # (V, V)
for this, following in pairwise(training.tolist()):
    pairs[this, following] += 1
counted = (pairs + 1) / (pairs + 1).sum(dim=1, keepdim=True)  # (V, V)
row = counted[number["q"]] if "q" in number else counted[0]
for share, i in zip(*row.topk(3), strict=True):
    print(f"after q comes {visible(vocabulary[i])[0]} with probability {share:.2f}")

# %% [markdown]
# Each count begins at 1, so that no pair is impossible just because it has not been seen.
#
# How good is this table? A good model gives the character that really comes a high probability.
# The usual measure is the **loss**: the mean of $-\ln p$ over a text, where $p$ is the probability
# that the model gave to what came.
#
# $$\text{loss} = -\frac{1}{N} \sum_{i=1}^{N} \ln p(\text{next}_i \mid \text{this}_i)$$

# %%
counted_loss = -counted.log()[validation[:-1], validation[1:]].mean().item()
print(f"counted table: {counted_loss:.3f} nats per character")

# %% [markdown]
# ## The same by gradient descent
#
# A neural network never counts. It starts anywhere, sees how wrong it is, and changes its numbers a
# little, again and again. For the bigram the numbers are a table of **logits**, scores that
# `softmax` turns into probabilities. This is the model of `bigram.py`, line by line.


# %%
@dataclass
class Config:
    vocab_size: int = 65  # V: vocabulary size, the number of distinct characters
    block_size: int = 8  # T: context length, in characters
    batch_size: int = 32  # B: sequences per training step
    max_iters: int = 5000  # training steps
    eval_interval: int = 500  # steps between evaluations
    learning_rate: float = 1e-2  # AdamW's step size


# %%
class Model(LanguageModel):
    """Predicts the next character from the current one alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.logit_table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.logit_table.weight)  # start with equal odds for every character

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.logit_table(idx)  # (B, T, V)
        if targets is None:
            return logits, None
        # Every position is one prediction: flatten to B*T rows of logits and B*T targets.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# %% [markdown]
# `nn.Embedding` is the table, and calling it looks up rows: `B` times `T` numbers go in, as many
# rows of `V` logits come out. `F.cross_entropy` takes the softmax and the mean of $-\ln p$ in one.

# %%
config = Config(vocab_size=V)
model = Model(config)
idx, targets = draw_batch(training, config.block_size, config.batch_size, torch.Generator())
logits, loss = model(idx, targets)
print("idx", tuple(idx.shape), "-> logits", tuple(logits.shape))

# %% [markdown]
# **Predict before you run the next cell:** nothing is learned yet, all logits are 0. What is the
# loss? Think of the probability that each character gets.

# %%
print(f"loss before training {loss.item():.4f}")
print(f"ln {V}                {torch.tensor(float(V)).log().item():.4f}")

# %% [markdown]
# Equal logits mean equal probabilities, $1/V$ each, and $-\ln(1/V) = \ln V$. Whenever you train a
# model, look at its first loss: much more than $\ln V$ means that it begins sure of wrong things.
#
# ## Training
#
# Four lines, the same to the last stage: predict, forget the old gradients, find the new ones, move
# the numbers a little against them.

# %%
torch.manual_seed(1)
generator = torch.Generator().manual_seed(1)
optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
history, evaluations = [], []
for step in range(steps(config.max_iters)):
    if step % steps(config.eval_interval) == 0:
        evaluations.append((step, exact_loss(model, validation)))
    idx, targets = draw_batch(training, config.block_size, config.batch_size, generator)
    logits, loss = model(idx, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(loss.item())
learned_loss = exact_loss(model, validation)
evaluations.append((step + 1, learned_loss))
print(f"validation loss: learned {learned_loss:.3f}, counted {counted_loss:.3f}")

# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
axes.plot(history, color=GREY, linewidth=0.5, alpha=0.6)
axes.plot(*zip(*evaluations, strict=True), color=BLUE, marker="o", linewidth=2)
axes.axhline(counted_loss, color=ORANGE, linestyle="--")
axes.annotate(
    "each batch", (len(history) * 0.75, max(history[len(history) // 2 :]) + 0.1), color=GREY
)
axes.annotate("validation", (len(history) * 0.12, 3.0), color=BLUE)
axes.annotate(
    "counted", (len(history) * 0.75, min(history[len(history) // 2 :]) - 0.12), color=ORANGE
)
axes.set(xlabel="training steps", ylabel="loss (nats per character)", ylim=(1.95, None))
plt.show()

# %% [markdown]
# The grey line is noisy because a batch is a small sample. The blue one is exact: it is the mean
# over the whole validation text. It comes down to the dashed line and stays: there is nothing more
# to know about pairs.
#
# ## Two roads, one table
#
# **Predict:** one table was counted, the other one never saw a count. How alike will they look?

# %%
learned = F.softmax(model.logit_table.weight.detach(), dim=-1)  # (V, V)
common_ones = "\n abcdefghijklmnopqrstuvwxyz"
shown = torch.tensor([number[character] for character in common_ones if character in number])
labels = visible(tokenizer.decode(shown.tolist()))
figure, axes = plt.subplots(1, 2, figsize=(11, 5.6))
for panel, probabilities, title in zip(
    axes, (counted, learned), ("counted", "learned"), strict=True
):
    heat_map(panel, probabilities[shown][:, shown], labels, labels, title, vmax=0.5)
    panel.set(xlabel="next character", ylabel="this character")
plt.show()

# %% [markdown]
# Bright is likely: after `q` comes `u`, after `d` and `y` a word often ends. The right table is the
# left one, a little off where a character is rare, for what is seldom seen is seldom corrected:

# %%
seen = pairs.sum(dim=1) > 1000  # characters that occur often enough to compare
difference = (counted - learned).abs().mean(dim=1)  # (V)
print(
    f"mean difference: frequent {difference[seen].mean():.4f}, rare {difference[~seen].mean():.4f}"
)

# %% [markdown]
# ## Sampling
#
# To write, look up the row of the last character, draw the next one by its probabilities, append
# it, and repeat.

# %%
generator = torch.Generator().manual_seed(1)
numbers = [number["\n"]] if "\n" in number else [0]
for _ in range(200):
    logits, _ = model(torch.tensor([numbers[-1:]]))  # (1, 1, V)
    probabilities = F.softmax(logits[0, -1], dim=-1)  # (V)
    numbers.append(torch.multinomial(probabilities, 1, generator=generator).item())
print(tokenizer.decode(numbers))

# %% [markdown]
# Hardly a word in there, but pairs that exist. `sample.py` does the same for every stage.
#
# ### Temperature
#
# Divide the logits by a **temperature** before the softmax. Below 1 the likely becomes likelier,
# above 1 everything comes closer together.

# %%
row = model.logit_table.weight.detach()[number["t"]]  # (V)
most_likely = row.topk(12).indices
figure, axes = plt.subplots(figsize=(8, 3.2))
for i, temperature in enumerate((0.5, 1.0, 2.0)):
    probabilities = F.softmax(row / temperature, dim=-1)[most_likely]
    axes.bar(torch.arange(12) + 0.27 * (i - 1), probabilities, 0.25, label=f"{temperature}")
axes.set_xticks(range(12), visible(tokenizer.decode(most_likely.tolist())))
axes.set(xlabel="the character after t", ylabel="probability")
axes.legend(title="temperature", frameon=False)
plt.show()

# %% [markdown]
# At 0.5 most draws take one of the two likeliest; at 2 anything may come. The order never changes.

# %%
for temperature in (0.3, 1.0, 2.0):
    sample = generate(model, tokenizer, length=90, temperature=temperature)
    print(f"temperature {temperature}: {''.join(visible(''.join(sample)))}")

# %% [markdown]
# ## The script
#
# `bigram.py` is the two classes above and this function, which it calls in its last line,
# `cli(main)`. `Run` is everything around the training: it reads the flags, draws the batches,
# evaluates, saves and shows the progress. The four lines that learn are in the script.


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
# ### 1 · Cut a batch yourself
#
# Write what `draw_batch` does, for places that are given: row `b` of `idx` begins at `starts[b]`
# and has `T` characters; `targets` are the same, one character later.


# %% tags=["exercise"]
def cut_batch(tokens: Tensor, starts: list[int], T: int) -> tuple[Tensor, Tensor]: ...


# %% tags=["check"]
@check
def exercise_1() -> None:
    tokens = torch.arange(100) * 3
    idx, targets = given(cut_batch(tokens, [0, 50, 7], 5))
    assert tuple(idx.shape) == (3, 5), f"idx has the shape {tuple(idx.shape)}, not (3, 5)"
    assert idx[1].tolist() == tokens[50:55].tolist(), "row 1 of idx begins at the wrong place"
    assert not torch.equal(targets, idx), "the targets are the inputs: move them by one"
    assert targets.tolist() == (idx + 3).tolist(), "a target is not the character that comes next"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cut_batch(tokens: Tensor, starts: list[int], T: int) -> tuple[Tensor, Tensor]:
#     idx = torch.stack([tokens[start : start + T] for start in starts])
#     targets = torch.stack([tokens[start + 1 : start + T + 1] for start in starts])
#     return idx, targets
# ```
#
# </details>
#
# ### 2 · Turn the temperature
#
# Return the probabilities of the next character at a temperature.


# %% tags=["exercise"]
def at_temperature(logits: Tensor, temperature: float) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_2() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0])
    cold, hot = (given(at_temperature(logits, temperature)) for temperature in (0.5, 2.0))
    assert torch.isclose(cold.sum(), torch.tensor(1.0)), "probabilities must add up to 1"
    assert cold[2] > hot[2], "colder must make the likeliest likelier: divide, do not multiply"
    ratio = (cold[2] / cold[1]).log().item()
    assert abs(ratio - 4) < 1e-3, "the temperature belongs to the logits, before the softmax"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def at_temperature(logits: Tensor, temperature: float) -> Tensor:
#     return F.softmax(logits / temperature, dim=-1)
# ```
#
# </details>
#
# ### 3 · Look two characters back
#
# A **trigram** table has a row for each pair. Count it on `tokens`, begin each count at
# `smoothing`, and return the probabilities, `(V, V, V)`: first character, second, next.


# %% tags=["exercise"]
def trigram_table(tokens: Tensor, V: int, smoothing: float) -> Tensor: ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    table = given(trigram_table(training, V, 0.1))
    assert tuple(table.shape) == (V, V, V), f"its shape is {tuple(table.shape)}"
    sums = table.sum(dim=-1)
    assert torch.allclose(sums, torch.ones(V, V), atol=1e-4), "each row must add up to 1"
    chosen = table[validation[:-2], validation[1:-1], validation[2:]]
    loss = -chosen.log().mean().item()
    assert loss < counted_loss, f"its loss is {loss:.3f}, worse than that of pairs: wrong order?"
    print(f"pairs {counted_loss:.3f}, triples {loss:.3f} nats per character")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def trigram_table(tokens: Tensor, V: int, smoothing: float) -> Tensor:
#     places = (tokens[:-2] * V + tokens[1:-1]) * V + tokens[2:]
#     counts = torch.bincount(places, minlength=V**3).view(V, V, V) + smoothing
#     return counts / counts.sum(dim=-1, keepdim=True)
# ```
#
# Already V³ numbers, most of them never seen. Four characters back it would be V⁵: counting ends
# here. [The next notebook](02_self_attention.ipynb) looks back as far as the block reaches, without
# a table.
#
# </details>
