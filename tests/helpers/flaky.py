"""A file system that fails on demand: ``flaky:///a/b`` is the local ``/a/b``, read through fsspec."""

import errno
from collections import Counter

import fsspec
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem


class Flaky(LocalFileSystem):
    """``Flaky.fail(operation, times)``: the next so many calls of ``ls``, ``open`` or ``read`` raise EIO."""

    protocol = "flaky"
    cachable = False
    failures: Counter = Counter()
    calls: Counter = Counter()

    def __init__(self, colour=None, **options):
        super().__init__(**options)
        self.colour = colour

    @classmethod
    def fail(cls, operation, times, after=0):
        """``after`` further calls that work."""
        cls.calls[operation] = -after
        cls.failures[operation] = times

    @classmethod
    def meet(cls, operation):
        cls.calls[operation] += 1
        if 0 < cls.calls[operation] <= cls.failures[operation]:
            raise OSError(errno.EIO, "Input/output error")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def ls(self, path, detail=False, **options):
        self.meet("ls")
        return super().ls(path, detail, **options)

    def _open(self, path, mode="rb", **options):
        self.meet("open")
        return _FlakyFile(path, mode, fs=self)


class _FlakyFile(LocalFileOpener):
    def read(self, *given):
        Flaky.meet("read")
        return self.f.read(*given)


fsspec.register_implementation("flaky", Flaky, clobber=True)
