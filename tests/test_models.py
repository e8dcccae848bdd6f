"""The models compute what the lessons say: no looking ahead, same results as PyTorch's modules."""

import importlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import batched_attention
import bigram
import feed_forward
import gpt
import layer_norm
import modern_gpt
import multihead_attention
import residual
import self_attention
from common import Tokenizer, choose, draw_batch
from sample import generate
from trainer.evaluate import exact_loss

import conftest
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = [importlib.import_module(name) for name in conftest.STAGES]
VARIANTS = [(stage, {}) for stage in STAGES] + [
    (residual, {"residual": False}),
    (layer_norm, {"norm": "post"}),
    (modern_gpt, {"rope": False}),
    (modern_gpt, {"qk_norm": False, "rms_norm": False, "embedding_norm": False}),
]
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
NAMES = ["-".join([stage.__name__, *options]) for stage, options in VARIANTS]
every_variant = pytest.mark.parametrize("stage, options", VARIANTS, ids=NAMES)

V, T, C, H = 11, 7, 12, 3
SIZES = {"vocab_size": V, "block_size": T, "n_embd": C, "n_head": H, "n_layer": 2, "dropout": 0.0}
TOKENIZER = Tokenizer("abcdefghijk")


def tiny(stage: ModuleType, **options: object) -> object:
    """The stage's config with small sizes."""
    sizes = {name: size for name, size in SIZES.items() if hasattr(stage.Config, name)}
    return stage.Config(**sizes | options)


@pytest.fixture
def double_precision() -> Iterator[None]:
    """For comparisons: rounding errors stay far below any mistake."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomize(module: nn.Module, std: float = 0.5) -> nn.Module:
    """Give every weight a random value: zeros and ones would hide one that is left out."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def random_batch(vocab_size: int, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(vocab_size, (10_000,), generator=generator)
    return draw_batch(text, block_size, batch_size, generator)


# Every stage.


@every_variant
@pytest.mark.parametrize("length", [1, T - 2, T])
def test_a_model_gives_logits_and_the_mean_cross_entropy(stage, options, length):
    model = randomize(stage.Model(tiny(stage, **options)))
    idx, targets = random_batch(V, 4, length)
    logits, no_loss = model(idx)
    same_logits, loss = model(idx, targets)
    assert model.block_size == T
    assert logits.shape == (4, length, V)
    assert no_loss is None
    assert torch.equal(logits, same_logits)
    log_likelihoods = logits.log_softmax(dim=-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss, -log_likelihoods.mean())


@every_variant
@pytest.mark.usefixtures("double_precision")
def test_no_character_reaches_an_earlier_logit(stage, options):
    model = randomize(stage.Model(tiny(stage, **options))).eval()
    idx, _ = random_batch(V, 1, T)
    for position in range(T):
        texts = idx.repeat(V, 1)
        texts[:, position] = torch.arange(V)  # every character at this one position
        logits, _ = model(texts)
        change = (logits - logits[:1]).abs().amax(dim=(0, 2))  # one number for each position
        assert (change[:position] < 1e-9).all()
        # The check above could fail: the change does reach all positions that may see it.
        last = position + 1 if stage is bigram else T
        assert (change[position:last] > 1e-6).all()


# The parts against PyTorch's own, with the same weights.


def assert_same(ours: Callable, theirs: Callable) -> None:
    """Both give the same results, and the same gradients for their input."""
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
            "in_proj_weight": attention.qkv_proj.weight,
            "in_proj_bias": torch.zeros(3 * C),  # ours has none
            "out_proj.weight": attention.out_proj.weight,
            "out_proj.bias": attention.out_proj.bias,
        }
    )
    return oracle


def pytorch_block(block: nn.Module, norm_first: bool) -> nn.TransformerEncoderLayer:
    oracle = nn.TransformerEncoderLayer(
        C, H, 4 * C, dropout=0.0, activation="relu", batch_first=True, norm_first=norm_first
    )
    oracle.self_attn = pytorch_attention(block.attention)
    oracle.linear1, oracle.linear2 = block.feed_forward.up_proj, block.feed_forward.down_proj
    oracle.norm1 = getattr(block, "attention_norm", nn.Identity())
    oracle.norm2 = getattr(block, "feed_forward_norm", nn.Identity())
    return oracle


