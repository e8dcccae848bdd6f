"""The models do what the lessons say: no look ahead, and PyTorch's own numbers."""

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bigram
import feed_forward
import gpt
import layer_norm
import multihead_attention
import residual
import self_attention
from common import Tokenizer, draw_batch
from sample import choose, generate
from training import exact_loss

STAGES = [
    bigram,
    self_attention,
    multihead_attention,
    feed_forward,
    residual,
    layer_norm,
    gpt,
]
VARIANTS = [(stage, {}) for stage in STAGES] + [
    (multihead_attention, {"attention": "heads"}),
    (residual, {"residual": False}),
    (layer_norm, {"norm": "post"}),
]
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
every_variant = pytest.mark.parametrize(
    "stage, options",
    VARIANTS,
    ids=["-".join([stage.__name__, *map(str, options.values())]) for stage, options in VARIANTS],
)

V, T, C, H = 11, 7, 12, 3
SIZES = {"vocab_size": V, "block_size": T, "n_embd": C, "n_head": H, "n_layer": 2, "dropout": 0.0}
TOKENIZER = Tokenizer("abcdefghijk")


def tiny(stage: ModuleType, **options: object) -> object:
    """The stage's config, with small sizes for what it has of them."""
    sizes = {name: size for name, size in SIZES.items() if hasattr(stage.Config, name)}
    return stage.Config(**sizes | options)


@pytest.fixture
def double_precision() -> Iterator[None]:
    """For comparisons: rounding stays far below any mistake."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scatter(module: nn.Module, std: float = 0.5) -> nn.Module:
    """Give every weight a random value: zeros and ones would hide one that is left out."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def random_batch(vocab_size: int, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(vocab_size, (10_000,), generator=generator)
    return draw_batch(text, block_size, batch_size, generator)


def learn(model: nn.Module, idx: Tensor, targets: Tensor, steps: int, learning_rate: float) -> None:
    """The training lines of the scripts, on one batch over and over."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    for _ in range(steps):
        logits, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# What every stage promises.


@every_variant
@pytest.mark.parametrize("length", [1, T - 2, T])
def test_a_model_gives_logits_and_the_mean_cross_entropy(stage, options, length):
    model = scatter(stage.Model(tiny(stage, **options)))
    idx, targets = random_batch(V, 4, length)
    logits, no_loss = model(idx)
    same_logits, loss = model(idx, targets)
    assert model.block_size == T
    assert logits.shape == (4, length, V)
    assert no_loss is None
    assert torch.equal(logits, same_logits)
    surprises = -logits.log_softmax(dim=-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss, surprises.mean())


@every_variant
@pytest.mark.usefixtures("double_precision")
def test_no_character_reaches_an_earlier_logit(stage, options):
    model = scatter(stage.Model(tiny(stage, **options))).eval()
    idx, _ = random_batch(V, 1, T)
    for position in range(T):
        texts = idx.repeat(V, 1)
        texts[:, position] = torch.arange(V)  # every character there is in this one place
        logits, _ = model(texts)
        spread = (logits - logits[:1]).abs().amax(dim=(0, 2))  # one number for each position
        assert (spread[:position] < 1e-9).all()
        # So that the line above could fail: the change does reach all that may see it.
        last = position + 1 if stage is bigram else T
        assert (spread[position:last] > 1e-6).all()


@every_stage
def test_an_untrained_model_knows_nothing(stage):
    config = gpt.PRESETS["small"] if stage is gpt else stage.Config()
    torch.manual_seed(1)
    model = stage.Model(config)
    _, loss = model(*random_batch(config.vocab_size, 32, config.block_size))
    # A sure opinion before the first step would be a wrong one. The sums of stage 5 have grown
    # unnormalised, so its opinions are the strongest; gpt starts small on purpose.
    allowed = {bigram: 1e-5, residual: 0.8, layer_norm: 0.4, gpt: 0.1}.get(stage, 0.2)
    assert abs(loss.item() - math.log(config.vocab_size)) < allowed


@every_stage
def test_a_model_learns_one_batch_by_heart(stage):
    torch.manual_seed(1)
    model = stage.Model(tiny(stage))
    idx, targets = random_batch(V, 4, T)
    idx[:, 0] = torch.arange(4)  # a first character has nothing else to tell it apart
    if stage is bigram:  # all it can learn is which character follows which
        targets = torch.randperm(V)[idx]
    learn(model, idx, targets, steps=300, learning_rate=0.1 if stage is bigram else 0.01)
    _, loss = model(idx, targets)
    # A single head can get stuck: two positions that look at the same place say the same.
    assert loss.item() < (0.5 if stage is self_attention else 0.02)


# The parts against PyTorch's own, with the same weights.


def assert_same(ours: Callable, theirs: Callable) -> None:
    """Both give the same results, and send the same gradients back to their input."""
    torch.manual_seed(2)
    x = torch.randn(2, T - 2, C, requires_grad=True)
    results = [ours(x), theirs(x)]
    torch.testing.assert_close(*results)
    direction = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(result, x, direction)[0] for result in results]
    torch.testing.assert_close(*gradients)


def causal_mask() -> Tensor:
    """PyTorch's own modules mark what is *not* to be seen."""
    return torch.ones(T - 2, T - 2, dtype=torch.bool).triu(1)


