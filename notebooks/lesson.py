"""What the notebooks share: a quick mode, visible characters, one style for pictures, checks."""

import os
from collections.abc import Callable, Sequence

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

# COURSE_QUICK=1 in the environment runs a notebook with a fraction of the steps, to see that it
# works; its losses then mean nothing.
QUICK = os.environ.get("COURSE_QUICK", "") not in ("", "0")

# Colors that a color-blind reader can tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#777777"

plt.rcParams.update(
    {
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, PINK, GREY]),
    }
)
torch.set_num_threads(1 if QUICK else torch.get_num_threads())


def steps(count: int) -> int:
    """This number of training steps, or in quick mode a hundredth of it."""
    return max(2, count // 100) if QUICK else count


def visible(text: str) -> list[str]:
    """A text's characters as labels, with signs for space and newline."""
    return [{" ": "␣", "\n": "↵"}.get(character, character) for character in text]


def heat_map(
    axes: Axes,
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    **options: object,
) -> None:
    """Values as shades, from dark to light, with a label at each row and column."""
    axes.imshow(values.detach().cpu(), aspect="equal", **{"cmap": "cividis"} | options)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11)


class NotYet(Exception):
    """The cell above is not filled in yet."""


def given(answer: object) -> object:
    """The reader's answer, once there is one."""
    if answer is None or answer is ...:
        raise NotYet
    return answer


def check(exercise: Callable[[], None]) -> None:
    """Run the assertions about an answer, and say which one fails."""
    try:
        exercise()
        print("Right.")
    except NotYet:
        print("Nothing there yet: fill in the cell above, then run this one again.")
    except AssertionError as error:
        print(f"Not yet: {error}")
    except Exception as error:  # whatever the reader's code does
        print(f"Not yet: your code stopped with {type(error).__name__}: {error}")
