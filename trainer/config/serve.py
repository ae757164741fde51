"""Keys ``serve.…`` of ``clicktrainer serve``."""

from dataclasses import dataclass

from data_loaders.errors import UserError
from trainer.config.checks import positive

LARGEST_PORT = 65535
MEMORY = ("warn", "require")  # where tables are larger than it


@dataclass
class ServeConfig:
    """An HTTP server over an export (docs/serving.md)."""

    host: str = "127.0.0.1"
    """Address that it listens on; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """Port that it listens on; 0 chooses one, which is printed."""
    workers: int | None = None
    """Processes that score; by default one a core. Tables are in memory once for all of them."""
    max_rows: int = 2048
    """Candidates that are scored at once: requests that wait are merged up to so many."""
    max_waiting: int = 256
    """Requests that may wait in a worker; further ones are answered 503."""
    max_candidates: int = 10_000
    """Candidates of one request; larger ones are answered 413."""
    max_body_mb: float = 16.0
    """Size of one request; larger ones are answered 413."""
    timeout_ms: float = 1000.0
    """A request that has waited longer is answered 504 and not scored. The header X-Timeout-Ms lowers it."""
    grace_seconds: float = 30.0
    """Time to answer what has come, when asked to stop."""
    reload_seconds: float = 5.0
    """How often current.json is looked at for a new version."""
    memory: str = "warn"
    """Where a version's tables are larger than the memory available: warn, and read what does not fit from disk; or require,
    and do not serve it."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= LARGEST_PORT:
            raise UserError(f"serve.port is {self.port}: give a number from 0 to {LARGEST_PORT}")
        for name in ("max_rows", "max_waiting", "max_candidates", "max_body_mb", "timeout_ms", "grace_seconds"):
            positive(getattr(self, name), f"serve.{name}")
        positive(self.reload_seconds, "serve.reload_seconds")
        if self.memory not in MEMORY:
            raise UserError(f"serve.memory is {self.memory!r:.100}: give {' or '.join(MEMORY)}")
        if self.workers is not None:
            positive(self.workers, "serve.workers")
