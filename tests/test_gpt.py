"""What makes gpt.py fast and strong: none of it changes what is learnt or written."""

import functools
import itertools
import json
import math
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import SMALL, SMALL_MODEL, STAGES, losses, same_state, start
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import STAGES as STAGE_MODULES
from test_models import TOKENIZER, C, H, T, V, random_batch, scatter, tiny
from torch import Tensor, nn
from torch.nn import functional as F

import gpt
import machine
import training
from gpt import Dropout
from sample import generate, load, store_by_columns

CPU = torch.device("cpu")
PLAIN = ["--dropout", "0", "--precision", "float32"]  # with these no chance and little rounding


def table(folder: Path) -> list[list[float]]:
    """The rows of losses.csv as numbers, without their seconds."""
    return [[float(value) for value in row.split(",")] for row in losses(folder)[1:]]


def assert_same_losses(folder: Path, expected: Path, tolerance: float) -> None:
    for row, expected_row in zip(table(folder), table(expected), strict=True):
        assert row == pytest.approx(expected_row, rel=0, abs=tolerance)


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# Dropout, whose random numbers are each cut into four.


def spread(p: float, count: int) -> float:
    """How far a share of `count` may lie from p: chance seldom goes as far as five of these."""
    return 5 * math.sqrt(p * (1 - p) / count) + 2**-16  # and p is rounded to 16 bits


@pytest.mark.parametrize("number_format", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.75, 0.999])
def test_dropout_silences_its_share_and_keeps_the_mean(p: float, number_format: torch.dtype):
    torch.manual_seed(1)
    x = torch.ones(3, 333, 1001, dtype=number_format)  # 999,999: no multiple of 4
    result = Dropout(p)(x)
    assert (result.shape, result.dtype) == (x.shape, number_format)
    silenced = result == 0
    assert silenced.double().mean().item() == pytest.approx(p, abs=spread(p, x.numel()))
    scale = torch.tensor(1 / (1 - p)).to(number_format)
    torch.testing.assert_close(result[~silenced], scale.expand((~silenced).sum()))
    rounding = torch.finfo(number_format).eps
    mean = pytest.approx(1, abs=spread(p, x.numel()) / (1 - p) + rounding)
    assert result.double().mean().item() == mean
    # Each of the four numbers that one draw is cut into, and the last one, which has no others.
    for i in range(4):
        piece = silenced.flatten()[i::4].double()
        assert piece.mean().item() == pytest.approx(p, abs=spread(p, len(piece)))


def test_dropout_that_leaves_almost_nothing():
    assert (Dropout(0.999999)(torch.ones(10_000)) == 0).double().mean() > 0.99


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9])
def test_dropout_treats_all_places_alike(size: int):
    torch.manual_seed(1)
    dropout, x, p = Dropout(0.3), torch.ones(size), 0.3
    silenced = torch.stack([dropout(x) == 0 for _ in range(4000)]).double()
    torch.testing.assert_close(
        silenced.mean(dim=0), torch.full((size,), p).double(), rtol=0, atol=spread(p, 4000)
    )


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 8, 1001])
def test_dropout_tells_nothing_of_one_place_by_another(distance: int):
    torch.manual_seed(1)
    p, x = 0.3, torch.ones(999, 1001)
    first, second = Dropout(p)(x), Dropout(p)(x)
    deviations = (first == 0).flatten().double() - p
    others = (second == 0).flatten().double() - p
    limit = 5 / math.sqrt(len(deviations))
    for one, other in ((deviations[distance:], deviations[:-distance]), (deviations, others)):
        assert abs((one * other).mean().item()) / (p * (1 - p)) < limit


def test_dropout_does_nothing_to_a_model_that_is_trained():
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_the_gradient_goes_where_dropout_let_the_number_through():
    torch.manual_seed(1)
    x = torch.randn(7, 13, 5).transpose(0, 2).requires_grad_()  # not in the order of memory
    result = Dropout(0.4)(x)
    result.sum().backward()
    silenced = result == 0
    assert 0 < silenced.sum() < x.numel()
    assert torch.equal(x.grad, (~silenced).float() / 0.6)
    torch.testing.assert_close(result, x * x.grad)


