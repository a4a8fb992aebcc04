"""The doctor: findings with remedies, crashes of children reported, and an exit code that a script can use."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from clipmill.tools import cli, doctor, doctor_child
from clipmill.tools.doctor import Args, Check


def by_name(checks) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_whole_examination_of_this_machine(capsys: pytest.CaptureFixture[str]):
    code = cli.main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in told["checks"]}
    broken = [check for check in told["checks"] if check["status"] == "fail"]
    assert (code == 0) == (not broken) == told["ok"]
    assert found["python"]["detail"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["torch"]["detail"] == metadata.version("torch")
    assert found["CUDA"]["status"] in ("ok", "note", "warn")
    assert "libavcodec" in found["FFmpeg"]["detail"]
    assert "libx264" in found["encoders"]["detail"]
    assert found["pyav"]["status"] == "ok"
    assert "h264" in found["pyav"]["detail"]
    assert {"pytest", "ruff"}.isdisjoint(found)


def test_text_shows_every_finding_and_its_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    good = Check(group="a", name="one", status="ok", detail="fine")
    bad = Check(group="b", name="other", status="fail", detail="broken", remedy="mend it")
    monkeypatch.setattr(doctor, "_PARTS", (lambda: [good], lambda: [bad]))
    assert doctor.main(Args()) == 1
    out = capsys.readouterr().out
    assert "\na\n  ok    one    fine\n" in out
    assert "\nb\n  FAIL  other  broken\n" in out
    assert "-> mend it" in out
    monkeypatch.setattr(doctor, "_PARTS", (lambda: [good],))
    assert doctor.main(Args()) == 0


def test_a_crash_of_a_child_is_named():
    lines, error = doctor_child.child("import os, signal; print(1, flush=True); os.kill(os.getpid(), signal.SIGSEGV)")
    assert (lines, error) == ([1], "crashed with SIGSEGV")
    lines, error = doctor_child.child("print('warning: x'); print('[2]'); raise ImportError('no symbol')")
    assert (lines, error) == ([[2]], "ImportError: no symbol")


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_child, "_LIMIT_S", 2.0)
    lines, error = doctor_child.child("import time; print('{}', flush=True); time.sleep(60)")
    assert lines == [{}]
    assert "no answer after" in error


def test_imports_go_on_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "fine_module.py").write_text("")
    (tmp_path / "crash_module.py").write_text("import os\nos.abort()\n")
    (tmp_path / "broken_module.py").write_text("raise OSError('libx.so: cannot open')\n")
    (tmp_path / "leaving_module.py").write_text("import os\nos._exit(0)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["fine_module", "crash_module", "broken_module", "absent_module", "json", "leaving_module"]
    assert doctor_child.import_errors(names) == {
        "fine_module": "",
        "crash_module": "crashed with SIGABRT",
        "broken_module": "OSError: libx.so: cannot open",
        "absent_module": "ModuleNotFoundError: No module named 'absent_module'",
        "json": "",
        "leaving_module": "the import ended the process",
    }


def test_required_packages_that_are_absent_broken_or_of_another_version(monkeypatch: pytest.MonkeyPatch):
    wanted = [("json-absent", ">=1"), ("numpy", ">=2.0"), ("av", "<1"), ("torch", ">=2")]
    monkeypatch.setattr(doctor, "requirements", lambda: {"": wanted})
    monkeypatch.setattr(doctor_child, "import_errors", lambda names: dict.fromkeys(names, "") | {"torch": "no libc10"})
    found = by_name(doctor.packages())
    assert [found[name].status for name, _ in wanted] == ["fail", "ok", "warn", "fail"]
    assert "no libc10" in found["torch"].detail
    assert found["av"].remedy == "pip install 'av<1'"


def test_optional_packages_have_the_extra_as_remedy(monkeypatch: pytest.MonkeyPatch):
    extras = {"": [("torch", "")], "dev": [("pytest", "")], "x": [("numpy", ""), ("no-such-package", "")]}
    monkeypatch.setattr(doctor, "requirements", lambda: extras)
    found = by_name(doctor.optional())
    assert list(found) == ["numpy", "no-such-package"]
    assert found["numpy"].detail == metadata.version("numpy")
    assert (found["no-such-package"].status, found["no-such-package"].remedy) == ("note", "pip install 'clipmill[x]'")


def test_requirements_come_from_the_installed_package(monkeypatch: pytest.MonkeyPatch):
    lines = ["torch<2.15,>=2.11", "tomli; python_version < '3'", 'ray[default]>=2; extra == "ray"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert doctor.requirements() == {"": [("torch", "<2.15,>=2.11")], "ray": [("ray", ">=2")]}


def backend(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder backend in a copy of the folder of backends."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(doctor_child.import_module("clipmill.pipeline.decode"), "__path__", [str(folder)])


def trial(name: str, capsys: pytest.CaptureFixture[str]) -> dict:
    doctor_child.trial(name)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts modules among the decoder backends."""

    def add(name: str, text: str) -> None:
        backend(tmp_path, name, text, monkeypatch)
        monkeypatch.delitem(sys.modules, f"clipmill.pipeline.decode.{name}", raising=False)

    yield add
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(f"clipmill.pipeline.decode.{path.stem}", None)


