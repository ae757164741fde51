"""What a server counts, for Prometheus; over all workers where the supervisor gives them a folder to share."""

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
SCORES = tuple(i / 20 for i in range(1, 20))

request_seconds = Histogram(
    "clicktrainer_request_seconds", "Time of a request from its last byte to its answer", buckets=SECONDS
)
requests = Counter("clicktrainer_requests", "Requests by status", ["code"])
candidates = Histogram("clicktrainer_candidates", "Candidates of a request", buckets=SIZES)
merged = Histogram("clicktrainer_batch_requests", "Requests that were scored together", buckets=SIZES[:8])
scores = Histogram("clicktrainer_score", "Probabilities that were given", buckets=SCORES)
waiting = Gauge("clicktrainer_waiting", "Requests that wait", multiprocess_mode="livesum")
problems = Counter("clicktrainer_feature_problems", "Values missing, cut or replaced", ["feature", "what"])
reloads = Counter("clicktrainer_reloads", "Versions that were taken over, or refused", ["outcome"])
model_info = Gauge(
    "clicktrainer_model_info", "1 for the version that is served", ["version"], multiprocess_mode="livemax"
)
table_bytes = Gauge("clicktrainer_table_bytes", "Size of all tables", multiprocess_mode="livemax")


def text(shared: Path | None) -> bytes:
    """In Prometheus' exposition format."""
    if shared is None:
        return generate_latest()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(shared))
    return generate_latest(registry)


def serves(version: str, before: str | None, size: int) -> None:
    if before is not None:
        model_info.labels(before).set(0)
    model_info.labels(version).set(1)
    table_bytes.set(size)


def count_problems(counts: dict[str, int], counted: dict[str, int]) -> None:
    """Adds what ``counts`` (``<feature>.<what>``) has more than ``counted``, which is brought up to date."""
    for name, count in counts.items():
        more = count - counted.get(name, 0)
        if more:
            feature, _, what = name.rpartition(".")
            problems.labels(feature, what).inc(more)
            counted[name] = count
