"""From dataclasses to the command line: the field `n_embd: int = 32  # C` becomes `--n-embd N`."""

import argparse
import inspect
import math
import re
import types
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from trainer.cli import UserError

C = TypeVar("C")


@dataclass(frozen=True)
class Limits:
    """The numbers that a field accepts, as in `Annotated[float, Limits(at_least=0, below=1)]`."""

    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf

    def accept(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above}
        bounds |= {"below": self.below, "at most": self.at_most}
        return " and ".join(f"{word} {b:,}" for word, b in bounds.items() if math.isfinite(b))


@dataclass(frozen=True)
class Divides:
    """A limit of one field by another: `Annotated[int, Divides("n_embd")]` divides n_embd."""

    field: str


Fraction = Annotated[float, Limits(at_least=0, below=1)]
PositiveFraction = Annotated[float, Limits(above=0, at_most=1)]
NonNegative = Annotated[float, Limits(at_least=0)]
NonNegativeInt = Annotated[int, Limits(at_least=0, below=2**31)]
Seed = Annotated[int, Limits(at_least=0, below=2**63)]
Positive = Annotated[float, Limits(above=0)]
Count = Annotated[int, Limits(at_least=1, below=2**31)]
ORDINARY = {int: Count, float: Positive}  # what a field without limits of its own accepts


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is answered with a single line."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def add_fields(self, title: str, cls: type, presets: dict[str, Any] | None = None) -> None:
        """A flag for each field, with its comment as the help; flags not given leave no trace."""
        group = self.add_argument_group(title)
        hints, comments = typing.get_type_hints(cls, include_extras=True), comments_of(cls)
        for field in fields(cls):
            if field.name == "vocab_size":  # the text decides
                continue
            default = field.default
            values = {name: getattr(preset, field.name) for name, preset in (presets or {}).items()}
            if len(set(values.values())) > 1:
                default = ", ".join(f"{name} {value}" for name, value in values.items())
            shown = "" if default in (None, "", False) else f" (default {default})"
            group.add_argument(
                flag(field.name),
                default=argparse.SUPPRESS,
                help=(comments.get(field.name, "") + shown).replace("%", "%%"),
                **options_for(hints[field.name], field.default is False),
            )


def options_for(hint: Any, is_off: bool = False) -> dict[str, Any]:
    """What argparse needs to know about a field of that type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # `int | None`: None if absent
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if hint is bool:
        return {"action": "store_true" if is_off else argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if hint in (str, Path):
        return {"type": hint, "metavar": "TEXT" if hint is str else "PATH"}
    kind, *metadata = typing.get_args(ORDINARY.get(hint, hint))
    limits = [each for each in metadata if isinstance(each, Limits)]
    return {"type": number(kind, *(limits or typing.get_args(ORDINARY[kind])[1:])), "metavar": "N"}


def number(kind: type, limits: Limits) -> typing.Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and limits.accept(value)):
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word} {limits}")
        return value

    return parse


def comments_of(cls: type) -> dict[str, str]:
    try:
        return dict(re.findall(r"(\w+): .*?# (.*)", inspect.getsource(cls)))
    except (OSError, TypeError):  # defined where there is no source, as in a notebook
        return {}


def given(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields that the command line sets."""
    return {each.name: getattr(options, each.name) for each in fields(cls) if each.name in options}


def filled(options: argparse.Namespace, cls: type[C]) -> C:
    """The dataclass, with what the command line sets."""
    return cls(**given(options, cls))


def check_divides(config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        for limit in typing.get_args(hint):
            if isinstance(limit, Divides):
                total, parts = getattr(config, limit.field), getattr(config, name)
                if total % parts:
                    raise UserError(
                        f"{flag(limit.field)} {total} is not divisible by {flag(name)} {parts}; "
                        f"try {flag(limit.field)} {math.ceil(total / parts) * parts}"
                    )


def flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def typed(name: str, value: Any) -> str:
    """A field as it would be typed."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {value}"
