"""``clicktrainer export``: from a run to files that a server reads (``trainer.serve.artifact``), and the proof that they are the
right ones."""
