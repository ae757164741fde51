"""Where a step's time goes: parts of traces whose answer is known, or found moment by moment; the window and its settings."""

import json
import random

import pytest
import torch

from tests.helpers import tiny
from trainer.config.monitoring import ProfilingConfig
from trainer.monitoring.profiling.parts import PARTS, STEP, analyse, part_of, segments
from trainer.monitoring.profiling.summary import as_text
from trainer.monitoring.profiling.window import Window
from trainer.runtime.distributed import Ranks
from trainer.runtime.watchdog import Watchdog

MAIN, AUTOGRAD, GLOO, STREAM, NCCL_STREAM = 1, 2, 3, 7, 20
EXCHANGE = "autograd::engine::evaluate_function: All2All_Seq_ReqBackward"
UPDATE = "autograd::engine::evaluate_function: torch::autograd::CppNode<SplitLookupFunction_rowwise_adagrad_Op_pt2>"


def span(name, start, end, tid=MAIN, cat="user_annotation", **args):
    """Milliseconds."""
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "tid": tid,
        "ts": 1e3 * start,
        "dur": 1e3 * (end - start),
        "args": args,
    }


def parts_of(events):
    found = analyse(events)
    assert sum(found.parts_ms.values()) == pytest.approx(found.step_ms)
    return {part: pytest.approx(value) for part, value in found.parts_ms.items() if value}


HOST = [
    span(f"{STEP}5", 0, 100),
    span("## zero_grad ##", 0, 1),
    span("## start_sparse_data_dist 6 ##", 1, 4),
    span("c10d::alltoall_base_", 2, 3, cat="cpu_op"),  # of ids: input dist, as what is around it
    span("## copy_batch_to_gpu 7 ##", 4, 10),
    span("## next_batch ##", 5, 9),
    span("## forward 5 ##", 10, 50),
    span("[lookup]_[model.embedding_bags]_[table_wise]", 12, 20),
    span("fbgemm::split_embedding_codegen_forward_cpu", 13, 19, cat="cpu_op"),
    span("All2All_Pooled_Wait", 21, 25, cat="cpu_op"),
    span("aten::addmm", 25, 40, cat="cpu_op"),
    span("c10d::allreduce_", 40, 41, cat="cpu_op"),  # the guard's, which then waits in no operator
    span("aten::item", 47, 48, cat="cpu_op"),
    span("## backward 5 ##", 50, 90),
    span("autograd::engine::evaluate_function: AddmmBackward0", 50, 60, cat="cpu_op"),
    span(EXCHANGE, 60, 65, cat="cpu_op"),
    span(UPDATE, 65, 75, cat="cpu_op"),
    span("fbgemm::split_embedding_backward_codegen_rowwise_adagrad_unweighted_cpu", 66, 74, cat="cpu_op"),
    span("aten::as_strided", 85, 86, cat="cpu_op"),  # after 10 ms without an operator: gradients are being reduced
    span("## optimizer 5 ##", 90, 95),
    span("gloo:all_to_all", 26, 30, GLOO),  # beside a matrix product: free
    span("gloo:all_reduce", 40.5, 46, GLOO),
    span("gloo:all_reduce", 70, 83, GLOO),
]


def test_each_moment_of_the_thread_counts_once_for_its_innermost_range():
    assert parts_of(HOST) == {
        "optimizer": 1 + 5,
        "input_dist": 3 + 2,
        "input_wait": 4,
        "lookup": 8,
        "comms": 4 + 1 + 5 + 5 + 8,  # wait, all-reduce, waiting for it, exchange, waiting for gradients
        "dense_forward": 2 + 1 + 15 + 1 + 1 + 2,
        "table_update": 10,
        "backward": 10 + 2 + 1 + 4,
        "other": 5,
    }


def test_steps_are_averaged_and_what_lies_outside_of_them_is_left_out():
    later = [{**event, "ts": event["ts"] + 1e5} for event in HOST]
    around = [span("## forward 4 ##", -50, -1), span("## optimizer 9 ##", 200, 300)]
    found = analyse([*HOST, *later, *around])
    assert (found.steps, found.step_ms) == (2, pytest.approx(100))
    assert found.parts_ms == pytest.approx(analyse(HOST).parts_ms)


def test_what_an_evaluation_computes_is_no_part_of_a_step():
    events = [span(f"{STEP}1", 0, 10), span("## evaluation and checkpoint ##", 2, 9), span("## forward 3 ##", 3, 8)]
    assert parts_of(events) == {"other": 10}


