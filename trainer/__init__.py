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

# Ctrl-C while PyTorch loads ends a script without a traceback. Notebooks do not use this hook.
sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or sys.__excepthook__(kind, *error)

# While PyTorch loads, code that ignores every exception may swallow a Ctrl-C: let it wait.
waiting: list[int] = []
in_main = threading.current_thread() is threading.main_thread()
if delays := in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))

from trainer.cli import UserError, cli
from trainer.flags import Divides, Fraction, NonNegative, NonNegativeInt, PositiveFraction
from trainer.run import Run

if delays:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if waiting:
    raise KeyboardInterrupt
