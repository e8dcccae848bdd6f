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
# # 1 · A bigram model
#
# You build a minimal language model, a table of scores, and everything around it that the later
# notebooks reuse: tokenizer, batches, loss, training loop and sampling. Allow about 45 minutes to
# read and run, and one to two hours more for the exercises.
#
# ![A character selects a row in a V × V table of logits](../results/diagrams/bigram.svg)
#
# The loss drops from that of blind guessing, which you will predict, to about 2.48 nats per
# character (see *The loss* below).
#
# The course follows Andrej Karpathy's [*Let's build
# GPT*](https://www.youtube.com/watch?v=kCc8FmEb1nY), called "the lecture" here. You need not have
# seen it.
#
# Run the cells in order with Shift+Enter. In **predictions** and **exercises**, replace the `...`.
# The cell below an exercise checks your answer; a solution is folded under it. If something
# breaks, restart the kernel and run from the top.
#
# ## The text
#
# A **language model** predicts what comes next in a text. Ours reads plays by Shakespeare, one
# character at a time. The imports include three helpers: `open_corpus` loads the text,
# `exact_loss(model, tokens)` is the mean loss over a whole text, and `steps(n)` is `n`, or less in
# the quick mode for tests.

# %%
import sys

sys.path.insert(0, "..")

from collections import Counter
from itertools import islice, pairwise
from math import exp, log
from pathlib import Path

from bigram import Config
from common import LanguageModel, Tokenizer, draw_batch, split
from trainer.corpus import open_corpus
from trainer.evaluate import exact_loss

import torch
from lesson import BLUE, GRAY, ORANGE, check, given, heat_map, plt, reveal, steps, visible
from torch import Tensor, nn
from torch.nn import functional as F

# %%
corpus = open_corpus(None)  # downloads 1 MB at first use
text = Path(corpus.path).read_text(encoding="utf-8")
print(text[:148])
print(f"{len(text):,} characters, {len(set(text))} distinct, {len(text.split()):,} words")

ranked = Counter(text).most_common()
print("the rarest:", ", ".join(f"{c} {count:,}×" for c, count in ranked[-5:]))
characters, frequencies = zip(*ranked[:30], strict=True)
figure, axes = plt.subplots(figsize=(7.5, 2.8))
axes.bar(range(30), [100 * count / len(text) for count in frequencies])
axes.set_xticks(range(30), visible("".join(characters)))
axes.set(xlabel="character (␣ is a space, ↵ a newline)", ylabel="fraction of the text (%)")
plt.show()

# %% [markdown]
# ## From characters to token ids
#
# A model computes with numbers, so each character gets a **token id**: its index in the
# **vocabulary**, the sorted list of all characters that occur. `V` is the vocabulary size.

# %%
vocabulary = "".join(sorted(set(text)))
V = len(vocabulary)
id_of = {character: i for i, character in enumerate(vocabulary)}
print(" ".join(visible(vocabulary)))

ids = [id_of[character] for character in "hello"]  # encode
print(ids)
print("".join(vocabulary[i] for i in ids))  # decode

# %% [markdown]
# That is a complete **tokenizer**; `common.py` has it as a class, `Tokenizer`.
#
# ## Split and batches
#
# The first 90% of the text is the **training split**. The model never trains on the rest, the
# **validation split**. The loss there shows whether it has learned the language or only memorized
# the text.
#
# A model reads at most `T` characters at once, its **context length**. A window of `T + 1`
# characters holds `T` examples:

# %%
tokenizer = Tokenizer(text)
training, validation = split(torch.tensor(tokenizer.encode(text)))
print(f"{len(training):,} characters for training, {len(validation):,} for validation")

T = 8
print("the first window:", training[: T + 1].tolist())
window = visible(tokenizer.decode(training[: T + 1].tolist()))
for t in range(T):
    print(f"after {''.join(window[: t + 1]):8} comes {window[t + 1]}")

# %% [markdown]
# A bigram model uses only the last character of each context; later models use all of it.
#
# A **batch** stacks `B` random windows. The inputs `idx` are the first `T` characters of each
# window, and the `targets` are the last `T`: the same characters, shifted by one.

