"""Raw logs -> training-ready Parquet, out of core: ``clicktrainer prepare recipe=criteo input=… output=…``."""
