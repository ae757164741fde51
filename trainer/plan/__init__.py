"""Plan before you rent: what a job would need on a cluster that is not here (``clicktrainer plan``; docs/plan.md)."""
