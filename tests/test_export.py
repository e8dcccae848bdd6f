"""An exported run is the same model to transformers: same numbers, same text, same characters."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from sample import generate, load

import pytest
import torch
from conftest import files, finish, start
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs a network

# Two bytes, four bytes, joined and combining characters, and all that JSON must escape.
STRANGE = (
    "é e\u0301 😀 👩\u200d👩 \"quotes\" 'single' back\\slash \t \r\n \x00 \u00a0 \u2028 <|x|> n't ."
)
BLOCK_SIZE = 16
# Enough steps, and large enough ones, that no weight is where it began.
TRAINING = "--dropout 0.125 --max-iters 60 --eval-interval 30 --batch-size 8 --learning-rate 0.02"
SIZES = "--n-embd 24 --n-head 3 --n-layer 2 --block-size 16 --warmup-iters 5"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run, its export, and both of them loaded: the export with the lines that it prints."""
    pytest.importorskip("safetensors")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exported")
    lines = (f"Line {i}: {i * 7 % 13} steps away, {STRANGE}\n" for i in range(100))
    (folder / "text.txt").write_bytes("".join(lines).encode("utf-8"))
    flags = f"{SIZES} {TRAINING} --data text.txt --device cpu --out run".split()
    for script, arguments in (("gpt", flags), ("export", ["run", "--out", folder / "gpt2"])):
        code, output, errors = finish(start(script, *arguments, cwd=folder))
        assert code == 0, errors
    assert errors == ""
    names = {}
    exec("\n".join(output.splitlines()[1:]), names)
    our_model, our_tokenizer = load(folder / "run", "cpu")
    return SimpleNamespace(
        folder=folder / "gpt2",
        model=names["model"],
        tokenizer=names["tokenizer"],
        our_model=our_model,
        our_tokenizer=our_tokenizer,
    )


@pytest.mark.slow
def test_the_model_is_the_same(exported):
    from transformers import AutoModelForCausalLM

    model, ours = exported.model, exported.our_model
    for name, parameter in ours.named_parameters():  # one in the wrong place would be noticed
        if parameter.dim() == 1:
            began = 1.0 if name.endswith("norm.weight") else 0.0
            assert (parameter - began).abs().median() > 0.002, name
    idx = torch.randint(len(exported.our_tokenizer.vocabulary), (32, BLOCK_SIZE))
    with torch.inference_mode():
        torch.testing.assert_close(model(idx).logits, ours(idx)[0], rtol=0, atol=1e-5)
    _, report = AutoModelForCausalLM.from_pretrained(exported.folder, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(model.lm_head.weight, ours.lm_head.weight)  # not tied to the embedding
    assert torch.equal(model.transformer.wte.weight, ours.token_embedding.weight)
    config = json.loads((exported.folder / "config.json").read_text(encoding="utf-8"))
    expected = {"activation_function": "relu", "bos_token_id": None, "eos_token_id": None}
    expected |= {"tie_word_embeddings": False, "n_positions": BLOCK_SIZE, "n_inner": 4 * 24}
    assert config.items() >= expected.items()  # nothing is left to defaults
    config = model.config
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.125, 0.125, 0.125)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["L", "Line 7: ", "é e\u0301 😀", "\r\n"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_most_likely_text_is_the_same(prompt, use_cache, exported):
    length = BLOCK_SIZE - len(prompt)
    ours = "".join(generate(exported.our_model, exported.our_tokenizer, prompt, length, 0))
    tokens = exported.tokenizer([prompt, prompt], return_tensors="pt")
    options = {"max_new_tokens": length, "do_sample": False, "use_cache": use_cache}
    idx = exported.model.generate(**tokens, **options)
    assert exported.tokenizer.batch_decode(idx) == [prompt + ours] * 2
    assert idx.shape == (2, BLOCK_SIZE)  # no character ends a text, none fills one up


@pytest.mark.slow
def test_every_character_keeps_its_id(exported):
    tokenizer, ours = exported.tokenizer, exported.our_tokenizer
    assert tokenizer.get_vocab() == ours.ids
    assert len(tokenizer) == len(ours.vocabulary) == exported.model.config.vocab_size
    assert tokenizer.all_special_tokens == []
    assert tokenizer.model_max_length == BLOCK_SIZE
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    for character, i in ours.ids.items():
        assert tokenizer(character) == {"input_ids": [i], "attention_mask": [1]}
        assert tokenizer.decode([i]) == character

    @given(st.text(ours.vocabulary, max_size=BLOCK_SIZE))
    @settings(max_examples=100, deadline=None)
    def check(text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text

    check()
    for text in ("€", "e\u0302", "<unknown>x€"):
        with pytest.raises(Exception, match="Missing .UNK. token"):
            tokenizer(text)


def test_what_it_refuses_leaves_everything_as_it_was(run, small_run, monkeypatch, tmp_path):
    pytest.importorskip("safetensors")
    for stage in ("gpt", "bigram"):
        assert small_run(stage, "--out", stage)[0] == 0
    Path("damaged").mkdir()
    Path("damaged", "best.pt").write_bytes(b"")

    def refused(complaint: str, *arguments: str) -> None:
        before = files(tmp_path), sorted(tmp_path.rglob("*"))
        code, output, errors = run("export", *arguments)
        assert (code, output, errors.count("\n")) == (2, "", 1), errors
        assert complaint in errors
        assert (files(tmp_path), sorted(tmp_path.rglob("*"))) == before

    long = "x" * 300
    for complaint, folder, *out in (
        ("holds no trained run", "runs/none", "new"),
        ("holds no trained run", ".", "new"),
        ("text.txt", "text.txt", "new"),
        ("is damaged", "damaged", "new"),
        ("--out", "gpt"),
        ("made by bigram.py", "bigram", "new"),
        ("gpt already exists", "gpt", "gpt"),
        ("text.txt already exists", "gpt", "text.txt"),
        ("cannot write ", "gpt", str(Path("text.txt", "gpt2"))),
        (f"cannot write {long}: ", "gpt", long),
    ):
        refused(complaint, folder, *(["--out", *out] if out else []))
    with monkeypatch.context() as without_package:
        without_package.setitem(sys.modules, "safetensors.torch", None)
        refused("safetensors is missing", "gpt", "--out", "new")

    Path("empty").mkdir()
    for out in ("empty", str(Path("deep", "below"))):  # these will do
        assert run("export", "gpt", "--out", out)[0] == 0
        assert len(files(tmp_path / out)) == 4
    assert not list(tmp_path.rglob("*.part"))
