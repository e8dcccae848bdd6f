"""The ideas since GPT-2: each does what it says; without all of them the model is gpt.py's."""

from dataclasses import fields, replace

import gpt
import modern_gpt
from modern_gpt import Config, Model, RMSNorm, RoPE

import pytest
import torch
from conftest import SMALL, SMALL_MODEL, losses
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import randomize, sample
from torch import nn
from torch.nn import functional as F

IDEAS = [field.name for field in fields(Config) if field.type is bool]
NO_IDEAS = dict.fromkeys(IDEAS, False)
OFF = ["--no-" + idea.replace("_", "-") for idea in IDEAS]
SIZES = {"vocab_size": 11, "block_size": 12, "n_embd": 24, "n_head": 4, "n_layer": 3, "dropout": 0}
CONFIG = Config(**SIZES)


def random_model(**options: object) -> nn.Module:
    """No weight is at zero, so that every parameter matters."""
    return randomize(Model(replace(CONFIG, **options)), std=0.3)


# Without all ideas.


def test_without_all_ideas_it_is_gpts_model():
    models = []
    for model_class, config in (
        (gpt.Model, gpt.Config(**SIZES)),
        (Model, replace(CONFIG, **NO_IDEAS)),
    ):
        torch.manual_seed(1)
        models.append(model_class(config))
    old, new = (dict(model.named_parameters()) for model in models)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)  # sampled alike
    torch.manual_seed(2)
    idx, targets = torch.randint(11, (2, 5, 12))
    (old_logits, old_loss), (new_logits, new_loss) = (model(idx, targets) for model in models)
    assert torch.equal(old_logits, new_logits)
    old_loss.backward()
    new_loss.backward()
    assert all(torch.equal(old[name].grad, new[name].grad) for name in old)


def test_without_all_ideas_it_learns_as_gpt_does(run, tmp_path):
    # With a power of two as its peak the learning rate is rounded alike in both.
    flags = [*SMALL, *SMALL_MODEL["gpt"], "--learning-rate", 2**-7, "--preset", "small"]
    assert run("gpt", *flags, "--out", "old")[0] == 0
    assert run("modern_gpt", *flags, *OFF, "--out", "new")[0] == 0
    rows = [[line.split(",")[:3] for line in losses(tmp_path / name)] for name in ("old", "new")]
    assert rows[0] == rows[1]
    old, new = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["parts"]["model"]
        for name in ("old", "new")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


# Each idea.


def test_each_idea_makes_a_difference_by_itself(run, tmp_path):
    seen = {}
    for flags in ([], *([off] for off in OFF)):
        words = [*SMALL, *SMALL_MODEL["modern_gpt"], "--device", "cpu", *flags, "--overwrite"]
        assert run("modern_gpt", *words, "--out", "run")[0] == 0
        seen[" ".join(flags)] = losses(tmp_path / "run")[-1]
    assert len(set(seen.values())) == 1 + len(IDEAS), seen


def test_each_idea_is_in_the_model_only_where_it_is_on():
    full = Model(CONFIG)
    without = {idea: Model(replace(CONFIG, **{idea: False})) for idea in IDEAS}

    def count(model: nn.Module, kind: type) -> int:
        return sum(isinstance(part, kind) for part in model.modules())

    # One is the embedding's; three are for queries and keys, one in each block; seven are others.
    assert count(full, RMSNorm) == 1 + 3 + 7
    assert count(without["rms_norm"], RMSNorm) == 1 + 3
    assert count(without["rms_norm"], nn.LayerNorm) == 7
    assert count(without["qk_norm"], RMSNorm) == 1 + 7
    assert count(without["embedding_norm"], RMSNorm) == 3 + 7
    assert (count(full, RoPE), count(without["rope"], RoPE)) == (3, 0)
    assert (count(full, nn.Embedding), count(without["rope"], nn.Embedding)) == (1, 2)
    for idea, model in without.items():
        names = [name for name, _ in model.named_parameters()]
        expected = {"bias_free": 3 * 3, "rms_norm": 7}.get(idea, 0)
        assert sum(name.endswith("bias") for name in names) == expected
        lambdas = sum("skip_lambda" in name for name in names)
        assert lambdas == (0 if idea == "embedding_skip" else 3)
    x = torch.randn(2, 5, 24)
    assert torch.equal(full.blocks[0](x, x), x)  # blocks start as identities, and λ at 0
    assert not torch.equal(without["zero_init"].blocks[0](x, x), x)
    for model, activation in ((full, lambda x: x.relu() ** 2), (without["squared_relu"], F.relu)):
        mlp = randomize(model.blocks[0].feed_forward)
        torch.testing.assert_close(mlp(x), mlp.down_proj(activation(mlp.up_proj(x))))