def pytorch_attention(attention: nn.Module) -> nn.MultiheadAttention:
    oracle = nn.MultiheadAttention(C, H, batch_first=True)
    oracle.load_state_dict(
        {
            "in_proj_weight": attention.query_key_value.weight,
            "in_proj_bias": torch.zeros(3 * C),  # ours has none
            "out_proj.weight": attention.projection.weight,
            "out_proj.bias": attention.projection.bias,
        }
    )
    return oracle


def pytorch_block(block: nn.Module, norm_first: bool) -> nn.TransformerEncoderLayer:
    oracle = nn.TransformerEncoderLayer(
        C, H, 4 * C, dropout=0.0, activation="relu", batch_first=True, norm_first=norm_first
    )
    parts = {
        "self_attn": pytorch_attention(block.attention),
        "linear1": block.feed_forward.widen,
        "linear2": block.feed_forward.narrow,
    }
    if hasattr(block, "attention_norm"):
        parts |= {"norm1": block.attention_norm, "norm2": block.feed_forward_norm}
    else:
        oracle.norm1 = oracle.norm2 = nn.Identity()
    oracle.load_state_dict(
        {
            f"{name}.{weight}": value
            for name, part in parts.items()
            for weight, value in part.state_dict().items()
        }
    )
    return oracle


