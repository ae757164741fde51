"""Clusters by name and by file; a GPU recognised by name and memory; what a rank of this machine has."""

import psutil
import pytest
import torch
import yaml

from trainer.config.sharding import ShardingConfig
from trainer.runtime import gpus
from trainer.sharding import planner
from trainer.sharding.hardware import CONTEXT, GB, GIB, GPUS, Cluster, Hardware, parse_cluster, recognised

HERE = Hardware("CPU", "cpu", 8 * GIB, 8 * GIB, 1e10, 3e9, 1e9, 1e11, bf16=False)
OWN = {
    "gpu": "MI300X",
    "machines": 2,
    "gpus_per_machine": 8,
    "memory_gib": 190,
    "host_memory_gib": 256,
    "memory_bandwidth": 5300,
    "within": 448,
    "between": 50,
    "matmul": 1307,
}


def from_file(folder, given):
    path = folder / "cluster.yaml"
    path.write_text(given if isinstance(given, str) else yaml.safe_dump(given))
    return parse_cluster(str(path), HERE)


@pytest.mark.parametrize(
    ("text", "machines", "local", "told"),
    [
        ("H100", 1, 1, "1xH100"),
        ("8xh100", 1, 8, "8xH100"),
        ("64xA100-40", 8, 8, "8x8xA100-40"),
        ("2x4xL4", 2, 4, "2x4xL4"),
        ("12xCPU", 1, 12, "12xCPU"),
    ],
)
def test_a_name_says_how_many_of_what_in_how_many_machines(text, machines, local, told):
    found = parse_cluster(text, HERE)
    assert (found.machines, found.local, found.ranks, str(found)) == (machines, local, machines * local, told)


def test_a_file_replaces_figures_of_a_known_gpu(tmp_path):
    given = {"gpu": "H100", "machines": 4, "gpus_per_machine": 8, "between": 12.5, "host_memory_gib": 64, "bf16": False}
    found = from_file(tmp_path, given)
    sheet = GPUS["H100"]
    assert (found.machines, found.local) == (4, 8)
    assert (found.hardware.between, found.hardware.host_memory, found.hardware.bf16) == (12.5e9, 64 * GIB, False)
    for name in ("name", "memory", "memory_bandwidth", "within", "matmul"):
        assert getattr(found.hardware, name) == getattr(sheet, name)


def test_a_file_describes_a_gpu_that_is_in_no_table(tmp_path):
    expected = Hardware("MI300X", "cuda", 190 * GIB, 256 * GIB, 5300 * GB, 448 * GB, 50 * GB, 1307e12)
    assert from_file(tmp_path, OWN) == Cluster(expected, 2, 8)
    known = from_file(tmp_path, {**OWN, "gpu": "v100"}).hardware
    assert (known.name, known.bf16, known.matmul) == ("V100", False, 1307e12)


def test_a_file_may_speak_of_this_machines_cpu(tmp_path):
    assert from_file(tmp_path, {"gpu": "cpu", "gpus_per_machine": 2}) == Cluster(HERE, 1, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu": "H100", "gpus": 8}, "key: 'gpus' is not known"),
        ({"gpu": "H101"}, "'H101' is not known; did you mean 'H100'"),
        (
            {key: value for key, value in OWN.items() if key != "between"},
            "'MI300X' is in no table: give between as well",
        ),
        ({key: value for key, value in OWN.items() if key != "gpu"}, "topology: GPU"),
        ({"machines": 2}, "topology: GPU"),
        ({"gpu": "H100", "machines": 1.5}, "machines and gpus_per_machine are [1.5, 1]: give whole numbers"),
        ({"gpu": "H100", "between": "fast"}, "between is fast: give a positive number"),
        ({"gpu": "H100", "memory_gib": True}, "memory_gib is True: give a positive number"),
        ({"gpu": "H100", "machines": 0}, "machines is 0: give a positive number"),
        ({"gpu": "H100", "machines": 1000, "gpus_per_machine": 8}, "8000 ranks"),
        ("[1, 2]", "expected a map"),
        ("gpu: [", "that is not closed"),
    ],
)
def test_a_file_that_says_nothing_possible_is_one_line(tmp_path, given, message):
    with pytest.raises(ValueError, match=".") as caught:
        from_file(tmp_path, given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told_with_what_a_name_may_be(tmp_path):
    with pytest.raises(ValueError, match=r"there is no such file; write A100-40, .*8xH100"):
        parse_cluster(str(tmp_path / "absent.yaml"), HERE)


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.39, "A100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.25, "A100-80"),
        ("NVIDIA H100 80GB HBM3", 79.11, "H100"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA B200", 178.36, "B200"),
        ("NVIDIA L4", 22.05, "L4"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("Tesla V100-SXM2-32GB", 31.74, "V100"),
        ("Tesla T4", 14.58, "T4"),
        ("Tesla V100-SXM2-16GB", 15.77, None),  # half the memory
        ("NVIDIA H100 PCIe", 79.11, None),  # other links
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.5, None),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA L40", 44.4, None),  # not an L4, nor an L40S
        ("NVIDIA GeForce RTX 4090", 23.5, None),
    ],
)
def test_a_gpu_is_recognised_by_its_name_and_memory(name, gib, expected):
    found = recognised(name, gib * GIB)
    assert (found.name if found else None) == expected