def test_the_token_shift_adds_a_multiple_of_the_embedding_before():
    model, seen = random_model(), []
    model.embedding_norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    idx = torch.randint(11, (2, 9))
    model(idx)
    x = model.token_embedding(idx)
    assert torch.equal(seen[0][:, 0], x[:, 0])
    torch.testing.assert_close(seen[0][:, 1:], x[:, 1:] + model.shift_scale * x[:, :-1])


def test_the_embedding_skip_adds_lambda_times_the_embedding():
    block = random_model().blocks[0]
    x, embedding = torch.randn(2, 2, 5, 24)
    scale = block.skip_lambda.item()
    result = block(x, embedding)
    block.skip_lambda.data.zero_()
    torch.testing.assert_close(result, block(x + scale * embedding, embedding))


@given(shift=st.integers(0, 5000), size=st.sampled_from([2, 4, 32, 64]))
@settings(deadline=None, max_examples=30)
def test_with_rope_scores_depend_on_the_distance_alone(shift, size):
    torch.manual_seed(shift)
    query, key = torch.randn(2, 9, size, dtype=torch.float64)
    rotate = RoPE(size).double()
    here = rotate(query, 0) @ rotate(key, 0).T
    there = rotate(query, shift) @ rotate(key, shift).T
    torch.testing.assert_close(here, there, rtol=0, atol=1e-6)
    # Not because nothing is rotated: at another distance the same two have another score.
    query, key = query[:1].expand(9, -1), key[:1].expand(9, -1)
    scores = rotate(query, shift) @ rotate(key, shift).T
    assert (scores[0] - scores[0, 0]).abs()[1:].min() > 1e-6


def test_rope_rotates_as_the_formula_says():
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])  # channels 0 and 2 are a point, and 1 and 3
    rotated = RoPE(4)(x, 5)
    fast, slow = torch.tensor(5.0), torch.tensor(5.0 / 100)
    expected = [fast.cos(), -2 * slow.sin(), fast.sin(), 2 * slow.cos()]
    torch.testing.assert_close(rotated[0], torch.stack(expected))


def test_rms_norm_is_pytorchs():
    x = torch.randn(5, 7, 24) * 3
    torch.testing.assert_close(RMSNorm()(x), F.rms_norm(x, (24,), eps=1e-6))
    assert RMSNorm()(torch.zeros(2, 24)).isfinite().all()


@pytest.mark.parametrize("rope", [True, False])
def test_qk_norm_bounds_every_score(rope, monkeypatch):
    seen, attention = [], modern_gpt.attention

    def watched(query: torch.Tensor, key: torch.Tensor, *others: object) -> torch.Tensor:
        seen.append(query @ key.transpose(-2, -1) * 6**-0.5)
        return attention(query, key, *others)

    monkeypatch.setattr(modern_gpt, "attention", watched)
    for qk_norm in (True, False):
        model = random_model(rope=rope, qk_norm=qk_norm)
        model.blocks[0].attention(torch.randn(2, 9, 24) * 1000)
    bound = 6**0.5 * (1 + 1e-5)  # two vectors of norm √D, over √D
    assert seen[0].abs().max() <= bound < seen[1].abs().max()


