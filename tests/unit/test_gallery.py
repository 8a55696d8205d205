"""The gallery: each committed figure is listed, each listed one exists, every quoted text stands where it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import gallery_page
from bench.gallery_page import FIGURES, ROOT, Figure, claims, manifest, page, quoted, section
from common.errors import ConfigError

LISTED = manifest()


def test_each_committed_figure_is_listed_and_each_listed_one_exists() -> None:
    there = {str(path.relative_to(FIGURES).with_suffix("")) for path in FIGURES.rglob("*.png")}
    assert there == {figure.name for figure in LISTED}
    assert all((FIGURES / f"{figure.name}.pdf").exists() for figure in LISTED)


@pytest.mark.parametrize("figure", LISTED, ids=[figure.name for figure in LISTED])
def test_each_says_runtime_command_and_claim(figure: Figure) -> None:
    text = section(figure)
    assert any(word in figure.runtime for word in ("simulated", "emulated", "measured"))
    assert (ROOT / figure.command.split()[0].replace(".", "/")).with_suffix(".py").exists() or \
        (ROOT / figure.command.split()[0].replace(".", "/") / "__main__.py").exists()  # fmt: skip
    assert figure.paper or figure.table or figure.quote or figure.arena
    assert f"]({figure.name}.png)" in text and f"python -m {figure.command}" in text


def test_the_committed_page_is_what_the_manifest_makes() -> None:
    assert (FIGURES / "README.md").read_text(encoding="utf-8") == page(LISTED), "python -m bench.gallery --page"


def test_a_quote_that_has_moved_is_one_line_of_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery_page, "ROOT", tmp_path)
    table = "| paper | ours | why |\n|---|---|---|\n| x | y | z |\n"
    (tmp_path / "a.md").write_text("# A\n\n- **Claim.** one\n  two\n- other\n\n" + table)
    assert quoted("a.md", "- **Claim") == "> **Claim.** one two"
    with pytest.raises(ConfigError, match="no paragraph"):
        quoted("a.md", "- **Gone")
    assert claims(Figure("f", "t", "c", "simulated", table="a.md")).endswith("| x | y | z |")
    with pytest.raises(ConfigError, match="no row"):
        claims(Figure("f", "t", "c", "simulated", table="a.md", rows=("q",)))


def test_what_no_figure_shows_is_a_table_at_the_end() -> None:
    """Each row of a file of claims is on the page: beside a figure, or among those without one, never in both."""
    whole = page(LISTED)
    shown, _, rest = whole.partition("## Experiments without a figure of their own")
    for path in {figure.table for figure in LISTED if figure.table and figure.rows}:
        for line in claims(Figure("", "", "", "", table=path)).splitlines()[2:]:
            assert (line in shown) != (line in rest), line
    assert "Fig. 9:" in rest and "Fig. 14:" in rest and "DGFM" in rest


@pytest.mark.parametrize("figure", LISTED, ids=[figure.name for figure in LISTED])
def test_a_paper_s_experiment_says_the_paper_s_claim(figure: Figure) -> None:
    """In a table with the paper's column, in an arena's question, or in words that name the paper."""
    assert figure.table or figure.arena or figure.paper or "paper" in section(figure).lower()


def test_the_list_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.gallery", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(LISTED)
    unknown = subprocess.run([sys.executable, "-m", "bench.gallery", "--only", "nope"], cwd=ROOT, capture_output=True,
                             text=True)  # fmt: skip
    assert unknown.returncode == 2 and unknown.stderr == "error: no such figure: nope (--list names them)\n"
