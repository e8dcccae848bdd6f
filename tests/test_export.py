"""An exported run is the same model to transformers: same numbers, same text, same characters."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import files, start
from hypothesis import given, settings
from hypothesis import strategies as st

from sample import generate, load

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs a network

# Two bytes, four bytes, joined and combining characters, and all that JSON must escape.
STRANGE = (
    "é e\u0301 😀 👩\u200d👩 \"quotes\" 'single' back\\slash \t \r\n \x00 \u00a0 \u2028 <|x|> n't ."
)
BLOCK_SIZE = 16
# So many steps, and such long ones, that no weight is where it began.
TRAINING = "--dropout 0.125 --max-iters 60 --eval-interval 30 --batch-size 8 --learning-rate 0.02"
SIZES = {  # n_embd, n_head, n_layer
    "one head, several layers": (12, 1, 3),
    "several heads, one layer": (24, 3, 1),
}


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A run, its export, and both of them loaded: the export with the lines that it prints."""
    pytest.importorskip("safetensors")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exported")
    lines = (f"Line {i}: {i * 7 % 13} steps away, {STRANGE}\n" for i in range(100))
    (folder / "text.txt").write_bytes("".join(lines).encode("utf-8"))
    n_embd, n_head, n_layer = request.param
    sizes = f"--n-embd {n_embd} --n-head {n_head} --n-layer {n_layer} --block-size {BLOCK_SIZE}"
    flags = f"{sizes} {TRAINING} --warmup-iters 5 --data text.txt --out run".split()
    for script, arguments in (("gpt", flags), ("export", ["run", "--out", folder / "gpt2"])):
        process = start(script, *arguments, cwd=folder)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
    assert errors == ""
    first_line, *python = output.splitlines()
    assert first_line.startswith("wrote model.safetensors, config.json, tokenizer.json")
    names = {}
    exec("\n".join(python), names)
    our_model, our_tokenizer = load(folder / "run", "cpu")
    return SimpleNamespace(
        folder=folder / "gpt2",
        text=STRANGE + "".join(2 * character for character in our_tokenizer.vocabulary),
        model=names["model"],
        tokenizer=names["tokenizer"],
        our_model=our_model,
        our_tokenizer=our_tokenizer,
    )


def difference(exported: SimpleNamespace, model: torch.nn.Module) -> float:
    """The largest between two models' logits, over contexts of the full length."""
    idx = torch.randint(len(exported.our_tokenizer.vocabulary), (32, BLOCK_SIZE))
    with torch.inference_mode():
        ours, _ = exported.our_model(idx)
        theirs = model(idx).logits
    assert ours.std() > 0.5  # a model that says little could be matched by a wrong one
    return float((ours - theirs).abs().max())


def test_no_weight_is_where_it_began(exported: SimpleNamespace) -> None:
    """So that the tests below would see one that went to the wrong place."""
    for name, parameter in exported.our_model.named_parameters():
        if parameter.dim() == 1:
            start_value = 1.0 if name.endswith("norm.weight") else 0.0
            assert (parameter - start_value).abs().median() > 0.002, name


def test_the_logits_are_the_same(exported: SimpleNamespace) -> None:
    assert difference(exported, exported.model) < 1e-5


def test_every_weight_has_its_place(exported: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(exported.folder, output_loading_info=True)
    assert not any(report.values()), report
    count = sum(parameter.numel() for parameter in exported.model.parameters())
    added = sum(block.attn.c_attn.bias.numel() for block in exported.model.transformer.h)
    assert count - added == sum(weight.numel() for weight in exported.our_model.parameters())


def test_the_output_layer_is_not_tied(exported: SimpleNamespace) -> None:
    model, ours = exported.model, exported.our_model
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, ours.to_logits.weight)
    assert torch.equal(model.transformer.wte.weight, ours.token_embedding.weight)


def test_it_trains_with_the_same_dropout(exported: SimpleNamespace) -> None:
    config = exported.model.config
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.125, 0.125, 0.125)


