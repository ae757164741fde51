"""The configuration: dataclasses by section, and how Hydra's files and a command line become them."""
