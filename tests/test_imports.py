"""Who may import whom (docs: one direction only), read from the syntax trees without importing anything."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("conf", "data_loaders", "launch", "trainer", "bench", "tests")
DISTRIBUTED = ("torch.distributed", "torchrec.distributed")
CONFIGURATION = ("hydra", "omegaconf")
# What turns a batch into logits and loss, wherever it runs: unit test, sharded, exported.
PURE = ("trainer.kernels", "trainer.modules", "trainer.models")
# The rooms of the trainer, in order (docs/architecture.md): a file imports from its own room and from rooms above it.
ROOMS = (
    "kernels",
    "modules",
    "models",
    "config",
    "runtime",
    "metrics",
    "checkpoint",
    "serve",
    "sharding",
    "optim",
    "warm_start",
    "monitoring",
    "report",
    "run",
)
COMMANDS = (
    "doctor",
    "export",
    "plan",
    "embeddings",
    "evaluate",
    "predict",
    "train",
    "training",
    "api",
)  # above all rooms; none imports another


def imports_of(tree, module, is_package):
    """Full dotted names of everything a module imports; ``from a import b`` gives a.b (b may be a module)."""
    parts = module.split(".") if is_package else module.split(".")[:-1]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{origin}.{alias.name}" for alias in node.names]
    return names


def environment_uses(tree):
    """Lines that read or write the environment: os.environ, os.getenv, os.putenv, from os import environ."""
    found = []
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names and getattr(node.value, "id", "") == "os":
            found.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            found.append(node.lineno)
    return found


def within(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def sources():
    for top in OURS:
        for path in sorted((REPOSITORY / top).rglob("*.py")):
            relative = path.relative_to(REPOSITORY).with_suffix("")
            is_package = relative.name == "__init__"
            module = ".".join(relative.parent.parts if is_package else relative.parts)
            yield module, is_package, ast.parse(path.read_text(), filename=str(path))


SOURCES = list(sources())
IMPORTS = {module: imports_of(tree, module, is_package) for module, is_package, tree in SOURCES}


def room(name):
    """Its number, counted from the ground; None for what is no room."""
    parts = name.split(".")
    return ROOMS.index(parts[1]) if parts[0] == "trainer" and len(parts) > 1 and parts[1] in ROOMS else None


def broken(rule):
    """``module imports name`` for all imports that ``rule(module, name)`` says are forbidden."""
    return [f"{module} imports {name}" for module, names in IMPORTS.items() for name in names if rule(module, name)]


def test_there_is_something_to_check():
    assert {"trainer.train", "data_loaders.schema", "launch.run"} <= set(IMPORTS)
    assert "data_loaders.schema.Schema" in IMPORTS["trainer.models.deepfm"]


def test_data_loaders_import_nothing_of_ours():
    forbidden = (*(top for top in OURS if top != "data_loaders"), *DISTRIBUTED, *CONFIGURATION)
    found = broken(lambda module, name: within(module, ["data_loaders"]) and within(name, forbidden))
    # The edge of prepare's own command line, where YAML becomes dataclasses, and what trainer.config.compose shares.
    edges = tuple(f"data_loaders.{name} imports omegaconf" for name in ("prepare.compose", "configuration"))
    assert [line for line in found if not line.startswith(edges)] == []


def test_the_loader_knows_no_preparation():
    def reaches_up(module, name):
        inside = within(module, ["data_loaders"]) and not within(module, ["data_loaders.prepare"])
        return inside and within(name, ["data_loaders.prepare", "ibis", "duckdb", "pyspark"])

    assert broken(reaches_up) == []


def test_models_know_no_process_groups_and_no_hydra():
    assert broken(lambda module, name: within(module, PURE) and within(name, (*DISTRIBUTED, *CONFIGURATION))) == []


def test_models_know_of_data_only_schema_and_batch():
    allowed = ("data_loaders.schema", "data_loaders.batch", "data_loaders.errors", "data_loaders.messages")
    assert broken(lambda m, n: within(m, PURE) and within(n, ["data_loaders"]) and not within(n, allowed)) == []


def test_rooms_import_from_rooms_above_them():
    def upwards(module, name):
        here, there = room(module), room(name)
        is_command = within(name, [f"trainer.{command}" for command in COMMANDS])
        return here is not None and (is_command or (there is not None and there > here))

    assert broken(upwards) == []


def test_launch_knows_no_model_and_no_training():
    # Configuration, run folders and reports are how a launcher learns what a job wants and what became of it.
    # Of a server it knows which version is served, and the files that workers read.
    served = ("trainer.serve.state", "trainer.serve.versions")
    allowed = ("launch", "data_loaders", "trainer.cli", "trainer.config", "trainer.runtime", "trainer.report", *served)
    assert broken(lambda m, n: within(m, ["launch"]) and within(n, OURS) and not within(n, allowed)) == []


def test_no_circles():
    """Counting imports in functions, too. A package's own modules may be imported by its ``__init__``."""
    graph = {}
    for module, names in IMPORTS.items():
        owners = {name if name in IMPORTS else name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in owners if name in IMPORTS and not within(module, [name])}
    graphlib.TopologicalSorter(graph).prepare()


