"""Jobs of many machines: the command, the Slurm script or the Kubernetes manifests of one, rendered from ``conf/launch``."""