@pytest.mark.parametrize("prompt", ["L", "Line 7: ", "é e\u0301 😀", "\n", "\r\n"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_likeliest_text_is_the_same(
    prompt: str, use_cache: bool, exported: SimpleNamespace
) -> None:
    length = BLOCK_SIZE - len(prompt)
    ours = "".join(generate(exported.our_model, exported.our_tokenizer, prompt, length, 0))
    tokens = exported.tokenizer([prompt, prompt], return_tensors="pt")
    idx = exported.model.generate(
        **tokens, max_new_tokens=length, do_sample=False, use_cache=use_cache
    )
    assert exported.tokenizer.batch_decode(idx) == [prompt + ours] * 2
    assert idx.shape == (2, BLOCK_SIZE)  # no character ends a text, none fills one up


def test_saved_and_loaded_again(exported: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported.model.save_pretrained(tmp_path)
    exported.tokenizer.save_pretrained(tmp_path)
    assert difference(exported, AutoModelForCausalLM.from_pretrained(tmp_path)) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(exported.text)["input_ids"] == exported.our_tokenizer.encode(exported.text)


def test_every_character_keeps_its_number(exported: SimpleNamespace) -> None:
    tokenizer, ours = exported.tokenizer, exported.our_tokenizer
    assert tokenizer.get_vocab() == ours.number
    assert len(tokenizer) == len(ours.vocabulary) == exported.model.config.vocab_size
    assert tokenizer.all_special_tokens == []
    assert {
        "\r",
        "\n",
        "\t",
        "\x00",
        "\\",
        '"',
        "'",
        "\u0301",
        "\u200d",
        "😀",
    } <= ours.number.keys()
    for character, number in ours.number.items():
        assert tokenizer(character) == {"input_ids": [number], "attention_mask": [1]}
        assert tokenizer.decode([number]) == character
    assert tokenizer(exported.text)["input_ids"] == ours.encode(exported.text)


def test_any_text_comes_back(exported: SimpleNamespace) -> None:
    @given(st.text(exported.our_tokenizer.vocabulary, max_size=BLOCK_SIZE))
    @settings(max_examples=200, deadline=None)
    def check(text: str) -> None:
        numbers = exported.tokenizer(text)["input_ids"]
        assert numbers == exported.our_tokenizer.encode(text)
        assert exported.tokenizer.decode(numbers) == text
        assert exported.tokenizer.decode(numbers, skip_special_tokens=True) == text

    check()


@pytest.mark.parametrize("text", ["€", "Line €", "e\u0302", "<unknown>x€", "Z"])
def test_an_unknown_character_is_an_error(text: str, exported: SimpleNamespace) -> None:
    with pytest.raises(Exception, match="Missing .UNK. token"):
        exported.tokenizer(text)


def test_the_files_say_what_they_mean(exported: SimpleNamespace) -> None:
    """Other versions and programs have other defaults: what matters is not left to them."""
    from safetensors import safe_open

    config = json.loads((exported.folder / "config.json").read_text(encoding="utf-8"))
    assert config["activation_function"] == "relu"
    assert config["bos_token_id"] is None and config["eos_token_id"] is None
    assert config["tie_word_embeddings"] is False
    assert config["n_positions"] == BLOCK_SIZE
    assert config["n_inner"] == 4 * config["n_embd"]
    tokenizer = json.loads((exported.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert tokenizer["clean_up_tokenization_spaces"] is False
    assert exported.tokenizer.model_max_length == BLOCK_SIZE
    with safe_open(exported.folder / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}


@pytest.fixture
def refused(run: Callable, small_run: Callable, tmp_path: Path) -> Callable:
    """Export a run of gpt.py, or what is named: it must refuse and leave everything as it was."""

    def call(*flags: object, folder: str = "run") -> str:
        if not (tmp_path / "run").exists():
            assert small_run("gpt", "--out", "run")[0] == 0
        before = files(tmp_path), sorted(tmp_path.rglob("*"))
        code, output, errors = run("export", folder, *flags)
        assert code == 2, output + errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("export.py: ")
        assert not output
        assert (files(tmp_path), sorted(tmp_path.rglob("*"))) == before
        return errors

    return call


def test_no_run(refused: Callable, tmp_path: Path) -> None:
    for folder, complaint in (
        ("runs/none", "holds no trained run: there is no such folder"),
        (".", "holds no trained run: it has no best.pt"),
        ("text.txt", "is a file: name the folder of a run"),
    ):
        assert complaint in refused("--out", "gpt2", folder=folder)
    (tmp_path / "run" / "best.pt").write_bytes(b"")
    assert "is damaged" in refused("--out", "gpt2")


def test_flags(refused: Callable) -> None:
    assert "--out" in refused()
    assert "unrecognized arguments: --device cpu" in refused("--out", "gpt2", "--device", "cpu")


@pytest.mark.parametrize("stage", ["bigram", "layer_norm"])
def test_a_run_of_another_stage(stage: str, refused: Callable, small_run: Callable) -> None:
    assert small_run(stage, "--out", "other")[0] == 0
    complaint = f"made by {stage}.py: only gpt.py's runs have GPT-2's parts"
    assert complaint in refused("--out", "gpt2", folder="other")


def test_the_package_is_missing(refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    complaint = "safetensors is missing: python -m pip install -r requirements-export.txt"
    assert complaint in refused("--out", "gpt2")


def test_a_folder_that_is_taken(refused: Callable) -> None:
    pytest.importorskip("safetensors")
    for taken in ("run", "text.txt"):
        assert f"{taken} is there already: name another folder" in refused("--out", taken)


def test_an_empty_or_deep_folder_will_do(
    small_run: Callable, run: Callable, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "empty").mkdir()
    assert small_run("gpt", "--out", "run")[0] == 0
    for out in ("empty", Path("deep", "below")):
        assert run("export", "run", "--out", out)[0] == 0
        assert len(files(tmp_path / out)) == 4
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_cannot_be_made(refused: Callable) -> None:
    pytest.importorskip("safetensors")
    for out in ("text.txt/gpt2", "x" * 300):
        assert f"cannot write {Path(out)}: " in refused("--out", out)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(refused: Callable, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot write" in refused("--out", "locked/gpt2")


def test_a_full_disk(refused: Callable, run: Callable) -> None:
    pytest.importorskip("safetensors")
    resource = pytest.importorskip("resource")
    refused()  # with the run made before the disk is full
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # enough for config.json, no more
    try:
        assert "cannot write gpt2: File too large" in refused("--out", "gpt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run("export", "run", "--out", "gpt2")[0] == 0
