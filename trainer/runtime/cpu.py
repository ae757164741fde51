"""What a rank on a CPU computes best with: its process's environment, and how the CPU multiplies.

A C library reads its part of the environment once, at its start. The launcher gives it to the ranks; a program that was started
without it, as by torchrun, starts itself again with it.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

import torch

# Without the first two glibc gives large activations back to the kernel at every step, and a tenth of the step is page
# faults. The third has tables and activations in huge pages; a glibc before 2.35 passes it over.
MALLOC = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
# Ranks share a machine's cores, a thread each: a second thread waits for the first at every operation, and on a busy machine
# such waits took 13 of 14 parts of a step. What waits sleeps: a core that it would hold belongs to another rank.
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",  # of GNU's OpenMP, and
    "KMP_BLOCKTIME": "0",  # of LLVM's and Intel's
    "GLIBC_TUNABLES": MALLOC,
}
# Of the largest value: what is lost where factors are rounded to bf16 is 100 times as much, what float32 loses a tenth.
FLOAT32_LOSES = 1e-5


def missing(environment: Mapping[str, str]) -> dict[str, str]:
    """What of ``VARIABLES`` is not set; what is stays as it is."""
    return {name: value for name, value in VARIABLES.items() if name not in environment}


def start_again_with_variables() -> None:
    """Called first of all by a program: one on a CPU that lacks the settings of memory is replaced by itself with all
    variables. Its process stays the same, so whoever started it sees nothing of that."""
    wanted, arguments = missing(os.environ), sys.argv[1:]
    on_gpu = "device=cpu" not in arguments and torch.cuda.device_count() > 0
    as_started = sys.orig_argv[len(sys.orig_argv) - len(arguments) :] == arguments  # else it lives in another program
    if sys.platform == "linux" and "GLIBC_TUNABLES" in wanted and as_started and not on_gpu:
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def computing_as_a_rank(device: str) -> Iterator[None]:
    """A process that was not started as a rank computes as one: on a CPU with its number of threads. Afterwards threads and
    products are as they were."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    on_gpu = device != "cpu" and torch.cuda.device_count() > 0
    if not on_gpu and "OMP_NUM_THREADS" in missing(os.environ):
        torch.set_num_threads(int(VARIABLES["OMP_NUM_THREADS"]))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def multiplies_bf16() -> bool:
    """Whether products of bf16 matrices are faster than those of float32: in AMX's tiles or by AVX512-BF16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def multiply_float32_by_onednn() -> None:
    """Has oneDNN multiply float32 matrices where it is faster than MKL (AMD's CPUs with AVX512-BF16: 1.1 to 1.4 times). PyTorch
    calls that a medium precision, since AMX would round factors to bf16; without AMX none are, which is tried here."""
    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported():
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if error_of_product() > FLOAT32_LOSES:
        torch.set_float32_matmul_precision(before)


def error_of_product() -> float:
    """Of a product of float32 matrices as this process computes it, the largest error relative to the largest value."""
    left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = left.double() @ right.double()
    return float((left @ right - exact).abs().max() / exact.abs().max())