@pytest.mark.parametrize("stage, head_size", [(self_attention, C), (multihead_attention, C // H)])
@pytest.mark.usefixtures("double_precision")
def test_a_head_is_scaled_dot_product_attention(stage, head_size):
    head = randomize(stage.Head(tiny(stage), head_size))

    def theirs(x: Tensor) -> Tensor:
        query, key, value = head.query(x), head.key(x), head.value(x)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    assert_same(head, theirs)


@pytest.mark.usefixtures("double_precision")
def test_batched_attention_is_the_list_of_heads():
    """Its weights are the list's, one above the other; so are their gradients."""
    listed = randomize(multihead_attention.MultiHeadAttention(tiny(multihead_attention)))
    batched = batched_attention.MultiHeadAttention(tiny(batched_attention))
    layers = [getattr(head, name) for name in ("query", "key", "value") for head in listed.heads]
    batched.qkv_proj.weight.data = torch.cat([layer.weight.data for layer in layers])
    batched.out_proj.load_state_dict(listed.out_proj.state_dict())
    assert_same(listed, batched)

    x, direction = torch.randn(2, 2, T, C)
    for attention in (listed, batched):
        attention(x).backward(direction)
    torch.testing.assert_close(
        batched.qkv_proj.weight.grad, torch.cat([layer.weight.grad for layer in layers])
    )
    for ours, theirs in zip(
        batched.out_proj.parameters(), listed.out_proj.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("stage", STAGES[3:8], ids=lambda stage: stage.__name__)
@pytest.mark.usefixtures("double_precision")
def test_batched_attention_is_pytorchs(stage):
    attention = randomize(stage.MultiHeadAttention(tiny(stage)))
    oracle = pytorch_attention(attention)
    mask = causal_mask()
    assert_same(attention, lambda x: oracle(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.usefixtures("double_precision")
def test_feed_forward_is_two_layers_with_a_relu_between():
    ours = randomize(feed_forward.FeedForward(tiny(feed_forward)))
    assert_same(ours, nn.Sequential(ours.up_proj, nn.ReLU(), ours.down_proj))


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
    block = randomize(stage.Block(tiny(stage, **options)), std=0.3)
    oracle = pytorch_block(block, norm_first)
    mask = causal_mask()
    assert_same(block, lambda x: oracle(x, src_mask=mask))


# What gpt.py adds.


def test_the_full_preset_has_its_number_of_parameters():
    with torch.device("meta"):  # counting needs no memory
        model = gpt.Model(gpt.PRESETS["full"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 10_788_864


def test_weights_start_small_and_smaller_where_they_feed_the_residual_stream():
    config = gpt.PRESETS["small"]
    torch.manual_seed(1)
    model = gpt.Model(config)
    feeding = {id(block.attention.out_proj.weight) for block in model.blocks}
    feeding |= {id(block.feed_forward.down_proj.weight) for block in model.blocks}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(2 * config.n_layer) if id(parameter) in feeding else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.05 * std), name
        else:
            start = 0 if name.endswith("bias") else 1  # the norms begin as no change at all
            assert (parameter == start).all(), name


def test_weight_decay_shrinks_the_matrices_alone_and_every_weight_is_trained():
    config = tiny(gpt, weight_decay=0.5, learning_rate=0.1, warmup_iters=0)
    model = randomize(gpt.Model(config))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = gpt.make_optimizer(model, config)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))
    for parameter in model.parameters():  # nothing to learn, so that only the decay is left
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize(
    "config",
    [*gpt.PRESETS.values(), gpt.Config(warmup_iters=0), gpt.Config(warmup_iters=1, max_iters=500)],
    ids=[*gpt.PRESETS, "no warm-up", "short"],
)
def test_the_learning_rate_warms_up_then_decays_to_a_tenth(config):
    peak, warmup = config.learning_rate, config.warmup_iters
    rates = [gpt.learning_rate_at(step, config) for step in range(config.max_iters)]
    assert rates[:warmup] == pytest.approx([peak * (i + 1) / warmup for i in range(warmup)])
    decaying = rates[max(0, warmup - 1) :]
    assert decaying[0] == max(rates) == pytest.approx(peak)
    assert decaying == sorted(decaying, reverse=True)
    assert decaying[len(decaying) // 2] == pytest.approx(0.55 * peak, rel=0.01)
    assert decaying[-1] == pytest.approx(0.1 * peak, rel=0.01)


def test_dropout_is_where_gpt2_has_it(monkeypatch):
    """On the embedding, on attention weights, and on what each sublayer adds."""
    seen = []
    monkeypatch.setattr(gpt.Dropout, "forward", lambda self, x: seen.append((self.p, x.shape)) or x)
    gpt.Model(tiny(gpt, dropout=0.5))(random_batch(V, 4, T)[0])
    x, weights = (0.5, (4, T, C)), (0.5, (4 * H, T, T))
    assert seen == [x, *(2 * [weights, x, x])]


# The bigram table, and the exact loss.


def test_the_trained_bigram_table_is_the_counted_one():
    generator = torch.Generator().manual_seed(1)
    text = (torch.rand(3000, generator=generator) ** 2 * 5).cumsum(0).long() % 5
    idx, targets = text[:-1], text[1:]
    counts = torch.zeros(5, 5).index_put((idx, targets), torch.tensor(1.0), accumulate=True)
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    entropy = -(counts * frequencies.log()).nansum() / len(idx)

    model = bigram.Model(bigram.Config(vocab_size=5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        model(idx[None], targets[None])[1].backward()
        optimizer.step()
    learned = model.logit_table.weight.softmax(dim=1)
    torch.testing.assert_close(learned, frequencies, rtol=0, atol=0.005)
    assert exact_loss(model, text) == pytest.approx(entropy.item(), abs=5e-4)


@pytest.mark.parametrize("length", [2, 10, 32, 33, 34, 65, 100, 20_000])
def test_the_exact_loss_is_the_mean_over_consecutive_windows(length):
    """Windows of 32: none whole, whole ones alone, a shorter last one, many forward passes."""
    model = randomize(gpt.Model(tiny(gpt, block_size=32, dropout=0.5))).eval()
    text = torch.randint(V, (length,), generator=torch.Generator().manual_seed(1))
    total, predictions = 0.0, 0
    with torch.no_grad():
        for start in range(0, length - 1, 32):
            window = text[start : start + 33]
            logits, _ = model(window[None, :-1])
            total += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
            predictions += len(window) - 1
    assert predictions == length - 1

    for training in (True, False):
        model.train(training)
        assert exact_loss(model, text) == pytest.approx(total / predictions, rel=1e-5)
        assert model.training == training  # it restores the mode


# Sampling.


def sample(
    model: nn.Module, prompt: str, length: int, cached: bool = True, **options: object
) -> str:
    new_cache = model.new_cache if cached else lambda: None
    with mock.patch.object(model, "new_cache", new_cache):
        return "".join(generate(model, TOKENIZER, prompt, length, **options))


@every_stage
@pytest.mark.parametrize("prompt", ["a", "cabbageheadache"])
def test_at_temperature_zero_the_most_likely_character_follows(stage, prompt):
    model = randomize(stage.Model(tiny(stage)), std=0.1)
    expected = sample(model, prompt, 30, temperature=0)
    logits, _ = model(torch.tensor([TOKENIZER.encode(prompt[-T:])]))
    assert expected[0] == TOKENIZER.decode([int(logits[0, -1].argmax())])
    assert sample(model, prompt, 30, temperature=1e-40) == expected  # one divided by it overflows
    assert sample(model, prompt, 30, top_k=1) == expected
    samples = [sample(model, prompt, 30, seed=seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_k", [None, 3, 2 * V])
def test_characters_are_sampled_with_the_models_probabilities(temperature, top_k):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(V, generator=generator)
    sampled = [choose(logits, temperature, top_k, generator) for _ in range(5000)]
    counts = torch.bincount(torch.tensor(sampled), minlength=V)

    likely = logits.argsort(descending=True)[:top_k]
    expected = torch.zeros(V)
    expected[likely] = 5000 * (logits[likely] / temperature).softmax(dim=0)
    assert counts[expected == 0].sum() == 0  # none but the top k
    # A count's standard deviation is at most the square root of what is expected.
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()
