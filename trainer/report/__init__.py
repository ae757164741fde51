"""``report.html``: a run on one page that needs nothing else. ``record`` and ``table_statistics`` write down what only the run
itself knows; all else draws from the files of the run folder, of a run that is still going on, too."""