def test_nothing_imports_what_starts_it():
    assert broken(lambda m, n: within(m, ["trainer", "conf"]) and within(n, ["launch", "bench"])) == []


def test_nothing_imports_tests():
    assert broken(lambda module, name: not within(module, ["tests"]) and within(name, ["tests"])) == []


def test_no_test_module_imports_another():
    """What several need stands in ``tests/helpers``."""

    def is_test(name):
        return any(part.startswith("test_") for part in name.split(".")[:-1])

    assert broken(lambda module, name: within(name, ["tests"]) and is_test(name)) == []


def test_the_environment_is_read_in_two_places():
    found = {
        module: environment_uses(tree)
        for module, _, tree in SOURCES
        if within(module, ["trainer", "data_loaders", "conf"])
        if module not in ("trainer.runtime.distributed", "trainer.runtime.cpu")
    }
    assert {module: lines for module, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.distributed as dist", ["torch.distributed"]),
        ("from torch import distributed", ["torch.distributed"]),
        ("from . import loop", ["trainer.loop"]),
        ("from .models.din import Model", ["trainer.models.din.Model"]),
        ("def f():\n    import hydra", ["hydra"]),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert imports_of(ast.parse(source), "trainer.train", is_package=False) == expected


def test_every_way_to_the_environment_is_seen():
    source = "import os\nos.environ['A']\nos.getenv('A')\nfrom os import environ\nx.environ"
    assert environment_uses(ast.parse(source)) == [4, 2, 3]


# Attributes that our code sets on objects of libraries, which offer no other way.
SET_ON_OTHERS = {
    "bench.loader_peers": {"features.labels", "datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN"},  # the peers' settings
    "bench.prepare": {"process.returncode"},  # wait4, unlike Popen.wait, also returns the peak of memory
    "data_loaders.packages": {"sys.excepthook"},  # where Python looks for it
    "data_loaders.prepare.spark_engine": {"session.sparkContext.pythonExec"},  # else only PYSPARK_PYTHON
    "launch.rank": {"sys.argv"},  # of the module that it runs
    "launch.ranks": {"logging.getLogger(name).propagate"},  # logging's own switch: torchrun's agent repeats what we say
    "launch.sweep.space": {"sweep.shuffle"},  # Hydra's; trials have numbers, which a resumed sweep must find again
    "launch.sweep.study": {"self._study.sampler"},  # Optuna's, as its documentation says
    "trainer.export.onnx_head": {"options.intra_op_num_threads"},  # ONNX Runtime has no other way to say it
    "trainer.checkpoint.host_memory": {  # Python's switch: at the end of the process CUDA may be gone
        "weakref.finalize(memory, torch.cuda.cudart().cudaHostUnregister, address).atexit"
    },
    "trainer.optim.dense": {
        "parameter.grad",
        "optimizer.found_inf",
    },  # what torch.optim makes its state by, and skips by
    "trainer.runtime.distributed": {"torch.utils.deterministic.fill_uninitialized_memory"},  # PyTorch's own switch
    "trainer.sharding.shard": {"wrapped.module.forward"},  # for three empty steps, until DDP keeps its buckets
    # What TorchRec and its planner offer no argument for (each reason stands beside the assignment).
    "trainer.sharding.torchrec_internals": {
        "batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen",
        "option.output_dtype",
        "exchange._is_sequence",
        "part.storage",
    },
}
OWN = re.compile(r"(self|cls)\.\w+")


def set_on_others(tree):
    """Every target of an assignment (``=``, ``+=``, ``for``, ``with``, ``del``) that is another object's attribute.
    ``ctx`` is what ``torch.autograd.Function`` gives its methods for that."""
    attributes = [
        ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load)
    ]
    return {name for name in attributes if name.split(".")[0] != "ctx" and not OWN.fullmatch(name)}


