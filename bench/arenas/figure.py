"""An arena's results as a figure: targets met, latency and cost of every system, every seed a dot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.arenas.verdict import complete, mean, values
from common.plots import style

FIGURES = Path(__file__).resolve().parents[2] / "results" / "figures" / "arenas"
PANELS = (
    ("slo_attainment", "targets met (%)", 100, False), ("p99_ttft_ms", "P99 TTFT (s)", 1e-3, True),
    ("mean_tpot_ms", "mean TPOT (ms)", 1, False), ("gpu_seconds", "GPU-seconds", 1, False),
)  # fmt: skip


def draw(result: dict[str, Any]) -> list[Path]:
    """<arena>.png and .pdf; hollow: defaults, filled: the system's own best."""
    from matplotlib.ticker import LogLocator

    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    height = 1.35 + 0.27 * len(systems)
    with style.styled():
        figure, axes = style.new_figure(1, len(PANELS), 10.0, height, left=0.115, right=0.97, top=1 - 0.78 / height,
                                        bottom=0.5 / height, wspace=0.14)  # fmt: skip
        for index, (panel, (key, title, factor, log)) in enumerate(zip(axes[0], PANELS)):
            panel.set_title(title)
            for row in filter(complete, result["rows"]):
                _mark(panel, row, systems.index(row["system"]), key, factor)
            if log:
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            else:
                panel.set_xlim(left=0)
            style.plain_numbers(panel.xaxis, log=log)
            names = [f"{name} (oracle)" if name == "infinite_kv" else name for name in systems]
            panel.set_yticks(range(len(systems)), names if index == 0 else [""] * len(systems))
            panel.set_ylim(len(systems) - 0.5, -0.5)
        style.title(figure, f"Arena: {result['arena'].replace('_', ' ')} (simulated)", height)
        figure.text(0.01, 1 - 0.36 / height, "large mark: mean over seeds, small: each seed; hollow: defaults, "
                    "filled: the system's own best configuration", fontsize=8, va="top")  # fmt: skip
        commit = str(result["git"].get("commit"))[:12]
        figure.text(0.01, 0.006, f"simulated  ·  {' · '.join(result['common'][:3])}  ·  {len(result['seeds'])} "
                    f"{'windows' if result['windows'] else 'seeds'}  ·  {commit}", fontsize=7, color="#555555",
                    va="bottom")  # fmt: skip
        FIGURES.mkdir(parents=True, exist_ok=True)
        return style.save(figure, FIGURES, result["arena"])


def _mark(panel: Any, row: dict[str, Any], at: int, key: str, factor: float) -> None:
    best = row["kind"] == "best"
    colour, y = style.P99 if best else style.P50, at + (0.16 if best else -0.16)
    face = colour if best else "none"
    dots = [value * factor for value in values(row, key)]
    panel.plot(dots, [y] * len(dots), "o", ms=2, color=colour, alpha=0.55, linestyle="none")
    panel.plot([mean(row, key) * factor], [y], "o", ms=5.5, markerfacecolor=face, markeredgecolor=colour)
