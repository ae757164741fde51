"""What listens during a run of one machine, as the kernel has it: nothing that another machine could reach."""

import json
import subprocess
import sys

import psutil
import pytest

from launch import one_machine
from tests.helpers.tiny import REPOSITORY

RANK = """
import datetime, json, os, pathlib, psutil, sys, torch
from trainer.runtime.rendezvous import process_group
with process_group(torch.device("cpu"), 60.0) as ranks:
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    everyone = [os.getpid(), os.getppid()]
    found = [c.laddr.ip for pid in everyone for c in psutil.Process(pid).net_connections("tcp") if c.status == "LISTEN"]
    torch.distributed.barrier()  # all of them listen while each looks
    pathlib.Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps([total.item(), found]))
    os._exit(0)
"""


def test_the_store_is_reached_on_loopback_alone():
    store = one_machine.listen()
    store.set("a", "b")
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
    assert [where.ip for where in listening if where.port == store.port] == ["127.0.0.1"] and store.get("a") == b"b"


def test_a_machine_without_loopback_is_told(monkeypatch):
    monkeypatch.setattr(one_machine, "LOOPBACK", "192.0.2.1")  # of no machine
    with pytest.raises(
        OSError, match="no port can be opened on 192.0.2.1, Cannot assign .*: the loopback interface must be"
    ):
        one_machine.listen()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at other processes' sockets")
def test_ranks_and_agent_listen_on_loopback_alone(tmp_path, monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "listens.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["--nproc-per-node", "2", "listens", str(tmp_path)]
    assert (
        subprocess.run(
            [sys.executable, "-m", "tests.helpers.start_ranks", *words], cwd=REPOSITORY, check=False
        ).returncode
        == 0
    )
    for rank in range(2):
        total, found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert total == 2 and found and set(found) == {"127.0.0.1"}


def test_a_process_without_launcher_listens_on_loopback_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", RANK, str(tmp_path)], check=False)
    assert done.returncode == 0
    assert set(json.loads((tmp_path / "0.json").read_text())[1]) <= {"127.0.0.1"}