def test_muon_takes_the_matrices_in_the_blocks_and_adamw_the_rest():
    config = replace(CONFIG, muon_learning_rate=0.02, muon_momentum=0.7, weight_decay=0.3)
    model = Model(config)
    adamw, muon = modern_gpt.make_optimizers(model, config)
    assert isinstance(muon, torch.optim.Muon)
    (group,) = muon.param_groups
    inside = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    assert {id(p) for p in group["params"]} == inside
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.7, 0.3)
    assert group["adjust_lr_fn"] == "match_rms_adamw"
    others = {id(p) for each in adamw.param_groups for p in each["params"]}
    assert not others & inside
    assert others | inside == {id(p) for p in model.parameters()}
    for each in adamw.param_groups:
        (dim,) = {p.dim() for p in each["params"]}
        assert each["weight_decay"] == (0.3 if dim == 2 else 0)
    (alone,) = modern_gpt.make_optimizers(model, replace(config, muon=False))
    everything = {id(p) for each in alone.param_groups for p in each["params"]}
    assert everything == {id(p) for p in model.parameters()}


def test_the_learning_rate_warms_up_holds_and_decays_to_zero():
    config = replace(CONFIG, max_iters=100, warmup_iters=10, cooldown=0.5)
    factors = [modern_gpt.learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:51] == [1.0] * 42
    assert factors[75] == 0.5
    assert factors[99] == pytest.approx(0.02)
    assert modern_gpt.learning_rate_factor(0, replace(config, warmup_iters=0, cooldown=1)) == 1
    config = replace(config, linear_decay=False)
    for step in range(100):  # gpt.py's
        expected = gpt.learning_rate_at(step, config) / config.learning_rate
        assert modern_gpt.learning_rate_factor(step, config) == pytest.approx(expected)


def test_both_optimizers_follow_the_schedule(small_run, tmp_path):
    rates = ["--muon-learning-rate", 0.02, "--learning-rate", 0.004]
    assert small_run("modern_gpt", *rates, "--out", "run")[0] == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    config = Config(**checkpoint["config"])
    factor = modern_gpt.learning_rate_factor(config.max_iters - 1, config)
    assert 0 < factor < 1
    for name, peak in (("optimizer 0", 0.004), ("optimizer 1", 0.02)):
        for group in checkpoint["parts"][name]["param_groups"]:
            assert group["lr"] == pytest.approx(peak * factor)


# What a position sees, and the cache.


def test_a_position_sees_as_many_as_the_context_holds():
    for token_shift in (False, True):
        model = random_model(n_layer=1, token_shift=token_shift)
        idx = torch.randint(11, (1, 40))
        changed = idx.clone()
        changed[:, 20] = (idx[:, 20] + 1) % 11
        seen = (model(idx)[0] != model(changed)[0]).any(dim=-1)[0].nonzero().flatten()
        assert seen.tolist() == list(range(20, 20 + 12 + token_shift))


@pytest.mark.parametrize("options", [{}, {"rope": False}, NO_IDEAS], ids=["all", "rope", "none"])
def test_the_cache_does_not_change_the_text_and_slides(options):
    """With RoPE every character is computed once, even beyond the context length."""
    model, sizes = random_model(**options), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[1]))
    text = sample(model, "abc", 60)
    assert (sizes == [3] + [1] * 59) == model.slides == options.get("rope", True)
    assert text == sample(model, "abc", 60, cached=False)
    assert len(set(text)) > 5


def test_an_odd_head_size_is_refused(run, tmp_path):
    flags = [*SMALL, "--n-embd", 6, "--n-head", 2, "--n-layer", 1]
    code, output, errors = run("modern_gpt", *flags)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "--rope needs an even head size" in errors and "3" in errors
    assert not (tmp_path / "runs").exists()
    assert run("modern_gpt", *flags, "--no-rope")[0] == 0
