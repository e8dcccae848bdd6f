"""What the notebooks share: quick mode, pictures, predictions, and checks of exercises."""

import html
import linecache
import os
import re
import traceback
from collections.abc import Callable, Sequence

import matplotlib
import torch
from IPython import get_ipython
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib_inline.backend_inline import set_matplotlib_formats
from torch import Tensor

# COURSE_QUICK=1 in the environment runs a notebook with a fraction of the steps, to check that it
# works. Its losses mean nothing.
QUICK = os.environ.get("COURSE_QUICK", "") not in ("", "0")

# Colors that a color-blind reader can tell apart (Okabe and Ito), dark enough for text.
BLUE, ORANGE, GREEN, PINK, GRAY = "#0072b2", "#c04f00", "#007a59", "#a8457e", "#666666"
RIGHT, WRONG, OPEN = ("✓", "#007a59"), ("✗", "#c0392b"), ("…", "#666666")

set_matplotlib_formats("svg")
plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.facecolor": "#fbfbf8",  # light in JupyterLab's dark theme too, but not glaring
        "axes.facecolor": "#fbfbf8",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, PINK, GRAY]),
        "svg.hashsalt": "the same picture, the same file",
    }
)
torch.set_num_threads(1 if QUICK else torch.get_num_threads())


def say(text: str, sign: tuple[str, str] = ("", GRAY)) -> None:
    """Show a line in color, with a symbol for readers who cannot see the color."""
    symbol, color = sign
    line = f"{symbol} {text}".strip()
    style = f"color: {color}; font-weight: bold; white-space: pre-wrap; margin: 0"
    page = f'<p style="{style}">{html.escape(line)}</p>'
    display({"text/plain": line, "text/html": page}, raw=True)


if QUICK:
    say("Quick mode (COURSE_QUICK=1): models are barely trained, so losses mean nothing.", WRONG)


def steps(count: int) -> int:
    """This number of training steps, or in quick mode a hundredth of it."""
    return max(2, count // 100) if QUICK else count


def visible(text: str) -> list[str]:
    """A text's characters as labels, with symbols for space and newline."""
    return [{" ": "␣", "\n": "↵"}.get(character, character) for character in text]


def heat_map(
    axes: Axes,
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    bar: str = "",
    **options: object,
) -> None:
    """Values as colors; -inf and NaN stay blank. `bar` labels a color bar."""
    values = values.detach().cpu().float()
    values = values.masked_fill(~values.isfinite(), float("nan"))
    image = axes.imshow(values, aspect="equal", **{"cmap": "cividis"} | options)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11)
    if bar:
        axes.figure.colorbar(image, ax=axes, label=bar, shrink=0.8)


def causal(weights: Tensor) -> Tensor:
    """Attention weights with the masked future as NaN, so that a heat map leaves it blank."""
    future = torch.ones_like(weights, dtype=torch.bool).triu(1)
    return weights.masked_fill(future, float("nan"))


def reveal(guess: object, answer: object, within: float = 0.0) -> None:
    """Compare the reader's prediction with the answer; without one, the answer stays hidden."""
    if guess is ...:
        say("First replace the three dots above with your prediction.", OPEN)
    elif isinstance(answer, str):
        hit = str(guess).strip().lower() == answer.lower()
        say(f"You said {guess}; it is {answer}.", RIGHT if hit else WRONG)
    else:
        hit = abs(float(guess) - float(answer)) <= within
        say(f"You said {guess}; it is {float(answer):.4g}.", RIGHT if hit else WRONG)


class NotYet(Exception):
    """The cell above is not filled in yet."""


def given(answer: object) -> object:
    """The reader's answer, once there is one."""
    if answer is None or answer is ...:
        raise NotYet
    return answer


def check(exercise: Callable[[], None]) -> None:
    """Run the assertions about an answer, and say which one fails."""
    if complaint := failed_above():
        say(f"Not yet: {complaint}", WRONG)
        return
    try:
        exercise()
        say("Right.", RIGHT)
    except NotYet:
        missing = "a value is still `...`, or a `return` is missing"
        say(f"Not finished: {missing}. Change the cell above, run it, then run this one.", OPEN)
    except AssertionError as error:
        say(f"Not yet: {error}", WRONG)
    except Exception as error:  # whatever the reader's code does
        what, where = f"{type(error).__name__}: {error}", line_of(error)
        if where:
            say(f"Not yet: your code stopped with {what}{where}", WRONG)
        else:
            say(
                f"Not yet: the check cannot use your answer; is it of the right type? {what}", WRONG
            )


def failed_above() -> str:
    """A complaint if the previous cell failed, since its functions are then outdated."""
    shell = get_ipython()
    result = shell.last_execution_result if shell else None
    error = (result.error_before_exec or result.error_in_exec) if result else None
    if error is None:
        return ""
    return f"the cell that you ran last stopped with {type(error).__name__}: {error}"


def line_of(error: Exception) -> str:
    """Where in the reader's own code an error happened, if it did."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if re.search(r"ipykernel|ipython-input", f.filename)]
    own = [f for f in own if not f.name.startswith("exercise_")]
    if not own:
        return ""
    source = linecache.getline(own[-1].filename, own[-1].lineno).strip()
    return f"\nin line {own[-1].lineno} of {own[-1].name}: {source}"
