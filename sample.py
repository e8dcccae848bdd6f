"""Continue a text with a trained model of any stage.

    python sample.py runs/gpt --prompt "ROMEO:" --temperature 0.8

`load` and `generate` do the same from Python.
"""

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer import UserError, cli
from common import LanguageModel, Tokenizer
from trainer.checkpoint import read_checkpoint, restore, saved_config
from trainer.corpus import make_tokenizer
from trainer.flags import Parser, Seed, given, options_for, path_of
from trainer.machine import DeviceSettings, available_device
from trainer.sampling import SampleSettings, continuation, store_by_columns


def load(folder: str | Path, device: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """The best model of a run, and its tokenizer."""
    return rebuild(read_checkpoint(Path(folder) / "best.pt"), device)


def rebuild(checkpoint: dict[str, Any], device: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    stage = stage_module(checkpoint["stage"])
    model = stage.Model(saved_config(stage.Config, checkpoint))
    restore(checkpoint, {"model": model})
    model = model.to(available_device(device)).eval()
    store_by_columns(model)
    return model, make_tokenizer(checkpoint["vocabulary"])


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 500,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 1,
) -> Iterator[str]:
    """Yield `length` tokens that continue the prompt, each as soon as it is sampled."""
    how = SampleSettings(prompt, length, temperature, top_k)
    return itertools.islice(continuation(model, tokenizer, how, seed), 1, None)


def stage_module(name: str) -> ModuleType:
    """Import a stage's script; only one next to this file is accepted."""
    if Path(name).name == name and Path(__file__).with_name(f"{name}.py").exists():
        module = importlib.import_module(name)
        if any(model.__module__ == name for model in LanguageModel.__subclasses__()):
            return module
    raise UserError(f"this run was made by {name}.py, and there is no such stage next to sample.py")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=path_of, metavar="RUN_FOLDER", help="such as runs/gpt")
    parser.add_fields("the sample", SampleSettings)
    parser.add_fields("the machine", DeviceSettings)
    words = "random seed for sampling (default: the run's own)"
    parser.add_argument("--seed", help=words, **options_for(Seed))
    options = parser.parse_args()

    checkpoint = read_checkpoint(options.folder / "best.pt")
    model, tokenizer = rebuild(checkpoint, DeviceSettings(**given(options, DeviceSettings)).device)
    seed = checkpoint["seed"] if options.seed is None else options.seed
    how = SampleSettings(**given(options, SampleSettings))
    for piece in continuation(model, tokenizer, how, seed):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli(main)
