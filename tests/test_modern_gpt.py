"""The ideas since GPT-2: each does what it says, and without all of them the model is gpt.py's."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import SMALL, SMALL_MODEL, losses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gpt
import modern_gpt
from common import Tokenizer
from modern_gpt import Config, Idea, Model, RMSNorm, Rotary
from sample import generate

IDEAS = get_args(Idea)
SIZES = {"vocab_size": 11, "block_size": 12, "n_embd": 24, "n_head": 4, "n_layer": 3, "dropout": 0}
CONFIG = Config(**SIZES)
TOKENIZER = Tokenizer("abcdefghijk")


def awake(config: Config) -> nn.Module:
    """A model with no weight at zero, so that all its parts have a say."""
    torch.manual_seed(3)
    model = Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@given(shift=st.integers(0, 5000), size=st.sampled_from([2, 4, 32, 64]))
@settings(deadline=None, max_examples=30)
def test_rotary_scores_depend_on_the_distance_alone(shift: int, size: int):
    torch.manual_seed(shift)
    query, key = torch.randn(2, 9, size, dtype=torch.float64)
    rotate = Rotary(size).double()
    here = rotate(query, 0) @ rotate(key, 0).T
    there = rotate(query, shift) @ rotate(key, shift).T
    torch.testing.assert_close(here, there, rtol=0, atol=1e-6)
    # Not because nothing turns: the same two at another distance have another score.
    query, key = query[:1].expand(9, -1), key[:1].expand(9, -1)
    scores = rotate(query, shift) @ rotate(key, shift).T
    for offset in range(-8, 9):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)
    assert (scores[0] - scores[0, 0]).abs()[1:].min() > 1e-6


def test_rotary_turns_as_the_formula_says():
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])  # channels 0 and 2 are a point, and 1 and 3
    turned = Rotary(4)(x, 5)
    fast, slow = torch.tensor(5.0), torch.tensor(5.0 / 100)
    expected = [fast.cos(), -2 * slow.sin(), fast.sin(), 2 * slow.cos()]
    torch.testing.assert_close(turned[0], torch.stack(expected))


def test_rms_norm_is_pytorchs():
    x = torch.randn(5, 7, 24) * 3
    expected = nn.RMSNorm(24, eps=1e-6, elementwise_affine=False)(x)
    torch.testing.assert_close(RMSNorm()(x), expected)
    assert not list(RMSNorm().parameters())
    assert RMSNorm()(torch.zeros(2, 24)).isfinite().all()


def test_normalised_queries_and_keys_keep_every_score_in_bounds():
    attention = awake(CONFIG).blocks[0].attention
    x = torch.randn(2, 3, 4, 5, 6) * 1000  # (2, B, H, T, D)
    query, key = attention.rotate(attention.norm(x), 0)
    scores = (query * 6**-0.5) @ key.transpose(2, 3)
    assert scores.abs().max() <= 6**0.5 * (1 + 1e-5)


@pytest.mark.parametrize("n_head", [1, 4])
def test_without_all_ideas_it_is_gpts_model(n_head: int):
    sizes = SIZES | {"n_head": n_head}
    torch.manual_seed(1)
    old = gpt.Model(gpt.Config(**sizes))
    torch.manual_seed(1)
    new = Model(Config(**sizes, without=IDEAS))
    weights = {name.removeprefix("place."): value for name, value in new.state_dict().items()}
    assert weights.keys() == old.state_dict().keys()
    for name, value in old.state_dict().items():
        assert torch.equal(value, weights[name]), name  # drawn alike
    idx, targets = torch.randint(11, (2, 5, 12))
    (old_logits, old_loss), (new_logits, new_loss) = old(idx, targets), new(idx, targets)
    assert torch.equal(old_logits, new_logits)
    old_loss.backward()
    new_loss.backward()
    for (_, before), (_, after) in zip(
        sorted(old.named_parameters()),
        sorted((name.removeprefix("place."), each) for name, each in new.named_parameters()),
        strict=True,
    ):
        assert torch.equal(before.grad, after.grad)


def test_without_all_ideas_it_learns_as_gpt_does(run: Callable, tmp_path: Path):
    flags = [*SMALL, *SMALL_MODEL["gpt"], "--learning-rate", 1e-2]
    assert run("gpt", *flags, "--preset", "small", "--out", "old")[0] == 0
    without = ["--without", *IDEAS]
    assert run("modern_gpt", *flags, "--preset", "small", *without, "--out", "new")[0] == 0
    rows = [
        [line.split(",")[:3] for line in losses(tmp_path / folder)[1:]] for folder in ("old", "new")
    ]
    assert rows[0] == rows[1]
    samples = [
        (tmp_path / folder / "sample.txt").read_text(encoding="utf-8") for folder in ("old", "new")
    ]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("idea", IDEAS)
def test_each_idea_makes_a_difference_by_itself(idea: str, run: Callable, tmp_path: Path):
    flags = [*SMALL, *SMALL_MODEL["modern_gpt"]]
    assert run("modern_gpt", *flags, "--out", "all")[0] == 0
    assert run("modern_gpt", *flags, "--without", idea, "--out", "less")[0] == 0
    assert losses(tmp_path / "all")[-1] != losses(tmp_path / "less")[-1]


def norms(model: nn.Module) -> int:
    return sum(isinstance(part, RMSNorm) for part in model.modules())


def parts(model: nn.Module) -> set[str]:
    return {type(part).__name__ for part in model.modules()}


def test_each_idea_is_out_where_it_is_left_out():
    full = Model(CONFIG)
    assert not any(name.endswith("bias") for name, _ in full.named_parameters())
    assert {"RMSNorm", "Rotary", "Recall"} <= parts(full)
    assert not {"LayerNorm", "PositionTable"} & parts(full)

    def without(idea: str) -> nn.Module:
        return Model(replace(CONFIG, without=(idea,)))

    assert "LayerNorm" in parts(without("rms-norm"))
    # One is the embedding's; three are for heads, in a block each; seven for the other places.
    assert norms(full) == 1 + 3 + 7
    assert norms(without("rms-norm")) == 1 + 3
    assert norms(without("qk-norm")) == 1 + 7
    assert norms(without("embedding-norm")) == 3 + 7
    assert "Rotary" not in parts(without("rope"))
    biases = [name for name, _ in without("bias-free").named_parameters() if "bias" in name]
    assert len(biases) == 3 * 3
    assert without("squared-relu").blocks[0].feed_forward.activation is nn.functional.relu
    assert full.blocks[0].feed_forward.activation(torch.tensor(-3.0)) == 0
    assert full.blocks[0].feed_forward.activation(torch.tensor(3.0)) == 9
    for name, parameter in without("zero-init").named_parameters():
        assert parameter.any() or "share" in name, name
    assert "Recall" not in parts(without("re-embedding"))


def test_muon_moves_the_matrices_inside_and_adamw_the_rest():
    model = Model(CONFIG)
    adamw, muon = modern_gpt.make_optimizers(model, CONFIG)
    assert isinstance(muon, torch.optim.Muon)
    inside = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == inside
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not others & inside
    assert others | inside == {id(p) for p in model.parameters()}
    (alone,) = modern_gpt.make_optimizers(model, replace(CONFIG, without=("muon",)))
    everything = {id(p) for group in alone.param_groups for p in group["params"]}
    assert everything == {id(p) for p in model.parameters()}


def test_both_optimizers_take_their_settings_and_follow_the_schedule(
    small_run: Callable, tmp_path: Path
):
    flags = {"muon-learning-rate": 0.02, "muon-momentum": 0.7, "weight-decay": 0.3}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert small_run("modern_gpt", *words, "--learning-rate", 0.004, "--out", "run")[0] == 0
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    config = Config(**state["config"])
    share = modern_gpt.learning_rate_share(config.max_iters - 1, config)
    assert 0 < share < 1
    matrices, vectors = state["optimizers"][0]["param_groups"]
    (muon,) = state["optimizers"][1]["param_groups"]
    assert [group["lr"] for group in (matrices, vectors, muon)] == [
        *([pytest.approx(0.004 * share)] * 2),
        pytest.approx(0.02 * share),
    ]
    assert [group["weight_decay"] for group in (matrices, vectors, muon)] == [0.3, 0, 0.3]
    assert (muon["momentum"], muon["adjust_lr_fn"]) == (0.7, "match_rms_adamw")


def test_a_gradient_that_is_no_number_stops_one_optimizer_for_a_step(
    small_run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """As happens in float16: the scaler leaves out that optimizer's step, the other goes on."""
    initialize, scaler = Model.initialize, torch.amp.GradScaler

    def spoiling(self: nn.Module, config: Config) -> None:
        initialize(self, config)
        spoilt = iter([1.0] * 20 + [math.nan])  # late enough to be in training
        weight = self.blocks[0].feed_forward.narrow.weight
        weight.register_hook(lambda gradient: gradient * next(spoilt, 1))

    monkeypatch.setattr(Model, "initialize", spoiling)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    code, _, errors = small_run("modern_gpt", "--out", "run")
    assert (code, errors) == (0, "")
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    steps = state["config"]["max_iters"]
    taken = {int(each["step"]) for each in state["optimizers"][0]["state"].values()}
    assert taken == {steps}  # AdamW's, none left out
    assert state["scaler"]["scale"] == 2**15  # half of what it began with: Muon's was left out