@pytest.mark.parametrize(
    "stage, head_size",
    [(self_attention, C), (multihead_attention, C // H)],
    ids=["self_attention", "multihead_attention"],
)
@pytest.mark.usefixtures("double_precision")
def test_a_head_is_scaled_dot_product_attention(stage, head_size):
    head = scatter(stage.Head(tiny(stage), head_size))

    def theirs(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            head.query(x), head.key(x), head.value(x), is_causal=True
        )

    assert_same(head, theirs)


@pytest.mark.usefixtures("double_precision")
def test_all_heads_at_once_compute_what_they_do_one_after_the_other():
    config = tiny(multihead_attention)
    one_by_one = scatter(multihead_attention.MultiHeadAttention(config))
    at_once = multihead_attention.BatchedMultiHeadAttention(config)
    at_once.projection = one_by_one.projection
    rows = [
        getattr(head, part).weight
        for part in ("query", "key", "value")
        for head in one_by_one.heads
    ]
    at_once.query_key_value.weight.data = torch.cat(rows)
    assert_same(one_by_one, at_once)


@pytest.mark.parametrize("stage", STAGES[2:], ids=lambda stage: stage.__name__)
@pytest.mark.usefixtures("double_precision")
def test_batched_attention_is_multihead_attention(stage):
    attention = scatter(stage.BatchedMultiHeadAttention(tiny(stage)))
    oracle = pytorch_attention(attention)
    mask = causal_mask()
    assert_same(attention, lambda x: oracle(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize(
    "stage, options, norm_first",
    [
        (residual, {}, True),  # without norms there is nothing to come first
        (layer_norm, {"norm": "pre"}, True),
        (layer_norm, {"norm": "post"}, False),
        (gpt, {}, True),
    ],
    ids=["residual", "layer_norm-pre", "layer_norm-post", "gpt"],
)
@pytest.mark.usefixtures("double_precision")
def test_a_block_is_a_transformer_layer(stage, options, norm_first):
    block = scatter(stage.Block(tiny(stage, **options)), std=0.3)
    oracle = pytorch_block(block, norm_first)
    mask = causal_mask()
    assert_same(block, lambda x: oracle(x, src_mask=mask))


# What gpt.py adds.


def test_the_full_preset_has_its_number_of_parameters():
    config = gpt.PRESETS["full"]
    V, T, C = config.vocab_size, config.block_size, config.n_embd
    with torch.device("meta"):  # counting needs no memory
        model = gpt.Model(config)
    embeddings = V * C + T * C
    attention = 3 * C * C + (C * C + C)
    feed_forward = (4 * C * C + 4 * C) + (4 * C * C + C)
    block = attention + feed_forward + 2 * 2 * C
    to_logits = 2 * C + C * V  # the last norm, and no bias
    expected = embeddings + config.n_layer * block + to_logits
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 10_788_864


def test_weights_start_small_and_smaller_where_they_feed_the_sum():
    config = gpt.PRESETS["small"]
    torch.manual_seed(1)
    model = gpt.Model(config)
    feeding_the_sum = [block.attention.projection.weight for block in model.blocks]
    feeding_the_sum += [block.feed_forward.narrow.weight for block in model.blocks]
    feeding_the_sum = set(map(id, feeding_the_sum))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(2 * config.n_layer) if id(parameter) in feeding_the_sum else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.05 * std), name
        else:
            start = 0 if name.endswith("bias") else 1  # the norms begin as no change at all
            assert (parameter == start).all(), name


def test_weight_decay_shrinks_the_matrices_alone():
    config = tiny(gpt, weight_decay=0.5, learning_rate=0.1, warmup_iters=0)
    model = scatter(gpt.Model(config))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = gpt.make_optimizer(model, config)
    for parameter in model.parameters():  # nothing to learn, so that only the decay is left
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = 1 - 0.1 * 0.5 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * shrunk)


def test_every_weight_is_trained():
    config = tiny(gpt)
    model = gpt.Model(config)
    groups = gpt.make_optimizer(model, config).param_groups
    trained = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize(
    "config",
    [*gpt.PRESETS.values(), gpt.Config(warmup_iters=0), gpt.Config(warmup_iters=1, max_iters=500)],
    ids=[*gpt.PRESETS, "no warm-up", "short"],
)
def test_the_learning_rate_rises_then_falls_to_a_tenth(config):
    top, warmup = config.learning_rate, config.warmup_iters
    rates = [gpt.learning_rate_at(step, config) for step in range(config.max_iters)]
    assert rates[:warmup] == pytest.approx([top * (i + 1) / warmup for i in range(warmup)])
    falling = rates[max(0, warmup - 1) :]
    assert falling[0] == max(rates) == pytest.approx(top)
    assert falling == sorted(falling, reverse=True)
    assert falling[len(falling) // 2] == pytest.approx(0.55 * top, rel=0.01)
    assert falling[-1] == pytest.approx(0.1 * top, rel=0.01)


class Unchanged(nn.Module):
    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return x


@pytest.mark.parametrize("place", ["attention", "block", "embedding"])
def test_dropout_works_while_training_alone(place):
    model = scatter(gpt.Model(tiny(gpt, dropout=0.5)))
    idx, _ = random_batch(V, 4, T)
    x = model.token_embedding(idx)
    block = model.blocks[0]
    parts = {"attention": (block.attention, x), "block": (block, x), "embedding": (model, idx)}
    part, given = parts[place]
    block.attention = Unchanged()  # so that the block is left with its own dropout,
    model.blocks = nn.ModuleList()  # and the model with that of the embedding

    part.train()
    assert not torch.equal(part(given)[0], part(given)[0])
    part.eval()
    assert torch.equal(part(given)[0], part(given)[0])


def test_dropout_changes_nothing_in_a_trained_model():
    silent = scatter(gpt.Model(tiny(gpt)))
    model = gpt.Model(tiny(gpt, dropout=0.5)).eval()
    model.load_state_dict(silent.state_dict())
    idx, _ = random_batch(V, 4, T)
    torch.testing.assert_close(model(idx)[0], silent(idx)[0])


# The bigram table, and the exact loss.


def markov_text(length: int) -> Tensor:
    """A text of five characters in which each knows only the one before it."""
    generator = torch.Generator().manual_seed(1)
    odds = torch.rand(5, 5, generator=generator) ** 2
    text = [0]
    for _ in range(length - 1):
        text.append(int(torch.multinomial(odds[text[-1]], 1, generator=generator)))
    return torch.tensor(text)


def test_the_trained_bigram_table_is_the_counted_one():
    text = markov_text(3000)
    idx, targets = text[:-1], text[1:]
    counts = torch.zeros(5, 5).index_put((idx, targets), torch.tensor(1.0), accumulate=True)
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    entropy = -(counts * frequencies.log()).nansum() / len(idx)

    model = bigram.Model(bigram.Config(vocab_size=5))
    learn(model, idx[None], targets[None], steps=400, learning_rate=0.1)
    odds = model.logit_table.weight.softmax(dim=1)
    torch.testing.assert_close(odds, frequencies, rtol=0, atol=0.005)
    assert exact_loss(model, text) == pytest.approx(entropy.item(), abs=5e-4)


@pytest.mark.parametrize("length", [2, 10, 32, 33, 34, 65, 100, 20_000])
def test_the_exact_loss_is_the_mean_over_consecutive_windows(length):
    """Windows of 32: none whole, whole ones alone, a shorter last one, many forward passes."""
    model = scatter(gpt.Model(tiny(gpt, block_size=32, dropout=0.5))).eval()
    text = torch.randint(V, (length,), generator=torch.Generator().manual_seed(1))
    total, predictions = 0.0, 0
    with torch.no_grad():
        for start in range(0, length - 1, 32):
            window = text[start : start + 33]
            logits, _ = model(window[None, :-1])
            total += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
            predictions += len(window) - 1
    assert predictions == length - 1

    model.train()
    assert exact_loss(model, text) == pytest.approx(total / predictions, rel=1e-5)
    assert model.training  # as it was


# Sampling.


def sample(model: nn.Module, prompt: str, length: int, **options: object) -> str:
    return "".join(generate(model, TOKENIZER, prompt, length, **options))


def greedy_sample(model: nn.Module, prompt: str, length: int) -> str:
    """Always the likeliest character; what no longer fits into the context is halved."""
    text, context = "", prompt[-model.block_size :]
    for _ in range(length):
        if len(context) == model.block_size + 1:
            context = context[-max(1, model.block_size // 2) :]
        logits, _ = model(torch.tensor([TOKENIZER.encode(context)]))
        character = TOKENIZER.decode([int(logits[0, -1].argmax())])
        text, context = text + character, context + character
    return text


@every_stage
@pytest.mark.parametrize("prompt", ["a", "cabbageheadache"])
def test_without_chance_the_likeliest_character_follows(stage, prompt):
    model = scatter(stage.Model(tiny(stage)))
    expected = greedy_sample(model.eval(), prompt, 30)
    for temperature in (0, 1e-30, 1e-40):  # dividing a logit by the last overflows
        assert sample(model, prompt, 30, temperature=temperature) == expected
    assert sample(model, prompt, 30, top_k=1) == expected


@every_stage
def test_a_seed_is_a_text(stage):
    model = scatter(stage.Model(tiny(stage)), std=0.1)
    texts = [sample(model, "a", 50, seed=seed) for seed in (1, 1, 2)]
    assert len(texts[0]) == 50
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, V, 2 * V])
def test_a_character_is_drawn_as_often_as_the_model_says(temperature, top_k):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(V, generator=generator)
    draws = [choose(logits, temperature, top_k, generator) for _ in range(5000)]
    counts = torch.bincount(torch.tensor(draws), minlength=V)

    likeliest = logits.argsort(descending=True)[:top_k]
    expected = torch.zeros(V)
    expected[likeliest] = 5000 * (logits[likeliest] / temperature).softmax(dim=0)
    assert counts[expected == 0].sum() == 0  # no other than the top k
    # A count spreads like the square root of what is expected; five times that does not happen.
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()
