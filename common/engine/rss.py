"""Resident memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def current_rss() -> int:
    """Bytes resident now. Without /proc: the peak, the best that is known there."""
    return _status("VmRSS") or _rusage_peak()


def peak_rss() -> int:
    """Bytes resident at most so far."""
    return _status("VmHWM") or _rusage_peak()


def _status(key: str) -> int | None:
    """A kB entry of /proc/self/status in bytes; None where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _rusage_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
