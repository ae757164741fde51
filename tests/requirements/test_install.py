"""Installation: when it is quick, when it starts anew, what it says when it fails, which versions pass the check."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.doctor import check_install, pins

REPOSITORY = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("requirements_install", REPOSITORY / "requirements" / "install.py")
installer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(installer)


class Machine:
    """Stands in for pip and venv: keeps the commands, fails where told."""

    def __init__(self, root):
        self.root, self.commands, self.failure, self.settings = root, [], None, {}
        self.python = root / ".venv" / "bin" / "python"

    def run(self, command, folder, quiet=False):
        self.commands.append(" ".join(command[1:]))
        if "venv" in command:
            self.python.parent.mkdir(parents=True)
            self.python.touch()
        if self.failure and self.failure[0] in self.commands[-1]:
            code, errors = self.failure[1:]
            if code is KeyboardInterrupt:
                raise KeyboardInterrupt
            return code, errors
        return 0, ""

    def ensure(self, device=None, torch_index=""):
        self.commands.clear()
        installer.ensure(self.root, device, torch_index)
        return [command.removeprefix("-m ") for command in self.commands]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    folder = tmp_path / "requirements"
    folder.mkdir()
    for file in (REPOSITORY / "requirements").glob("*.txt"):
        (folder / file.name).write_text(file.read_text())
    machine = Machine(tmp_path)
    monkeypatch.setattr(installer, "_run", machine.run)
    monkeypatch.setattr(installer, "_settings", lambda command, folder: machine.settings.get(command[-2], {}))
    return machine


PIP = "pip install --disable-pip-version-check"


def test_a_fresh_machine_gets_torch_first_and_the_engine_without_dependencies(machine):
    environment = machine.root / ".venv"
    assert machine.ensure() == [
        f"venv {environment}",
        "pip --version",
        f"{PIP} -r requirements/cpu.txt",
        f"{PIP} --no-deps -r requirements/cpu-engine.txt",
        f"pip config --site set global.constraint {(environment / 'constraints.txt').as_uri()}",
        "trainer.doctor.check_install --device cpu",
    ]
    constraints = (environment / "constraints.txt").read_text().splitlines()
    assert "torchrec==1.8.0" in constraints and not any(line.startswith(("-", "#")) for line in constraints)
    assert (environment / ".installed").read_text().startswith("cpu ")
    assert not (environment / ".unfinished").exists()


def test_nothing_runs_when_nothing_changed(machine):
    machine.ensure()
    assert machine.ensure() == machine.ensure("cpu") == []


@pytest.mark.parametrize("name", ["common.txt", "cpu.txt", "cpu-engine.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(machine, name):
    machine.ensure()
    with open(machine.root / "requirements" / name, "a") as file:
        file.write("tqdm\n")
    assert machine.ensure()[0] == "pip --version"
    assert machine.ensure() == []


def test_an_environment_is_kept_where_pip_fails_to_change_it(machine):
    machine.ensure("cuda")
    with open(machine.root / "requirements" / "common.txt", "a") as file:
        file.write("tqdm==1\n")
    machine.failure = ("cuda.txt", 1, "no network")
    for _ in range(2):
        with pytest.raises(installer.InstallError):
            machine.ensure()
        assert machine.commands[0] == "-m pip --version", "neither made anew nor of another device"
    machine.failure = None
    assert "trainer.doctor.check_install --device cuda" in machine.ensure()


def test_the_other_device_gets_a_new_environment_and_is_remembered(machine):
    machine.ensure()
    (machine.root / ".venv" / "left-over").touch()
    assert f"{PIP} -r requirements/cuda.txt" in machine.ensure("cuda")
    assert not (machine.root / ".venv" / "left-over").exists()
    assert machine.ensure() == [], "without DEVICE the installed one stays"


@pytest.mark.parametrize("step", ["venv", "cpu.txt", "cpu-engine.txt"])
def test_an_interrupted_installation_starts_anew(machine, step):
    machine.failure = (step, KeyboardInterrupt, "")
    with pytest.raises(KeyboardInterrupt):
        machine.ensure()
    (machine.root / ".venv" / "half").touch()
    machine.failure = None
    assert machine.ensure()[0].startswith("venv ")
    assert not (machine.root / ".venv" / "half").exists()
    assert machine.ensure() == []


@pytest.mark.parametrize("end", [(KeyboardInterrupt, ""), (1, "error: GPU 0 cannot be used")])
def test_what_is_installed_but_did_not_pass_the_check_is_only_checked_again(machine, end):
    machine.failure = ("check_install", *end)
    for _ in range(2):
        with pytest.raises((KeyboardInterrupt, installer.InstallError)):
            machine.ensure()
    assert machine.commands == ["-m trainer.doctor.check_install --device cpu"]
    machine.failure = None
    assert machine.ensure() == ["trainer.doctor.check_install --device cpu"]
    assert machine.ensure() == []


def test_without_a_driver_it_is_installed_and_checked_where_there_is_one(machine, monkeypatch):
    """A docker build, a login node: nothing is installed anew, and nothing checked, until there is a driver."""
    drivers = []
    monkeypatch.setattr(installer.gpus, "has_driver", lambda: bool(drivers))
    machine.failure = ("check_install", installer.NOT_CHECKED, "")
    assert "trainer.doctor.check_install --device cuda" in machine.ensure("cuda")
    assert machine.ensure() == [] and not (machine.root / ".venv" / ".unfinished").exists()
    drivers.append("580")
    machine.failure = None
    assert machine.ensure() == ["trainer.doctor.check_install --device cuda"]
    assert machine.ensure() == []


def test_a_version_that_something_else_has_installed_is_put_right(machine, capsys):
    machine.ensure()
    environment = machine.root / ".venv"
    (environment / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    metadata = environment / "lib" / "python3.11" / "site-packages"
    pinned = installer.pins.pins(installer._requirements(machine.root, "cpu"), (3, 11))
    for name, version in pinned.items():
        (metadata / f"{name.replace('-', '_')}-{version}.dist-info").mkdir(parents=True)
    assert machine.ensure() == [], "all is as it is pinned"
    folder = next(metadata.glob("pyarrow-2*"))
    folder.rename(metadata / "pyarrow-25.0.0.dist-info")
    assert f"{PIP} -r requirements/cpu.txt" in machine.ensure()
    assert f"pyarrow is 25.0.0 (pinned: {pinned['pyarrow']})" in capsys.readouterr().out
    (metadata / "pyarrow-25.0.0.dist-info").rmdir()
    assert f"{PIP} -r requirements/cpu.txt" in machine.ensure(), "or removed"


def test_constraints_of_the_machines_own_hold_beside_ours(machine):
    machine.settings = {
        "--global": {"global.constraint": "/etc/pip/a.txt", "install.constraint": "/etc/pip/b.txt /etc/pip/c.txt"},
        "--user": {"global.constraint": "~/mine.txt"},
    }
    ours = (machine.root / ".venv" / "constraints.txt").as_uri()
    assert [command for command in machine.ensure() if "config" in command] == [
        f"pip config --site set global.constraint ~/mine.txt {ours}",
        f"pip config --site set install.constraint /etc/pip/b.txt /etc/pip/c.txt {ours}",
    ]


def test_pins_are_those_of_the_python_and_the_platform():
    files = [REPOSITORY / "requirements" / "cpu.txt"]
    assert pins.pins(files, (3, 10), "linux")["numpy"].startswith("2.2.")
    assert pins.pins(files, (3, 13), "linux")["torch"].endswith("+cpu")
    assert not pins.pins(files, (3, 13), "darwin")["torch"].endswith("+cpu")
    assert pins.changed({"torch": "2.13.0"}, {"torch": {"2.13.0+cu130"}}) == []
    assert pins.changed({"torch": "2.13.0+cpu", "x": "1"}, {"torch": {"2.13.0"}}) == [
        "torch is 2.13.0 (pinned: 2.13.0+cpu)",
        "x is not installed (pinned: 1)",
    ]


def test_an_environment_from_elsewhere_is_used_and_never_deleted(machine):
    machine.python.parent.mkdir(parents=True)
    machine.python.touch()
    theirs = machine.root / ".venv" / "theirs"
    theirs.touch()
    machine.failure = ("cpu-engine", KeyboardInterrupt, "")
    with pytest.raises(KeyboardInterrupt):
        machine.ensure()
    machine.failure = None
    assert machine.ensure()[0] == "pip --version"
    assert theirs.exists() and not (machine.root / ".venv" / "constraints.txt").exists()


def test_a_folder_in_the_way_is_not_deleted(machine):
    (machine.root / ".venv").mkdir()
    with pytest.raises(installer.InstallError, match="move it away"):
        machine.ensure()
    assert (machine.root / ".venv").exists()


def test_torch_index_is_handed_to_pip(machine):
    commands = machine.ensure(torch_index="https://index.invalid/cpu")
    assert f"{PIP} --extra-index-url https://index.invalid/cpu -r requirements/cpu.txt" in commands


def test_no_torch_says_where_to_find_one(machine):
    machine.failure = ("cpu.txt", 1, "ERROR: No matching distribution found for torch==2.13.0+cpu\n")
    with pytest.raises(installer.InstallError) as error:
        machine.ensure()
    assert "no torch==2.13.0+cpu" in str(error.value)
    assert "make setup DEVICE=cpu TORCH_INDEX=<address>" in str(error.value)


@pytest.mark.parametrize(
    ("errors", "remedy"),
    [
        ("ERROR: No matching distribution found for torchmetrics==1.0.3", "found no torchmetrics==1.0.3"),
        ("error: command 'x86_64-linux-gnu-gcc' failed: No such file or directory", "build-essential"),
        ("ERROR: Could not install packages due to an OSError: No space left on device", "mend that and run"),
    ],
)
def test_other_failures_of_pip_say_what_to_do(errors, remedy):
    assert remedy in installer.explain(errors, "cpu")


def test_no_venv_module_names_the_package_to_install(machine, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else real(name))
    with pytest.raises(installer.InstallError, match=r"ensurepip are missing[\s\S]*apt install python3-venv"):
        machine.ensure()


def test_make_names_the_pythons_that_are_too_old(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.8.19; fi\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.10 or newer is needed" in done.stderr and "Python 3.8.19" in done.stderr


def test_requirements_pin_one_version_of_everything_for_each_python():
    from packaging.requirements import Requirement

    for python in ("3.10", "3.11", "3.12", "3.13"):
        for platform in ("linux", "darwin"):
            environment = {"python_version": python, "sys_platform": platform}
            for device, steps in installer.STEPS.items():
                names = [a.removeprefix("requirements/") for step in steps for a in step if a.endswith(".txt")]
                lines = [line for name in [*names, "common.txt"] for line in _lines(name)]
                wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate(environment)]
                pinned = [r.name.lower() for r in wanted]
                assert len(pinned) == len(set(pinned)), f"twice, for {device} and Python {python}"
                assert all(str(r.specifier).count("==") == 1 for r in wanted)
                assert {"torch", "torchrec", "fbgemm-gpu" if device == "cuda" else "fbgemm-gpu-cpu"} <= set(pinned)


def test_no_cpu_requirement_admits_a_cuda_build_on_linux_and_no_cuda_one_a_cpu_build():
    from packaging.requirements import Requirement

    (cpu,) = (r for r in map(Requirement, _lines("cpu.txt")) if r.marker.evaluate({"sys_platform": "linux"}))
    assert cpu.specifier.contains("2.13.0+cpu")
    assert not any(cpu.specifier.contains(v) for v in ("2.13.0", "2.13.0+cu130"))
    (cuda,) = (r for r in map(Requirement, _lines("cuda.txt")) if r.name == "torch")
    assert cuda.specifier.contains("2.13.0") and cuda.specifier.contains("2.13.0+cu130")
    assert not cuda.specifier.contains("2.13.0+cpu")


def _lines(name):
    text = (REPOSITORY / "requirements" / name).read_text()
    return [line for line in re.sub(r"#.*", "", text).splitlines() if line.strip() and not line.startswith("-r")]


CPU = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
CUDA = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}
OLDER = {"torch": "2.11.0+cu130", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0"}


@pytest.mark.parametrize(("device", "versions"), [("cpu", CPU), ("cuda", CUDA), ("cuda", OLDER), (None, OLDER)])
def test_versions_that_belong_together(device, versions):
    assert check_install.check_versions(device, versions.get) is None


@pytest.mark.parametrize(
    ("device", "versions", "problem"),
    [
        ("cpu", {**CPU, "fbgemm-gpu-cpu": "1.9.0"}, r"fbgemm 1\.9 do not belong together \(known: torch 2\.13"),
        ("cpu", {**CPU, "torch": "2.11.0+cpu"}, "do not belong together"),
        ("cpu", {**CPU, "fbgemm-gpu": "1.8.0"}, "both fbgemm-gpu and fbgemm-gpu-cpu"),
        ("cpu", {"torch": "2.13.0+cpu"}, "torchrec and fbgemm-gpu not installed"),
        ("cpu", CUDA, "fbgemm-gpu is the CUDA build"),
        ("cuda", CPU, "cannot compute on GPUs"),
    ],
)
def test_versions_that_do_not_belong_together(device, versions, problem):
    found = check_install.check_versions(device, versions.get)
    assert re.search(problem, found.message) and "run `make clean setup`" in found.remedy


def test_a_cuda_torch_in_a_cpu_installation_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "is a CUDA build in a CPU installation" in check_install.check_build("cpu").message
    monkeypatch.setattr(torch.version, "cuda", None)
    assert check_install.check_build("cpu") is None
    assert "TORCH_INDEX" in check_install.check_build("cuda").remedy


def test_a_library_that_does_not_load_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)  # import raises ImportError
    assert "fbgemm_gpu does not load" in check_install.check_imports("cpu").message


def test_without_a_driver_nothing_of_cuda_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(check_install, "version", lambda name: CUDA.get(name))
    monkeypatch.setattr(check_install.gpus, "DRIVER_LIBRARY", "libnot-here.so.1")
    for check in ("check_versions", "check_build"):
        monkeypatch.setattr(check_install, check, lambda device: None)
    monkeypatch.setattr(check_install, "check_requirements", lambda: [])
    monkeypatch.setattr(check_install, "check_imports", lambda device: pytest.fail("was loaded"))
    monkeypatch.setattr(sys, "argv", ["check_install", "--device", "cuda"])
    assert check_install.main() == check_install.NOT_CHECKED
    assert "warn  installation: not checked" in capsys.readouterr().out


@pytest.mark.parametrize(("capability", "problem"), [((9, 0), None), ((7, 5), "T4 has compute capability 7.5")])
def test_a_gpu_without_code_fails_the_check_by_name(monkeypatch, capability, problem):
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    found = check_install.check_gpus("cuda")
    assert found is None if problem is None else problem in found.message
    assert check_install.check_gpus("cpu") is None


def test_the_operators_here_work():
    assert check_install.check_operators("cpu") is None


def test_pip_check_forgives_only_the_cuda_build_and_what_is_not_from_here(monkeypatch):
    def found(output):
        done = subprocess.CompletedProcess([], 1, output)
        monkeypatch.setattr(check_install.subprocess, "run", lambda *_, **__: done)
        return [(each.state, each.message) for each in check_install.check_requirements()]

    assert found("torchrec 1.8.0 requires fbgemm-gpu, which is not installed.\n") == []
    theirs = "mlflow 3.1 has requirement pyarrow<26, but you have pyarrow 26.0.1."
    assert found(f"{theirs}\n") == [("warn", theirs)]
    ours = "torchrec 1.8.0 has requirement torchmetrics==1.0.3, but you have torchmetrics 1.9."
    assert found(f"{ours}\n") == [("fail", ours)]


def system_commands(monkeypatch, environment, found=(), user=0, code=0):
    """The commands that ``ensure_system_packages`` runs on a made-up machine."""
    commands = []

    def run(command, **options):
        commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.delenv("CI", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        installer.shutil, "which", lambda name, path=None: name if name in (*found, "apt-get") else None
    )
    monkeypatch.setattr(installer.os, "geteuid", lambda: user)
    monkeypatch.setattr(installer.subprocess, "run", run)
    installer.ensure_system_packages()
    return commands


def test_ci_gets_the_system_packages_that_are_missing(monkeypatch):
    install = "apt-get -qq install --yes --no-install-recommends"
    found = system_commands(monkeypatch, {"CI": "true"}, found=["slurmctld", "munged"])
    assert found == ["apt-get -qq update", f"{install} chromium"]
    assert system_commands(monkeypatch, {"CI": "true"}, found=["slurmctld", "munged", "chromium"]) == []


def test_nobody_elses_system_is_changed(monkeypatch):
    assert system_commands(monkeypatch, {}) == []
    assert system_commands(monkeypatch, {"CI": "true"}, user=1000) == []


def test_system_packages_that_cannot_be_installed_are_a_note(monkeypatch, capsys):
    assert system_commands(monkeypatch, {"CI": "true"}, code=100) == ["apt-get -qq update"]
    assert "their tests are skipped" in capsys.readouterr().err


def test_the_program_is_that_of_the_folder_that_holds_the_environment(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "rank.py").write_text("import sys\nprint(sys.argv[1:])\n")
    installer.write_command(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / ".venv" / "bin" / "clicktrainer")
    done = subprocess.run([tmp_path / "link", "train", "a b"], capture_output=True, text=True)
    assert done.stdout == "['trainer', 'train', 'a b']\n", done.stderr


def test_without_a_compiler_the_installation_succeeds_and_says_so(monkeypatch, capsys):
    def ensure():
        raise installer.build.BuildError("no C++ compiler")

    monkeypatch.setattr(installer.build, "find", lambda: None)
    monkeypatch.setattr(installer.build, "ensure", ensure)
    installer.compile_kernels()
    assert "note: no compiled kernels: no C++ compiler. Training on CPUs is slower" in capsys.readouterr().err
