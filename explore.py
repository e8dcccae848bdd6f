"""Look inside your own models: one page that runs them in the browser, without a network.

    python explore.py runs/gpt                              writes runs/gpt/explore.html
    python explore.py runs/bigram runs/layer_norm runs/gpt  one page to compare these runs

In a notebook: `from explore import show; show("runs/gpt")`.
"""

import base64
import html
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from trainer import UserError, cli
from bpe import BYTES, PATTERN
from common import LanguageModel, Tokenizer
from explorer.steps import describe
from sample import rebuild
from trainer.checkpoint import read_checkpoint
from trainer.corpus import open_corpus
from trainer.flags import Parser, path_of
from trainer.folder import write_whole

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

PARTS = Path(__file__).resolve().parent / "explorer"
PASSAGE = 64  # tokens of the validation split that the page shows first


Packed = tuple[dict[str, Any], str]  # what the page needs to know about a run, and its weights


def pack(folder: Path) -> Packed:
    checkpoint = read_checkpoint(folder / "best.pt")
    return pack_model(*rebuild(checkpoint, "cpu"), folder.resolve().name, checkpoint)


def pack_model(
    model: LanguageModel, tokenizer: Tokenizer, name: str, checkpoint: dict[str, Any]
) -> Packed:
    """The model as a list of steps, and its weights: float16 numbers in base64."""
    about, tensors = describe(model)
    source = inspect.getsource(sys.modules[type(model).__module__]).split("\n")
    lines = {n for step in about["steps"] for n in (step["line"], *step.get("lines", {}).values())}
    about |= {
        "name": name,
        "stage": checkpoint["stage"],
        "vocabulary": list(tokenizer.vocabulary),
        "corpus": checkpoint["corpus"]["name"],
        "passage": passage(checkpoint["corpus"]["path"], tokenizer, model.block_size),
        "valLoss": checkpoint["val_loss"] / checkpoint["corpus"].get("characters_per_token", 1),
        "step": checkpoint["step"],
        "parameters": checkpoint["parameters"],
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "source": {n: source[n - 1].strip() for n in sorted(filter(None, lines))},
    }
    if tokenizer.unit == "tokens":  # what the page needs to encode a text
        about |= {"merges": tokenizer.source, "pattern": PATTERN, "bytes": BYTES}
    largest = torch.finfo(torch.float16).max
    halves = [tensor.clamp(-largest, largest).half().numpy() for tensor in tensors.values()]
    numbers = b"".join(each.astype("<f2").tobytes() for each in halves)
    return about, base64.b64encode(numbers).decode("ascii")


def passage(path: str, tokenizer: Tokenizer, block_size: int) -> str:
    """The beginning of the validation split, or if the text is gone, of the vocabulary."""
    try:
        corpus = open_corpus(Path(path))
        text = corpus.tokenizer.decode(corpus.validation[:PASSAGE].tolist())
    except UserError:
        text = tokenizer.vocabulary
    if tokenizer.unit == "characters":
        text = "".join(each for each in text if each in tokenizer.ids)
    return "".join(text)[: max(2, block_size)]


def page(packed: list[Packed]) -> bytes:
    """The page of one or several models."""
    abouts, weights = zip(*packed, strict=True)
    loader = FileSystemLoader(PARTS, encoding="utf-8")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    files = [*PARTS.glob("*.js"), *PARTS.glob("*.css")]
    texts = {
        path.name.replace(".", "_"): Markup(path.read_text(encoding="utf-8")) for path in files
    }
    # In a script element only "<" could end the JSON early; nothing else is read as HTML.
    models = Markup(json.dumps(abouts).replace("<", "\\u003c"))
    title = "Explore " + ", ".join(about["name"] for about in abouts)
    values = {"title": title, "models": models, "weights": weights, **texts}
    return template.get_template("page.html").render(values).encode("utf-8", errors="replace")


def show(*folders: str | Path) -> Any:
    """The page in a notebook."""
    from IPython.display import HTML

    source = html.escape(page([pack(Path(each)) for each in folders]).decode("utf-8"))
    return HTML(f'<iframe srcdoc="{source}" width="100%" height="900" frameborder="0"></iframe>')


def main() -> None:
    parser = Parser(__doc__)
    words = "such as runs/gpt; the page is written into the first one"
    parser.add_argument("folders", nargs="+", type=path_of, metavar="RUN_FOLDER", help=words)
    parser.add_argument("--out", type=path_of, metavar="FILE", help="where to write the page")
    options = parser.parse_args()
    out = options.out or options.folders[0] / "explore.html"
    write_whole(out, page([pack(folder) for folder in options.folders]))
    print(out.resolve().as_uri())


if __name__ == "__main__":
    cli(main)
