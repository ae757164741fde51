"""Compiling: once for sources, CPU and compiler, never without a compiler; arguments that are not as declared are refused."""

import ctypes

import pytest
import torch

from trainer import kernels
from trainer.kernels import build

SOURCE = """
#include <cstdint>
#define KERNEL extern "C" __attribute__((visibility("default")))
KERNEL void scale(const float *x, int64_t count,
                  float by, float *y) {
  for (int64_t i = 0; i < count; i++) y[i] = by * x[i];
}
"""
needs_compiler = pytest.mark.skipif(
    not any(map(build.shutil.which, build.COMPILERS)), reason="there is no C++ compiler"
)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A place with one small source instead of the trainer's."""
    (tmp_path / "scale.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    kernels.library.cache_clear()
    monkeypatch.setattr(build.find, "__defaults__", (tmp_path / "build",))
    yield tmp_path
    kernels.library.cache_clear()


@needs_compiler
def test_a_library_is_compiled_once_and_anew_for_other_sources(compiled):
    assert build.find() is None and not kernels.available()
    first = build.ensure(compiled / "build")
    stamp = first.stat().st_mtime_ns
    assert build.find() == build.ensure(compiled / "build") == first and first.stat().st_mtime_ns == stamp
    (compiled / "scale.cpp").write_text(SOURCE.replace("by * x", "2 * by * x"))
    assert build.find() is None
    second = build.ensure(compiled / "build")
    assert second != first and list((compiled / "build").iterdir()) == [second]  # nothing is left of the first


@needs_compiler
def test_another_cpu_has_a_library_of_its_own(compiled, monkeypatch):
    first = build.ensure(compiled / "build")
    monkeypatch.setattr(build.platform, "machine", lambda: "other")
    assert build.find() is None
    assert {build.ensure(compiled / "build"), first} == set((compiled / "build").iterdir())


@needs_compiler
def test_arguments_are_what_the_source_declares(compiled):
    build.ensure(compiled / "build")
    x, y = torch.tensor([1.0, -0.0, float("nan"), float("inf")]), torch.empty(4)
    kernels.library().scale(x, 4, 0.5, y)
    torch.testing.assert_close(y, torch.tensor([0.5, -0.0, float("nan"), float("inf")]), rtol=0, atol=0, equal_nan=True)
    for wrong in (x.double(), x.repeat(2)[::2], x.to("meta")):
        with pytest.raises(ctypes.ArgumentError):
            kernels.library().scale(wrong, 4, 0.5, y)
    with pytest.raises(ctypes.ArgumentError):
        kernels.library().scale(x, 4.5, 0.5, y)


@needs_compiler
def test_what_does_not_compile_is_named(compiled):
    (compiled / "scale.cpp").write_text("#error no such instruction\n")
    with pytest.raises(build.BuildError, match=r"failed: .*no such instruction"):
        build.ensure(compiled / "build")
    assert list((compiled / "build").iterdir()) == []


def test_without_a_compiler_there_is_no_library(compiled, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda program: None)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(g\+\+ or clang\+\+\)"):
        build.ensure(compiled / "build")
    assert not kernels.available()


def test_what_does_not_load_is_as_if_it_were_not_there(compiled):
    (compiled / "build").mkdir()
    (compiled / "build" / f"{build._stem()}-0.so").write_bytes(b"of another machine")
    assert build.find() is not None and not kernels.available()
