"""Parquet click logs to training batches. Independent of models, process groups and Hydra."""

from data_loaders import packages

if packages.is_program():
    packages.explain_missing()
