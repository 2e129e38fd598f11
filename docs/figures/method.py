"""Draws the pictures of docs/method.md and of the README: `python docs/figures/method.py`."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

HERE = Path(__file__).parent
TASK, DISTILL, SUM, STEP = "#1565c0", "#c62828", "#757575", "#2e7d32"


def weights(first: np.ndarray, second: np.ndarray, clamp: bool = True) -> np.ndarray:
    """Eq. 11 and 12 of the paper, clamped to the segment or not."""
    difference = first - second
    pi = float(second @ (second - first)) / float(difference @ difference)
    pi = min(max(pi, 0.0), 1.0) if clamp else pi
    return np.array([pi, 1 - pi])


def arrow(axes: Axes, to: np.ndarray, color: str, text: str, shift: tuple[float, float], width: float = 2) -> None:
    """A vector from the origin, with its name at its end."""
    axes.annotate(
        "", to, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0}
    )
    axes.annotate(text, to, xytext=shift, textcoords="offset points", color=color, ha="center", va="center")


def frame(axes: Axes, x: tuple[float, float], y: tuple[float, float], title: str = "") -> None:
    """Equal scales, the origin as a dot, no ticks."""
    axes.set(xlim=x, ylim=y, aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    axes.plot(0, 0, "o", color="black", ms=4)
    for side in axes.spines.values():
        side.set_visible(False)


def why() -> None:
    """One gradient four times as long as the other, and against it: what a sum does, and what the balance does."""
    task, distill = np.array([-0.45, 0.9]), np.array([3.9, 0.25])
    total = (task + distill) / 2
    pi = weights(task, distill)
    step = pi @ np.stack([task, distill])
    figure, axes = plt.subplots(figsize=(7.2, 3.0))
    frame(axes, (-1.5, 4.6), (-0.45, 1.5))
    axes.plot(*np.stack([task, distill]).T, "--", color="black", lw=1, zorder=0)
    # to the right of this line the task's loss rises
    along = np.array([task[1], -task[0]]) / np.linalg.norm(task)
    edge = np.stack([-3 * along, 9 * along, 9 * along + [9, -9], -3 * along + [0, -9]])
    axes.fill(*edge.T, color=TASK, alpha=0.08, lw=0, zorder=-1)
    axes.text(4.5, -0.33, "task loss rises", color=TASK, ha="right", fontsize=9)
    arrow(axes, task, TASK, "task", (-8, 10))
    arrow(axes, distill, DISTILL, "distillation", (-6, 12))
    arrow(axes, total, SUM, "their mean", (-8, 14))
    arrow(axes, step, STEP, f"balanced\n({pi[0]:.2f}, {pi[1]:.2f})", (36, 14), 3)
    save(figure, "why.svg")


def segment() -> None:
    """The three cases of the nearest point."""
    cases = [
        ("inside: both losses fall equally", (-0.5, 1.6), (1.5, 0.6), True),
        ("vertex: the shorter one alone", (0.9, 0.2), (1.6, 1.5), True),
        ("affine (no clamp): past the end", (0.9, 0.2), (1.6, 1.5), False),
    ]
    figure, each = plt.subplots(1, 3, figsize=(9.6, 3.3))
    for axes, (title, first, second, clamp) in zip(each, cases, strict=True):
        one, two = np.array(first), np.array(second)
        pi = weights(one, two, clamp)
        d = pi @ np.stack([one, two])
        frame(axes, (-0.7, 2.1), (-0.6, 1.8), f"{title}\n$\\pi$ = ({pi[0]:.2f}, {pi[1]:.2f})")
        if not clamp:
            reach = np.stack([one - 0.6 * (two - one), two])
            axes.plot(*reach.T, ":", color="black", lw=1, zorder=0)
        axes.plot(*np.stack([one, two]).T, "--", color="black", lw=1.2, zorder=0)
        arrow(axes, one, TASK, "$g_1$", (10, 2))
        arrow(axes, two, DISTILL, "$g_2$", (6, 8))
        arrow(axes, d, STEP, "$d$", (-2, -12) if d[1] < 0.3 else (-12, 2), 3)
    save(figure, "segment.svg")


def save(figure: plt.Figure, name: str) -> None:
    """The same bytes each time."""
    figure.tight_layout()
    figure.savefig(HERE / name, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "dtokd", "font.size": 10})
    why()
    segment()
