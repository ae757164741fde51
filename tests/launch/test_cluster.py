"""What `python -m launch.cluster` renders, and how it refuses: one line for each mistake, before anything is submitted."""

import importlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cluster.command import main
from tests.helpers import tiny

SLURM = ("launch=slurm", "launch.nodes=2", "launch.gpus_per_node=4")
KUBERNETES = ("launch=kubernetes", "launch.nodes=2", "launch.gpus_per_node=4", "launch.volumes.clicks=/mnt/c")
KUBERNETES += ("launch.image=registry.example/click:1",)
TORCHRUN = ("launch=torchrun", "launch.nodes=2", "launch.gpus_per_node=4", "launch.endpoint=node0:29500")
KEPT = "run.dir=/mnt/c/run"
# What three parsers on the way might take for something of theirs: a shell, Kubernetes, torchrun.
AWKWARD = """run.name="a'b $(HOME) $$ `x`\""""


@pytest.fixture
def render(tmp_path, capfd):
    """Exit code, stdout and stderr of a job of the tiny click log."""

    def render(*own, dry_run=True, conf=tiny.CONF):
        job = ["--config-dir", str(conf), *tiny.arguments(tmp_path, "model=deepfm", "device=auto", *own)[2:]]
        code = main([*(["--dry-run"] if dry_run else []), *job])
        return code, *capfd.readouterr()

    return render


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["launch.nodes=2"], "launch= is missing: torchrun, slurm, kubernetes"),
        (["launch=slrum"], "launch=slrum: there is no conf/launch/slrum.yaml (valid: kubernetes, slurm, torchrun)"),
        ([*SLURM, "launch.image=x"], "launch.image is not a known key (valid: cpus_per_node, env,"),
        ([*SLURM, "launch.nodes=two"], "launch.nodes is 'two': expected a whole number"),
        ([*SLURM, "launch.nodes.x=2"], "launch.nodes"),
        ([*SLURM, "launch.nodes=0"], "launch.nodes is 0: give a number from 1"),
        ([*SLURM, "launch.kind=torchrun"], "launch.kind is what launch= chooses"),
        ([*SLURM, "launch.nproc_per_node=5"], "launch.nproc_per_node is 5, launch.gpus_per_node 4: one rank a GPU"),
        (["launch=slurm", "launch.gpus_per_node=0"], "launch.nproc_per_node has no value"),
        ([*SLURM, "launch.env.PET_NNODES=2"], "launch.env.PET_NNODES is no variable"),
        ([*SLURM, "launch.options.requeue=false"], "launch.options.requeue is set by the script"),
        ([*SLURM, "launch.options.mem=1G\nrm -rf x"], "launch.options.mem is no option of sbatch"),
        ([*SLURM, "launch.port=70000"], "launch.port is 70000"),
        ([*SLURM, "launch.setup=['a"], "launch.setup, line 1: "),
        (["launch=torchrun"], "launch.endpoint has no value: launch.endpoint=…"),
        (["launch=torchrun", "launch.endpoint=node0"], "launch.endpoint is 'node0': give HOST:PORT"),
        (["launch=kubernetes"], "launch.image has no value"),
        ([*KUBERNETES], "run folder runs/deepfm-tiny/"),
        ([*KUBERNETES, "launch.volumes.clicks=mnt", KEPT], "launch.volumes.clicks is 'mnt': give the absolute path"),
        ([*KUBERNETES, "launch.name=Run_1", KEPT], "launch.name is 'Run_1'"),
        ([*KUBERNETES, "launch.secrets.KEY=wandb", KEPT], "launch.secrets.KEY is 'wandb': give SECRET/KEY"),
        (
            [*KUBERNETES, "launch.runtime=torch", "launch.max_restarts=1", KEPT],
            "launch.max_restarts and launch.runtime",
        ),
        # The job's own configuration, as clicktrainer train checks it.
        ([*SLURM, "optim.dense.rl=1"], "optim.dense.rl is not a known key"),
        ([*SLURM, "batch_size=7"], "batch_size"),
        (
            ["launch=slurm", "launch.gpus_per_node=0", "launch.nproc_per_node=2", "device=cuda"],
            "device=cuda, but launch.gpus_",
        ),
    ],
)
def test_a_mistake_is_one_line(render, own, said):
    code, printed, message = render(*own)
    assert (code, printed) == (2, "")
    assert message.startswith("error: ") and said in message and message.count("\n") == 1


