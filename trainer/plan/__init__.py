"""Plan before you rent: what a job would need on a cluster that is not here (``python -m trainer.plan``; docs/plan.md)."""
