"""Feeding: Parquet click logs to batches. Knows nothing of models, ranks' process groups or Hydra."""

from data_loaders import packages

if packages.is_program():
    packages.explain_missing()