DEVICE = [
    span(f"{STEP}5", 0, 100),
    span(f"{STEP}5", 0, 100, STREAM, "gpu_user_annotation"),
    span("## next_batch ##", 0, 8),
    span("## forward 5 ##", 8, 30),
    span("[lookup]_[model.embedding_bags]_[row_wise]", 10, 14),
    span("cudaLaunchKernel", 11, 12, cat="cuda_runtime", correlation=1),
    span("cudaLaunchKernel", 20, 21, cat="cuda_runtime", correlation=2),
    span("ncclLaunch", 22, 23, cat="cuda_driver", correlation=3),
    span("## wait_sparse_data_dist 6 ##", 28, 30),
    span("ncclLaunch", 28, 29, cat="cuda_driver", correlation=6),
    span("## backward 5 ##", 30, 60),
    span(UPDATE, 40, 50, AUTOGRAD, "cpu_op"),
    span("cudaLaunchKernel", 41, 42, AUTOGRAD, "cuda_runtime", correlation=4),
    span("aten::mm", 52, 54, AUTOGRAD, "cpu_op"),
    span("cudaLaunchKernel", 53, 54, AUTOGRAD, "cuda_runtime", correlation=5),
    span("## next_batch ##", 80, 98),
    span("gather", 15, 25, STREAM, "kernel", correlation=1),
    span("gemm", 25, 40, STREAM, "kernel", correlation=2),
    span("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 35, 50, NCCL_STREAM, "kernel", correlation=3),
    span("ncclDevKernel_SendRecv", 45, 52, NCCL_STREAM, "kernel", correlation=6),  # of ids
    span("update", 55, 75, STREAM, "kernel", correlation=4),
    span("gemm", 75, 85, STREAM, "kernel", correlation=5),
    span("Memcpy HtoD", 97, 99, STREAM, "gpu_memcpy", correlation=99),  # launched before the window
]


def test_the_time_of_a_device_goes_to_what_launched_its_kernels():
    assert parts_of(DEVICE) == {
        "lookup": 10,
        "dense_forward": 15,
        "comms": 5,  # 5 more are hidden, 5 are beside ids
        "input_dist": 7,
        "table_update": 20,
        "backward": 10,
        "input_wait": 8 + 12,  # while the device idles; the last one ends with a copy
        "other": 7 + 3 + 2 + 1,
    }


def by_the_moment(ranges, moment):
    """The part of the innermost range, looked for from outside in."""
    part = None
    for event in sorted(ranges, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] <= moment < event["ts"] + event["dur"]:
            part = part_of(event["name"], part)
    return part


def nested(generator, start, end, depth=0):
    found = []
    while start < end and depth < 5:
        start = generator.randint(start, end)
        stop = generator.randint(start, end)
        names = [event["name"] for event in HOST[1:]] + ["aten::add"]
        found += [{"name": generator.choice(names), "ts": start, "dur": stop - start}]
        found += nested(generator, start, stop, depth + 1)
        start = stop + 1
    return found


@pytest.mark.parametrize("seed", range(20))
def test_segments_are_what_every_moment_says(seed):
    ranges = nested(random.Random(seed), 0, 300)
    found = segments(ranges, None)
    assert all(left.end <= right.start for left, right in zip(found, found[1:]))
    for moment in range(300):
        here = [segment.part for segment in found if segment.start <= moment < segment.end]
        assert here in ([by_the_moment(ranges, moment)], []), moment
        inside = any(event["ts"] <= moment < event["ts"] + event["dur"] for event in ranges)
        assert bool(here) == inside


@pytest.mark.parametrize(
    ("name", "around", "part"),
    [
        ("[splits_dist]_[model.embedding_bags]_[table_wise]", None, "input_dist"),
        ("## wait_sparse_data_dist 6 ##", None, "input_dist"),
        ("## runtime_forward_assemble_KJT ##", "dense_forward", "input_dist"),
        ("## next_batch ##", "input_dist", "input_wait"),
        ("## next_batch ##", "other", "other"),
        ("## KJTAllToAllTensorsAwaitable wait() ##", "input_dist", "input_dist"),
        ("## PooledEmbeddingsAwaitable wait() ##", "dense_forward", "comms"),
        ("[output_dist]_[model.embeddings.dim_8]_[row_wise]", "dense_forward", "comms"),
        ("## construct_jagged_tensors ##", "comms", "lookup"),
        ("_SegmentSum", "dense_forward", "dense_forward"),
        ("fbgemm::split_embedding_codegen_lookup_rowwise_adagrad_function_pt2", "lookup", "lookup"),
        ("ReduceScatterBase_ReqBackward", "backward", "comms"),
        ("Optimizer.step#Adam.step", "optimizer", "optimizer"),
        ("aten::add", None, None),
    ],
)
def test_a_range_belongs_to_its_part(name, around, part):
    assert part_of(name, around) == part


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="holds no step"):
        analyse([span("## forward 1 ##", 0, 1)])


