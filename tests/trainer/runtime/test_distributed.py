"""How ranks find each other, and each its device."""

import datetime
import os
import re
import threading

import pytest
import torch
import torch.distributed as dist

from data_loaders.errors import UserError
from trainer.runtime import distributed, rendezvous
from trainer.runtime.distributed import choose_device
from trainer.runtime.process import is_retryable
from trainer.runtime.rendezvous import RendezvousError, _meet, first_to_say

SOON = datetime.timedelta(seconds=0.5)


@pytest.fixture
def agent(monkeypatch):
    """The store of torchrun's agent, which this process, rank 2 of 4, is told of."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in {**address, **place}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "_meeting", rendezvous._Meeting())
    return store


def test_ranks_that_do_not_come_are_named(agent):
    agent.set("attempt-1/arrived/0", "")
    agent.set("attempt-0/arrived/3", "")  # came to an earlier attempt
    with pytest.raises(
        RendezvousError, match=r"rank 1, 3 of 4 did not come .* within 0.5 s: .*rendezvous_timeout_seconds"
    ) as raised:
        _meet(2, 4, SOON)
    assert is_retryable(raised.value)
    assert [first_to_say(str(raised.value)) for _ in range(2)] == [True, False], "by the first one, through the store"


def test_all_there_are_let_through(agent):
    for rank in (0, 1, 3):
        agent.set(f"attempt-1/arrived/{rank}", "")
    store = _meet(2, 4, SOON)
    store.set("x", "1")
    assert agent.get("attempt-1/x") == b"1"


def test_a_store_that_is_not_there_is_reported_by_every_rank(agent, monkeypatch):
    assert not first_to_say("a mistake in the configuration"), "the first rank of the machine says that"
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(
        RendezvousError, match=re.escape("rank 2 did not meet all 4 ranks at MASTER_ADDR:MASTER_PORT=localhost:1")
    ):
        _meet(2, 4, SOON)
    assert first_to_say("no store")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"MASTER_PORT": ""}, "RANK is set, but not MASTER_PORT: start the ranks by clicktrainer train or torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "but not MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http': give the number"),
    ],
)
def test_a_rank_without_a_meeting_point_is_one_line(agent, monkeypatch, where, says):
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says) as raised:
        _meet(2, 4, SOON)
    assert isinstance(raised.value, UserError) and not is_retryable(raised.value)


def connect(rank, others, collective):
    """``_connect_gpus`` of one of three ranks, where the ``others`` have come."""
    store = dist.HashStore()
    for other in others:
        store.set(f"on-gpu/{other}", "")
    rendezvous._connect_gpus(store, rank, 3, 0.2, collective)


def test_gpus_that_do_not_come_to_their_first_collective_are_named():
    connect(0, [], lambda: None)
    stuck = threading.Event().wait
    with pytest.raises(RendezvousError, match=r"^rank 1 of 3 did not come to the first exchange .* within 0.2 s: "):
        connect(0, [2], stuck)
    with pytest.raises(
        RendezvousError, match=r"^the GPU of rank 1 of 3 could not connect .* within 0.2 s: .*NCCL_SOCKET_I"
    ):
        connect(1, [0, 2], stuck)

    def fails():
        raise RuntimeError("NCCL error in:\nno route")

    with pytest.raises(RendezvousError, match=r"could not connect .* \(NCCL error in: no route\): ") as raised:
        connect(1, [0, 2], fails)
    assert is_retryable(raised.value)


@pytest.fixture
def deterministic(monkeypatch):
    """After ``make_deterministic``; the test's end takes it back."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "another")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    distributed.make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_one_order_of_sums_is_asked_of_all_libraries(deterministic):
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_NVLS_ENABLE"] == "0"


def test_an_operation_without_an_order_is_named_in_one_line(deterministic):
    refused = torch.zeros(4).put_  # one of few that PyTorch refuses on a CPU, too
    line = r"^deterministic=true, but put_ adds up in no fixed order on this device: do without it"
    with pytest.raises(ValueError, match=line) as raised, distributed.unordered_operation_named():
        refused(torch.tensor([0, 0]), torch.ones(2))
    assert isinstance(raised.value, UserError) and not is_retryable(raised.value)
    with pytest.raises(RuntimeError, match="^another error$"), distributed.unordered_operation_named():
        raise RuntimeError("another error")


@pytest.mark.parametrize(
    ("wanted", "gpus", "ranks", "expected"),
    [
        ("auto", 0, 2, "cpu"),
        ("auto", 2, 2, "cuda:1"),
        ("cpu", 2, 4, "cpu"),
        ("cuda", 0, 2, "device=cuda, but PyTorch sees no GPU here"),
        ("cuda", 1, 2, r"2 ranks were started on a machine with 1 GPU\(s\): .*--nproc_per_node=1"),
        ("auto", 1, 2, r"2 ranks were started on a machine with 1 GPU\(s\)"),
    ],
)
def test_a_rank_gets_its_gpu_or_says_what_is_missing(monkeypatch, wanted, gpus, ranks, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(distributed, "identity", lambda: (1, ranks, 1, ranks))
    monkeypatch.setattr(distributed, "check_gpu", lambda index: None)
    if expected.startswith(("cpu", "cuda:")):
        assert choose_device(wanted) == torch.device(expected)
    else:
        with pytest.raises(ValueError, match=expected):
            choose_device(wanted)


T4, H200 = ("Tesla T4", (7, 5)), ("NVIDIA H200", (9, 0))


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([H200, H200], None),
        (
            [H200, T4],
            r"GPU 1 cannot be used: Tesla T4 has compute capability 7\.5, for which FBGEMM has no code: .*device=cpu",
        ),
        ([("Tesla V100-SXM2-32GB", (7, 0))] * 2, r"GPU 0 .*V100.* 7\.0"),
        ([("NVIDIA GeForce RTX 5090", (12, 0))] * 2, r"RTX 5090 has compute capability 12\.0"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_gpu_without_code_is_refused_by_every_rank_of_its_machine(monkeypatch, cards, expected, rank):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: cards[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index][1])
    monkeypatch.setattr(distributed, "identity", lambda: (rank, 2, rank, 2))
    if expected is None:
        assert choose_device("auto") == torch.device("cuda", rank)
    else:
        with pytest.raises(ValueError, match=expected):
            choose_device("auto")


def test_a_driver_that_is_too_old_is_one_line_that_names_the_one_to_install(monkeypatch):
    def refuse(index):
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver by "
            "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx\nOr go to …"
        )

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", refuse)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        ValueError, match=r"too old: it knows CUDA 12\.8, .* for CUDA 13\.0; install driver 580 or newer"
    ) as raised:
        choose_device("cuda")
    assert isinstance(raised.value, UserError) and "\n" not in str(raised.value)
