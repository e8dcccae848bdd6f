"""What makes gpt.py fast and robust: none of it changes what is learned or written."""

import functools
import itertools
import json
import math
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import gpt
import modern_gpt
import trainer.machine
import trainer.run
from trainer.layers import Dropout, attention, rms_norm
from trainer.machine import Machine, MachineSettings, fast_dtype

import pytest
import torch
from conftest import SMALL, SMALL_MODEL, finish, losses, start, table
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import TOKENIZER, H, T, V, random_batch, randomize, sample, tiny
from torch import Tensor, nn
from torch.nn import functional as F

CPU = torch.device("cpu")
# Without randomness and with little rounding, runs can be compared number by number.
PLAIN = ["--dropout", "0", "--precision", "float32", "--device", "cpu"]


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def parts_of(folder: Path, name: str = "checkpoint.pt") -> dict:
    return torch.load(folder / name, weights_only=True)["parts"]


# Dropout: on a CPU, each random number is split into four.


def tolerance(p: float, count: int) -> float:
    """How far from p a fraction of `count` may be: five standard deviations."""
    return 5 * math.sqrt(p * (1 - p) / count) + 2**-16  # and p is rounded to 16 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.3, 0.999])
def test_dropout_zeroes_its_fraction_and_keeps_the_mean(p, dtype):
    torch.manual_seed(1)
    x = torch.ones(3, 333, 1001, dtype=dtype)  # 999,999: not a multiple of 4
    result = Dropout(p)(x)
    assert (result.shape, result.dtype) == (x.shape, dtype)
    dropped = result == 0
    for i in range(4):  # each of the four numbers that one draw is split into
        piece = dropped.flatten()[i::4].double()
        assert piece.mean().item() == pytest.approx(p, abs=tolerance(p, len(piece)))
    scale = torch.tensor(1 / (1 - p)).to(dtype)
    torch.testing.assert_close(result[~dropped], scale.expand((~dropped).sum()))


@pytest.mark.parametrize("distance", [1, 2, 4, 1001])
def test_dropout_is_independent_between_positions_and_calls(distance):
    torch.manual_seed(1)
    p, x = 0.3, torch.ones(999, 1001)
    first, second = ((Dropout(p)(x) == 0).flatten().double() - p for _ in range(2))
    for one, other in ((first[distance:], first[:-distance]), (first, second)):
        correlation = (one * other).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(len(first))


def test_dropout_follows_the_seed_and_its_gradient_goes_where_the_value_did():
    x = torch.randn(7, 13, 5).transpose(0, 2).requires_grad_()  # not in the order of memory
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(Dropout(0.4)(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    results[0].sum().backward()
    assert torch.equal(x.grad, (results[0] != 0).float() / 0.6)
    assert torch.equal(Dropout(0.4).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
    torch.testing.assert_close(results[0], x * x.grad)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_rms_norm_is_pytorchs(dtype, tolerance):
    torch.manual_seed(1)
    x = torch.randn(3, 5, 16).to(dtype).requires_grad_()
    direction = torch.randn(3, 5, 16).to(dtype)
    ours, expected = rms_norm(x), F.rms_norm(x, (16,), eps=1e-6)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(each, x, direction)[0] for each in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)
    assert not rms_norm(torch.zeros(4)).any()


# Attention: the plain lines, PyTorch's one call, and ours.

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
cpu_and_gpu = pytest.mark.parametrize("device", DEVICES)


@cpu_and_gpu
@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (1, 7), (3, 7), (300, 310)])
def test_attention_equals_the_plain_lines_and_pytorchs_call(T, S, window, device):
    torch.manual_seed(1)
    options = {"dtype": torch.float64, "device": device, "requires_grad": True}
    query = torch.randn(2, H, T, 4, **options)
    key, value = (torch.randn(2, H, S, 4, **options) for _ in range(2))
    seen = [[i - (window or S) < j <= i for j in range(S)] for i in range(S - T, S)]
    seen = torch.tensor(seen, device=device)  # which keys each query may see

    scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5
    weights = F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    ours = attention(query, key, value, nn.Dropout(0.0), window)
    direction = torch.randn_like(query)
    gradients = torch.autograd.grad(ours, (query, key, value), direction)
    pytorchs = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    for expected in (weights @ value, pytorchs):
        torch.testing.assert_close(ours, expected)
        expected = torch.autograd.grad(expected, (query, key, value), direction)
        torch.testing.assert_close(gradients, expected)


