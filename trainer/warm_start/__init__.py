"""A new run that begins with an old run's checkpoint, though features, vocabularies, tables and cluster have changed.

``rules`` are what the user says, ``plan`` decides for every table and dense tensor, new and old (``tables``, ``dense``,
``vocabularies``), ``report`` shows it before anything is trained, and ``plan.apply`` writes into the new run's tensors.
Whatever no rule explains is an error that names the rule that would.
"""
