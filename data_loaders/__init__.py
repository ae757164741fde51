"""Feeding: Parquet click logs to batches. Knows nothing of models, ranks' process groups or Hydra."""