# %%
B = 4
idx, targets = draw_batch(training, T, B, torch.Generator().manual_seed(1))  # (B, T) each
print(idx, targets, sep="\n")

colors = {("idx", 0, 4): BLUE, ("targets", 0, 4): ORANGE, ("idx", 0, 5): ORANGE}
figure, panels = plt.subplots(1, 2, figsize=(7.5, 2.6))
for panel, ids, name in zip(panels, (idx, targets), ("idx", "targets"), strict=True):
    for b in range(B):
        for t, character in enumerate(visible(tokenizer.decode(ids[b].tolist()))):
            color = colors.get((name, b, t), "black")
            weight = "normal" if color == "black" else "bold"
            panel.text(t, b, character, color=color, weight=weight, ha="center", va="center")
    panel.set(title=name, xlabel="position t", ylabel="row b of the batch")
    panel.set(xlim=(-0.5, T - 0.5), ylim=(B - 0.5, -0.5), xticks=range(T), yticks=range(B))
plt.show()

# %% [markdown]
# In row 0, at position 4, the model reads the blue character and should predict the orange one,
# which is also its next input. This batch holds B · T = 32 predictions; its rows are independent.
#
# ### Exercise 1: cut a batch
#
# Write what `draw_batch` does once it knows where the windows start.


# %% tags=["exercise"]
def cut_batch(tokens: Tensor, starts: list[int], T: int) -> tuple[Tensor, Tensor]:
    """Row b of idx has the T tokens from starts[b] on; targets are shifted by one."""
    idx = ...  # (B, T); torch.stack makes one tensor from a list of rows
    targets = ...  # (B, T)
    return idx, targets


# %% tags=["check"]
@check
def exercise_1() -> None:
    tokens = torch.arange(100) * 3
    idx, targets = map(given, given(cut_batch(tokens, [0, 50, 7], 5)))
    assert tuple(idx.shape) == (3, 5), f"idx has the shape {tuple(idx.shape)}, not (3, 5)"
    for b, start in enumerate((0, 50, 7)):
        same = idx[b].tolist() == tokens[start : start + 5].tolist()
        assert same, f"row {b} of idx should start at {start}, but it has the wrong tokens"
    assert tuple(targets.shape) == (3, 5), f"targets have the shape {tuple(targets.shape)}"
    assert not torch.equal(targets, idx), "the targets equal the inputs"
    assert targets.tolist() == (idx + 3).tolist(), "a target is not the token after its input"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cut_batch(tokens, starts, T):
#     idx = torch.stack([tokens[i : i + T] for i in starts])
#     targets = torch.stack([tokens[i + 1 : i + T + 1] for i in starts])
#     return idx, targets
# ```
#
# </details>
#
# ## A model by counting
#
# A **bigram** is a pair of neighboring characters. Bigram counts can predict the next character: in
# `hello there`, `e` follows `h` both times.
#
# For the whole text, the counts form a `V × V` table. Each row, divided by its sum, holds the
# probabilities of the next character. Counts start at 1 (**add-one smoothing**), so unseen pairs
# are unlikely, not impossible.

# %%
print(Counter(pairwise("hello there")).most_common(3))

pairs = training[:-1] * V + training[1:]  # pair (i, j) has the index i * V + j
counts = torch.bincount(pairs, minlength=V * V).view(V, V)
counted = (counts + 1) / (counts + 1).sum(dim=1, keepdim=True)  # (V, V)
for probability, i in zip(*counted[id_of["q"]].topk(3), strict=True):
    print(f"after q comes {visible(vocabulary[i])[0]} with probability {probability:.3f}")

# %% [markdown]
# ## The loss
#
# A good model gives a high probability $p$ to the character that really comes next. The **loss** of
# one prediction is $-\ln p$: 0 if the model was certain, and large if it thought the character
# unlikely. Here are some predictions of the counted table:

# %%
losses = []
for this, following in pairwise("the queen"):
    p = counted[id_of[this], id_of[following]].item()
    losses.append(-log(p))
    print(f"{visible(this)[0]} → {visible(following)[0]}   p = {p:.3f}   -ln p = {-log(p):.2f}")