def test_no_attribute_is_set_from_outside_its_class():
    checked = [(module, tree) for module, _, tree in SOURCES if not within(module, ["tests"])]
    assert {module: names for module, tree in checked if (names := set_on_others(tree))} == SET_ON_OTHERS


def test_hooks_are_registered_only_for_tables():
    registered = {
        module
        for module, _, tree in SOURCES
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.fullmatch(r"register_\w*hook\w*", node.attr)
        if not within(module, ["tests", "trainer.sharding"])
    }
    assert registered == {"trainer.optim.touched_rows", "bench.train"}


# Imports inside functions, each with its reason; all others stand at the top of their file.
LATE = {
    # Each process measures one library, whose start and memory are not to be another's.
    "bench.loader_peers": {"datasets", "fuxictr", "ray", "torch_rechub"},
    "bench.prepare_peers": {"duckdb", "fuxictr", "numpy", "pandas", "pyarrow", "ray"},
    # Optional packages: the one file that needs them is imported where they are asked for.
    "trainer.export.onnx_head": {"onnx", "onnxruntime"},
    "data_loaders.prepare.engines": {"data_loaders.prepare.spark_engine.SparkEngine"},
    "launch.sweep.command": {"launch.sweep.study"},
    "launch.rank": {"launch.rank", "data_loaders.packages"},  # behind the change of sys.path that makes them ours
    # What is examined may be broken.
    "trainer.doctor.__main__": {"trainer.doctor.gpu"},
    "trainer.doctor.check_install": {"torch", "torchrec"},
    "trainer.doctor.places": {
        "data_loaders.storage.Storage",
        "data_loaders.storage.is_uri",
        "data_loaders.storage.root_name",
        "trainer.checkpoint.direct_file.DirectFile",
    },
    # Seconds to load, which most who import the file do not need.
    "trainer.monitoring.trackers": {"torch"},
    "trainer.predict": {
        "data_loaders.prepare.pipeline.Options",
        "data_loaders.prepare.pipeline.transform",
        "data_loaders.prepare.prepared.Prepared",
        "data_loaders.prepare.progress.Progress",
    },
    "trainer.report.drawing": {"trainer.report.curves", "trainer.report.page", "trainer.report.template"},
}


def late_imports(tree, module, is_package):
    """What is imported inside functions: of ours in full, of others the package."""
    functions = (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    names = {name for function in functions for name in imports_of(function, module, is_package)}
    return {name if within(name, OURS) else name.partition(".")[0] for name in names}


def test_what_is_imported_inside_functions_is_listed_with_its_reason():
    checked = [source for source in SOURCES if not within(source[0], ["tests"])]
    found = {module: late_imports(tree, module, is_package) for module, is_package, tree in checked}
    assert {module: names for module, names in found.items() if names} == LATE
