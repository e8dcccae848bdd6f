"""The numbers of explore.py's page: in a real browser, compared with PyTorch."""

import importlib
import importlib.util
import math
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import explore
from bpe import BYTES, BytePairTokenizer, learn
from common import LanguageModel, Tokenizer
from explorer.hooks import off, record, replace
from explorer.steps import describe
from sample import generate, load
from trainer.checkpoint import to_bytes

import pytest
import torch
from conftest import ROOT, STAGES, files
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-3
SWIGLU = """
        self.gate_proj = nn.Linear(config.n_embd, 4 * config.n_embd)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) + 0.5)
"""


VOCABULARY = "".join(map(chr, range(32, 97)))
TINY = {"n_embd": 32, "n_head": 4, "n_layer": 2, "block_size": 24}
SETTINGS = {
    **{stage: {} for stage in STAGES},
    "gpt": TINY,
    "modern_gpt": TINY,
    "residual without skips": {"residual": False},
    "layer_norm post": {"norm": "post"},
    "modern_gpt without ideas": TINY | {"rope": False, "qk_norm": False, "token_shift": False},
}
ABOUT = {"corpus": {"name": "text", "path": "no such text"}, "val_loss": 2.0, "step": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every stage; its weights are random float16 numbers, as on the page."""
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in SETTINGS}
    for name, folder in folders.items():
        stage = importlib.import_module(name.split()[0])
        model = stage.Model(config := stage.Config(**SETTINGS[name]))
        randomize(model)
        header = ABOUT | {"stage": name.split()[0], "vocabulary": VOCABULARY, "parameters": 1}
        folder.mkdir()
        content = to_bytes(header | {"config": asdict(config)}, {"model": model})
        (folder / "best.pt").write_bytes(content)
    return folders


def randomize(model: LanguageModel) -> None:
    """Add noise to the weights, since initially some parts do nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data = (parameter.data + noise).half().float()


@pytest.fixture(scope="module")
def open_page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that opens the page of some runs or packed models."""
    folder, errors = tmp_path_factory.mktemp("pages"), []
    context = browser.new_context()

    def open_page(*runs: Any) -> Any:
        packed = [explore.pack(run) if isinstance(run, Path) else run for run in runs]
        (folder / "explore.html").write_bytes(explore.page(packed))
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(error))
        page.goto((folder / "explore.html").as_uri())
        page.evaluate("explorer.ready")
        return page

    yield open_page
    context.close()
    assert errors == []


def random_text(tokenizer: Tokenizer, length: int, seed: int = 1) -> str:
    return "".join(random.Random(seed).choices(tokenizer.vocabulary, k=length))


def ids_of(tokenizer: Tokenizer, text: str) -> Tensor:
    return torch.tensor([tokenizer.encode(text)])


def trace(page: Any, text: str, *parts: str) -> dict[str, Any]:
    """What the page computes of a text while some parts are off."""
    return page.evaluate(
        """async ([text, parts]) => {
            const model = explorer.models[0];
            for (const part of parts) await explorer.off(model, part);
            const found = await explorer.trace(model, text);
            for (const part of parts) await explorer.on(model, part);
            return found;
        }""",
        [text, [*parts]],
    )


def difference(found: Any, wanted: Tensor) -> float:
    return (torch.tensor(found) - wanted).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_page_computes_what_pytorch_computes(name, runs, open_page):
    model, tokenizer = load(runs[name], "cpu")
    page = open_page(runs[name])
    for length in (1, 2, min(13, model.block_size), model.block_size, 2 * model.block_size):
        text = random_text(tokenizer, length)
        idx = ids_of(tokenizer, text)[:, -model.block_size :]
        wanted = record(model, idx)
        last = page.evaluate("(text) => explorer.logits(explorer.models[0], text)", text)
        assert difference(last, wanted["logits"][0, -1]) < TOLERANCE
        if length > model.block_size:
            continue
        found = trace(page, text)
        assert difference(found["logits"], wanted["logits"][0]) < TOLERANCE
        assert found["losses"][0] is None
        if length > 1:
            losses = F.cross_entropy(wanted["logits"][0, :-1], idx[0, 1:], reduction="none")
            assert difference(found["losses"][1:], losses) < TOLERANCE
        attention = [value[0] for key, value in wanted.items() if key.endswith(".weights")]
        assert len(found["attention"]) == len(attention)
        for layer, weights in zip(found["attention"], attention, strict=True):
            assert difference(layer, weights) < TOLERANCE
            assert (torch.tensor(layer).sum(-1) - 1).abs().max() < TOLERANCE
        if found["lens"]:
            assert difference(found["lens"][-1], wanted["logits"][0]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_off_on_the_page_is_off_in_pytorch(name, runs, open_page):
    model, tokenizer = load(runs[name], "cpu")
    page = open_page(runs[name])
    text = random_text(tokenizer, min(20, model.block_size))
    idx = ids_of(tokenizer, text)
    parts = describe(model)[0]["parts"]
    assert parts or name == "bigram"
    with torch.no_grad():
        whole = model(idx)[0][0]
        for without in [[part] for part in parts] + [parts[::3], parts[1::3]]:
            with off(model, *without):
                wanted = model(idx)[0][0]
            assert difference(trace(page, text, *without)["logits"], wanted) < TOLERANCE
            assert not without or (whole - wanted).abs().max() > 1e-4, without
        assert torch.equal(model(idx)[0][0], whole)  # all hooks are gone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bigram", "layer_norm", "gpt", "modern_gpt"])
def test_the_page_generates_what_sample_does(name, runs, open_page):
    model, tokenizer = load(runs[name], "cpu")
    prompt = random_text(tokenizer, 5)
    length = model.block_size + 20  # so that the context is full before the end
    wanted = "".join(generate(model, tokenizer, prompt, length, temperature=0))
    found = open_page(runs[name]).evaluate(
        """([text, length]) => explorer.generate(explorer.models[0], text, length,
            {temperature: 0, topK: 0, seed: 1})""",
        [prompt, length],
    )
    assert found == wanted


def own_model(folder: Path, old: str, new: str) -> tuple[LanguageModel, Tokenizer]:
    """A model of the reader's own: gpt.py with a change."""
    source = (ROOT / "gpt.py").read_text(encoding="utf-8")
    assert old in source
    path = folder / "my_gpt.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("my_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_gpt"] = module  # where explore.py finds the source
    spec.loader.exec_module(module)
    model = module.Model(module.Config(**TINY)).eval()
    randomize(model)
    return model, Tokenizer(VOCABULARY)


OWN = ABOUT | {"stage": "my_gpt", "parameters": 1}
FEED_FORWARD = """
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up_proj(x))  # (B, T, 4*C)
        return self.down_proj(x)  # (B, T, C)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FEED_FORWARD, SWIGLU.lstrip("\n")),
        ("F.relu(", "F.gelu("),
        ("F.relu(self.up_proj(x))", 'F.gelu(self.up_proj(x), approximate="tanh")'),
    ],
)
def test_a_script_of_ones_own(old, new, tmp_path, open_page):
    model, tokenizer = own_model(tmp_path, old, new)
    page = open_page(explore.pack_model(model, tokenizer, "my_gpt", OWN))
    text = random_text(tokenizer, 24)
    wanted = record(model, ids_of(tokenizer, text))
    assert difference(trace(page, text)["logits"], wanted["logits"][0]) < TOLERANCE


@pytest.mark.slow
def test_a_model_that_reads_tokens(open_page):
    text = "ROMEO: Hello, wörld 天地 😀  two lines\n\nand the end of the world\n" * 3
    tokenizer = BytePairTokenizer(learn(text, 300))
    stage = importlib.import_module("gpt")
    model = stage.Model(stage.Config(**TINY, vocab_size=len(tokenizer.vocabulary))).eval()
    randomize(model)
    page = open_page(explore.pack_model(model, tokenizer, "tokens", OWN | {"stage": "gpt"}))
    for each in (text[:60], "another 地 wörld", "a"):
        idx = ids_of(tokenizer, each)[:, -model.block_size :]
        last = page.evaluate("(text) => explorer.logits(explorer.models[0], text)", each)
        assert difference(last, model(idx)[0][0, -1].detach()) < TOLERANCE
    append, plain = "(id) => appendToken(id, 'next')", [BYTES.index(x) for x in " 天é".encode()]
    page.fill("#input", "an")
    for i in plain:
        page.evaluate(append, i)
        assert page.evaluate("`${encode(state.run, state.text).ids}` === `${state.shown.ids}`")
    assert page.input_value("#input") == "an 天é"
    page.evaluate(append, plain[-2])
    assert page.locator("#characters .character").last.inner_text() == "‹C3›"
    ids = [tokenizer.encode("the world"), [BYTES.index(byte) for byte in b"the world"]]
    losses = [[math.log(2)] * len(each) for each in ids]
    totals = "([ids, losses]) => totals([runs[0], runs[0]], ids, losses)"
    found = page.evaluate(totals, [ids, losses])
    assert found == pytest.approx([len(ids[0]) - 1, 9 - len(tokenizer.tokens[ids[0][0]])])


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("F.relu(", "F.mish(", "explore.py cannot show my_gpt.py: it uses mish (line 1"),
        (
            "x = attention(query, key, value, self.dropout)",
            "x = attention(query, 2 * key, value, self.dropout)",
            "an attention in blocks.0.attention that is not this course's",
        ),
    ],
)
def test_a_script_that_the_page_cannot_show(old, new, complaint, tmp_path):
    model, tokenizer = own_model(tmp_path, old, new)
    with pytest.raises(explore.UserError, match=complaint.replace("(", r"\(")):
        explore.pack_model(model, tokenizer, "my_gpt", OWN)


def test_hooks_replace_outputs(runs):
    model, tokenizer = load(runs["gpt"], "cpu")
    idx, other = (ids_of(tokenizer, random_text(tokenizer, 12, seed)) for seed in (1, 2))
    own, patch = record(model, idx), record(model, other)
    for name, wanted in (("blocks.0", own), ("final_norm", patch)):
        source = own if wanted is own else patch
        with torch.no_grad(), replace(model, {name: source[name]}):
            assert torch.equal(model(idx)[0], wanted["logits"])
    with pytest.raises(ValueError, match="the model has no blocks.9.attention"):
        off(model, "blocks.9.attention").__enter__()


def test_bad_input_is_one_line(run, small_run, tmp_path):
    assert small_run("bigram", "--out", "run")[0] == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "best.pt").write_bytes((tmp_path / "run" / "best.pt").read_bytes()[:-1])
    taken = tmp_path / "taken.html"
    taken.mkdir()
    for flags, words in (
        ([], "RUN_FOLDER"),
        (["nothing"], "nothing holds no trained run: it has no best.pt"),
        ([empty], "holds no trained run"),
        (["run", empty], "holds no trained run"),
        ([damaged], "is damaged or from an older version"),
        (["run", "--out", taken], "cannot write"),
        (["run", "--out", "no/such/folder.html"], "cannot write no/such/folder.html"),
    ):
        before = files(tmp_path)
        code, output, errors = run("explore", *flags)
        assert (code, output, errors.count("\n")) == (2, "", 1), errors
        assert words in errors
        assert files(tmp_path) == before


def test_the_page_is_written_into_the_first_run(run, small_run, tmp_path):
    for name in ("one", "two"):
        assert small_run("bigram", "--out", name)[0] == 0
    code, output, errors = run("explore", "one", "two")
    assert (code, errors) == (0, "")
    assert output == f"{(tmp_path / 'one' / 'explore.html').as_uri()}\n"
    page = (tmp_path / "one" / "explore.html").read_text(encoding="utf-8")
    assert "<title>Explore one, two</title>" in page
    assert not any(words in page for words in (' src="', 'href="http', "@import"))