def test_dropout_follows_the_seed():
    x = torch.ones(1000)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(Dropout(0.5)(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(Dropout(0.5)(x), Dropout(0.5)(x))


# Attention: PyTorch's own call and the lines that spell it out; in one go and piece by piece.

PIECES = [[T], [1] * T, [3, 2, 1, 1], [3, T - 3], [T - 1, 1], [1, T - 1]]


def plain_attention(attention: nn.Module, x: Tensor) -> Tensor:
    """Straight from the textbook, with the weights of ours."""
    query, key, value = (
        half.unflatten(-1, (H, C // H)).transpose(1, 2)
        for half in attention.query_key_value(x).chunk(3, dim=-1)
    )
    result = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attention.projection(result.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("fused", [True, False, None])
def test_attention_is_the_same_in_one_call_and_piece_by_piece(fused: bool | None, pieces: list):
    attention = scatter(gpt.BatchedMultiHeadAttention(tiny(gpt, fused=fused))).double()
    x = torch.randn(2, T, C, dtype=torch.float64, requires_grad=True)
    expected = plain_attention(attention, x)
    caches = [gpt.Cache(), None] if len(pieces) == 1 else [gpt.Cache()]
    for cache in caches:
        result = torch.cat([attention(part, cache) for part in x.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(result, expected)
        direction = torch.randn_like(expected)
        weights = [x, attention.query_key_value.weight]
        torch.testing.assert_close(
            torch.autograd.grad(result, weights, direction),
            torch.autograd.grad(expected, weights, direction, retain_graph=True),
        )
        assert cache is None or cache.length == T


def test_both_ways_of_attention_silence_alike():
    """As many weights, and scaled up as much: no result is the same, but mean and spread are."""
    torch.manual_seed(1)
    x = torch.randn(1, T, C).expand(5000, T, C)
    attention = scatter(gpt.BatchedMultiHeadAttention(tiny(gpt, dropout=0.4)))
    results = []
    with torch.no_grad():
        for attention.fused in (True, False):
            expected = attention.eval()(x[:1])[0]
            result = attention.train()(x)
            results.append(result)
            limit = 6 * result.std(dim=0) / math.sqrt(len(x))
            assert ((result.mean(dim=0) - expected).abs() <= limit).all()
    torch.testing.assert_close(*(result.std(dim=0) for result in results), rtol=0.1, atol=1e-3)


# The cache, and what sampling does with it.


@settings(deadline=None)
@given(st.sets(st.integers(min_value=1, max_value=T - 1)), st.booleans())
def test_logits_do_not_depend_on_how_a_text_is_cut(cuts: set[int], fused: bool):
    model = scatter(gpt.Model(tiny(gpt, fused=fused)), std=0.2).eval()
    idx, targets = random_batch(V, 3, T)
    with torch.no_grad():
        expected, expected_loss = model(idx, targets)
        caches = model.new_caches()
        bounds = [0, *sorted(cuts), T]
        logits = [
            model(idx[:, begin:end], caches=caches)[0] for begin, end in itertools.pairwise(bounds)
        ]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)
        loss = model(idx, targets, model.new_caches())[1]
    torch.testing.assert_close(loss, expected_loss)


@functools.cache
def small_model(block_size: int) -> nn.Module:
    """Its odds are neither all alike nor sure, so that every text is possible."""
    return scatter(gpt.Model(tiny(gpt, block_size=block_size)), std=0.3)


BLOCK_SIZES = [1, 2, 3, 8]
PROMPTS = st.text(TOKENIZER.vocabulary, max_size=20)


@settings(deadline=None)
@given(
    block_size=st.sampled_from(BLOCK_SIZES),
    prompt=PROMPTS,
    times=st.integers(min_value=0, max_value=6),
    temperature=st.sampled_from([0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3]),
    seed=st.integers(min_value=0, max_value=1000),
)
def test_the_cache_does_not_change_the_text(
    block_size: int, prompt: str, times: int, **options: object
):
    model, length = small_model(block_size), times * block_size + 1
    texts = [
        "".join(generate(model, TOKENIZER, prompt, length, cached=cached, **options))
        for cached in (True, False)
    ]
    assert len(texts[0]) == length
    assert texts[0] == texts[1]


def sizes_given(model: nn.Module, prompt: str, length: int, **options: object) -> list[int]:
    """How many characters each call of the model gets, while it continues a prompt."""
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[1]))
    try:
        assert len(list(generate(model, TOKENIZER, prompt, length, **options))) == length
    finally:
        hook.remove()
    return sizes


@settings(deadline=None)
@given(st.sampled_from(BLOCK_SIZES), PROMPTS, st.integers(min_value=1, max_value=50))
def test_each_character_is_computed_once_and_half_a_window_again(
    block_size: int, prompt: str, length: int
):
    held = min(max(1, len(prompt)), block_size)
    new, all_of_them = [held], [held]
    while len(new) < length:
        full = held == block_size
        held = max(1, block_size // 2) if full else held + 1
        new.append(held if full else 1)
        all_of_them.append(held)

    model, computed = small_model(block_size), []
    hook = model.token_embedding.register_forward_hook(
        lambda _, given, embedded: computed.append(embedded.shape[1])
    )
    try:
        assert sizes_given(model, prompt, length) == computed == new
    finally:
        hook.remove()
    assert sizes_given(model, prompt, length, cached=False) == all_of_them


@pytest.mark.parametrize("prompt", ["", "a", "cabbage", "cabbageheadache"])
@pytest.mark.parametrize("stage", STAGE_MODULES, ids=lambda stage: stage.__name__)
def test_no_model_gets_more_than_it_can_see(stage: ModuleType, prompt: str):
    model = scatter(stage.Model(tiny(stage)))
    sizes = sizes_given(model, prompt, 5 * T)
    assert len(sizes) == 5 * T
    assert max(sizes) <= T
    assert max(sizes) == T or stage is gpt  # which sees the rest in its cache


def test_matrices_stored_by_columns_are_the_same_matrices():
    model = scatter(gpt.Model(tiny(gpt)), std=0.2).eval()
    idx, _ = random_batch(V, 3, T)
    with torch.no_grad():
        logits = model(idx)[0]
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        store_by_columns(model)
        torch.testing.assert_close(model(idx)[0], logits, rtol=0, atol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    linear = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]
    assert len(linear) == 4 * 2 + 1
    assert all(weight.stride() == (1, weight.shape[0]) for weight in linear)


def test_a_loaded_model_still_learns(small_run: Callable, tmp_path: Path):
    """And as the same model does whose matrices lie in their usual order."""
    assert small_run("gpt", *PLAIN, "--out", "run")[0] == 0
    model, tokenizer = load(tmp_path / "run", "cpu")
    checkpoint = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    config = gpt.Config(**checkpoint["config"])
    usual = gpt.Model(config)
    usual.load_state_dict(checkpoint["model"])
    idx, targets = random_batch(len(tokenizer.vocabulary), 4, config.block_size)
    courses = []
    for each in (model.train(), usual.train()):
        optimizer = gpt.make_optimizer(each, config)
        courses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            _, loss = each(idx, targets)
            loss.backward()
            optimizer.step()
            courses[-1].append(loss.item())
    assert courses[0] == pytest.approx(courses[1], abs=1e-4)
    assert courses[0][-1] < courses[0][0]


# A batch in portions.


@pytest.fixture
def portions_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the model gets at a time while it learns."""
    rows, forward = [], gpt.Model.forward

    def watched(self: nn.Module, idx: Tensor, *others: object, **named: object) -> tuple:
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            rows.append(len(idx))
        return forward(self, idx, *others, **named)

    monkeypatch.setattr(gpt.Model, "forward", watched)
    return rows


def test_portions_change_nothing_in_what_is_learnt(
    small_run: Callable, portions_seen: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for count in (1, 2, 4):
        flags = [*PLAIN, "--grad-accumulation", count, "--out", f"in {count}"]
        portions_seen.clear()
        assert small_run("gpt", *flags)[0] == 0
        # 20 steps of so many portions; beside them a few rehearsals, in which nothing is learnt.
        assert 0 <= portions_seen.count(4 // count) - 20 * count <= 3
        assert_same_losses(tmp_path / f"in {count}", tmp_path / "in 1", 1e-4)

    monkeypatch.setattr(machine, "PORTION", 2 * 8 * 8)  # the cache holds two rows
    portions_seen.clear()
    assert small_run("gpt", *PLAIN, "--out", "as fits")[0] == 0
    assert 0 <= portions_seen.count(2) - 20 * 2 <= 3
    assert set(portions_seen) <= {1, 2}
    assert_same_losses(tmp_path / "as fits", tmp_path / "in 1", 1e-4)


def test_a_gradient_cut_to_nothing_moves_nothing(small_run: Callable, tmp_path: Path):
    """It is far below the 1e-8 that AdamW adds to what it divides by."""
    flags = [*PLAIN, "--grad-accumulation", 2, "--weight-decay", 0]
    for length in (1, 1e-14):
        assert small_run("gpt", *flags, "--gradient-clip", length, "--out", length)[0] == 0
    first, *_, last = table(tmp_path / "1")
    assert first[2] - last[2] > 0.1
    first, *_, last = table(tmp_path / "1e-14")
    assert last[2] == pytest.approx(first[2], abs=1e-4)


@given(
    rows=st.integers(min_value=1, max_value=128),
    row_size=st.integers(min_value=1, max_value=2**21),
    data=st.data(),
)
def test_portions_are_equal_and_as_few_as_fit(rows: int, row_size: int, data: st.DataObject):
    divisors = [count for count in range(1, rows + 1) if rows % count == 0]
    at_least = data.draw(st.sampled_from(divisors))
    enough = [count for count in divisors if count >= at_least]
    fitting = [count for count in enough if rows // count * row_size <= machine.PORTION]
    expected = fitting[0] if fitting else rows
    assert machine.portions_for(CPU, rows, row_size, at_least) == expected
    # A graphics card has no such cache, and no wish for small portions.
    assert machine.portions_for(torch.device("cuda"), rows, row_size, at_least) == at_least


# Numbers of 16 bits.


def test_bfloat16_learns_as_well_as_float32(run: Callable, tmp_path: Path):
    flags = [*SMALL, *SMALL_MODEL["gpt"], "--max-iters", 200, "--eval-interval", 200]
    for precision in ("bfloat16", "float32"):
        flags_here = [*flags, "--dropout", 0, "--precision", precision, "--out", precision]
        code, output, _ = run("gpt", *flags_here)
        assert code == 0
        assert f"of what a large {precision} product reaches here" in output
        assert settings_of(tmp_path / precision)["number_format"] == precision
    short, long = (table(tmp_path / name)[-1] for name in ("bfloat16", "float32"))
    assert short[2] == pytest.approx(long[2], abs=0.01)
    assert short != long  # it was no float32 after all


def reach_speeds(monkeypatch: pytest.MonkeyPatch, bfloat16: float, float32: float) -> None:
    """As if matrix products were that fast here, in operations a second."""
    speeds = {torch.bfloat16: bfloat16, torch.float32: float32}
    monkeypatch.setattr(
        machine, "product_speeds", lambda _, *formats: [speeds[each] for each in formats]
    )


@pytest.mark.parametrize(
    ("bfloat16", "expected"), [(2e9, "bfloat16"), (1.2e9, "float32"), (1e8, "float32")]
)
def test_the_number_format_is_the_one_that_is_fast(
    bfloat16: float,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    small_run: Callable,
    tmp_path: Path,
):
    reach_speeds(monkeypatch, bfloat16, 1e9)
    assert machine.pick_number_format(CPU) == machine.FORMATS[expected]
    assert small_run("gpt", "--out", "run")[0] == 0
    assert settings_of(tmp_path / "run")["number_format"] == expected


def test_the_number_format_of_other_devices(monkeypatch: pytest.MonkeyPatch):
    assert machine.pick_number_format(torch.device("mps")) == torch.float32
    for modern, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda modern=modern, **_: modern)
        assert machine.pick_number_format(torch.device("cuda")) == expected


def test_the_speed_of_products_is_measured():
    for speed in machine.product_speeds(CPU, torch.float32, torch.bfloat16):
        assert 1e6 < speed < 1e15


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in that step, once."""
    learning_rate_at, pressed = gpt.learning_rate_at, []

    def interrupted(now: int, config: gpt.Config) -> float:
        if now == step - 1 and not pressed:
            pressed.append(now)
            signal.raise_signal(signal.SIGINT)
        return learning_rate_at(now, config)

    monkeypatch.setattr(gpt, "learning_rate_at", interrupted)


@pytest.mark.parametrize(("first", "then"), [(2e9, 1e8), (1e8, 2e9)])
def test_a_resumed_run_keeps_its_number_format(
    first: float,
    then: float,
    monkeypatch: pytest.MonkeyPatch,
    small_run: Callable,
    run: Callable,
    tmp_path: Path,
):
    """Whatever would be faster now: the losses go on as if it had never stopped."""
    reach_speeds(monkeypatch, first, 1e9)
    assert small_run("gpt", "--out", "whole")[0] == 0
    stop_at(13, monkeypatch)
    code, output, _ = small_run("gpt", "--out", "stopped")
    assert (code, "stopped at step 13" in output) == (130, True)

    reach_speeds(monkeypatch, then, 1e9)
    assert run("gpt", "--resume", "--out", "stopped")[0] == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert same_state(*(tmp_path / name / "checkpoint.pt" for name in ("stopped", "whole")))
    assert (
        len({settings_of(tmp_path / name)["number_format"] for name in ("stopped", "whole")}) == 1
    )


def test_float16_is_for_graphics_cards(small_run: Callable, tmp_path: Path):
    code, output, errors = small_run("gpt", "--precision", "float16", "--device", "cpu")
    assert (code, output) == (2, "")
    message = "gpt.py: --precision float16 needs a CUDA graphics card: take bfloat16\n"
    assert errors == message
    assert not (tmp_path / "runs").exists()


# Operations, counted and reached.


@pytest.mark.parametrize("fused", [None, False, True])
def test_operations_are_as_many_as_by_hand(fused: bool | None):
    B, T, C, n_layer = 3, 16, 32, 2
    sizes = {"block_size": T, "n_embd": C, "n_head": 4, "n_layer": n_layer, "fused": fused}
    model = gpt.Model(tiny(gpt, **sizes))
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "embedding" not in name
    )
    # A product costs two operations a weight, or a pair of characters, and its way back four.
    # Attention has two products of all pairs: the scores, and the sums of values.
    expected = 6 * matrices * B * T + 6 * n_layer * 2 * (B * T * T * C)
    counted = machine.operations(model, torch.zeros(B, T, dtype=torch.long))
    assert counted == pytest.approx(expected, rel=0.01)


def test_at_the_end_it_says_how_fast_it_was(
    run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    reach_speeds(monkeypatch, 1e9, 50e9)
    B, T, C, n_layer = 8, 32, 64, 2
    flags = f"--batch-size {B} --block-size {T} --n-embd {C} --n-head 2 --n-layer {n_layer}"
    steps = "--max-iters 20 --eval-interval 10 --sample-length 5".split()
    code, output, _ = run("gpt", *flags.split(), *steps, *PLAIN, "--out", "run")
    assert code == 0
    (line,) = [line for line in output.splitlines() if "product reaches here" in line]
    found = re.fullmatch(
        r"([\d,.]+) ms a step, ([\d,]+) characters a second, ([\d,]+) GFLOP/s: (\d+)% of what a "
        r"large float32 product reaches here",
        line,
    )
    milliseconds, characters, speed, share = (
        float(number.replace(",", "")) for number in found.groups()
    )
    assert characters == pytest.approx(B * T / milliseconds * 1000, rel=0.05)
    vocab_size = settings_of(tmp_path / "run")["config"]["vocab_size"]
    matrices = n_layer * 12 * C * C + vocab_size * C
    operations = 6 * matrices * B * T + 12 * n_layer * B * T * T * C
    assert speed == pytest.approx(operations * characters / (B * T) / 1e9, abs=0.6)
    assert share == pytest.approx(speed / 50 * 100, abs=2)
    # What the steps take is part of what the whole took.
    log = (tmp_path / "run" / "losses.csv").read_text(encoding="utf-8")
    assert 0 < milliseconds / 1000 * 20 <= float(log.rpartition(",")[2]) + 0.02


# The compiler.


def test_without_a_compiler_the_run_goes_on(
    small_run: Callable, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = [*SMALL, *SMALL_MODEL["gpt"], "--precision", "float32", "--device", "cpu"]
    process = start("gpt", *flags, "--data", text, "--compile", "--out", "run", cwd=tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    first_line, *lines = output.splitlines()
    assert first_line.startswith("torch.compile fails here, so this run goes without it: ")
    assert not any("compile" in line for line in lines)
    assert settings_of(tmp_path / "run")["compiled"] is False
    assert small_run("gpt", *flags, "--out", "plain")[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_a_compiler_that_fails_late_leaves_no_trace(
    small_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Say, on the way back: by then dropout has drawn, and some of the gradients are there."""

    def compile_badly(model: nn.Module) -> Callable:
        def network(idx: Tensor, targets: Tensor) -> None:
            model(idx, targets)[1].backward()
            raise RuntimeError("no way back")

        return network

    assert small_run("gpt", "--out", "plain")[0] == 0
    monkeypatch.setattr(torch, "compile", compile_badly)
    code, output, _ = small_run("gpt", "--compile", "--out", "run")
    assert code == 0
    line = "torch.compile fails here, so this run goes without it: no way back"
    assert output.splitlines()[0] == line
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


@pytest.mark.skipif(
    sys.platform == "win32" or not (shutil.which("g++") or shutil.which("c++")),
    reason="there is no compiler here",
)
def test_a_compiled_model_learns_the_same(
    small_run: Callable, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = [*SMALL, *SMALL_MODEL["gpt"], *PLAIN, "--n-layer", 1, "--device", "cpu"]
    process = start("gpt", *flags, "--data", text, "--compile", "--out", "run", cwd=tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert settings_of(tmp_path / "run")["compiled"] is True
    assert small_run("gpt", *flags, "--out", "plain")[0] == 0
    assert settings_of(tmp_path / "plain")["compiled"] is False
    assert_same_losses(tmp_path / "run", tmp_path / "plain", 1e-3)
    names = [
        list(torch.load(tmp_path / name / "best.pt", weights_only=True)["model"])
        for name in ("run", "plain")
    ]
    assert names[0] == names[1]


# A loss that is no longer a number.


@pytest.fixture
def first_bad_loss(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The count of the first loss, from 1, that was not finite."""
    seen, log = [], training.Run.log

    def watched(self: training.Run, loss: Tensor) -> None:
        seen.append(loss.item())
        log(self, loss)

    monkeypatch.setattr(training.Run, "log", watched)
    return lambda: next(i for i, loss in enumerate(seen, 1) if not math.isfinite(loss))


def assert_finite(folder: Path) -> None:
    for name in ("checkpoint.pt", "best.pt"):
        weights = torch.load(folder / name, weights_only=True)["model"].values()
        assert all(weight.isfinite().all() for weight in weights)


WILD = "--learning-rate 1e38 --eval-interval 100 --max-iters 100".split()


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_explodes_between_two_evaluations(
    stage: str, small_run: Callable, first_bad_loss: Callable, tmp_path: Path
):
    code, output, errors = small_run(stage, *WILD, "--out", "run")
    assert code == 2
    begin, advice, kept = re.fullmatch(rf"{stage}\.py: (.+?): (.+); (.+)\n", errors).groups()
    assert begin == f"the loss became nan at step {first_bad_loss()}"
    bfloat16 = settings_of(tmp_path / "run")["number_format"] == "bfloat16"
    second = ", or --precision float32" if bfloat16 else ""
    first = " or --muon-learning-rate" if stage == "modern_gpt" else ""
    assert advice == "try a smaller --learning-rate" + first + second
    assert kept == "run keeps step 0 in checkpoint.pt and step 0 in best.pt"
    assert_finite(tmp_path / "run")
    assert "best validation loss" not in output
    assert not (tmp_path / "run" / "sample.txt").exists()


def test_the_step_is_right_with_portions(small_run: Callable, first_bad_loss: Callable):
    code, _, errors = small_run("gpt", *WILD, "--grad-accumulation", 4, "--out", "run")
    assert code == 2
    assert f"at step {(first_bad_loss() + 3) // 4}: " in errors


@pytest.mark.parametrize("stage", STAGES)
def test_no_save_takes_up_what_exploded(
    stage: str, small_run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Even if it comes right after each step."""
    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0)
    code, _, errors = small_run(stage, *WILD, "--out", "run")
    assert code == 2
    assert len(errors.splitlines()) == 1
    step, saved = re.search(
        r" at step (\d+): try a smaller .*keeps step (\d+) in checkpoint.pt and step 0 in best.pt$",
        errors.strip(),
    ).groups()
    assert int(saved) == int(step) - 1
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == int(saved)
    assert_finite(tmp_path / "run")


def test_weights_that_are_no_numbers_are_not_saved(
    small_run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A step can spoil a weight that no loss has shown yet."""
    learning_rate_at = gpt.learning_rate_at

    def spoiling(step: int, config: gpt.Config) -> float:
        return math.nan if step == 9 else learning_rate_at(step, config)

    monkeypatch.setattr(gpt, "learning_rate_at", spoiling)
    stop_at(10, monkeypatch)
    code, _, errors = small_run("gpt", "--eval-interval", 100, "--out", "run")
    assert code == 2
    assert "gpt.py: a weight is no longer a number at step 10: try a smaller" in errors
    assert errors.strip().endswith("run keeps step 0 in checkpoint.pt and step 0 in best.pt")
    assert_finite(tmp_path / "run")


def test_ctrl_c_after_the_loss_has_exploded(
    small_run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    stop_at(7, monkeypatch)  # before the first look at the losses
    code, output, errors = small_run("gpt", *WILD, "--out", "run")
    assert code == 2
    assert "gpt.py: the loss became nan at step 2: try a smaller --learning-rate" in errors
    assert "stopped at step" not in output
    assert_finite(tmp_path / "run")


def test_a_run_from_before_there_were_formats_goes_on(small_run: Callable, run: Callable) -> None:
    assert small_run("gpt", "--out", "run", "--precision", "float32")[0] == 0
    path = Path("run", "checkpoint.pt")
    state = torch.load(path, weights_only=True)
    for name in ("number_format", "scaler"):
        del state[name]
    for name in ("grad_accumulation", "precision", "fused", "compile"):
        del state["config"][name]
    torch.save(state, path)
    assert run("gpt", "--resume", "--out", "run", "--max-iters", 30)[0] == 0
    assert '"number_format": "float32"' in Path("run", "config.json").read_text(encoding="utf-8")