def test_the_learning_rate_rises_holds_and_falls_to_nothing():
    config = replace(CONFIG, max_iters=100, warmup_iters=10, cooldown=0.5)
    shares = [modern_gpt.learning_rate_share(step, config) for step in range(100)]
    assert shares[0] == 0.1
    assert shares[9:51] == [1.0] * 42
    assert shares[75] == 0.5
    assert shares[99] == pytest.approx(0.02)
    assert modern_gpt.learning_rate_share(0, replace(config, warmup_iters=0, cooldown=1)) == 1


@pytest.mark.parametrize(
    "without", [(), *((idea,) for idea in IDEAS)], ids=lambda ideas: str(ideas)
)
def test_nothing_sees_the_future(without: tuple[str, ...]):
    model = awake(replace(CONFIG, without=without))
    idx = torch.randint(11, (2, 12))
    changed = idx.clone()
    changed[:, 7] = (idx[:, 7] + 1) % 11
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 8:] - after[:, 8:]).abs().amax(dim=(0, 2)).min() > 1e-6  # all later ones do


@pytest.mark.parametrize("without", [(), ("rope",)], ids=str)
def test_the_order_of_what_came_before_counts(without: tuple[str, ...]):
    """In the only block: what it reads is one vector per character, wherever that stands."""
    model = awake(replace(CONFIG, n_layer=1, without=without))
    idx = torch.arange(11)[None]
    swapped = idx.clone()
    swapped[0, [2, 5]] = idx[0, [5, 2]]
    before, after = model(idx)[0][0, -1], model(swapped)[0][0, -1]
    assert (before - after).abs().max() > 1e-3
    if without:  # and nothing else tells the order
        model.place.forward = modern_gpt.unchanged
    else:
        model.blocks[0].attention.rotate.forward = modern_gpt.unchanged
    torch.testing.assert_close(model(idx)[0][0, -1], model(swapped)[0][0, -1])


