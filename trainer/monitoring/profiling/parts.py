"""A trace of a window of steps -> milliseconds a step by part, disjoint, with the step as their sum.

``events`` are those of a Chrome trace (times in microseconds) as ``torch.profiler`` writes it. The ranges in it are
TorchRec's (``## forward 7 ##``, ``[lookup]_[…]``), autograd's and PyTorch's own operators; ``RULES`` say to which part a range
belongs, and one without a rule belongs to the part of the range around it.

Without a GPU every moment of the thread that drives the steps counts once, for the innermost range of that moment (CPU
backward runs on that thread as well). Threads beside it (reading, gloo) do not count: work that overlaps is free. Who waits
for another rank is in no operator; such a moment counts as ``comms`` where a collective of this rank is under way and either
was started just before or backward has nothing else left to do.

With a GPU it is the device whose time counts: each kernel belongs to the part of the range that launched it (found by its
correlation number, on whichever thread). Where kernels overlap, those that compute count before those that move data:
``comms`` is only what nothing hides. While the device is idle the host's wait for input counts as such, all else as ``other``.
"""

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from data_loaders.errors import UserError

PARTS = (
    "input_wait",
    "input_dist",
    "lookup",
    "dense_forward",
    "backward",
    "table_update",
    "optimizer",
    "comms",
    "other",
)
# Of a range's name; the first that fits.
RULES = (
    (re.compile(r"^## (evaluation|metrics)"), "other"),
    (re.compile(r"^## next_batch"), "input_wait"),
    (
        re.compile(
            r"^## (\w*copy_batch_to_gpu|\w+_sparse_data_dist|wait_for_batch|runtime_forward_assemble_KJT|all2all_data)"
            r"|^\[(input|splits)_dist\]"
        ),
        "input_dist",
    ),
    (re.compile(r"^\[lookup\]|construct_jagged_tensors|apply mean pooling"), "lookup"),
    # Of FBGEMM, and of trainer.sharding.cpu_tables.
    (re.compile(r"LookupFunction|_LookUpBackward|^fbgemm::split_embedding\w*backward"), "table_update"),
    (
        re.compile(r"All2All|ReduceScatter|AllGather|^c10d::|^\[output_dist|Awaitable wait\(\)|Request wait\(\)"),
        "comms",
    ),
    (re.compile(r"^## backward"), "backward"),
    (re.compile(r"^## (optimizer|zero_grad)"), "optimizer"),
    (re.compile(r"^## (forward|guard)"), "dense_forward"),
)
# What is inside these stays theirs, but for the parts named.
WHOLE: dict[str | None, tuple[str, ...]] = {"input_wait": (), "input_dist": ("input_wait",), "other": ()}
# Of what a device does at a time, what counts: to compute, then to move data, then that the host waits for input.
FIRST = (
    "dense_forward",
    "backward",
    "lookup",
    "table_update",
    "optimizer",
    "other",
    "input_dist",
    "comms",
    "input_wait",
)
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
STEP = "ProfilerStep#"


class Segment(NamedTuple):
    """A stretch of a thread's time, of which ``name`` is the innermost range; ``after``: the range that ended where it
    begins, or empty."""

    start: float
    end: float
    part: str | None
    name: str
    after: str


class Window(NamedTuple):
    """So many ``steps`` of ``step_ms``; ``parts_ms``: of one of them, by ``PARTS``."""

    steps: int
    step_ms: float
    parts_ms: dict[str, float]


def analyse(events: Iterable[Mapping[str, Any]]) -> Window:
    """Raises ``UserError`` for a trace without a step."""
    events = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [event for event in events if event["name"].startswith(STEP) and event["cat"] == "user_annotation"]
    if not steps:
        raise UserError("the trace holds no step: it was not written by a profiled run")
    start, end = min(step["ts"] for step in steps), max(step["ts"] + step["dur"] for step in steps)
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
    main = steps[0]["tid"]
    timelines = {thread: segments(ranges, None if thread == main else "backward") for thread, ranges in threads.items()}
    kernels = _kernels(events, timelines)
    found = _of_device(kernels, timelines[main]) if kernels else _of_host(timelines[main], _collectives(events, main))
    totals = dict.fromkeys(PARTS, 0.0)
    for begin, stop, part in found:
        totals[part] += max(0.0, min(stop, end) - max(begin, start))
    totals["other"] += end - start - sum(totals.values())  # moments in no range
    scale = 1e-3 / len(steps)
    return Window(len(steps), (end - start) * scale, {part: time * scale for part, time in totals.items()})


