"""The torchrun command on two hosts: network namespaces with names and addresses of their own, joined by a cable (veth). They
have no names in /run/netns: a namespace ends with its last process, and the cable with it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster.command import main
from tests.helpers import tiny, warm
from tests.helpers.slurm import die_with_parent, until

HOSTS = {"click-host-a": "10.213.77.1", "click-host-b": "10.213.77.2"}
CABLE = [f"c{os.getpid()}{end}" for end in "ab"]  # 15 characters at most
NAMESPACES = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
# Besides its network, a host has a name, and knows the other's. $1 name, $2 address, $3 its end of the cable, $4 hosts, $5 job
AS_HOST = """
hostname "$1" && mount --bind "$4" /etc/hosts && ip link set lo up || exit
until ip link show "$3" > /dev/null 2>&1; do sleep 0.1; done
ip address add "$2/24" dev "$3" && ip link set "$3" up && exec bash -c "$5"
"""


def why_not():
    """Why there can be no hosts here; None where there can."""
    if sys.platform != "linux" or not all(map(shutil.which, ("ip", "unshare", "mount", "hostname"))):
        return "needs Linux with iproute2 and util-linux"
    done = subprocess.run([*NAMESPACES, "mount", "--bind", "/etc/hosts", "/etc/hosts"], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


@contextlib.contextmanager
def running(command, folder):
    """The command on both hosts, once the cable is laid. Skips where that is not permitted."""
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in HOSTS.items()))
    started = []
    try:
        for (host, address), end in zip(HOSTS.items(), CABLE):
            with open(folder / f"{host}.txt", "wb") as output:
                process = subprocess.Popen(
                    [*NAMESPACES, "bash", "-c", AS_HOST, "-", host, address, end, str(names), command],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "GLOO_SOCKET_IFNAME": end, "PYTHONPATH": str(tiny.REPOSITORY)},
                    preexec_fn=die_with_parent,
                )
            started.append(process)
        lay_cable(started)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def lay_cable(hosts):
    networks = [Path(f"/proc/{process.pid}/ns/net") for process in hosts]
    until(lambda: all(network.readlink() != Path("/proc/self/ns/net").readlink() for network in networks), 20)
    ends = [["name" if end else "", name, "netns", str(host.pid)] for end, (name, host) in enumerate(zip(CABLE, hosts))]
    words = [word for word in ["link", "add", *ends[0], "type", "veth", "peer", *ends[1]] if word]
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")


def test_one_command_trains_on_two_hosts(click_log, tmp_path, capsys):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
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
    with running(capsys.readouterr().out, tmp_path) as hosts:
        codes = [host.wait(timeout=warm.PATIENCE) for host in hosts]
    outputs = [(tmp_path / f"{host}.txt").read_text() for host in HOSTS]
    assert codes == [0, 0], outputs
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["world_size"], status["step"]) == ("finished", 2, 3)