@pytest.mark.parametrize("length", [12, 40], ids=["a block", "longer"])
def test_one_call_of_pytorchs_does_the_same(length: int):
    idx, targets = torch.randint(11, (2, 2, length))
    results = []
    for fused in (True, False):
        model = awake(replace(CONFIG, fused=fused))
        logits, loss = model(idx, targets)
        loss.backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_character_sees_as_many_as_a_block_holds():
    model = awake(replace(CONFIG, n_layer=1))
    idx = torch.randint(11, (1, 40))
    changed = idx.clone()
    changed[:, 20] = (idx[:, 20] + 1) % 11
    seen = (model(idx)[0] != model(changed)[0]).any(dim=-1)[0].nonzero().flatten()
    assert seen.tolist() == list(range(20, 20 + 12))


@pytest.mark.parametrize("fused", [True, False])
@given(cuts=st.sets(st.integers(1, 39)))
@settings(deadline=None, max_examples=20)
def test_logits_do_not_depend_on_how_a_text_is_cut(fused: bool, cuts: set[int]):
    model = awake(replace(CONFIG, fused=fused))
    idx = torch.randint(11, (2, 40))
    caches = model.new_caches()
    edges = [0, *sorted(cuts), 40]
    pieces = [
        model(idx[:, start:end], caches=caches)[0]
        for start, end in zip(edges[:-1], edges[1:], strict=True)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx)[0], rtol=0, atol=1e-4)
    assert all(cache.pair.shape[3] == 11 for cache in caches)  # no more than can be seen