def test_a_backend_is_a_module_with_a_constructor(backends):
    backends("good", "def new(reader):\n    return None\n")
    backends("helper", "new_things = 1\n")
    backends("broken", "import nothing_of_the_kind\ndef new(reader):\n    return None\n")
    assert doctor_child.backends() == ["broken", "good"]


def test_wrong_frames_are_found(backends, capsys: pytest.CaptureFixture[str]):
    backends(
        "stale",
        "import numpy as np\n"
        "class Stale:\n"
        "    def decode(self, record, frames, emit):\n"
        "        if record.codec.codec == 'hevc': raise ValueError('no hevc here')\n"
        "        last = frames[:-1] if record.codec.codec == 'raw' else frames\n"
        "        for frame in last: emit(frame, (np.full((64, 64), 30 + 24 * frames[0], np.uint8), None, None))\n"
        "def new(reader):\n    return Stale()\n",
    )
    found = trial("stale", capsys)
    assert found["works"] == []
    assert found["refused"] == {"hevc": "ValueError: no hevc here"}
    assert found["wrong"]["h264"] == "frame 4 has luma 54 instead of 126"
    assert found["wrong"]["raw"] == "frames [1, 4] instead of [1, 4, 7]"


def test_a_backend_that_cannot_be_made_says_why(backends, capsys: pytest.CaptureFixture[str]):
    backends("needy", "def new(reader):\n    raise RuntimeError('no device')\n")
    assert trial("needy", capsys)["error"] == "RuntimeError: no device"


def test_the_tiny_streams_are_what_they_claim():
    reader_of_truth = np.frombuffer(doctor_child._raw_packets()[3], np.uint8)
    assert reader_of_truth[: 64 * 64].tolist() == [doctor_child.level(3)] * 64 * 64
    for encoder, pix_fmt in doctor_child._ENCODED.values():
        assert len(doctor_child._packets(encoder, pix_fmt)) == 8


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (({}, "crashed with SIGILL"), "fail", "does not work: crashed with SIGILL"),
        (({"works": ["mjpeg"], "wrong": {}, "refused": {"h264": "x"}}, ""), "fail", "decodes mjpeg, not h264"),
        (
            ({"works": ["h264"], "wrong": {"hevc": "frame 1"}, "refused": {}}, ""),
            "fail",
            "WRONG frames of hevc (frame 1)",
        ),
        (({"works": ["h264"], "wrong": {}, "refused": {"raw": "x"}}, ""), "ok", "decodes h264, not raw"),
    ],
)
def test_the_default_decoder_must_work(monkeypatch: pytest.MonkeyPatch, answer, status: str, said: str):
    monkeypatch.setattr(doctor_child, "backends", lambda: ["pyav"])
    monkeypatch.setattr(doctor_child, "try_decoder", lambda name: answer)
    (check,) = doctor.decoders()
    assert check.status == status
    assert said in check.detail


def test_another_decoder_may_be_absent_and_has_a_remedy(monkeypatch: pytest.MonkeyPatch):
    error = "ModuleNotFoundError: No module named 'torchcodec'"
    monkeypatch.setattr(doctor_child, "backends", lambda: ["torchcodec"])
    monkeypatch.setattr(doctor_child, "try_decoder", lambda name: ({}, error))
    monkeypatch.setattr(doctor, "requirements", lambda: {"": [], "torchcodec": [("torchcodec", "")]})
    (check,) = doctor.decoders()
    assert (check.status, check.remedy) == ("note", "pip install 'clipmill[torchcodec]'")
    assert error in check.detail


def test_every_backend_of_the_protocol_is_tried():
    found = doctor_child.backends()
    assert "pyav" in found
    assert "decoder" not in found


def test_devices_and_drivers(monkeypatch: pytest.MonkeyPatch):
    facts = {"built": "13.0", "devices": ["H, 80 GiB"], "why": "", "driver": "580.1"}
    monkeypatch.setattr(doctor_child, "cuda_facts", lambda: (facts, ""))
    assert [check.status for check in doctor.device()] == ["ok", "ok"]
    facts.update(devices=[], why="The NVIDIA driver on your system is too old")
    (check,) = doctor.device()
    assert (check.status, check.remedy) == ("warn", "The NVIDIA driver on your system is too old")
    facts.update(driver=None)
    (check,) = doctor.device()
    assert check.status == "note"
    monkeypatch.setattr(doctor_child, "cuda_facts", lambda: ({"driver": "1"}, "crashed with SIGSEGV"))
    (check,) = doctor.device()
    assert (check.status, "SIGSEGV" in check.detail) == ("warn", True)


def test_cpu_quotas_of_both_control_group_versions(tmp_path: Path):
    assert doctor.cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert doctor.cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert doctor.cpu_quota(tmp_path) == 4.0
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.cpu_quota(tmp_path) is None


def test_a_small_machine_is_warned_about(monkeypatch: pytest.MonkeyPatch):
    small = type("Usage", (), {"free": 1 << 20, "total": 1 << 30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: small)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (256, 4096))
    monkeypatch.setattr(doctor, "cpu_quota", lambda path: 0.5)
    found = by_name(doctor.machine())
    warned = {name for name, check in found.items() if check.status == "warn"}
    assert {"processor", "open files", "current disk"} <= warned
    assert all(found[name].remedy for name in warned)
    assert found["open files"].remedy == "ulimit -n 4096"
    if os.path.isdir("/dev/shm"):
        assert "shared memory" in warned
