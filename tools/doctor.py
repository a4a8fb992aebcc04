"""``clipmill doctor``: what works on this machine, what does not, and the remedy.

Everything that could crash is tried in a child process, so that a crash is one line here.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from clipmill import __version__
from clipmill.tools.progress import track

Status = Literal["ok", "note", "warn", "fail"]

_ENCODERS = ("libx264", "libx265", "libsvtav1", "mjpeg", "aac", "libopus", "libvpx-vp9")
_MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}  # where the import is named differently
_MIN_SHM_GIB, _MIN_DISK_GIB, _MIN_FILES = 1.0, 5.0, 1024


@dataclass(frozen=True, kw_only=True)
class Args:
    """Say what works on this machine, and how to get what does not.

    The exit code is 0 unless something that clipmill needs is broken.
    """

    json: bool = False
    """Print the findings as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding. status: ok; note, for your information; warn, works but badly; fail, a required thing is broken."""

    group: str
    name: str
    status: Status
    detail: str
    remedy: str = ""


def main(args: Args) -> int:
    """Print all findings; 1 if a required thing is broken."""
    parts = track(_PARTS, "doctor", len(_PARTS), "checks", quiet=args.json)
    checks = [check for part in parts for check in part()]
    healthy = all(check.status != "fail" for check in checks)
    if args.json:
        print(json.dumps({"version": __version__, "ok": healthy, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        _show(checks)
    return 0 if healthy else 1


def _show(checks: list[Check]) -> None:
    print(f"clipmill {__version__}")
    width = max(len(check.name) for check in checks)
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            print(f"\n{group}")
        mark = "FAIL" if check.status == "fail" else check.status
        print(f"  {mark:<4}  {check.name:<{width}}  {check.detail}".rstrip())
        if check.remedy:
            print(f"        {'':<{width}}  -> {check.remedy}")


# --- machine ------------------------------------------------------------------------------------------------


def machine() -> Iterator[Check]:
    """Python, processor, memory, shared memory, open files and disks."""
    group = "machine"
    yield Check(group=group, name="python", status="ok", detail=f"{platform.python_version()} on {platform.platform()}")
    yield _processors(group)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Check(group=group, name="memory", status="ok", detail=f"{memory_gib:.1f} GiB")
    yield _room(group, "shared memory", Path("/dev/shm"), _MIN_SHM_GIB, "in a container: docker run --shm-size=8g")
    yield _open_files(group)
    remedy = "choose folders on another disk; set TMPDIR for temporary files"
    for name, path in (("current disk", Path.cwd()), ("temporary disk", Path(tempfile.gettempdir()))):
        yield _room(group, name, path, _MIN_DISK_GIB, remedy)


def _processors(group: str) -> Check:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = cpu_quota(Path("/sys/fs/cgroup"))
    detail = f"{cores} cores, {usable} usable by this process"
    if quota is None or quota >= usable:
        return Check(group=group, name="processor", status="ok", detail=detail)
    remedy = f"use about {max(round(quota), 1)} decode threads: the choice by cores would take {usable}"
    return Check(
        group=group, name="processor", status="warn", detail=f"{detail}, but limited to {quota:g}", remedy=remedy
    )


def cpu_quota(cgroup: Path) -> float | None:
    """Cores' worth of time that the control group grants (version 2 or 1); None without a limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if limit in ("max", "-1") else int(limit) / int(period)


def _room(group: str, name: str, path: Path, least_gib: float, remedy: str) -> Check:
    if not path.is_dir():
        return Check(group=group, name=name, status="note", detail=f"{path} does not exist here")
    usage = shutil.disk_usage(path)
    free_gib = usage.free / 2**30
    detail = f"{path}: {free_gib:.1f} of {usage.total / 2**30:.1f} GiB free"
    short = free_gib < least_gib
    status: Status = "warn" if short else "ok"
    return Check(group=group, name=name, status=status, detail=detail, remedy=remedy if short else "")


def _open_files(group: str) -> Check:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < _MIN_FILES
    remedy = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}" if few else ""
    detail = f"{soft if soft >= 0 else 'unlimited'} (at most {hard if hard >= 0 else 'unlimited'})"
    return Check(group=group, name="open files", status="warn" if few else "ok", detail=detail, remedy=remedy)


# --- packages -----------------------------------------------------------------------------------------------


def requirements() -> dict[str, list[tuple[str, str]]]:
    """{extra: [(distribution, wanted versions)]} of the installed clipmill; the required ones are under ""."""
    from packaging.requirements import Requirement

    found: dict[str, list[tuple[str, str]]] = {"": []}
    try:
        lines = metadata.requires("clipmill") or []
    except metadata.PackageNotFoundError:
        return found
    for line in lines:
        wanted = Requirement(line)
        extra = ""
        if wanted.marker is not None and "extra" in str(wanted.marker):
            extra = str(wanted.marker).split("extra ==")[1].split()[0].strip("\"'()")
        elif wanted.marker is not None and not wanted.marker.evaluate():
            continue
        found.setdefault(extra, []).append((wanted.name, str(wanted.specifier)))
    return found