@pytest.mark.parametrize("without", [(), ("rope",), IDEAS], ids=str)
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_cache_does_not_change_the_text(without: tuple[str, ...], temperature: float):
    model = awake(replace(CONFIG, without=without))
    texts = [
        "".join(
            generate(model, TOKENIZER, "abcdefghijkabcdef", 60, temperature, seed=2, cached=cached)
        )
        for cached in (True, False)
    ]
    assert texts[0] == texts[1]
    assert temperature == 0 or len(set(texts[0])) > 5


def test_the_window_slides_without_computing_anything_again(monkeypatch: pytest.MonkeyPatch):
    model = awake(CONFIG)
    sizes = []
    forward = Model.forward

    def watched(self: nn.Module, idx: torch.Tensor, **named: object) -> tuple:
        sizes.append(idx.shape[1])
        return forward(self, idx, **named)

    monkeypatch.setattr(Model, "forward", watched)
    list(generate(model, TOKENIZER, "abc", 60))
    assert sizes == [3] + [1] * 59


def test_a_head_of_an_odd_size_is_refused(run: Callable, tmp_path: Path):
    flags = [*SMALL, "--n-embd", 6, "--n-head", 2, "--n-layer", 1]
    code, output, errors = run("modern_gpt", *flags)
    assert (code, output) == (2, "")
    assert errors == (
        "modern_gpt.py: rope turns pairs of channels, and a head has 3: make --n-embd / --n-head "
        "even, or add --without rope\n"
    )
    assert not (tmp_path / "runs").exists()
    assert run("modern_gpt", *flags, "--without", "rope")[0] == 0


def test_ideas_are_named_in_any_order(run: Callable, small_run: Callable):
    assert small_run("modern_gpt", "--without", "rope", "muon", "--out", "one")[0] == 0
    code, _, errors = run("modern_gpt", "--resume", "--out", "one", "--without", "muon")
    assert code == 2
    assert "was made with --without rope muon, not muon" in errors
    words = ["--without", "muon", "--without", "rope", "rope"]
    assert run("modern_gpt", "--resume", "--out", "one", *words)[0] == 0


def test_an_unknown_idea_is_refused(small_run: Callable, tmp_path: Path):
    code, _, errors = small_run("modern_gpt", "--without", "attention")
    assert code == 2
    assert errors.count("\n") == 1
    assert "'attention'" in errors and "rms-norm" in errors
    assert not (tmp_path / "runs").exists()


def test_a_run_of_gpt_is_no_run_of_it(small_run: Callable, run: Callable, tmp_path: Path):
    assert small_run("gpt", "--out", "old")[0] == 0
    for flags in (["--resume", "--out", "old"], ["--init-from", "old"]):
        code, _, errors = run("modern_gpt", *flags)
        assert code == 2
        assert "was made by gpt.py" in errors
    for name in ("best.pt", "checkpoint.pt"):  # even if it claims to be one
        state = torch.load(tmp_path / "old" / name, weights_only=True)
        torch.save(state | {"stage": "modern_gpt"}, tmp_path / "old" / name)
    for script, flags in (("modern_gpt", ["--resume", "--out", "old"]), ("sample", ["old"])):
        code, _, errors = run(script, *flags)
        assert code == 2
        assert "modern_gpt.py has changed since this run, which no longer fits it" in errors