print(f"mean loss {sum(losses) / len(losses):.2f}")

# %% [markdown]
# The mean of $-\ln p$ over a text is the **cross-entropy**. It is reported in three forms:
#
# - **nats** per character, with the natural logarithm, as above;
# - **bits** per character: nats / ln 2, about what a program needs to compress the text with this
#   model's predictions;
# - **perplexity**: $e^{\text{loss}}$. The model is as uncertain as if it chose evenly among this
#   many characters.
#
# Does the current character help? Compare the table with a model that knows only each character's
# frequency.


# %%
def report(name: str, loss: float) -> None:
    bits, perplexity = loss / log(2), exp(loss)
    print(f"{name}: {loss:.2f} nats = {bits:.2f} bits per character, perplexity {perplexity:.1f}")


frequency = (torch.bincount(training, minlength=V) + 1) / (len(training) + V)  # (V)
report("frequencies only", -frequency.log()[validation[1:]].mean().item())
counted_loss = -counted.log()[validation[:-1], validation[1:]].mean().item()  # of each pair
report("counted bigrams ", counted_loss)

# %% [markdown]
# One character of context cuts the perplexity to less than half.
#
# ## Logits
#
# A neural network learns the table instead. Probabilities are awkward to learn, since they must be
# positive and sum to 1. So the table holds **logits**, which can be any numbers, and **softmax**
# turns them into probabilities: $p_i = e^{z_i} / \sum_j e^{z_j}$. Here is a vocabulary of three:

# %%
table = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])  # (V, V)
print(F.softmax(table, dim=-1))  # each row sums to 1

small_idx = torch.tensor([[0, 1], [2, 0]])  # (B, T)
small_targets = torch.tensor([[1, 0], [2, 1]])  # (B, T)
small_logits = table[small_idx]  # (B, T, V): each id selects its row
print(small_logits)

# %% [markdown]
# Each of the B · T positions is one prediction. `F.cross_entropy` expects the `V` logits in
# dimension 1, but `(B, T, V)` has the positions there. So `flatten(0, 1)` merges dimensions 0 and 1
# into one list of predictions.

# %%
rows, answers = small_logits.flatten(0, 1), small_targets.flatten()  # (B*T, V) and (B*T)
print(rows.shape, answers)
by_hand = -F.softmax(rows, dim=-1)[range(4), answers].log().mean()  # p of each target
print(f"by hand {by_hand:.4f}, F.cross_entropy {F.cross_entropy(rows, answers):.4f}")

# %% [markdown]
# ## The model
#
# This is the model of `bigram.py`. `nn.Embedding` is a table of parameters whose rows are looked up
# by id. `LanguageModel` adds sampling, which calls `forward` without targets.


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


config = Config(vocab_size=V)
model = Model(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# **Predict before you run:** all logits are 0. What is the loss before training? Hint: what
# probability does each of the `V` characters get?

# %%
guess = ...  # nats per character; log(x) computes ln x

# %% tags=["prediction"]
reveal(guess, exact_loss(model, validation), within=0.05)  # the mean over the whole split

# %% [markdown]
# Equal logits give each character the probability $1/V$, so the loss is $-\ln(1/V) = \ln V$. Every
# new model should start near it, at most a few tenths above. **A bad first loss signals a bug**:
# far above ln V, the initial logits are too large, and the model is confident in wrong predictions.
# Far below, it knows more than a new model can: look for leaking targets or a wrong loss.
#
# ## The gradient
#
# Training needs the **gradient**: how the loss changes with each logit. `backward` computes it. For
# one prediction, with target 0:

# %%
logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)  # (1, V)
F.cross_entropy(logits, torch.tensor([0])).backward()
print("probabilities", F.softmax(logits, dim=-1).detach())
print("gradient     ", logits.grad)

# %% [markdown]
# ### Exercise 2: the gradient by hand
#
# Compare the two rows above. Then write the gradient for `N` predictions without `backward`. The
# loss is the mean over the predictions.