def test_the_text_tells_milliseconds_and_shares_by_rank():
    parts = dict.fromkeys(PARTS, 0.0) | {"lookup": 15.0, "comms": 5.0}
    rank = {"step_ms": 20.0, "parts_ms": parts}
    facts = {"first_step": 21, "last_step": 25, "unprofiled_step_ms": 18.04, "ranks": {"0": rank, "3": rank}}
    lines = as_text(facts | {"slowed": None}).splitlines()
    assert lines[0] == "Where a step goes, of steps 21 to 25:" and lines[1].split() == ["rank", "0", "rank", "3"]
    assert lines[4].split() == ["lookup", "15.00", "ms", "75.0%", "15.00", "ms", "75.0%"]
    assert lines[-2].split() == ["step", "20.00", "ms", "100.0%", "20.00", "ms", "100.0%"]
    assert lines[-1] == "A step took 20.0 ms under the profiler, 18.0 ms before it."
    assert len({len(line) for line in lines[1:-1]}) == 1
    slowed = {"step": 12, "before_ms": 50.0, "after_ms": 700.0}
    assert "Steps slowed from 50.0 to 700.0 ms at step 12: other work" in as_text(facts | {"slowed": slowed})


@pytest.mark.parametrize(("made", "ranks"), [(0, [0]), (1, [0]), (4, [0]), (5, [0]), (5, [1])])
def test_a_run_that_ends_before_its_window_says_so_and_leaves_nothing(tmp_path, capsys, made, ranks):
    here = Ranks(0, 2, 0, 2, torch.device("cpu"))
    config = ProfilingConfig(after_steps=3, steps=2, ranks=ranks)
    opened = Window(config, tmp_path, here, Watchdog(tmp_path, here, 60), lambda seconds: None)
    for step in range(made):
        opened.before_step(step)
        torch.ones(2) + 1
    opened.close()
    told = capsys.readouterr().err.strip()
    assert told.startswith("note: nothing was profiled: this process ended before it had made 5 steps")
    assert "\n" not in told and list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "profile").write_text("in the way")
    monkeypatch.setattr("trainer.monitoring.profiling.window.on_ranks", lambda mine: [mine])
    here, outside = Ranks(0, 1, 0, 1, torch.device("cpu")), []
    opened = Window(ProfilingConfig(1, 1), tmp_path, here, Watchdog(tmp_path, here, 60), outside.append)
    for step in range(4):
        opened.before_step(step)
    opened.close()
    told = capsys.readouterr().err
    assert told.count("warning: no profile of rank 0: ") == 1 and "note" not in told and len(outside) == 1


def test_profile_true_is_all_that_it_takes(tmp_path):
    config = tiny.job(tmp_path, "profile=true").config
    assert config.profile and config.profiling == ProfilingConfig(after_steps=20, steps=5, ranks=[0])
    assert not tiny.job(tmp_path).config.profile


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["profiling.steps=0"], "profiling.steps is 0: it must be a positive number"),
        (["profiling.after_steps=0"], "profiling.after_steps is 0: it must be a positive number"),
        (["profiling.ranks=[]"], r"profiling.ranks is \[\]: give different ranks"),
        (["profiling.ranks=[1,1]"], r"profiling.ranks is \[1, 1\]: give different ranks"),
        (["profiling.ranks=[-1]"], r"profiling.ranks is \[-1\]"),
        (["profile=often"], "profile is 'often': expected true or false"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny.job(tmp_path, *overrides)


def test_a_rank_that_is_not_there_is_refused_where_it_would_be_profiled(tmp_path):
    wanted = "profiling.ranks=[0,2]"
    with pytest.raises(ValueError, match=r"profiling.ranks is \[0, 2\], but 2 rank\(s\) were started"):
        tiny.job(tmp_path, "profile=true", wanted).config.check_world_size(2)
    tiny.job(tmp_path, "profile=true", wanted).config.check_world_size(3)
    tiny.job(tmp_path, wanted).config.check_world_size(2)


def test_the_summary_is_plain_data():
    assert json.loads(json.dumps(analyse(HOST)._asdict()))["steps"] == 1
