"""Errors that the user can fix, and how a script reports them."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """What is wrong and what to type instead, in one line."""


def cli(main: Callable[[], None]) -> None:
    """Run a script's `main`; an error that the user can fix is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a text may hold any character, on any system
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # of several processes, one says it
            sys.exit(2)
        refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            refuse(
                "out of memory: make --batch-size, --block-size, --n-embd or --n-layer smaller, "
                "or gpt.py's --grad-accumulation larger"
            )
        if is_lost_process(error):
            refuse("another process of this run has ended; --resume continues from the checkpoint")
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # nobody reads our output any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def refuse(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch says it differently on every device."""
    words = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "invalid buffer size",
        "storage size calculation overflowed",
    )
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def is_lost_process(error: Exception) -> bool:
    """What PyTorch says when one of several processes is gone."""
    words = ("closed by peer", "reset by peer", "broken pipe", "remote process", "remote error")
    return "WORLD_SIZE" in os.environ and any(word in str(error).lower() for word in words)