# %% tags=["exercise"]
def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """The gradient of F.cross_entropy(logits, targets) with respect to the logits."""
    N, V = logits.shape
    ...  # probabilities: (N, V)
    ...  # one_hot: (N, V), 1 at each row's target, 0 elsewhere; use F.one_hot
    return ...  # (N, V)


# %% tags=["check"]
@check
def exercise_2() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 2, 2, 1, 3])
    F.cross_entropy(logits, targets).backward()
    mine = given(cross_entropy_gradient(logits.detach(), targets))
    assert mine.shape == logits.shape, f"its shape is {tuple(mine.shape)}, not (6, 5)"
    row_sum = mine.sum(dim=-1).abs().max().item()
    assert row_sum < 1e-12, f"a row sums to {row_sum:.3g}: in the example, what does it sum to?"
    ratio = (mine / logits.grad).mean().item()
    same = torch.allclose(mine, logits.grad * ratio, rtol=1e-9, atol=1e-12)
    assert same, "it differs from autograd's; try it on the example above"
    assert abs(ratio - 1) < 1e-9, f"each value is {ratio:.3g} times autograd's"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cross_entropy_gradient(logits, targets):
#     N, V = logits.shape
#     probabilities = F.softmax(logits, dim=-1)
#     one_hot = F.one_hot(targets, V)
#     return (probabilities - one_hot) / N
# ```
#
# </details>
#
# Summed over the text, these differences cancel when each row's probabilities equal the text's
# frequencies. So training should approach the counted table.
#
# ## Training
#
# Each step draws a batch, computes the loss, and moves the parameters a little against the
# gradient. `zero_grad` clears the previous gradient, since `backward` adds to it. The
# optimizer, AdamW, adapts the size of each parameter's step.
#
# Here are two models. One starts with zeros; the other starts as PyTorch initializes an embedding,
# from a normal distribution with standard deviation 1. Training takes about 10 seconds on two
# cores.