def installed(name: str) -> str | None:
    """The version of a distribution, None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def packages() -> Iterator[Check]:
    """Required packages: there, of a wanted version, and importable."""
    from packaging.specifiers import SpecifierSet

    from clipmill.tools.doctor_child import import_errors

    group = "packages"
    required = requirements()[""]
    if not required:
        remedy = "pip install -e . in the folder of the sources"
        yield Check(
            group=group, name="clipmill", status="warn", detail="not installed, run from sources", remedy=remedy
        )
    errors = import_errors([_MODULES.get(name, name) for name, _ in required if installed(name) is not None])
    for name, wanted in required:
        version = installed(name)
        error = errors.get(_MODULES.get(name, name), "")
        if version is None:
            yield Check(group=group, name=name, status="fail", detail="not installed", remedy="pip install clipmill")
        elif error:
            remedy = f"pip install --force-reinstall '{name}{wanted}'"
            yield Check(
                group=group, name=name, status="fail", detail=f"{version} does not import: {error}", remedy=remedy
            )
        elif not SpecifierSet(wanted).contains(version, prereleases=True):
            detail, remedy = f"{version}, tested with {wanted}", f"pip install '{name}{wanted}'"
            yield Check(group=group, name=name, status="warn", detail=detail, remedy=remedy)
        else:
            yield Check(group=group, name=name, status="ok", detail=version)


def optional() -> Iterator[Check]:
    """Packages that some functions need; absent is no fault."""
    for extra, wanted in sorted(requirements().items()):
        if extra in ("", "dev"):
            continue
        for name, _ in wanted:
            version = installed(name)
            remedy = "" if version else f"pip install 'clipmill[{extra}]'"
            yield Check(
                group="optional",
                name=name,
                status="ok" if version else "note",
                detail=version or "not installed",
                remedy=remedy,
            )


# --- media, device, decoders --------------------------------------------------------------------------------


def media() -> Iterator[Check]:
    """FFmpeg's libraries as PyAV brings them, and the encoders that `pack` may use."""
    from clipmill.tools.doctor_child import media_facts

    group = "media"
    facts, error = media_facts()
    if error:
        yield Check(group=group, name="FFmpeg", status="fail", detail=error, remedy="pip install --force-reinstall av")
        return
    yield Check(group=group, name="FFmpeg", status="ok", detail=", ".join(facts["libraries"]))
    there = [name for name in _ENCODERS if name in facts["encoders"]]
    absent = [name for name in _ENCODERS if name not in facts["encoders"]]
    broken = "libx264" in absent
    status: Status = "fail" if broken else "note" if absent else "ok"
    detail = ", ".join(there) + (f"; without {', '.join(absent)}" if absent else "")
    remedy = "install PyAV's wheel from PyPI, it brings libx264: pip install --force-reinstall av" if broken else ""
    yield Check(group=group, name="encoders", status=status, detail=detail, remedy=remedy)


def device() -> Iterator[Check]:
    """CUDA as torch sees it, with a small computation on each device."""
    from clipmill.tools.doctor_child import cuda_facts

    group = "device"
    facts, error = cuda_facts()
    driver = facts.get("driver") or "none"
    if error:
        remedy = "look at the driver with nvidia-smi, or hide the devices: CUDA_VISIBLE_DEVICES="
        yield Check(group=group, name="CUDA", status="warn", detail=f"driver {driver}: {error}", remedy=remedy)
        return
    built = f"torch built for CUDA {facts['built']}" if facts["built"] else "torch built without CUDA"
    if not facts["devices"]:
        there = bool(facts.get("driver"))
        detail = f"no device for torch; {built}, driver {driver}. Training runs on the CPU"
        remedy = facts["why"] or "the driver is there but torch cannot use it; update it" if there else ""
        yield Check(group=group, name="CUDA", status="warn" if there else "note", detail=detail, remedy=remedy)
        return
    yield Check(group=group, name="CUDA", status="ok", detail=f"{built}, driver {driver}")
    for number, about in enumerate(facts["devices"]):
        yield Check(group=group, name=f"cuda:{number}", status="ok", detail=about)


def decoders() -> Iterator[Check]:
    """Every decoder backend, tried on tiny streams of each codec."""
    from clipmill.tools.doctor_child import backends, try_decoder

    group = "decoders"
    for name in backends():
        found, error = try_decoder(name)
        needed = name == "pyav"
        if error:
            status: Status = "fail" if needed else "note"
            yield Check(group=group, name=name, status=status, detail=f"does not work: {error}", remedy=_remedy(error))
            continue
        wrong = [f"{codec} ({why})" for codec, why in found["wrong"].items()]
        works = ", ".join(found["works"]) or "nothing"
        works += f", not {', '.join(found['refused'])}" if found["refused"] else ""
        bad = bool(wrong) or (needed and "h264" not in found["works"])
        status = ("fail" if needed else "warn") if bad else "ok"
        detail = f"decodes {works}" + (f"; WRONG frames of {', '.join(wrong)}" if wrong else "")
        remedy = "do not use this decoder here; please report it" if wrong else ""
        yield Check(group=group, name=name, status=status, detail=detail, remedy=remedy)


def _remedy(error: str) -> str:
    """The extra to install when an import failed for want of a package."""
    for extra, wanted in requirements().items():
        if extra and any(f"'{name.replace('-', '_')}" in error or f"'{name}" in error for name, _ in wanted):
            return f"pip install 'clipmill[{extra}]'"
    return ""


_PARTS: tuple[Callable[[], Iterator[Check]], ...] = (machine, packages, media, device, decoders, optional)

if __name__ == "__main__":
    sys.exit(main(Args()))
