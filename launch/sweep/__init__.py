"""Many runs of one job: `launch.run --multirun …`, a grid or an Optuna search. Each trial is a launch.run of its own."""