# %%
def train(model: Model) -> list[tuple[int, float, float]]:
    """At some steps: the step, the loss of its batch and then that of the validation split."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    count, history = steps(config.max_iters), []
    evaluated = {round(count ** (i / 40)) for i in range(41)}  # evenly spaced on a log axis
    for step in range(1, count + 1):
        idx, targets = draw_batch(training, config.block_size, config.batch_size, generator)
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in evaluated:
            history.append((step, loss.item(), exact_loss(model, validation)))
    return history


default_model = Model(config)
torch.manual_seed(1)
nn.init.normal_(default_model.logit_table.weight)
history, default_history = train(model), train(default_model)
print(f"validation loss: learned {history[-1][2]:.3f}, counted {counted_loss:.3f}")

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.6))
pasts = {"zeros": (history, BLUE), "standard deviation 1": (default_history, ORANGE)}
for start, (past, color) in pasts.items():
    at, batch_losses, validation_losses = zip(*past, strict=True)
    axes.plot(at, validation_losses, color=color, linewidth=2)
    first = (at[0], validation_losses[0])
    axes.annotate(f"start: {start}", first, (0, 6), textcoords="offset points", color=color)
    if past is history:
        axes.scatter(at, batch_losses, color=GRAY, s=12)
        dot = (at[8], batch_losses[8])
        axes.annotate("batches", dot, (0, -24), textcoords="offset points", color=GRAY)
axes.axhline(counted_loss, color="black", linestyle="--", linewidth=1)
axes.annotate("counted table", (1, counted_loss), (0, 5), textcoords="offset points")
axes.set(xscale="log", xlabel="training steps (log scale)", ylabel="loss (nats per character)")
axes.xaxis.set_major_formatter("{x:,.0f}")
plt.show()

# %% [markdown]
# The dots scatter because a batch is a small sample; the lines are exact, over the whole
# validation split. The model with random logits starts above ln V and must first unlearn them.
#
# The learned and the counted table end at nearly the same loss. Do they also look alike?

# %%
learned = F.softmax(model.logit_table.weight.detach(), dim=-1)  # (V, V)
shown = torch.tensor(tokenizer.encode("\n acdefghilmnoqrstuvy"))  # few enough to label
labels = visible(tokenizer.decode(shown.tolist()))
figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.6))
for panel, values, title in zip(panels, (counted, learned), ("counted", "learned"), strict=True):
    heat_map(panel, values[shown][:, shown], labels, labels, title, vmin=0, vmax=0.5)
    panel.set(xlabel="next character", ylabel="current character")
    panel.tick_params(labelsize=9)
figure.colorbar(panels[0].images[0], ax=panels, label="probability", extend="max", shrink=0.8)
plt.show()

difference = (counted - learned).abs().mean(dim=1)  # (V)
frequent = counts.sum(dim=1) > 1000
print(f"mean difference: {difference[frequent].mean():.4f} in the rows of frequent characters")
print(f"                 {difference[~frequent].mean():.4f} in those of rare ones")

# %% [markdown]
# In both, `u` follows `q`. Rare characters differ most: they get few updates, and smoothing changes
# their rows more.
#
# ## Sampling
#
# To write a text, sample the next character from its probabilities, append it, and repeat. A
# **temperature** divides the logits before softmax. Below 1, likely characters become likelier;
# above 1, the probabilities move closer together. One step after a `t`:

# %%
logits = model.logit_table.weight.detach()[id_of["t"]]  # (V)
order = logits.argsort(descending=True)  # (V): ids, the most likely first
names = visible(tokenizer.decode(order.tolist()))

figure, panels = plt.subplots(1, 3, figsize=(7.5, 2.6), sharey=True)
for panel, temperature in zip(panels, (0.5, 1.0, 2.0), strict=True):
    probabilities = F.softmax(logits[order].double() / temperature, dim=0)  # (V), in float64
    generator = torch.Generator().manual_seed(1)
    picks = torch.multinomial(probabilities, 20, replacement=True, generator=generator)
    print(f"temperature {temperature}: t is followed by", " ".join(names[pick] for pick in picks))
    panel.bar(range(10), probabilities[:10])
    panel.set_xticks(range(10), names[:10])
    panel.set(title=f"temperature {temperature}", xlabel="character after t")
panels[0].set_ylabel("probability")
plt.show()

# %% [markdown]
# ### Exercise 3: write `generate`
#
# Turn the step above into a loop, sampling one character at a time. You need neither sorting nor
# float64: they change which random number gives which character, not the probabilities.


# %% tags=["exercise"]
@torch.inference_mode()
def generate(
    model: Model, ids: list[int], length: int, temperature: float, generator: torch.Generator
) -> list[int]:
    """The given ids, followed by `length` sampled ones."""
    ids = list(ids)
    for _ in range(length):
        ...  # idx: (1, T), the last model.block_size ids
        ...  # logits: (V), those of the last position; the model returns (logits, loss)
        ...  # probabilities: (V), at this temperature
        ...  # sample one id with torch.multinomial and the generator; append it
    return ...


# %% tags=["check"]
@check
def exercise_3() -> None:
    torch.manual_seed(2)
    small = Model(Config(vocab_size=3))
    nn.init.normal_(small.logit_table.weight)

    def watch(module: nn.Module, inputs: tuple[Tensor]) -> None:
        for idx in inputs:
            assert idx.dim() == 2, f"the model got idx with the shape {tuple(idx.shape)}"
            assert idx.shape[1] <= small.block_size, "idx has more than model.block_size ids"

    small.register_forward_pre_hook(watch)

    def sample(count: int, temperature: float) -> list[int]:
        generator = torch.Generator().manual_seed(7)
        return [int(i) for i in given(generate(small, [1, 2], count, temperature, generator))]

    for temperature in (1.0, 0.5):
        ids = sample(3000, temperature)
        assert len(ids) == 3002, f"{len(ids)} ids came back, not the 2 given and 3,000 new ones"
        assert ids[:2] == [1, 2], f"the given ids were 1 and 2, but yours start with {ids[:2]}"
        again = sample(20, temperature)
        assert again == ids[:22], "the same seed gives other ids: does multinomial use `generator`?"
        found = torch.zeros(3, 3)  # how often j follows i
        for i, j in pairwise(ids[1:]):
            found[i, j] += 1
        found /= found.sum(dim=1, keepdim=True).clamp(min=1)
        wanted = F.softmax(small.logit_table.weight.detach() / temperature, dim=1)
        i, j = divmod((found - wanted).abs().argmax().item(), 3)
        assert abs(found[i, j] - wanted[i, j]) < 0.08, (
            f"at temperature {temperature}, id {j} follows id {i} in {found[i, j]:.0%} of all "
            f"cases, not in {wanted[i, j]:.0%}"
        )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# @torch.inference_mode()
# def generate(model, ids, length, temperature, generator):
#     ids = list(ids)
#     for _ in range(length):
#         idx = torch.tensor([ids[-model.block_size :]])
#         logits = model(idx)[0][0, -1]
#         probabilities = F.softmax(logits / temperature, dim=0)
#         ids.append(torch.multinomial(probabilities, 1, generator=generator).item())
#     return ids
# ```
#
# </details>
#
# **Predict before you run:** at temperature 0, `LanguageModel.generate` always takes the most
# likely character. How many distinct characters are among the 100 that follow a space?

# %%
guess = ...  # a number from 1 to 100


# %% tags=["prediction"]
def write(start: str, length: int, temperature: float) -> str:
    generator = torch.Generator().manual_seed(1)
    ids = model.generate(tokenizer.encode(start), temperature, None, generator)
    return tokenizer.decode(islice(ids, length))


greedy = write(" ", 100, temperature=0)
reveal(guess, len(set(greedy)))
print(greedy)

# %% [markdown]
# The model sees only the last character and always continues it in the same way, so the text
# loops. Sampling avoids that:

# %%
for temperature in (0.5, 1.0, 2.0):
    print(f"--- temperature {temperature}\n{write(' ', 150, temperature)}\n")

# %% [markdown]
# ## Larger tokens: byte-pair encoding
#
# Real models such as GPT-2 read larger tokens, made by **byte-pair encoding** (BPE). It starts
# with the 256 possible bytes. Then it repeats: find the most frequent pair of neighbors, and
# replace it with a new id.


# %%
def merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace every occurrence of the pair with the new id."""
    merged, i = [], 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == pair
        merged.append(new_id if found else ids[i])
        i += 2 if found else 1
    return merged


