"""The doctor: every finding, on machines made well and ill; and that it always ends, in lines."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import warm
from tests.helpers.object_store import BUCKET, serve
from trainer.doctor import machine, places, processes
from trainer.doctor.finding import Finding, at_least, bounded, passed, shown

REPOSITORY = Path(__file__).resolve().parents[3]


def doctor(*arguments):
    command = [sys.executable, "-m", "trainer.doctor", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )


def states(found):
    return [(each.name, each.state) for each in found]


@pytest.mark.slow
def test_this_machine_is_fit_and_the_lines_say_so_in_json(tmp_path):
    done = doctor("--json", "--timeout", 900, "--folder", tmp_path / "new" / "runs", "--data-root", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    by_name = {each["name"]: each for each in found["findings"]}
    assert found["ok"] and {"versions", "memory", "shared memory", "open files", "cores", "clock"} <= set(by_name)
    assert {"disk speed", "disk space", "installation", "GPUs", "gloo", "data.root"} <= set(by_name)
    assert all(by_name[name]["state"] == "pass" for name in ("versions", "installation", "gloo"))
    assert "2 ranks: an all-reduce takes" in by_name["gloo"]["message"]
    assert by_name["data.root"]["state"] == "warn" and "empty" in by_name["data.root"]["message"]
    assert all(each["remedy"] for each in found["findings"] if each["state"] != "pass")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_failure_is_a_line_with_a_remedy_and_exit_code_1(tmp_path):
    """No rank answers in so short a time, a file is no folder, and there is no such data."""
    (tmp_path / "file").touch()
    arguments = (
        "--folder",
        tmp_path / "file",
        "--data-root",
        tmp_path / "absent",
        "--device",
        "cpu",
        "--timeout",
        "0.2",
    )
    done = doctor(*arguments)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    failures = {line.split()[1]: line for line in lines if line.startswith("fail")}
    assert set(failures) == {"disk:", "installation:", "gloo:", "data.root:"}
    assert "cannot be written" in failures["disk:"] and "no answer within 0 s" in failures["gloo:"]
    assert sum(line.startswith("      remedy: ") for line in lines) >= 4


def test_a_check_that_raises_or_hangs_is_a_failure():
    def raises():
        raise RuntimeError("no such device\nmore")

    (raised,) = bounded("x", raises, 5)
    assert raised.state == "fail" and "RuntimeError: no such device more)" in raised.message
    answered = threading.Event()
    (hung,) = bounded("y", answered.wait, 0.1)
    assert hung.state == "fail" and "no answer" in hung.message and not answered.is_set()
    answered.set()
    assert bounded("z", lambda: [passed("z", "well")], 5) == [passed("z", "well")]


def test_limits_part_pass_warn_and_fail():
    found = [at_least("x", value, 10, 2, "message", "remedy").state for value in (10, 9, 2, 1)]
    assert found == ["pass", "warn", "warn", "fail"]
    text = shown(Finding("disk", "fail", "full", "make room"), colour=False)
    assert text == "fail  disk: full\n      remedy: make room"
    assert "\033[31m" in shown(Finding("disk", "fail", "full", "make room"), colour=True)


def test_memory_is_that_of_the_container_where_it_has_less(tmp_path):
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2 * 2**30 + 2**29}\n")
    (found,) = machine.memory(tmp_path)
    assert found.state == "fail" and found.message == "0.5 GiB free (the container's limit is 3.0 GiB)"
    (tmp_path / "memory.max").write_text("max\n")
    assert "container" not in machine.memory(tmp_path)[0].message


def test_cores_are_those_of_the_container_where_it_has_less(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (found,) = machine.cores(tmp_path)
    assert found.state == "warn" and found.message.startswith("0.5 ")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert f"of {os.cpu_count()} cores" in machine.cores(tmp_path)[0].message


def test_shared_memory_that_is_small_or_absent_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    (small,) = machine.shared_memory(tmp_path)
    assert small.state == "warn" and "--shm-size" in small.remedy
    assert machine.shared_memory(tmp_path / "absent")[0].state == "warn"


@pytest.mark.parametrize(("soft", "hard", "state"), [(1024, 1024, "warn"), (200, 10**6, "fail"), (-1, -1, "pass")])
def test_few_open_files_are_told_with_what_the_hard_limit_allows(soft, hard, state, monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (soft, hard))
    assert resource.RLIM_INFINITY == -1
    (found,) = machine.open_files()
    assert found.state == state
    if soft == 1024:
        assert found.remedy.startswith("ulimit -n 1024, or raise the hard limit")


def test_a_clock_that_nothing_keeps_right_is_told(monkeypatch):
    monkeypatch.setattr(machine, "_clock_state", lambda: machine.UNSYNCHRONISED)
    assert states(machine.clock()) == [("clock", "warn")]
    monkeypatch.setattr(machine, "_clock_state", lambda: 0)
    assert states(machine.clock()) == [("clock", "pass")]


@pytest.mark.parametrize(("available", "state"), [(True, "pass"), (False, "warn")])
def test_kernels_that_are_not_compiled_are_a_warning(monkeypatch, available, state):
    monkeypatch.setattr(machine.kernels, "available", lambda: available)
    assert states(machine.compiled_kernels()) == [("kernels", state)]


def test_a_disk_is_slow_full_or_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "SECONDS", 0.1)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**29))
    measured, *others = states(places.disk(tmp_path))
    assert measured[0] == "disk speed" and others[0] == ("disk space", "fail")
    monkeypatch.setattr(places, "_write", lambda path: (50.0, 60.0))
    assert states(places.disk(tmp_path)) == [
        ("disk speed", "warn"),
        ("disk space", "fail"),
        ("clock of the disk", "warn"),
    ]

    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(places, "_write", refuse)
    (found,) = places.disk(tmp_path)
    assert found.state == "fail" and "Read-only file system" in found.message


def test_data_are_reached_in_a_folder_and_in_an_object_store(tmp_path):
    (tmp_path / "a.parquet").touch()
    assert states(places.data_root(str(tmp_path))) == [("data.root", "pass")]
    with serve() as (options, filesystem):
        with filesystem.open_output_stream(f"{BUCKET}/log/a.parquet") as file:
            file.write(b"x")
        assert states(places.data_root(f"s3://{BUCKET}/log?{options}")) == [("data.root", "pass")]
        (absent,) = places.data_root(f"s3://{BUCKET}/other?{options}")
        assert absent.state == "fail" and "No such file" in absent.message
    assert places.data_root("nowhere://a/b")[0].state == "fail"


def answers(monkeypatch, *found, driver="580.1"):
    monkeypatch.setattr(processes, "run_probes", lambda arguments, seconds: list(found))
    monkeypatch.setattr(processes, "driver", lambda: driver)


def test_gpus_are_told_with_what_keeps_them_apart(monkeypatch):
    gpu = {"name": "H200", "capability": [9, 0], "free": 130 << 30, "total": 140 << 30}
    busy = {**gpu, "free": 10 << 30}
    answers(monkeypatch, {"build": "13.0", "devices": [gpu, gpu], "apart": [], "unusable": []})
    found, count = processes.gpus(None, 1)
    assert count == 2 and states(found) == [("GPUs", "pass"), ("peer access", "pass")]
    assert found[0].message == "2 x H200, 130.0 of 140.0 GiB free; driver 580.1, CUDA 13.0"
    answers(monkeypatch, {"build": "13.0", "devices": [gpu, busy], "apart": [[0, 1]], "unusable": []})
    found, _ = processes.gpus(None, 1)
    assert states(found) == [("GPUs", "fail"), ("peer access", "warn")] and "(0-1)" in found[1].message
    answers(monkeypatch, {"build": "13.0", "devices": [gpu], "apart": [], "unusable": ["GPU 0, Tesla T4, has …"]})
    assert processes.gpus(None, 1)[0][0].message == "GPU 0, Tesla T4, has …" and processes.gpus(None, 1)[1] == 0


@pytest.mark.parametrize(
    ("device", "driver", "state"), [(None, None, "pass"), ("cuda", None, "fail"), (None, "470.1", "warn")]
)
def test_no_gpu_is_well_unless_there_should_be_one(device, driver, state, monkeypatch):
    answers(monkeypatch, {"build": None, "devices": [], "apart": [], "unusable": []}, driver=driver)
    found, count = processes.gpus(device, 1)
    assert (count, states(found)) == (0, [("GPUs", state)])


def test_probes_that_crash_fail_or_hang_are_told(monkeypatch):
    def tell(program, seconds=600):
        monkeypatch.setattr(processes, "PROBE", (sys.executable, "-c", program))
        (found,) = processes.collectives("gloo", 2, seconds)
        assert found.state == "fail" and "GLOO_SOCKET_IFNAME" in found.remedy
        return found.message

    assert "crashed by signal 6" in tell("import os; os.abort()")
    assert "(RuntimeError: no route)" in tell("raise RuntimeError('no route')")
    assert "no answer within 1 s" in tell("import time; time.sleep(99999)", seconds=1)


def test_an_installation_that_cannot_even_be_checked_is_a_failure(monkeypatch):
    monkeypatch.setattr(processes, "INSTALLATION", (sys.executable, "-c", "import os; os.abort()"))
    (found,) = processes.installation("cpu", 60)
    assert found.state == "fail" and "crashed by signal 6" in found.message and "make clean setup" in found.remedy
