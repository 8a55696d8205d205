"""One self-contained HTML page of results: question and answer, tables, figures, configuration and provenance.

Nothing on it is loaded from anywhere: figures are embedded as PNG, there is no script and no font of its own.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.comparison import Comparison
from common.comparison_text import BLOCKS, difference_columns, heading, not_for, shown
from common.console import BEST_NOTE, metric_columns
from common.metrics import format_metric
from common.provenance import provenance_line
from common.runs import LoadedRun

STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}table{border-collapse:collapse;
font-size:13px;margin:.6em 0;display:block;overflow-x:auto}td,th{padding:.2em .6em;text-align:right;border-bottom:1px
solid #eee}td:first-child,th:first-child{text-align:left}td.best{font-weight:700;background:#e8f2fa}
figure{margin:1em 0;overflow-x:auto}img{max-width:100%;height:auto;cursor:zoom-in}
input{position:absolute;opacity:0}input:checked+img{max-width:none;width:1200px;cursor:zoom-out}
input:focus-visible+img{outline:2px solid #0072B2}
.answer{font-size:1.08em;background:#f5f7f9;padding:.8em 1.1em;border-left:4px solid #0072B2}.warn{border-color:#D55E00}
pre{font-size:12px;background:#f7f7f7;padding:.8em;overflow-x:auto}.note{color:#555;font-size:13px}"""
HEADLINES = (
    ("mean_ttft_ms", "mean time to first token", "ms", -1), ("p99_ttft_ms", "P99 time to first token", "ms", -1),
    ("mean_tpot_ms", "mean time per output token", "ms", -1), ("goodput", "goodput", "requests/s", 1),
    ("output_throughput", "output throughput", "tokens/s", 1), ("gpu_seconds", "GPU-seconds", "s", -1),
)  # fmt: skip


def page(runs: Sequence[LoadedRun], comparison: Comparison | None, figures: Sequence[Path]) -> str:
    """The page's text. `figures` are PNG files, drawn already; those that cannot be read are named instead."""
    title = "Which system pays here?" if comparison else f"How did {runs[0].name} do?"
    line = provenance_line([run.manifest for run in runs])
    parts = [f"<h1>{_text(title)}</h1>", f'<p class="note">{_text(line)}</p>', _problems(runs)]
    parts.append(f'<div class="answer">{_answer(runs, comparison)}</div>')
    parts += _tables(runs, comparison)
    parts += ["<h2>Figures</h2>", '<p class="note">A click or tap on a figure enlarges it.</p>']
    parts += [_figure(path) for path in figures]
    parts.append("<h2>Configuration and provenance</h2>")
    parts += [_details(run) for run in runs]
    metas = '<meta charset="utf-8"/><meta name="viewport" content="width=device-width,initial-scale=1"/>'
    head = f"<head>{metas}<title>{_text(title)}</title><style>{STYLE}</style></head>"
    return f'<!DOCTYPE html>\n<html lang="en">{head}<body>\n' + "\n".join(filter(None, parts)) + "\n</body></html>\n"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _problems(runs: Sequence[LoadedRun]) -> str:
    lines = [f"<li>{_text(run.name)}: {_text('; '.join(run.problems))}</li>" for run in runs if run.problems]
    return f'<div class="answer warn">Not everything is here:<ul>{"".join(lines)}</ul></div>' if lines else ""