ids = list(b"the thin thing")
print(len(ids), ids)
pair, count = Counter(pairwise(ids)).most_common(1)[0]
print(f"the pair {pair} = {bytes(pair).decode()!r} occurs {count} times")
ids = merge(ids, pair, 256)
print(len(ids), ids)

# %% [markdown]
# ### Challenge · Exercise 4: a BPE tokenizer
#
# Write the functions for training, encoding and decoding. Decoding must undo encoding exactly.


# %% tags=["exercise"]
def train_merges(ids: list[int], count: int) -> dict[tuple[int, int], int]:
    """From each merged pair to its new id, in the order in which they were learned."""
    merges = {}
    for _ in range(count):
        ...  # find the most frequent pair
        ...  # give it the id 256 + len(merges), and replace it in ids
    return merges or ...


def encode(text: str, merges: dict[tuple[int, int], int]) -> list[int]:
    ...  # start with the bytes, list(text.encode())
    ...  # apply the merges
    return ...


def decode(ids: list[int], merges: dict[tuple[int, int], int]) -> str:
    ...  # collect the bytes of each id: bytes([i]) below 256, then those of the merged ones
    return ...  # join the bytes of all ids, and call decode() on them


# %% tags=["check"]
@check
def exercise_4() -> None:
    start = list(text[:20_000].encode())
    merges = given(train_merges(list(start), 20))
    assert len(merges) == 20, f"{len(merges)} different pairs, not 20: do ids change in the loop?"
    ids, tokens = start, {i: bytes([i]) for i in range(256)}
    for i, ((a, b), new_id) in enumerate(merges.items(), 256):
        assert new_id == i, f"the id {new_id} should be {i}"
        pairs = Counter(pairwise(ids))
        assert pairs[a, b] == max(pairs.values()), f"the pair of id {i} is not the most frequent"
        ids, tokens[i] = merge(ids, (a, b), i), tokens[a] + tokens[b]
    learned = "  ".join("".join(visible(tokens[i].decode())) for i in merges.values())
    print(f"Training works: {len(start):,} bytes become {len(ids):,} tokens. New: {learned}")

    small = {(97, 97): 256, (97, 98): 257, (256, 257): 258}  # aa, ab, aaab
    ids, expected = given(encode("aaabdaaabac", small)), [258, 100, 258, 97, 99]
    assert ids == expected, f"with the merges {small}, aaabdaaabac became {ids}, not {expected}"
    two = {(98, 99): 256, (97, 98): 257}  # bc, then ab
    ids = encode("abc", two)
    assert ids == [97, 256], f"with {two}, abc became {ids}: apply merges in the order learned"
    for example in ("aaabdaaabac", "aab aaaab", "", "Zoë → 😀"):
        back = given(decode(encode(example, small), small))
        assert back == example, f"{example!r} came back as {back!r}"


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def train_merges(ids, count):
#     merges = {}
#     for _ in range(count):
#         pair = Counter(pairwise(ids)).most_common(1)[0][0]
#         merges[pair] = 256 + len(merges)
#         ids = merge(ids, pair, merges[pair])
#     return merges
#
#
# def encode(text, merges):
#     ids = list(text.encode())
#     for pair, new_id in merges.items():
#         ids = merge(ids, pair, new_id)
#     return ids
#
#
# def decode(ids, merges):
#     token = {i: bytes([i]) for i in range(256)}
#     for (a, b), new_id in merges.items():
#         token[new_id] = token[a] + token[b]
#     return b"".join(token[i] for i in ids).decode()
# ```
#
# </details>
#
# GPT-2 has 50,257 tokens. The scripts read characters, which keeps tables small. Notebook 10 builds
# the full tokenizer.
#
# ## The script
#
# `bigram.py` has this `Model`, the `Config` that you imported, and a `main` with the training
# lines. `Run` does the rest: command line, evaluation, checkpoints and a sample. Try
# `python bigram.py` in a terminal, in the course's folder (JupyterLab: *File › New › Terminal*).
# `git diff --no-index bigram.py self_attention.py` shows the next step.

