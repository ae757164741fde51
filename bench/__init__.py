"""Measured comparisons: one command each, sides interleaved in one run, results as JSON in bench/results/."""
