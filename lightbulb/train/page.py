"""What pages and pictures of runs have in common: one HTML file with everything in it, axes of one look."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightbulb.folder import explained

BLUE, ORANGE, GREEN, GREY = "#2f6fde", "#e07b1a", "#2a9d6f", "#7a8699"

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2530; background: #f5f7fa; margin: 0; }
main { max-width: 960px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .8rem; font-size: 1.15rem; }
.lead { color: #55606f; margin: .3rem 0 1.8rem; }
section { background: white; border: 1px solid #e2e7ee; border-radius: 10px; padding: 1.2rem 1.4rem; }
section + section { margin-top: 1.2rem; }
img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #edf0f4; vertical-align: top; }
th { font-weight: 500; color: #55606f; }
td { overflow-wrap: anywhere; }
tr:last-child > * { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; width: 5rem; }
.bars td:last-child { width: 52%; padding-right: 0; }
.bar { display: block; height: .95rem; border-radius: 3px; background: #c3cbd6; }
.own th, .own td { font-weight: 700; color: #2f6fde; }
.own .bar { background: #2f6fde; }
.alarm { color: #a33; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7fa; border-radius: 6px; padding: .9rem; }
pre b { color: #2f6fde; }
"""


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """A page that needs no other file and no network; empty sections are left out.

    Args:
        title: plain text.
        lead: HTML under the title.
        sections: HTML, as :func:`section` makes it.
    """
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} · LightBulb</title><style>{STYLE}</style></head>\n"
        f'<body><main>\n<h1>{html.escape(title)}</h1><p class="lead">{lead}</p>\n'
        + "\n".join(part for part in sections if part)
        + "\n</main></body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of a page; the body is HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def image(about: str, path: Path) -> str:
    """A picture, in the page itself."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(about)}" src="data:image/png;base64,{data}">'


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a picture.

    Raises:
        FolderError: it cannot be written.
    """
    with explained(path):
        figure.savefig(path, dpi=130, facecolor="white")
    return path


def style(axis: Axes, title: str, label: str) -> None:
    """Title, name of the vertical axis, and the look of all our axes."""
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axis.set_ylabel(label)
    axis.grid(color="#e4e8ee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#b8c0cc")
    axis.margins(x=0.01)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10], integer=True))