# %% [markdown]
# ## Quiz
#
# **1.** `idx` has the shape (32, 8). Over how many predictions is the loss averaged?
#
# <details><summary>Answer</summary>
# 32 · 8 = 256: every position predicts its next character.
# </details>
#
# **2.** With V = 65, a new model starts at a loss of 9. Another starts at 1. What do you suspect?
#
# <details><summary>Answer</summary>
# ln 65 is about 4.17. At 9, the initial logits are too large. At 1, targets leak into the model, or
# the loss is wrong.
# </details>
#
# **3.** What are 2.48 nats per character in bits, and as perplexity?
#
# <details><summary>Answer</summary>
# 2.48 / ln 2 ≈ 3.58 bits; e^2.48 ≈ 12.
# </details>
#
# **4.** Why does temperature divide the logits and not the probabilities?
#
# <details><summary>Answer</summary>
# Dividing all probabilities by the same number and normalizing again changes nothing.
# </details>
#
# **5.** Why not count what follows each context of eight characters?
#
# <details><summary>Answer</summary>
# The table would have 65⁸ ≈ 3 · 10¹⁴ rows. The text has a million characters, so nearly all would
# be empty.
# </details>

# %% [markdown]
# ## Papers
#
# - Shannon, [Prediction and Entropy of Printed
#   English](https://doi.org/10.1002/j.1538-7305.1951.tb01366.x), 1951
# - Bengio et al., [A Neural Probabilistic Language
#   Model](https://www.jmlr.org/papers/v3/bengio03a.html), 2003
# - Sennrich et al., [Neural Machine Translation of Rare Words with Subword
#   Units](https://arxiv.org/abs/1508.07909), 2016 (BPE)
# - Holtzman et al., [The Curious Case of Neural Text
#   Degeneration](https://arxiv.org/abs/1904.09751), 2020 (sampling)
#
# **Next →** [02_self_attention](02_self_attention.ipynb)