def _answer(runs: Sequence[LoadedRun], comparison: Comparison | None) -> str:
    """Who is best at what, with the margin; for one run what it reached. Numbers only, from the summaries."""
    rows = [row.averaged() for row in comparison.rows] if comparison else list(runs)
    kinds = " and ".join(dict.fromkeys(run.label for run in runs))
    lines = []
    for key, name, unit, direction in HEADLINES:
        known = [(run.summary[key], run.name) for run in rows if isinstance(run.summary.get(key), int | float)]
        if not known:
            continue
        value, winner = (max if direction > 0 else min)(known, key=lambda pair: pair[0])
        reached = f"{format_metric(value)} {unit}"
        if comparison is None:
            lines.append(f"<li>{_text(name)}: <b>{_text(reached)}</b></li>")
        elif len({number for number, _ in known}) == 1:
            lines.append(f"<li>{_text(name)}: all equal, {_text(reached)}</li>")
        else:
            margin = next((f" ({shown(d)} against {comparison.baseline})" for d in comparison.differences
                           if (d.metric, d.row) == (key, winner)), "")  # fmt: skip
            within = _within(next(run.summary for run in rows if run.name == winner), key)
            lines.append(f"<li>{_text(name)}: <b>{_text(winner)}</b>, {_text(reached + margin + within)}</li>")
    if not lines:
        return f"No metric can be read ({_text(kinds)})."
    lead = "Best of each" if comparison else "Reached"
    return f"{lead} ({_text(kinds)}):<ul>{''.join(lines)}</ul>"


def _within(summary: Mapping[str, Any], key: str) -> str:
    """Saved GPUs and tokens per second are worth what the targets say: their share, beside them."""
    met = summary.get("slo_attainment")
    if key not in ("gpu_seconds", "output_throughput", "goodput") or not isinstance(met, int | float):
        return ""
    return f"; {100 * met:.0f}% of its requests meet the targets"


def _tables(runs: Sequence[LoadedRun], comparison: Comparison | None) -> list[str]:
    rows = [row.averaged() for row in comparison.rows] if comparison else list(runs)
    parts = []
    for title, block in BLOCKS.items():
        columns = metric_columns(rows, block)
        if columns:
            parts += [f"<h2>{_text(title)}</h2>", _table([run.name for run in rows], columns)]
    if comparison is None:
        return parts
    parts.append(f'<p class="note">{_text(BEST_NOTE)}</p>')
    columns = difference_columns(comparison)
    if columns:
        others = [row.name for row in comparison.rows if row.name != comparison.baseline]
        parts += [f"<h2>Against {_text(comparison.baseline)}</h2>", _table(others, columns)]
    notes = [*comparison.notes, *(f"{name} was not designed for: {what}" for name, what in not_for(comparison))]
    return [*parts, '<ul class="note">' + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>"]


def _table(names: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(heading(c))}</th>" for c in columns)
    lines = []
    for i, name in enumerate(names):
        cells = "".join(f'<td class="best">{_text(cell)}</td>' if cell.endswith("*") else f"<td>{_text(cell)}</td>"
                        for cell in (column[i + 2].strip() for column in columns))  # fmt: skip
        lines.append(f"<tr><td>{_text(name)}</td>{cells}</tr>")
    return f"<table><thead><tr><th>run</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _figure(path: Path) -> str:
    name = f"{path.parent.name}/{path.stem}"
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError:
        return f"<p>{_text(name)} could not be drawn</p>"
    image = f'<img alt="{_text(name)}" src="data:image/png;base64,{data}"/>'
    # A tap makes it large, which a phone needs: a checkbox and a rule of style, no script.
    return f'<figure><label><input type="checkbox" aria-label="enlarge {_text(name)}"/>{image}</label></figure>'


def _details(run: LoadedRun) -> str:
    import json

    import yaml

    config = yaml.safe_dump(_plain(run.config), sort_keys=True) if run.config else "config.yaml is missing"
    manifest = json.dumps(_plain(run.manifest), indent=1) if run.manifest else "manifest.json is missing"
    return (f"<details><summary>{_text(run.name)}: {_text(run.label)}</summary><pre>{_text(config)}</pre>"
            f"<pre>{_text(manifest)}</pre></details>")  # fmt: skip


def _plain(value: Any) -> Any:
    """Without characters that XML forbids."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "".join(c for c in value if c.isprintable() or c in "\n\t") if isinstance(value, str) else value