@cpu_and_gpu
def test_attention_drops_weights_as_pytorchs_call_does(device):
    """The results differ each time, but mean and standard deviation are the same."""
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 1, H, T, 4, device=device).expand(3, 5000, H, T, 4)
    call = functools.partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)
    expected, theirs = call(), call(dropout_p=0.4)
    ours = attention(query, key, value, Dropout(0.4))
    limit = 6 * ours.std(dim=0) / math.sqrt(len(ours)) + 1e-6
    assert ((ours.mean(dim=0) - expected[0]).abs() <= limit).all()
    torch.testing.assert_close(ours.std(dim=0), theirs.std(dim=0), rtol=0.1, atol=1e-3)
    torch.testing.assert_close(attention(query, key, value, Dropout(0.4).eval()), expected)


# The cache, and what sampling does with it.


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(min_value=1, max_value=2 * T - 1)), st.sampled_from([gpt, modern_gpt]))
def test_logits_do_not_depend_on_how_a_text_is_cut(cuts, stage):
    """Not even where the window of modern_gpt.py slides."""
    model = randomize(stage.Model(tiny(stage)), std=0.2).eval()
    idx, _ = random_batch(V, 3, 2 * T if model.slides else T)
    cache, cuts = model.new_cache(), [0, *sorted(cuts), 2 * T]
    with torch.no_grad():
        pieces = [idx[:, a:b] for a, b in itertools.pairwise(cuts)]
        logits = [model(piece, cache=cache)[0] for piece in pieces if piece.numel()]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(idx)[0], rtol=0, atol=1e-5)
    for each in cache:
        assert each.length == idx.shape[1]
        assert each.key.shape[2] == each.value.shape[2] == (T - 1 if model.slides else T)


@functools.cache
def small_model(block_size: int) -> nn.Module:
    """Its probabilities are neither all alike nor certain, so that every text is possible."""
    return randomize(gpt.Model(tiny(gpt, block_size=block_size)), std=0.3)


@settings(deadline=None, max_examples=60)
@given(
    block_size=st.sampled_from([1, 2, 3, 8]),
    prompt=st.text(TOKENIZER.vocabulary, max_size=20),
    length=st.integers(min_value=1, max_value=40),
    temperature=st.sampled_from([0, 0.5, 2.0]),
    top_k=st.sampled_from([None, 3]),
    seed=st.integers(min_value=0, max_value=1000),
)
def test_the_cache_changes_no_text(block_size, prompt, length, **options):
    """And when the context is full, half of it again."""
    model, sizes = small_model(block_size), []
    plain = sample(model, prompt, length, cached=False, **options)
    hook = model.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[1]))
    try:
        assert sample(model, prompt, length, **options) == plain
    finally:
        hook.remove()
    held = min(max(1, len(prompt)), block_size)
    expected = [held]
    while len(expected) < length:
        full = held == block_size
        held = max(1, block_size // 2) if full else held + 1
        expected.append(held if full else 1)
    assert sizes == expected


# Micro-batches.


@pytest.mark.parametrize("rows, count", [(7, 3), (4, 4), (5, 2)])
def test_the_gradient_of_micro_batches_is_that_of_the_batch(
    rows, count, text, tmp_path, monkeypatch
):
    """Even if they are not equally large; and their losses count by size."""
    monkeypatch.chdir(tmp_path)
    sizes = ["--batch-size", rows, "--grad-accumulation", count, "--data", text]
    argv = [str(flag) for flag in [*SMALL, *SMALL_MODEL["gpt"], *PLAIN, *sizes]]
    run = trainer.run.Run(gpt.Config, gpt.PRESETS, argv, "gpt")
    model = gpt.Model(run.config).double()
    batches = run.batches(model, gpt.make_optimizer(model, run.config))
    batch = next(batches)
    _, whole = model(*batch)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    seen = []
    for idx, targets, weight in run.micro_batches(batch):
        _, loss = model(idx, targets)
        (weight * loss).backward()
        run.log(loss)
        seen.append(len(idx))
    assert len(seen) == count and sum(seen) == rows and max(seen) - min(seen) <= 1
    torch.testing.assert_close([each.grad for each in model.parameters()], list(expected))
    run.read_losses()
    assert run.history.loss_sum / run.history.loss_count == pytest.approx(whole.item())
    batches.close()


@pytest.mark.parametrize(
    "rows, n_embd, at_least, expected",
    [(8, 1, 1, 1), (8, 1, 3, 3), (8, 1, 9, 8), (7, 2**9, 1, 2), (4, 2**20, 1, 4)],
)
def test_micro_batches_are_as_few_as_fit_a_cpus_cache(rows, n_embd, at_least, expected):
    machine = Machine(MachineSettings(grad_accumulation=at_least), CPU, "float32")
    config = gpt.Config(batch_size=2 * rows, block_size=256, n_embd=n_embd)
    world = SimpleNamespace(size=2)  # each process has half of the rows; four of 2**9 fit
    assert machine.micro_batches(config, world) == expected
    machine.device = torch.device("cuda")  # a GPU has no such cache
    assert machine.micro_batches(config, world) == min(at_least, rows)


# The dtype.


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({"avx2": True, "avx512_f": True, "amx_int8": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
    ],
    ids=str,
)
def test_the_dtype_depends_on_what_the_machine_can_do_and_never_on_timing(
    capabilities, expected, monkeypatch
):
    def clock() -> float:
        raise AssertionError("the dtype was decided by a clock")

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with monkeypatch.context() as without_clock:
        for name in ("time", "perf_counter", "monotonic", "process_time", "thread_time"):
            without_clock.setattr(time, name, clock)
            without_clock.setattr(time, f"{name}_ns", clock)
        dtypes = [fast_dtype(CPU), Machine(MachineSettings(), CPU, "auto").dtype]
    assert dtypes == [expected, expected]
    assert fast_dtype(torch.device("mps")) == torch.float32
    for modern, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda modern=modern, **_: modern)
        assert fast_dtype(torch.device("cuda")) == expected