def pretend(monkeypatch, name, total, free, **properties):
    """As if there were one such GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), properties))


def test_a_rank_with_a_known_gpu_has_its_free_memory_and_the_links_of_its_kind(monkeypatch):
    # The clock of an H100's memory and its bus give the data sheet's 3.35 TB/s.
    clock = {"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}
    pretend(monkeypatch, "NVIDIA H100 80GB HBM3", 79.11 * GIB, 60 * GIB, **clock)
    found = planner.measured(torch.device("cuda"), 4)
    assert (found.name, found.device, found.memory) == ("NVIDIA H100 80GB HBM3", "cuda", 60 * GIB)
    assert (found.within, found.between) == (450e9, 50e9)
    assert found.memory_bandwidth == pytest.approx(GPUS["H100"].memory_bandwidth, rel=0.01)
    assert found.host_memory == pytest.approx(psutil.virtual_memory().available / 4, rel=0.2)
    assert planner.usable_memory(ShardingConfig(), found) == pytest.approx(0.85 * 60 * GIB)
    assert planner.usable_memory(ShardingConfig(hbm_gb=20), found) == 20 * GIB


def test_of_an_unknown_gpu_memory_is_measured_and_links_are_left_to_torchrec(monkeypatch):
    pretend(monkeypatch, "NVIDIA GeForce RTX 4090", 23.5 * GIB, 20 * GIB)
    found = planner.measured(torch.device("cuda"), 1)
    assert (found.memory, found.memory_bandwidth, found.within, found.between) == (20 * GIB, None, None, None)


def test_without_a_gpu_its_memory_must_be_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nothing = planner.measured(torch.device("cuda"), 1)
    with pytest.raises(ValueError, match="no GPU here to measure: set sharding.hbm_gb"):
        planner.usable_memory(ShardingConfig(), nothing)
    assert planner.usable_memory(ShardingConfig(hbm_gb=40), nothing) == 40 * GIB


def test_a_rank_on_a_cpu_has_its_share_of_this_machine():
    one, two = (planner.measured(torch.device("cpu"), ranks) for ranks in (1, 2))
    assert one.device == "cpu" and two.memory == two.host_memory
    assert two.memory == pytest.approx(one.memory / 2, rel=0.2)


def test_figures_are_those_of_the_data_sheets():
    """Both ways and with sparsity, as they are printed, in GB/s and TFLOPS."""
    printed = {
        "A100-40": (40, 1555, 600, 624),
        "A100-80": (80, 2039, 600, 624),
        "H100": (80, 3350, 900, 1979),
        "H200": (141, 4800, 900, 1979),
        "B200": (180, 64_000 / 8, 1800, 36_000 / 8),
        "L4": (24, 300, 64, 242),
        "L40S": (48, 864, 64, 733),
        "V100": (32, 900, 300, 2 * 125),  # has no sparsity, as T4
        "T4": (16, 320, 32, 2 * 65),
    }
    assert set(printed) == set(GPUS)
    for name, (sold, bandwidth, links, matmul) in printed.items():
        gpu = GPUS[name]
        assert 0.9 < (gpu.memory + CONTEXT) / (sold * GIB) < 1, name
        assert gpu.memory_bandwidth == bandwidth * GB and 2 * gpu.within == links * GB, name
        assert 2 * gpu.matmul == pytest.approx(matmul * 1e12, rel=0.02), name
        assert gpu.bf16 == gpus.has_code(gpu.capability) == (name not in ("V100", "T4"))