def part_of(name: str, around: str | None) -> str | None:
    part = next((part for rule, part in RULES if rule.search(name)), around)
    return around if around in WHOLE and part not in WHOLE[around] else part


def segments(ranges: Sequence[Mapping[str, Any]], default: str | None) -> list[Segment]:
    """The time of one thread, in order and without overlap; what is in no range is left out. ``default``: the part of
    ranges that no rule and no range around them gives one."""
    found: list[Segment] = []
    stack: list[tuple[float, str | None, str]] = []  # end, part, name
    now, after = 0.0, ""

    def go(to: float, ended: str = "") -> None:
        nonlocal now, after
        if stack and to > now:
            found.append(Segment(now, to, *stack[-1][1:], after))
        now, after = max(now, to), ended

    for event in sorted(ranges, key=lambda event: (event["ts"], -event["dur"])):
        start, name = event["ts"], event["name"]
        while stack and stack[-1][0] <= start:
            go(stack[-1][0], stack[-1][2])
            stack.pop()
        go(start)
        part = part_of(name, stack[-1][1] if stack else default)
        stack.append((start + event["dur"], part, name))
    while stack:
        go(stack[-1][0], stack[-1][2])
        stack.pop()
    return found


def _of_host(timeline: list[Segment], collectives: list[tuple[float, float]]) -> list[tuple[float, float, str]]:
    found = []
    for segment in timeline:
        part = segment.part or "other"
        may_wait = segment.after.startswith("c10d::") or segment.name.startswith("## backward")
        waits = _overlaps(segment, collectives) if may_wait and part not in WHOLE else []
        found += [(start, end, "comms") for start, end in waits]
        edges = [segment.start, *(edge for wait in waits for edge in wait), segment.end]
        found += [(start, end, part) for start, end in zip(edges[::2], edges[1::2])]
    return found


def _overlaps(segment: Segment, busy: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of ``busy``, which is sorted and without overlap, what lies within the segment."""
    first = max(0, bisect.bisect_right(busy, (segment.start, segment.start)) - 1)
    found = []
    for start, end in busy[first:]:
        if start >= segment.end:
            break
        if end > segment.start:
            found.append((max(start, segment.start), min(end, segment.end)))
    return found


def _collectives(events: list[Mapping[str, Any]], main: Any) -> list[tuple[float, float]]:
    """When gloo's threads were at work for this rank."""
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["tid"] != main and event["name"].startswith("gloo:")
    )
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _kernels(events: list[Mapping[str, Any]], timelines: dict[Any, list[Segment]]) -> list[tuple[float, float, str]]:
    """What ran on the device, each with the part of the range that launched it."""
    launches = {
        event["args"]["correlation"]: (event["tid"], event["ts"])
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    starts = {thread: [segment.start for segment in timeline] for thread, timeline in timelines.items()}
    found = []
    for event in events:
        if event.get("cat") not in ON_DEVICE:
            continue
        thread, time = launches.get(event["args"].get("correlation"), (None, 0.0))
        part = None
        if thread in timelines and (place := bisect.bisect_right(starts[thread], time)):
            segment = timelines[thread][place - 1]
            part = segment.part if time <= segment.end else None
        if event["name"].startswith("nccl") and part != "input_dist":
            part = "comms"
        found.append((event["ts"], event["ts"] + event["dur"], part or "other"))
    return found


def _of_device(kernels: list[tuple[float, float, str]], host: list[Segment]) -> list[tuple[float, float, str]]:
    """One part at a time."""
    waits = [(segment.start, segment.end, "input_wait") for segment in host if segment.part == "input_wait"]
    edges = [(start, 1, part) for start, _, part in (*kernels, *waits)]
    edges += [(end, -1, part) for _, end, part in (*kernels, *waits)]
    active: Counter[str] = Counter()
    found, last = [], 0.0
    for time, change, part in sorted(edges):
        first = next((name for name in FIRST if active[name] > 0), None)
        if first is not None and time > last:
            found.append((last, time, first))
        active[part] += change
        last = time
    return found