def test_the_torchrun_command_is_the_same_on_every_machine(render, tmp_path):
    code, printed, _ = render(
        *TORCHRUN, "launch.max_restarts=3", "launch.env.A=b c", AWKWARD, f"run.dir={tmp_path}/run"
    )
    assert code == 0
    words = shlex.split(printed)
    start = words.index(sys.executable)
    assert words[0] == "env" and set(words[1:start]) == {"OMP_NUM_THREADS=1", "TRAINER_GRACE_SECONDS=120", "A=b c"}
    options, trainer = words[start + 1 : words.index("trainer.train") + 1], words[words.index("trainer.train") + 1 :]
    assert options[:2] == ["-m", "torch.distributed.run"] and options[-3:] == ["-m", "launch.rank", "trainer.train"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--max-restarts=3", "--shutdown-timeout=120"} <= set(options)
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=node0:29500"} <= set(options)
    assert AWKWARD.replace("$", "$$") in trainer  # torchrun makes one of two
    assert trainer[-1] == f"run.dir={tmp_path}/run"


def test_a_job_has_its_run_folder_before_it_starts(render):
    _, printed, _ = render(*TORCHRUN, "run.root=/shared/runs")
    assert shlex.split(printed)[-1].startswith("run.dir=/shared/runs/deepfm-tiny/20")


def test_the_batch_script_is_shell_that_keeps_every_argument(render, tmp_path):
    (tmp_path / "launch").mkdir()
    mine = (
        "kind: slurm\noptions: {time: 10:00:00, partition: gpu, exclusive: true}\nsetup: [module load cuda, echo it]\n"
    )
    (tmp_path / "launch" / "mine.yaml").write_text(mine)
    shutil.copytree(tiny.CONF / "data", tmp_path / "data")
    own = ["launch=mine", *SLURM[1:], "launch.cpus_per_node=64", AWKWARD, "run.dir='a b/run'"]
    code, script, _ = render(*own, conf=tmp_path)
    assert code == 0
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    lines = script.splitlines()
    wanted = [
        "nodes=2",
        "gpus-per-node=4",
        "ntasks-per-node=1",
        "cpus-per-task=64",
        "signal=TERM@120",
        "open-mode=append",
    ]
    wanted += ["requeue", "exclusive", "time=10:00:00", "partition=gpu"]
    assert {f"#SBATCH --{option}" for option in wanted} <= set(lines)
    assert "module load cuda" in lines and "export OMP_NUM_THREADS=16" in lines
    # srun and scontrol replaced by functions: what would torchrun have been given?
    fakes = "scontrol() { echo first; echo second; }\nsrun() { printf '%s\\0' \"$@\"; }\n"
    fakes += "SLURM_JOB_NODELIST=x SLURM_JOB_ID=1234567\n"
    body = script[: script.index("code=$?")].replace("module load cuda\n", "")
    words = subprocess.run(["bash", "-c", fakes + body], capture_output=True, text=True).stdout.split("\0")
    assert {"--rdzv-endpoint=first:24567", "--rdzv-id=1234567-0", AWKWARD.replace("$", "$$")} <= set(words)
    assert words[-2] == f"run.dir='{Path.cwd()}/a b/run'"


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(render):
    _, script, _ = render(*SLURM)
    checked = subprocess.run(["shellcheck", "-"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(("own", "program"), [(SLURM, "sbatch"), ((*KUBERNETES, KEPT), "kubectl")])
def test_a_scheduler_that_is_not_there_is_one_line(render, own, program, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, printed, message = render(*own, *([] if KEPT in own else [f"run.dir={tmp_path}/run"]), dry_run=False)
    assert (code, printed) == (2, "")
    assert message == f"error: {program} is not on this machine: run this where it is, or --dry-run to see the job\n"


def test_what_is_submitted_is_what_a_dry_run_shows(render, tmp_path, monkeypatch):
    for name, text in {
        "kubectl": f'cat > "{tmp_path}/got"; echo "$@"; exit 3',
        "sbatch": f'cp "$1" "{tmp_path}/got"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for own, code in (
        ((*KUBERNETES, KEPT, "launch.name=n"), 1),
        ((*SLURM, "launch.name=n", f"run.dir={tmp_path}/run"), 0),
    ):
        _, shown, _ = render(*own)
        assert render(*own, dry_run=False)[0] == code
        assert (tmp_path / "got").read_text() == shown


def schema(manifest):
    """The published model of a manifest's kind, from kubeflow_trainer_api."""
    names = {"TrainJob": "train_job", "TrainingRuntime": "training_runtime"}
    module = importlib.import_module(f"kubeflow_trainer_api.models.trainer_v1alpha1_{names[manifest['kind']]}")
    return getattr(module, f"TrainerV1alpha1{manifest['kind']}")


def validate(manifest):
    """Raises ``ValueError`` for wrong types; what the schema does not know it leaves out."""
    assert schema(manifest).from_dict(manifest).to_dict() == manifest


ALL_KEYS = (
    "launch.namespace=ads",
    "launch.memory=900Gi",
    "launch.cpus_per_node=96",
    "launch.secrets.WANDB_API_KEY=wandb/key",
)
ALL_KEYS += (
    "launch.node_selector.gpu=h100",
    "launch.service_account=trainer",
    "launch.shared_memory=64Gi",
    "launch.grace=300",
)


@pytest.mark.parametrize(
    "own", [(), ("launch.max_restarts=3",), ALL_KEYS, (*ALL_KEYS, "launch.runtime=torch-distributed")]
)
def test_manifests_follow_their_published_schemas(render, own):
    pytest.importorskip("kubeflow_trainer_api", reason="pip install kubeflow_trainer_api")
    code, printed, _ = render(*KUBERNETES, KEPT, *own)
    assert code == 0
    for manifest in yaml.safe_load_all(printed):
        validate(manifest)


def test_a_broken_manifest_is_refused(render):
    pytest.importorskip("kubeflow_trainer_api", reason="pip install kubeflow_trainer_api")
    runtime, job = yaml.safe_load_all(render(*KUBERNETES, KEPT)[1])
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        validate(job)
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["restartpolicy"] = pod.pop("restartPolicy")
    with pytest.raises(AssertionError):
        validate(runtime)


def test_a_train_job_and_its_runtime_hold_what_was_asked_for(render):
    runtime, job = yaml.safe_load_all(render(*KUBERNETES, KEPT, *ALL_KEYS, "launch.max_restarts=3", AWKWARD)[1])
    name = job["metadata"]["name"]
    assert name.startswith("a-b-home-x-20") and job["metadata"]["namespace"] == "ads"
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]} | {
        "name": name
    }
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 4, "registry.example/click:1")
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "4", "cpu": "96", "memory": "900Gi"}
    assert {"name": "OMP_NUM_THREADS", "value": "24"} in trainer["env"]
    secret = {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}}
    assert secret in trainer["env"]
    assert trainer["command"][:3] == ["python", "-m", "torch.distributed.run"] and trainer["command"][-1] == KEPT
    assert AWKWARD.replace("$", "$$$$") in trainer["command"]  # Kubernetes and torchrun each make one of two
    template = runtime["spec"]["template"]["spec"]
    assert template["failurePolicy"]["maxRestarts"] == 3
    pod = template["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 315
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/mnt/c"]]["persistentVolumeClaim"] == {"claimName": "clicks"}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert (pod["nodeSelector"], pod["serviceAccountName"]) == ({"gpu": "h100"}, "trainer")


def test_a_runtime_of_the_cluster_is_patched(render):
    (job,) = yaml.safe_load_all(render(*KUBERNETES, KEPT, "launch.runtime=torch-distributed")[1])
    assert job["spec"]["runtimeRef"] == {"kind": "ClusterTrainingRuntime", "name": "torch-distributed"}
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["volumeMounts"][1] == {"name": "claim-0", "mountPath": "/mnt/c"}
