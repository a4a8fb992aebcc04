"""How much memory this process uses."""

from __future__ import annotations

from pathlib import Path


def status_mb(name: str) -> float:
    """A line of this process's status in MB: VmRSS, VmHWM (its peak), RssAnon; 0 where the system has none.

    Unlike the peak of ``getrusage``, VmHWM begins anew with a program, so a worker does not show its parent's.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name + ":")), 0.0)
