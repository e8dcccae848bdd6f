"""Everything around the training loop: command line, data, evaluation, checkpoints, hardware."""

import os
import signal
import sys
import threading
from pathlib import Path

# OpenMP threads busy-wait for each other, by default for so long that a step gets many times
# slower when another program needs a core. A shorter spin costs little on an idle machine.
# OpenMP reads this when PyTorch loads it, so scripts import `trainer` before `torch`.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "1500"

# While PyTorch loads, Ctrl-C ends a script at once; as an exception it would leave a traceback.
# `cli` restores Python's handler. In a notebook, Ctrl-C must not end the kernel.
script = Path(getattr(sys.modules["__main__"], "__file__", None) or "notebook").resolve()
if (
    script.parent == Path(__file__).resolve().parent.parent
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from trainer.cli import UserError, cli
from trainer.flags import Divides, Fraction, NonNegative, NonNegativeInt, PositiveFraction
from trainer.run import Run

__all__ = ["Divides", "Fraction", "NonNegative", "NonNegativeInt", "PositiveFraction"]
__all__ += ["Run", "UserError", "cli"]