def has_bfloat16(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": yes})


def test_bfloat16_is_for_stages_that_scale_and_learns_as_well(small_run, monkeypatch, tmp_path):
    has_bfloat16(monkeypatch, True)
    for stage, flags, dtype in (
        ("layer_norm", [], "float32"),
        ("gpt", ["--dropout", 0], "bfloat16"),
        ("gpt", PLAIN, "float32"),
    ):
        assert small_run(stage, *flags, "--device", "cpu", "--out", f"{stage} {dtype}")[0] == 0
        assert config_of(tmp_path / f"{stage} {dtype}")["dtype"] == dtype
    short, long = (table(tmp_path / f"gpt {dtype}")[-1] for dtype in ("bfloat16", "float32"))
    assert short[2] == pytest.approx(long[2], abs=0.01)
    assert short != long


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_keeps_its_dtype(first, monkeypatch, small_run, run, tmp_path):
    """Whatever the machine has now."""
    has_bfloat16(monkeypatch, first)
    assert small_run("gpt", "--device", "cpu", "--out", "run")[0] == 0
    before = config_of(tmp_path / "run")["dtype"]
    has_bfloat16(monkeypatch, not first)
    assert run("gpt", "--resume", "--out", "run", "--max-iters", 30)[0] == 0
    assert config_of(tmp_path / "run")["dtype"] == before == ("bfloat16" if first else "float32")


# Loss scaling, which float16 needs.


def scale_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that computes in float16."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))


@pytest.mark.parametrize("stage", ["gpt", "modern_gpt"])
def test_a_scaled_run_is_the_unscaled_one(stage, small_run, monkeypatch, tmp_path):
    """Bit for bit: the scale is a power of two, and nothing overflows."""
    flags = ["--precision", "float32", "--device", "cpu", "--grad-accumulation", 3]
    assert small_run(stage, *flags, "--out", "plain")[0] == 0
    scale_losses(monkeypatch)
    assert small_run(stage, *flags, "--out", "scaled")[0] == 0
    assert losses(tmp_path / "scaled") == losses(tmp_path / "plain")
    plain, scaled = (parts_of(tmp_path / name) for name in ("plain", "scaled"))
    assert all(map(torch.equal, plain["model"].values(), scaled["model"].values()))
    assert scaled["scaler"]["scale"] == 2**16


@pytest.mark.parametrize("stage", ["gpt", "modern_gpt"])
def test_an_overflow_skips_a_step_of_all_optimizers_and_halves_the_scale(
    stage, small_run, monkeypatch, tmp_path
):
    taken, cross_entropy = [], F.cross_entropy

    def spoiling(*arguments: Tensor) -> Tensor:
        """Once, in the middle of training, the gradient overflows."""
        loss = cross_entropy(*arguments)
        if loss.requires_grad:
            taken.append(loss)
            if len(taken) == 15:
                loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(F, "cross_entropy", spoiling)
    scale_losses(monkeypatch)
    code, _, errors = small_run(stage, *PLAIN, "--max-iters", 20, "--out", "run")
    assert (code, errors) == (0, "")
    parts = parts_of(tmp_path / "run")
    assert {int(each["step"]) for each in parts["optimizer 0"]["state"].values()} == {19}
    assert all(weight.isfinite().all() for weight in parts["model"].values())
    assert parts["scaler"]["scale"] == 2**15


# The compiler.


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [None, "nowhere"])
def test_a_compiled_run_learns_the_same_or_says_what_to_type(
    compiler, small_run, text, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    if compiler:
        monkeypatch.setenv("CXX", str(tmp_path / compiler))
    flags = [*SMALL, *SMALL_MODEL["gpt"], *PLAIN, "--n-layer", 1, "--data", text]
    code, _, errors = finish(start("gpt", *flags, "--compile", "--out", "run", cwd=tmp_path))
    run, plain = tmp_path / "run", tmp_path / "plain"
    if compiler or not (shutil.which("g++") or shutil.which("c++")):
        assert code == 2 and "--no-compile" in errors.splitlines()[-1]
        assert not run.exists()
        return
    assert code == 0, errors
    assert any((tmp_path / "cache").rglob("*.so"))  # it was compiled
    assert small_run("gpt", *flags, "--out", "plain")[0] == 0
    for row, expected in zip(table(run), table(plain), strict=True):
        assert row == pytest.approx(expected, rel=0, abs=1e-3)
    assert parts_of(run, "best.pt")["model"].keys() == parts_of(plain, "best.pt")["model"].keys()


# A loss that becomes NaN or infinite.

WILD = "--learning-rate 1e38 --eval-interval 100 --max-iters 100 --device cpu".split()


def diverged(result: tuple[int, str, str], folder: Path) -> tuple[int, int]:
    """The step it happened at, and the step that is saved, as one line of advice says.

    The files hold nothing but finite numbers, and there is no sample.
    """
    code, output, errors = result
    advice = errors.splitlines()[-1]
    assert code == 2 and "try a smaller --learning-rate" in advice
    assert "best validation loss" not in output and "stopped at step" not in output
    for name in ("checkpoint.pt", "best.pt"):
        assert all(weight.isfinite().all() for weight in parts_of(folder, name)["model"].values())
    assert not (folder / "sample.txt").exists()
    in_float32 = config_of(folder)["dtype"] == "float32"
    assert ("--precision float32" in advice) != in_float32
    kept = int(re.search(r"keeps step (\d+)", advice)[1])
    assert parts_of(folder)["history"]["step"] == kept
    return int(re.search(r"(?:at|by) step (\d+): ", advice)[1]), kept


@pytest.mark.parametrize("stage", ["bigram", "layer_norm", "gpt", "modern_gpt"])
def test_a_loss_that_explodes_between_two_evaluations_ends_the_run(
    stage, small_run, monkeypatch, tmp_path
):
    seen, log = [], trainer.run.Run.log

    def watched(self: trainer.run.Run, loss: Tensor) -> None:
        seen.append(math.isfinite(loss.item()))
        log(self, loss)

    monkeypatch.setattr(trainer.run.Run, "log", watched)
    micro_batches = 4 if "gpt" in stage else 1
    flags = ["--grad-accumulation", 4] if micro_batches > 1 else []
    step, kept = diverged(small_run(stage, *WILD, *flags, "--out", "run"), tmp_path / "run")
    assert (step, kept) == (seen.index(False) // micro_batches + 1, 0)


def test_weights_that_are_nan_are_not_saved(small_run, monkeypatch, tmp_path):
    """A step can spoil a weight before any loss shows it, and each step may be saved."""
    at = gpt.learning_rate_at
    spoiling = lambda step, config: math.nan if step == 9 else at(step, config)  # noqa: E731
    monkeypatch.setattr(gpt, "learning_rate_at", spoiling)
    monkeypatch.setattr(trainer.run, "SECONDS_BETWEEN_SAVES", 0)
    result = small_run("gpt", "--eval-interval", 100, "--out", "run")
    assert diverged(result, tmp_path / "run") == (10, 9)
