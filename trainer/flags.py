"""From dataclasses to the command line: the field `n_embd: int = 32  # C` is the flag --n-embd."""

import argparse
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

from trainer.cli import UserError


class Limits(NamedTuple):
    """The range of numbers that a field accepts."""

    accept: Callable[[float], bool]
    words: str


class Divides(NamedTuple):
    """`n_head: Annotated[int, Divides("n_embd")]`: n_head must divide n_embd."""

    field: str


Fraction = Annotated[float, Limits(lambda x: 0 <= x < 1, ">= 0 and < 1")]
PositiveFraction = Annotated[float, Limits(lambda x: 0 < x <= 1, "> 0 and <= 1")]
NonNegative = Annotated[float, Limits(lambda x: 0 <= x < math.inf, ">= 0")]
NonNegativeInt = Annotated[int, Limits(lambda x: 0 <= x < 2**31, ">= 0")]
Seed = Annotated[int, Limits(lambda x: 0 <= x < 2**63, ">= 0")]
DEFAULT_LIMITS = {  # limits for fields that declare none
    int: Limits(lambda x: 1 <= x < 2**31, ">= 1"),
    float: Limits(lambda x: 0 < x < math.inf, "> 0"),
}


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a wrong flag in a single line."""

    def __init__(self, description: str) -> None:
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=how)

    def error(self, message: str) -> NoReturn:
        hint, unknown = "--help lists the flags", re.search(r"unrecogn.*?(--[\w-]+)", message)
        if unknown and (close := get_close_matches(unknown[1], self._option_string_actions, 1)):
            hint = f"did you mean {close[0]}?"
        raise UserError(f"{message} ({hint})")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Accept --learning_rate for --learning-rate."""
        words = sys.argv[1:] if args is None else args
        if empty := [word for word in words if re.fullmatch("--[\\w-]+=--", word)]:
            self.error(f"{empty[0]}: a value is missing")  # argparse would read it as no value
        words = [re.sub(r"^--([\w-]+)(?=$|=)", lambda name: flag(name[1]), w) for w in words]
        return super().parse_known_args(words, namespace)

    def add_fields(self, title: str, cls: type, presets: dict[str, Any] | None = None) -> None:
        """Add a flag for each field, with its comment as help; omitted flags set nothing."""
        group, hints = self.add_argument_group(title), typing.get_type_hints(cls, None, None, True)
        try:
            source = "".join(map(inspect.getsource, cls.__mro__[-2::-1]))
        except (OSError, TypeError):  # it was defined interactively
            source = ""
        comments = dict(re.findall(r"(\w+): .*?# (.*)", source))
        for field in fields(cls):
            if field.name == "vocab_size":  # the text decides
                continue
            default = field.default
            values = {name: vars(each)[field.name] for name, each in (presets or {}).items()}
            if len(set(values.values())) > 1:
                default = ", ".join(f"{name} {value}" for name, value in values.items())
            shown = "" if default in (None, "") or default is False else f" (default {default})"
            words = (comments.get(field.name, "") + shown).replace("%", "%%")
            how = options_for(hints[field.name], field.default is False)
            group.add_argument(flag(field.name), default=argparse.SUPPRESS, help=words, **how)


def options_for(hint: Any, is_off: bool = False) -> dict[str, Any]:
    """argparse options for a field of this type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # such as `int | None`
        hint = typing.get_args(hint)[0]
    if hint is bool:
        return {"action": "store_true" if is_off else argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if hint is str:
        return {"metavar": "TEXT"}
    if hint is Path:
        return {"type": path_of, "metavar": "PATH"}
    kind, *metadata = typing.get_args(hint) or (hint,)
    limits = next((each for each in metadata if isinstance(each, Limits)), DEFAULT_LIMITS[kind])
    wanted = f"a {'whole ' if kind is int else ''}number {limits.words}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not limits.accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return {"type": parse, "metavar": "N"}


def path_of(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("a path is missing")
    return Path(text)


def given(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields that the command line sets: `cls(**given(options, cls))` is the dataclass."""
    return {each.name: getattr(options, each.name) for each in fields(cls) if each.name in options}


def check_divides(config: Any) -> None:
    values = vars(config)
    for name, hint in typing.get_type_hints(type(config), None, None, True).items():
        for limit in typing.get_args(hint):
            if isinstance(limit, Divides) and values[limit.field] % values[name]:
                total, parts = f"{flag(limit.field)} {values[limit.field]}", values[name]
                fitting = math.ceil(values[limit.field] / parts) * parts
                raise UserError(f"{total} is not divisible by {flag(name)} {parts}; try {fitting}")


def flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")
