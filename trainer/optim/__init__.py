"""Optimizers: embedding tables (in backward), FTRL for the linear part, the dense part, and the one that holds them all."""
