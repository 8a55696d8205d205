"""An arena's results as Markdown."""

from __future__ import annotations

from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    return f"# {result['arena']}\n"
