"""An arena's results as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(result: dict[str, Any]) -> list[Path]:
    """The figure."""
    return []
