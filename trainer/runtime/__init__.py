"""A process among others: ranks, signals, watchdog, run folder, restarts."""
