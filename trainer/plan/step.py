"""The time of a step by part, in milliseconds: TorchRec's estimates for the tables, counted operations for the dense part.

Ranks meet in every exchange, so a part takes as long as on its slowest rank. What the pipeline does beside others (reading,
copying and distributing ids) is not in it. A GPU's part of its peaks is what others measured of FBGEMM (63 % forward, 26 % in
backward with the update, of an H200) and a guess for matrix units, which small layers leave idle. The sums were never compared
with a cluster: they rank plans, and predict no speed.
"""

from torchrec.distributed.planner.types import ShardingOption

from trainer.sharding.hardware import Cluster

LOOKUP, UPDATE, MATMUL = 0.63, 0.26, 0.4  # of a GPU's peak
HOST_MS = 5.0  # what Python and TorchRec need to launch a step, whatever the kernels do: 5 to 10
OPTIMIZER_TRAFFIC = 7  # Adam reads parameter, gradient and two moments, and writes three of them
BACKWARD_SHARE = 2 / 3  # of the dense part's operations, beside which its gradients are reduced
OVER_NETWORK, OVER_LINK = 12.5e9, 600e9  # bytes a second, where nobody knows: TorchRec's


def step_times(
    chosen: list[ShardingOption], cluster: Cluster, operations: float, dense_parameters: int
) -> dict[str, float]:
    """``operations`` and ``dense_parameters`` (bytes) of the dense part of a rank."""
    hardware, gpu = cluster.hardware, cluster.hardware.device == "cuda"
    parts = {
        "lookup": _slowest(chosen, "fwd_compute", cluster.ranks) / (LOOKUP if gpu else 1),
        "exchange_forward": _slowest(chosen, "fwd_comms", cluster.ranks),
        "exchange_backward": _slowest(chosen, "bwd_comms", cluster.ranks),
        "backward_and_update": _slowest(chosen, "bwd_compute", cluster.ranks) / (UPDATE if gpu else 1),
    }
    matmul, bandwidth = hardware.matmul or 1e12, hardware.memory_bandwidth or 1e12
    dense = 1e3 * operations / (matmul * (MATMUL if gpu else 1))
    parts["dense"] = dense
    parts["dense_all_reduce"] = max(0.0, all_reduce_ms(dense_parameters, cluster) - BACKWARD_SHARE * dense)
    parts["dense_optimizer"] = 1e3 * OPTIMIZER_TRAFFIC * dense_parameters / bandwidth
    if gpu:
        parts["host"] = max(0.0, HOST_MS - sum(parts.values()))
    return parts


def all_reduce_ms(size: float, cluster: Cluster) -> float:
    """A ring's: 2 (W - 1) / W of ``size`` bytes through the slowest link of a rank."""
    if cluster.ranks == 1:
        return 0.0
    hardware = cluster.hardware
    link = (hardware.between or OVER_NETWORK) if cluster.machines > 1 else (hardware.within or OVER_LINK)
    return 1e3 * 2 * (cluster.ranks - 1) / cluster.ranks * size / link


def _slowest(chosen: list[ShardingOption], part: str, ranks: int) -> float:
    times = [0.0] * ranks
    for option in chosen:
        for shard in option.shards:
            times[shard.rank] += getattr(shard.perf, part)
    return max(times)
