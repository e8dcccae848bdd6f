"""Everything around the training loop: command line, data, evaluation, checkpoints, hardware."""

import os

# OpenMP's threads spin while they wait for each other, by default for so long that a step becomes
# many times slower when another program needs a core. A shorter spin costs little on an idle
# machine. PyTorch reads this when it loads, so a script imports `trainer` before anything else.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "1000"

from trainer.cli import UserError, cli
from trainer.flags import Divides, Fraction, NonNegative, NonNegativeInt, PositiveFraction
from trainer.run import Run

__all__ = ["Divides", "Fraction", "NonNegative", "NonNegativeInt", "PositiveFraction"]
__all__ += ["Run", "UserError", "cli"]
