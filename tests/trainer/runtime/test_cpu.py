"""What a rank on a CPU is given, and how the CPU multiplies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.run.build import autocast_dtype
from trainer.runtime import cpu

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = """
import os, sys
from trainer.runtime import cpu
print(os.getpid(), sys.argv[1:], *(os.environ.get(name, "-") for name in cpu.VARIABLES), flush=True)
{then}
cpu.start_again_with_variables()
"""
ARGUMENTS = ["run.name=a b", "device=cpu"]


def started(then: str = "", **environment: str) -> tuple[int, list[str]]:
    """The process's number and what it prints, each time it starts."""
    kept = {name: value for name, value in os.environ.items() if name not in cpu.VARIABLES}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then=then), *ARGUMENTS],
        env={**kept, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    printed, _ = process.communicate()
    assert process.returncode == 0
    return process.pid, printed.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_a_program_without_the_settings_is_replaced_by_itself_with_them():
    number, lines = started(OMP_NUM_THREADS="3")
    everything = {**cpu.VARIABLES, "OMP_NUM_THREADS": "3"}
    assert lines == [f"{number} {ARGUMENTS} 3 - - -", f"{number} {ARGUMENTS} {' '.join(everything.values())}"]


def test_it_stays_where_the_settings_are_and_within_another_program():
    number, lines = started(GLIBC_TUNABLES="")
    assert lines == [f"{number} {ARGUMENTS} - - - "]
    number, lines = started(then="sys.argv = ['trainer.train', 'model=fm', 'device=cpu']")
    assert lines == [f"{number} {ARGUMENTS} - - - -"]


@pytest.mark.parametrize(("amx", "avx512", "fast"), [(True, True, True), (False, True, True), (False, False, False)])
def test_bf16_is_chosen_where_the_cpu_multiplies_it(amx, avx512, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    device = torch.device("cpu")
    assert autocast_dtype("auto", device) == (torch.bfloat16 if fast else None)
    assert (autocast_dtype("fp32", device), autocast_dtype("bf16", device)) == (None, torch.bfloat16)


@pytest.mark.parametrize(
    ("amx", "avx512", "error", "expected"),
    [
        (False, True, 1e-7, "medium"),
        (False, True, 1e-3, "highest"),  # factors were rounded to bf16
        (True, True, 1e-7, "highest"),
        (False, False, 1e-7, "highest"),
    ],
)
def test_float32_is_multiplied_by_onednn_where_it_stays_float32(amx, avx512, error, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(cpu, "error_of_product", lambda: error)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        cpu.multiply_float32_by_onednn()
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_error_of_a_product_tells_float32_from_bf16(monkeypatch):
    assert cpu.error_of_product() < cpu.FLOAT32_LOSES / 10
    product = torch.Tensor.__matmul__

    def rounded(left, right):
        return product(left, right) if left.dtype == torch.float64 else product(left.bfloat16().float(), right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert cpu.error_of_product() > cpu.FLOAT32_LOSES * 10
