"""The torchrun command on two hosts: network namespaces with names and addresses of their own, joined by a cable (veth)."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from launch.cluster.command import main
from tests import tiny
from tests.launch.slurm import die_with_parent

PREFIX = f"click{os.getpid()}"
HOSTS = {f"{PREFIX}a": "10.213.77.1", f"{PREFIX}b": "10.213.77.2"}
CABLE = [f"c{os.getpid()}{end}" for end in "ab"]  # 15 characters at most
# Besides its network, a host has a name, and knows the other's.
AS_HOST = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)


def lay_cable():
    """Why it cannot be done; None where it is done."""
    if sys.platform != "linux" or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        return "needs Linux with iproute2 and util-linux"
    commands = [["netns", "add", host] for host in HOSTS]
    commands.append(["link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1]])
    for (host, address), end in zip(HOSTS.items(), CABLE):
        commands += [
            ["link", "set", end, "netns", host],
            ["-n", host, "address", "add", f"{address}/24", "dev", end],
            ["-n", host, "link", "set", end, "up"],
            ["-n", host, "link", "set", "lo", "up"],
        ]
    for command in commands:
        done = ip(*command)
        if done.returncode:
            return f"ip {' '.join(command)}: {done.stderr.strip()}"
    probe = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, text=True)
    return probe.stderr.strip() or None


@pytest.fixture
def hosts(tmp_path):
    """A function that starts a command on both hosts. Nothing of it is left, whatever happens."""
    started = []
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in HOSTS.items()))

    def start(command):
        for host, end in zip(HOSTS, CABLE):
            inside = [
                "unshare",
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-c",
                AS_HOST,
                "-",
                host,
                str(names),
            ]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": end, "PYTHONPATH": str(tiny.REPOSITORY)}
            with open(tmp_path / f"{host}.txt", "wb") as output:
                process = subprocess.Popen(
                    ["ip", "netns", "exec", host, *inside, "bash", "-c", command],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    preexec_fn=die_with_parent,
                )
            started.append(process)
        return [process.wait(timeout=240) for process in started], [(tmp_path / f"{h}.txt").read_text() for h in HOSTS]

    try:
        if (reason := lay_cable()) is not None:
            pytest.skip(reason)
        yield start
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        for host in HOSTS:
            ip("netns", "delete", host)
        ip("link", "delete", CABLE[0])


def test_one_command_trains_on_two_hosts(hosts, click_log, tmp_path, capsys):
    run = tmp_path / "run"
    own = ["launch=torchrun", "launch.nodes=2", "launch.gpus_per_node=0", "launch.nproc_per_node=1"]
    own.append(f"launch.endpoint={next(iter(HOSTS))}:29500")  # a host's ports are all free
    job = (
        "model=deepfm",
        "model.hidden_units=[8]",
        "steps=3",
        "data.test=[]",
        "data.probability=null",
        f"run.dir={run}",
    )
    assert main([*own, *tiny.arguments(click_log, *job)]) == 0
    command = capsys.readouterr().out
    codes, outputs = hosts(command)
    assert codes == [0, 0], outputs
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["world_size"], status["step"]) == ("finished", 2, 3)
