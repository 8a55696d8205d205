"""The gallery's page: every figure of the manifest, with the claims where they stand in the repository."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "results" / "figures"
MANIFEST = FIGURES / "manifest.yaml"
HEAD = """# Gallery

Every committed figure of the papers' experiments and of the common arenas: the paper's claim, ours, why they differ,
and which runtime made it. `python -m bench.gallery` makes all of them again (hours on two cores), `--only NAME` some,
`--list` names the commands, `--page` writes this page. Texts are quoted from the files named; PDFs lie beside the PNGs.
"""
UNDRAWN = """## Experiments without a figure of their own

Claims of the papers that were tried, whose numbers are tables only (`results/<system>/*.md`); MELL's migrations,
batching and utilisation (its Fig. 12 to 14) are in `results/mell/gpus.md`. **Simulated** unless a row says otherwise;
MemServe's Fig. 9 is CPU time, measured."""


@dataclass(frozen=True)
class Figure:
    """One entry of the manifest."""

    name: str
    title: str
    command: str
    runtime: str
    after: str | None = None  # a command that must have run
    paper: str | None = None
    table: str | None = None
    rows: tuple[str, ...] = ()
    quote: tuple[tuple[str, str], ...] = ()
    arena: str | None = None

    @property
    def present(self) -> bool:
        """Whether its PNG is there."""
        return (FIGURES / f"{self.name}.png").exists()


def manifest(path: Path = MANIFEST) -> list[Figure]:
    """Every figure, in the order of the page."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    out = []
    for name, entry in tree.items():
        rows, quote = tuple(entry.pop("rows", ())), tuple((a, b) for a, b in entry.pop("quote", ()))
        out.append(Figure(name, rows=rows, quote=quote, **entry))
    return out


def page(figures: list[Figure]) -> str:
    """The Markdown."""
    return "\n".join([HEAD, *(section(figure) for figure in figures), *_undrawn(figures)])


def _undrawn(figures: list[Figure]) -> list[str]:
    """The paper's claims that no figure quotes, from the files of which some rows are quoted."""
    parts = []
    for path in dict.fromkeys(figure.table for figure in figures if figure.table and figure.rows):
        drawn = {line for figure in figures if figure.table == path for line in claims(figure).splitlines()[2:]}
        head, rule, *body = claims(Figure("", "", "", "", table=path)).splitlines()
        rest = [line for line in body if line not in drawn]
        if rest:
            parts += ["\n".join([head, rule, *rest]), f"(from `{path}`)"]
    return ["\n\n".join([UNDRAWN, *parts]) + "\n"] if parts else []


def section(figure: Figure) -> str:
    """One figure: picture, runtime, command, claims."""
    parts = [f"## {figure.title}", f"`python -m {figure.command}` · **{figure.runtime}**"]
    parts += [f"![{figure.title}]({figure.name}.png)"] if figure.present else ["*Not drawn yet.*"]
    if figure.paper:
        parts.append(f"Paper's claim: {figure.paper}.")
    if figure.table:
        parts += [claims(figure), f"(from `{figure.table}`)"]
    parts += [f"{quoted(*place)}\n\n(from `{place[0]}`)" for place in figure.quote]
    if figure.arena:
        parts.append(_arena(figure.arena))
    return "\n\n".join(parts) + "\n"


def claims(figure: Figure) -> str:
    """The table of a file that has the columns paper and why, whole or some of its rows."""
    lines = (ROOT / str(figure.table)).read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("|") and "paper" in line and "why" in line]
    if not starts:
        raise ConfigError(f"{figure.table} has no table with the columns paper and why")
    table = []
    for line in lines[starts[0] :]:
        if not line.startswith("|"):
            break
        table.append(line)
    body = [line for line in table[2:] if not figure.rows or any(row in line.split("|")[1] for row in figure.rows)]
    if not body:
        raise ConfigError(f"{figure.table} has no row of {figure.rows}")
    return "\n".join([*table[:2], *body])


def quoted(path: str, starts: str) -> str:
    """The paragraph or list item of a file that starts so; ConfigError where there is none."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    found = next((i for i, line in enumerate(lines) if line.startswith(starts)), None)
    if found is None:
        raise ConfigError(f"{path} has no paragraph that starts with {starts!r}: mend results/figures/manifest.yaml")
    text = [lines[found]]
    for line in lines[found + 1 :]:
        if not line.strip() or line.startswith(("- ", "#", "|")):
            break
        text.append(line.strip())
    return "> " + " ".join(text).removeprefix("- ")


def _arena(name: str) -> str:
    from bench.arenas.declared import load
    from bench.arenas.table import why
    from bench.arenas.verdict import sentences

    path = ROOT / "results" / "arenas" / f"{name}.json"
    if not path.exists():
        return f"Declared in `conf/arena/{name}.yaml`; no results are committed."
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    verdict = " ".join(sentences(result))
    link = f"Table, search and settings: [results/arenas/{name}.md](../arenas/{name}.md)."
    return "\n\n".join(part for part in (load(name).question, verdict, why(name), link) if part)
