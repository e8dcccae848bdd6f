"""Everything around the training loop: command line, data, evaluation, checkpoints, hardware."""

import os
import signal
import sys
import threading

# OpenMP threads busy-wait for each other, by default for so long that a step gets many times
# slower when another program needs a core. A shorter spin costs little on an idle machine.
# OpenMP reads this when PyTorch loads it, so scripts import `trainer` before `torch`.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "1500"

# While PyTorch loads, Ctrl-C ends a script at once; as an exception it would leave a traceback.
in_script = hasattr(sys.modules["__main__"], "__file__")  # not in a notebook, whose kernel survives
in_script &= threading.current_thread() is threading.main_thread()
handler = signal.signal(signal.SIGINT, signal.SIG_DFL) if in_script else None

from trainer.cli import UserError, cli
from trainer.flags import Divides, Fraction, NonNegative, NonNegativeInt, PositiveFraction
from trainer.run import Run

if in_script:
    signal.signal(signal.SIGINT, handler)

__all__ = ["Divides", "Fraction", "NonNegative", "NonNegativeInt", "PositiveFraction"]
__all__ += ["Run", "UserError", "cli"]
