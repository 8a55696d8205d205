"""One look for every figure: colours, sizes, file formats and the line that says where the numbers come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.provenance import provenance_line
from common.results import replacing
from common.runs import LoadedRun

# Okabe and Ito's palette: told apart with any colour vision, and in grey by order of lightness
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
DASHES = ("-", "--", ":", "-.")
INK, FAINT = "#222222", "#9A9A9A"
P50, P99, LIMIT = PALETTE[0], PALETTE[1], INK

# one weight of one font: each that a PDF embeds takes 0.1 s
_RC: Any = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.4, "legend.frameon": False, "axes.titlelocation": "left",
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "pdf.fonttype": 42,
    "path.simplify": True, "agg.path.chunksize": 10_000,
}  # fmt: skip
PNG_DPI = 130


@contextmanager
def styled() -> Iterator[None]:
    """Draw with the suite's settings; the caller's are untouched. No pyplot, so no windows and no global figures."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def new_figure(rows: int, columns: int, width: float, height: float, **gridspec: Any) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches with a grid of axes (always a 2-d array of them)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    share = gridspec.pop("sharex", False)
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=share, gridspec_kw=gridspec)


def save(figure: Any, folder: Path, stem: str) -> list[Path]:
    """Write `<stem>.png` and `<stem>.pdf`, each as a whole or not at all, without timestamps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    canvas_pdf: Any = FigureCanvasPdf(figure)
    png, pdf = folder / f"{stem}.png", folder / f"{stem}.pdf"
    with replacing(pdf) as temporary:
        canvas_pdf.print_pdf(temporary, metadata={"CreationDate": None})
    canvas_png: Any = FigureCanvasAgg(figure)
    figure.set_dpi(PNG_DPI)
    with replacing(png) as temporary:
        canvas_png.print_png(temporary, pil_kwargs={"compress_level": 3})
    return [png, pdf]


def footer(figure: Any, runs: Sequence[LoadedRun]) -> None:
    """The provenance line at the foot of a figure."""
    figure.text(0.01, 0.006, provenance_line([run.manifest for run in runs]), fontsize=7, color="#555555", va="bottom")


def title(figure: Any, text: str, height: float) -> None:
    """The figure's headline, at the same distance from the top whatever its height in inches."""
    figure.text(0.01, 1 - 0.08 / height, text, fontsize=11.5, va="top")


def line_style(index: int) -> dict[str, Any]:
    """Colour, then dashes: distinct for 32 lines."""
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[index // len(PALETTE) % len(DASHES)]}


def plain_numbers(axis: Any, log: bool = False) -> None:
    """Tick labels as 20,000 and not 2e4; on a logarithmic axis at the decades only."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.0e}"))
    if log:
        axis.set_minor_formatter(NullFormatter())


def empty(axes: Any, why: str) -> None:
    """Say in a panel why there is nothing in it."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color="#777777")
