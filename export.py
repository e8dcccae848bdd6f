"""Export a trained run of gpt.py as a GPT-2 that Hugging Face transformers can load.

    python export.py runs/gpt --out exported

gpt.py has GPT-2's layers under plainer names: weights are renamed, and some are transposed, but
no value changes. The other files describe the model and its tokenizer. In transformers, the prompt
and its continuation together must fit into block_size; sample.py drops the older half of the
context instead.

This needs one more package: python -m pip install -r requirements-export.txt
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from trainer import UserError, cli
from bpe import BYTES, PATTERN, PRINTABLE, BytePairTokenizer
from common import Tokenizer
from gpt import Config
from sample import rebuild
from trainer.checkpoint import read_checkpoint, saved_config
from trainer.flags import Parser, path_of
from trainer.folder import rename

import torch
from torch import Tensor, nn

GPT2_NAMES = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "blocks": "transformer.h",
    "attention_norm": "ln_1",
    "attention": "attn",
    "qkv_proj": "c_attn",
    "out_proj": "c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward": "mlp",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def gpt2_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights under GPT-2's names and in its shapes."""
    weights = {}
    for name, parameter in model.named_parameters():
        name = ".".join(GPT2_NAMES.get(part, part) for part in name.split("."))
        weight = parameter.detach()
        if name.startswith("transformer.h.") and weight.dim() == 2:
            weight = weight.T  # GPT-2 stores the matrices of its blocks as (inputs, outputs)
        weights[name] = weight.contiguous()
        if name.endswith("c_attn.weight"):  # GPT-2 adds a bias here; gpt.py does not
            weights[name.replace("weight", "bias")] = torch.zeros(weight.shape[1])
    return weights


def gpt2_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "n_inner": 4 * config.n_embd,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": False,  # lm_head and token_embedding are separate
        "bos_token_id": None,  # there is no beginning-of-text token
        "eos_token_id": None,  # and no end-of-text token
        "use_cache": True,
    }


def byte_pair_json(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    """The merges of bpe.py, with GPT-2's way to write bytes as visible characters."""
    shown = {
        byte: chr(byte if i < len(PRINTABLE) else 256 + i - len(PRINTABLE))
        for i, byte in enumerate(BYTES)
    }
    words = ["".join(shown[byte] for byte in token) for token in tokenizer.tokens]
    merges = [[words[first], words[second]] for first, second in tokenizer.source]
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {
            "type": "BPE",
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": merges,
        },
        "post_processor": None,
        "decoder": byte_level,
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Split a text into characters and look each one up; decoding joins them without spaces.

    A character outside the vocabulary would become the unknown token; since the vocabulary has no
    unknown token either, it is an error instead.
    """
    any_character = {"Regex": r"[\s\S]"}  # unlike a dot, this matches newlines too
    cut = {"type": "Split", "pattern": any_character, "behavior": "Isolated", "invert": False}
    look_up = {"type": "WordLevel", "vocab": tokenizer.ids, "unk_token": "<unknown>"}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": cut,
        "model": look_up,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
    }


def tokenizer_config(config: Config) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        # Otherwise transformers 4 creates token types too, and GPT-2 adds them to the embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files into a temporary folder, then rename it: all of them appear, or none."""
    partial = folder.parent / f"{folder.name}.{os.getpid()}.part"
    try:
        taken = any(folder.iterdir()) if folder.is_dir() else os.path.lexists(folder)
        if taken:
            raise UserError(f"{folder} already exists: choose another folder with --out")
        try:
            partial.mkdir(parents=True)
            for name, content in files.items():
                (partial / name).write_bytes(content)
            if folder.exists():
                folder.rmdir()  # it is empty; on Windows, a rename cannot replace a folder
            rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=path_of, metavar="RUN_FOLDER", help="such as runs/gpt")
    parser.add_argument("--out", type=path_of, metavar="DIR", required=True, help="a new folder")
    options = parser.parse_args()

    checkpoint = read_checkpoint(options.folder / "best.pt")
    if checkpoint["stage"] != "gpt":
        raise UserError(
            f"the run in {options.folder} was made by {checkpoint['stage']}.py: "
            "only runs of gpt.py can be exported"
        )
    try:
        from safetensors.torch import save  # imported here because only export.py needs it
    except ImportError:
        raise UserError(
            "the package safetensors is missing: python -m pip install -r requirements-export.txt"
        ) from None
    model, tokenizer = rebuild(checkpoint, "cpu")
    config = saved_config(Config, checkpoint)
    to_json = byte_pair_json if tokenizer.unit == "tokens" else tokenizer_json
    files = {
        "model.safetensors": save(gpt2_weights(model), {"format": "pt"}),
        "config.json": as_json(gpt2_config(config)),
        "tokenizer.json": as_json(to_json(tokenizer)),
        "tokenizer_config.json": as_json(tokenizer_config(config)),
    }
    write_folder(options.out, files)
    print(f"wrote {', '.join(files)} to {options.out}; to load them:")
    print("from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"model = AutoModelForCausalLM.from_pretrained({str(options.out)!r})")
    print(f"tokenizer = AutoTokenizer.from_pretrained({str(options.out)!r})")


if __name__ == "__main__":
    cli(main)
