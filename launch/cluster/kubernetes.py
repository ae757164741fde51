"""Manifests for Kubeflow's Trainer (`trainer.kubeflow.org/v1alpha1`): a TrainJob, and unless it names a runtime of the cluster's,
a TrainingRuntime of its own, whose JobSet starts all pods again when one fails.

The Trainer gives each pod PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, which torchrun takes for its options.
A pod that is evicted or preempted fails its Job for a reason of its own, by which the JobSet knows it from a crash: such a
restart is not counted. API: https://www.kubeflow.org/docs/components/trainer/, https://jobset.sigs.k8s.io/docs/.
"""

from typing import Any

from launch.cluster.job import Job, environment, torchrun, worker
from launch.cluster.options import Kubernetes

API = "trainer.kubeflow.org/v1alpha1"
NODE = "node"  # the Trainer's name for replicated job and container
MANAGER = "clicktrainer/launch"
SHARED_MEMORY = "shared-memory"
MARGIN_SECONDS = 15  # from the last rank's end to the pod's
EVICTED = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
NOT_COUNTED = {
    "name": "evicted",
    "action": "RestartJobSetAndIgnoreMaxRestarts",
    "onJobFailureReasons": ["PodFailurePolicy"],
}


def manifests(config: Kubernetes, job: Job) -> list[dict[str, Any]]:
    """In the order they are to be created."""
    return [*([] if config.runtime else [runtime(config, job)]), train_job(config, job)]


def train_job(config: Kubernetes, job: Job) -> dict[str, Any]:
    reference = {"kind": "ClusterTrainingRuntime", "name": config.runtime}
    own = {"kind": "TrainingRuntime", "name": job.name}
    command = [*torchrun(config, "python"), f"--rdzv-id={job.name}", *worker(job.arguments)]
    trainer = {
        "image": config.image,
        "numNodes": config.nodes,
        "numProcPerNode": config.ranks_per_node,
        "command": [literal(part) for part in command],
        "env": variables(config),
        "resourcesPerNode": resources(config),
    }
    spec = {"runtimeRef": reference if config.runtime else own, "trainer": trainer}
    if config.runtime:
        pod = {**pod_spec(config), "containers": [{"name": NODE, "volumeMounts": mounts(config)}]}
        patch = {"spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}]}}
        spec["runtimePatches"] = [{"manager": MANAGER, "trainingRuntimeSpec": {"template": patch}}]
    return {"apiVersion": API, "kind": "TrainJob", "metadata": metadata(config, job), "spec": spec}


def runtime(config: Kubernetes, job: Job) -> dict[str, Any]:
    container = {"name": NODE, "image": config.image, "volumeMounts": mounts(config)}
    pod = {**pod_spec(config), "restartPolicy": "Never", "containers": [container]}
    node = {
        "name": NODE,
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            # A pod alone cannot start again: the other ones' ranks have ended, too.
            "spec": {"backoffLimit": 0, "podFailurePolicy": {"rules": [EVICTED]}, "template": {"spec": pod}},
        },
    }
    failures = {"maxRestarts": config.max_restarts, "rules": [NOT_COUNTED]}
    spec = {
        "mlPolicy": {"numNodes": config.nodes, "torch": {}},
        "template": {"spec": {"failurePolicy": failures, "replicatedJobs": [node]}},
    }
    return {"apiVersion": API, "kind": "TrainingRuntime", "metadata": metadata(config, job), "spec": spec}


def metadata(config: Kubernetes, job: Job) -> dict[str, Any]:
    return {"name": job.name, **({"namespace": config.namespace} if config.namespace else {})}


def pod_spec(config: Kubernetes) -> dict[str, Any]:
    """What may be patched into a runtime of the cluster's, too."""
    claims = [{"name": f"claim-{n}", "persistentVolumeClaim": {"claimName": c}} for n, c in enumerate(config.volumes)]
    shared = {"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}}
    return {
        "terminationGracePeriodSeconds": config.grace + MARGIN_SECONDS,
        "volumes": [shared, *claims],
        **({"nodeSelector": dict(config.node_selector)} if config.node_selector else {}),
        **({"serviceAccountName": config.service_account} if config.service_account else {}),
    }


def mounts(config: Kubernetes) -> list[dict[str, str]]:
    claims = [{"name": f"claim-{number}", "mountPath": path} for number, path in enumerate(config.volumes.values())]
    return [{"name": SHARED_MEMORY, "mountPath": "/dev/shm"}, *claims]


def resources(config: Kubernetes) -> dict[str, dict[str, str]]:
    wanted = {
        **({"nvidia.com/gpu": str(config.gpus_per_node)} if config.gpus_per_node else {}),
        **({"cpu": str(config.cpus_per_node)} if config.cpus_per_node else {}),
        **({"memory": config.memory} if config.memory else {}),
    }
    return {"requests": dict(wanted), "limits": wanted}


def variables(config: Kubernetes) -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = [
        {"name": name, "value": literal(value)} for name, value in environment(config).items()
    ]
    for name, text in config.secrets.items():
        secret, _, key = text.partition("/")
        plain.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return plain


def literal(text: str) -> str:
    """Kubernetes puts variables in place of $(NAME), and $ in place of $$."""
    return text.replace("$", "$$")
