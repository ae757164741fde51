"""Training click-through-rate models with sharded embedding tables."""
