"""``report.html``: a run on one page that needs nothing else; and the comparison of runs. ``run_record`` reads run folders, also
of unfinished runs; ``record`` and ``table_statistics`` write what only the running job knows."""
