"""SIGKILL at each phase of a commit (failure matrix R3): the newest checkpoint is whole and loads, what is left over is ours
and goes, and the job goes on."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers import warm
from trainer.checkpoint import Reader, clean, committed, newest, verify

# By phase: the newest checkpoint that a job killed there, in its save of step 3, leaves.
PHASES = {
    "before_snapshot": 2,
    "during_write": 2,
    "before_manifest": 2,
    "before_rename": 2,
    "before_fsync": 3,
    "during_prune": 3,
}


def job(folder, first, last, phase=None):
    faults = {"TRAINER_FAULTS": f"step=3,phase={phase},action=kill9"} if phase else {}
    return warm.run(0, "tests.helpers.committing", [folder, first, last], {**os.environ, **faults})


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a job killed at each phase."""
    folders = {phase: tmp_path_factory.mktemp(phase) for phase in PHASES}
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda phase: job(folders[phase], 1, 5, phase), PHASES))
    assert [done.returncode for done in ended] == [-9] * len(PHASES), [done.stderr for done in ended]
    return folders


@pytest.mark.parametrize("phase", PHASES)
def test_the_newest_checkpoint_is_whole_and_the_job_goes_on(killed, phase):
    folder, step = killed[phase], PHASES[phase]
    path = newest(folder)
    assert path.name == f"step-{step}" and verify(path) is None
    assert Reader(path).read("tables/t/weight").unique().tolist() == [step]
    assert all(verify(other) is None for other in committed(folder))
    clean(folder)
    assert all(entry.name.startswith("step-") for entry in folder.iterdir())
    done = job(folder, step + 1, 4)
    assert done.returncode == 0, done.stderr
    assert [entry.name for entry in committed(folder)] == ["step-4", "step-3"]
