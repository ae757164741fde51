"""One paper a file: ``Batch -> logits [B]``.

A file defines a module and names it at the end, ``Model = …``; ``conf/model/<file>.yaml`` holds its hyperparameters.
The constructor is ``(schema, *, <hyperparameters>, device)``, where ``device`` is that of the tables ("meta" before
sharding). The dense part, a ``trainer.modules.Head``, is always built on the CPU and before the tables, so that its
initial values depend on the seed alone. ``layout`` says which features the model reads from which part of the batch.

The training pipeline traces ``forward`` down to the tables: it calls them with attributes of the batch and leaves all
else to the head, which it does not look into.
"""
