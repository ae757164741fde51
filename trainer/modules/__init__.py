"""Layers: tensors in, tensors out. No process groups, no configuration."""
