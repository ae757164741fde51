"""``trainer.train`` that dies: ``-m tests.helpers.killed STEP …`` trains until rank 0 has trained STEP, then ends its
whole tree of
processes, torchrun's agent too, by SIGKILL. Its ledger is written every few rows, not only before checkpoints."""

import functools
import os
import signal
import sys

import psutil

from trainer import training
from trainer.monitoring.metrics_logger import MetricsLogger
from trainer.monitoring.row_log import RowLog
from trainer.run import job


def main() -> None:
    step, arguments = int(sys.argv[1]), sys.argv[2:]
    agent = psutil.Process(os.getppid()) if "RANK" in os.environ else None
    report = MetricsLogger.maybe_report

    def maybe_die(reporter: MetricsLogger, progress) -> None:
        report(reporter, progress)
        if progress.step == step and reporter.ranks.is_first:
            others = [p for p in agent.children(recursive=True) if p.pid != os.getpid()] + [agent] if agent else []
            for process in others:
                process.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsLogger.maybe_report = maybe_die
    job.RowLog = functools.partial(RowLog, flush_rows=150)
    training.main(arguments)


if __name__ == "__main__":
    main()
