"""Errors that the user can fix, and how a script reports them."""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

# PyTorch words these errors differently on every device and network.
OUT_OF_MEMORY = "out of memory|can't allocate|not enough memory|invalid buffer|storage size calc"
LOST_PROCESS = "closed by peer|reset by peer|broken pipe|remote process|remote error"


class UserError(Exception):
    """What is wrong and what to type instead, in one line."""


def cli(main: Callable[[], None]) -> None:
    """Run a script's `main`; report a UserError in one line, with exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # texts may contain any Unicode character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
        return print(end="", flush=True)
    except UserError as error:
        message = str(error) if os.environ.get("LOCAL_RANK", "0") == "0" else ""  # say it once
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            message = "out of memory: lower --batch-size or --n-embd, or raise --grad-accumulation"
        elif re.match(r"torch\._(dynamo|inductor)", type(error).__module__):
            message = f"torch.compile failed; try --no-compile: {str(error)[:200]}"
        elif "WORLD_SIZE" in os.environ and re.search(LOST_PROCESS, str(error), re.I):
            message = "another process has ended; --resume continues from the last checkpoint"
        else:
            raise
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.filename or error.errno not in (errno.EPIPE, errno.EINVAL, errno.ENOSPC):
            raise
        discard_output()
        if error.errno != errno.ENOSPC:  # nobody reads the output anymore, as after `| head`
            sys.exit(0)
        message = f"cannot write the output: {error.strerror}"
    if message:
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}:", *message.split(), file=sys.stderr, flush=True)
    sys.exit(2)


def say(text: str, end: str = "\n") -> None:
    """Print, but continue if printing fails: a run's results are in its files."""
    try:
        print(text, end=end, flush=True)
    except OSError:  # such as a pipe whose reader has ended
        discard_output()


def discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or bool(re.search(OUT_OF_MEMORY, str(error), re.I))
