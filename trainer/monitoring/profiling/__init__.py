"""Where a step's time goes (``profile=true``; docs/seeing.md): a window of steps under ``torch.profiler``, a trace, an answer."""
