"""The command line: a flag for every field of a stage's config, and those that all stages share."""

import argparse
import inspect
import math
import re
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from common import UserError


class Parser(argparse.ArgumentParser):
    """The usual one, but a wrong flag is answered with a single line."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def number(convert: type, test: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """A type for flags: a number that passes the test."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not test(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


COUNT = number(int, lambda value: 1 <= value < 2**31, "a whole number from 1 up")
COUNT_OR_ZERO = number(int, lambda value: 0 <= value < 2**31, "a whole number from 0 up")
SEED = number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 up")
POSITIVE = number(float, lambda value: 0 < value < math.inf, "a number above 0")
RATE = number(float, lambda value: 0 < value <= 1000, "a number above 0, at most 1000")
POSITIVE_OR_ZERO = number(float, lambda value: 0 <= value < math.inf, "a number from 0 up")
FRACTION = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
SHARE = number(float, lambda value: 0 < value <= 1, "a number above 0, at most 1")
FIELD_TYPES = {int: COUNT, float: POSITIVE}
SPECIAL_FIELDS = {
    "dropout": FRACTION,
    "muon_learning_rate": RATE,
    "muon_momentum": FRACTION,
    "cooldown": SHARE,
    "weight_decay": POSITIVE_OR_ZERO,
    "warmup_iters": COUNT_OR_ZERO,
}


def parse_flags(
    config_class: type, presets: dict[str, Any] | None, words: list[str] | None = None
) -> argparse.Namespace:
    """Read a stage's command line, or these words as if they stood there.

    Of the config's fields the result has only those given.
    """
    module = inspect.getmodule(config_class)
    parser = Parser(module.__doc__.partition("\nSince ")[0])  # the diff is not for this place
    add_config_flags(parser, config_class, presets)
    group = parser.add_argument_group("the run")
    folder = f"runs/{Path(module.__file__).stem}"
    group.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a UTF-8 text to learn from, or a folder that prepare.py made",
    )
    group.add_argument(
        "--seed", type=SEED, metavar="N", help="another seed, another run (default 1)"
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"the run's folder (default {folder}, or {folder}-2 and so on)",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, or with the newest"
    )
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument(
        "--init-from",
        type=Path,
        metavar="RUN_FOLDER",
        help="start from the best weights of another run, with its settings",
    )
    group.add_argument(
        "--extend-vocabulary",
        action="store_true",
        help="with --init-from: add the characters that are new in this text",
    )
    add_device_flag(group)
    add_sampling_flags(parser)
    return parser.parse_args(words)


def add_config_flags(parser: Parser, config_class: type, presets: dict[str, Any] | None) -> None:
    """The field `n_embd: int = 32  # what it is` makes the flag `--n-embd N`, with that help."""
    group = parser.add_argument_group("the model and its training")
    if presets:
        group.add_argument(
            "--preset",
            choices=presets,
            help="all of these at once (default: small on a processor, full elsewhere)",
        )
    types = typing.get_type_hints(config_class)
    comments = dict(re.findall(r"(\w+): .*?# (.*)", inspect.getsource(config_class)))
    for field in fields(config_class):
        if field.name == "vocab_size":  # the text decides
            continue
        kind = types[field.name]
        if kind in (bool, bool | None):
            how = {"action": argparse.BooleanOptionalAction}
        elif names := names_for(kind):
            choices = (*names, "all")
            how = {"action": "extend", "nargs": "+", "choices": choices, "metavar": "NAME"}
        elif kind in FIELD_TYPES:
            how = {"type": SPECIAL_FIELDS.get(field.name, FIELD_TYPES[kind]), "metavar": "N"}
        else:
            how = {"choices": typing.get_args(kind)}
        default = field.default
        if presets:
            values = {name: getattr(preset, field.name) for name, preset in presets.items()}
            if len(set(values.values())) > 1:
                default = ", ".join(f"{name} {value}" for name, value in values.items())
        if default is None:
            default = "what suits the machine"
        elif default == ():
            default = "none"
        group.add_argument(
            flag(field.name),
            default=argparse.SUPPRESS,
            help=f"{comments.get(field.name, '')} (default {default})".replace("%", "%%"),
            **how,
        )


def flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def given_fields(options: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The fields of the config that the command line sets."""
    given = {}
    for name, kind in typing.get_type_hints(config_class).items():
        if name in options:
            value = given[name] = getattr(options, name)
            if names := names_for(kind):  # in whichever order they were given
                given[name] = tuple(each for each in names if each in value or "all" in value)
    return given


def names_for(kind: type) -> tuple[str, ...]:
    """Those that a field takes several of."""
    is_several = typing.get_origin(kind) is tuple
    return typing.get_args(typing.get_args(kind)[0]) if is_several else ()


def typed(value: Any) -> str:
    """A flag's value as it would be typed."""
    return " ".join(value) or "nothing" if isinstance(value, tuple) else str(value)


def add_device_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "mps", "cpu"),
        help="where to compute (default auto: the first of the others that is there)",
    )


def add_sampling_flags(parser: Parser) -> None:
    group = parser.add_argument_group("the sample")
    group.add_argument("--prompt", default="", metavar="TEXT", help="a text to continue")
    group.add_argument(
        "--sample-length",
        type=COUNT,
        default=500,
        metavar="N",
        help="how many characters to add to it (default 500)",
    )
    group.add_argument(
        "--temperature",
        type=POSITIVE_OR_ZERO,
        default=1.0,
        metavar="N",
        help="0 takes the likeliest character, 1 trusts the model, more is wilder (default 1)",
    )
    group.add_argument(
        "--top-k",
        type=COUNT,
        metavar="N",
        help="draw from the N likeliest characters only (default: from all)",
    )


def sampling_words(options: argparse.Namespace) -> list[str]:
    """The command line's words for those of these flags that are not at their defaults."""
    words = ["--prompt", options.prompt] if options.prompt else []
    if options.sample_length != 500:
        words += ["--sample-length", str(options.sample_length)]
    if options.temperature != 1.0:
        words += ["--temperature", str(options.temperature)]
    if options.top_k is not None:
        words += ["--top-k", str(options.top_k)]
    return words
