"""Raw logs -> training-ready Parquet, out of core: ``python -m data_loaders.prepare recipe=criteo input=… output=…``."""
