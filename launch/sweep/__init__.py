"""Many runs of one job: `clicktrainer sweep`, a grid or an Optuna search. Each trial is a `clicktrainer train` of its own."""
