"""What the commands of `clicktrainer` take (data_loaders.prepare's: there). Nothing here imports PyTorch, so that `--help` and a
mistyped option are answered at once.

One grammar: overrides (`key=value`, `+key=value`, `~key`) and options (`--name value`, `--name=value`), in any order.
"""

import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

PRIMARY = "train"  # of conf/
SPLITS = ("train", "valid", "test")
GRACE_SECONDS = 30  # as torchrun has it
PLAIN = re.compile(r"[\w.-]*/[\w./-]+")  # a path that needs no quotes, and is no number
WHICH_CHECKPOINT = (
    "a checkpoint, such as step-100, or best (default: the best one where checkpoint.restore_best or early_stopping has chosen "
    "it, else the newest)"
)


def train() -> ArgumentParser:
    parser = _parser(
        "train",
        "Trains a model on this machine: one rank a GPU, or two on a CPU.",
        "model=din data=ml1m data.root=/data epochs=2",
        "--config-dir data/shop data=shop optim.dense.lr=3e-4 run.dir=runs/shop",
        "model=deepfm data=synthetic --print-config",
    )
    _add_job(parser)
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and stop")
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep, as clicktrainer sweep")
    _add_ranks(parser)
    return parser


def job() -> ArgumentParser:
    """Of `trainer.train`, which the ranks run."""
    parser = _parser("train", "Trains a model.")
    _add_job(parser)
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and stop")
    return parser


def job_words(options: Namespace, overrides: Sequence[str]) -> list[str]:
    """The command line of a job with other overrides, as ``job`` reads it."""
    folders = [word for folder in options.config_dir for word in ("--config-dir", folder)]
    name = [] if options.config_name == PRIMARY else ["--config-name", options.config_name]
    return [*folders, *name, *overrides]


def quoted(value: str | Path) -> str:
    """A value in Hydra's grammar, whatever characters are in it."""
    text = str(value)
    return text if PLAIN.fullmatch(text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def rank_words(options: Namespace) -> list[str]:
    """How ranks are started, as ``train`` reads it."""
    counts = "--nproc-per-node", options.nproc_per_node, "--max-restarts", str(options.max_restarts)
    return [*counts, "--grace", str(options.grace)]


def sweep() -> ArgumentParser:
    parser = _parser(
        "sweep",
        "Runs one job with many values: a grid, or a search by Optuna (docs/sweeps.md).",
        "model=deepfm,din optim.dense.lr=1e-3,3e-4 data=ml1m data.root=/data",
        "sweep=optuna sweep.trials=40 'optim.dense.lr=tag(log,interval(1e-4,1e-2))' data=ml1m data.root=/data",
    )
    _add_job(parser)
    _add_ranks(parser)
    return parser


def incremental() -> ArgumentParser:
    parser = _parser(
        "incremental",
        "Trains day after day, each day's model initialized from that of the day before.\n\n"
        "output=DIR           the folder of all days' runs\n"
        "data.days=PATTERN    the days, in order of their names: a glob under data.root, or [a,b,c]\n"
        "recipe=NAME          the days are raw logs, to be prepared first (prepare.KEY=VALUE: settings of that)\n"
        "evict=N              with recipe=: ids that N days in a row have not had lose their rows",
        "output=runs/daily data.root=/logs data.days='day-*' recipe=shop.yaml model=deepfm evict=30",
        "output=runs/daily data.days=[mon.parquet,tue.parquet] --config-dir mine data=shop",
    )
    _add_job(parser)
    _add_ranks(parser)
    return parser


def cluster() -> ArgumentParser:
    parser = _parser(
        "cluster",
        "Trains on many machines: submits a job to Slurm or Kubernetes, or prints a torchrun command (docs/clusters.md).",
        "launch=slurm launch.nodes=4 launch.options.partition=gpu model=dcn_v2 data=shop run.root=/shared/runs",
        "launch=kubernetes launch.nodes=2 launch.image=registry.example/clicktrainer:1 data=shop --dry-run",
        "launch=torchrun launch.nodes=2 launch.endpoint=node1:29500 data=shop",
    )
    _add_job(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")
    return parser


def plan() -> ArgumentParser:
    parser = _parser(
        "plan",
        "Says whether a job fits on a cluster, and where its tables go. Exit code 1: it does not fit.",
        "topology=8xH100 model=deepfm data=criteo39",
        "topology=2x8xH200 --config-dir mine data=shop --json",
    )
    _add_job(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw memory by rank into this page (.html)")
    return parser


def evaluate_alone() -> ArgumentParser:
    """Of `trainer.evaluate`, which a rank may be."""
    parser = _parser(
        "evaluate",
        "Evaluates a trained run on any data; prints JSON.",
        "runs/din --split valid",
        "runs/din 'data.test=[other.parquet]' evaluation.group_by=user_id --output metrics.json",
        "runs/din --checkpoint step-100",
    )
    _add_run(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a JSON file for the metrics")
    return parser


def evaluate() -> ArgumentParser:
    return _with_count(evaluate_alone())


def predict() -> ArgumentParser:
    return _with_count(predict_alone())


def count() -> ArgumentParser:
    """The number of ranks alone, beside arguments of another parser's."""
    return _with_count(ArgumentParser(add_help=False, allow_abbrev=False))


def predict_alone() -> ArgumentParser:
    """Of `trainer.predict`, which a rank may be."""
    parser = _parser(
        "predict",
        "Writes click probabilities for Parquet input, in its order of rows.",
        "runs/din --input new.parquet --output predictions.parquet --keep user_id",
        "runs/din --raw --input raw_folder --output predictions.parquet",
    )
    _add_run(parser)
    _add_rows(parser)
    parser.add_argument("--raw", action="store_true", help="--input is a folder of raw files, as prepare takes it")
    parser.add_argument("--memory-limit", default="4GB", help="with --raw: memory for preparing the rows")
    return parser


def export() -> ArgumentParser:
    parser = _parser(
        "export",
        "Writes a trained run as files to serve, and compares their scores with the run's (docs/serving.md).",
        "runs/din --output exports/shop",
        "runs/din --output exports/shop export.tables=int8 --checkpoint best",
    )
    _add_run(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the export folder, which holds all versions"
    )
    parser.add_argument(
        "--no-publish", dest="publish", action="store_false", help="write the version, but leave current.json as it is"
    )
    return parser


def serve() -> ArgumentParser:
    parser = _parser(
        "serve",
        "Answers requests with an exported model over HTTP, and takes over new versions (docs/serving.md).",
        "exports/shop",
        "exports/shop serve.port=8080 serve.workers=4",
    )
    parser.add_argument("export", type=Path, help="export folder; or one version of it, which is then never replaced")
    parser.add_argument("overrides", nargs="*", metavar="serve.KEY=VALUE", help="settings of the server")
    return parser


def serve_score() -> ArgumentParser:
    parser = _parser(
        "serve.score",
        "Scores Parquet input with an exported model, in its order of rows (docs/serving.md).",
        "exports/shop --input new.parquet --output scores.parquet --keep user_id item_id",
    )
    parser.add_argument("export", type=Path, help="export folder, whose published version scores; or one version of it")
    _add_rows(parser)
    return parser


def embeddings() -> ArgumentParser:
    parser = _parser(
        "embeddings",
        "Writes the rows of an embedding table as Parquet, with the values that they belong to (docs/serving.md).",
        "runs/din --table item --output items.parquet",
        "runs/din --table item --output items.parquet --checkpoint step-100 data.prepared=prepared/shop",
    )
    _add_run(parser)
    parser.add_argument("--table", required=True, help="a table of the schema, or a feature that reads it")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the Parquet file to write, or an earlier one of this command's to replace",
    )
    return parser


def doctor() -> ArgumentParser:
    parser = _parser(
        "doctor", "Checks that this machine can train.", "", "--gpu", "--data-root s3://bucket/data --json"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what is to train here (default: what there is)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs go (default: runs)")
    parser.add_argument("--data-root", help="a data.root to be read: a folder or a URI")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the round trip on the CPU (default: 2)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds that any one check may take (default: 120)"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="some minutes on GPUs: all that training needs, and FOLDER/doctor-gpu.json"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def report() -> ArgumentParser:
    parser = _parser("report", "Draws the report of a run from its files.", "runs/din", "runs/din --output din.html")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the run folder")
    return parser


def compare() -> ArgumentParser:
    parser = _parser(
        "compare",
        "Compares runs: what differs in their configurations, their metrics, and the curve of one metric.",
        "runs/deepfm runs/din",
        "runs/sweep-1a2b3c4d/*/ --metric valid.logloss --picture curves.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders")
    parser.add_argument(
        "--metric", default="valid.auc", help="the curve to show: split.name of metrics.jsonl (default: valid.auc)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the curves into this page (.html)")
    return parser


def checkpoint() -> ArgumentParser:
    parser = _parser(
        "checkpoint",
        "Looks into checkpoints; executes nothing. Exit code 1: one is damaged, or two differ.\n\n"
        "inspect PATH    what is in one\n"
        "verify PATH     whether all under PATH are whole\n"
        "diff PATH PATH  how two differ\n\n"
        "PATH is a step-N folder, or a run's folder (the newest is meant), also in an object store: 's3://bucket/…'.",
        "inspect runs/din --json",
        "verify runs/din",
        "diff runs/a runs/b/checkpoints/step-100",
    )
    parser.add_argument("action", choices=("inspect", "verify", "diff"))
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--json", action="store_true", help="with inspect: print JSON")
    return parser


def _parser(command: str, summary: str, *examples: str) -> ArgumentParser:
    lines = "\n".join(f"  clicktrainer {command} {example}".rstrip() for example in examples)
    return ArgumentParser(
        prog=f"clicktrainer {command}",
        description=summary,
        epilog=f"examples:\n{lines}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_job(parser: ArgumentParser) -> None:
    """Of a training job."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="+key=value adds, ~key deletes (docs/keys.md)"
    )
    parser.add_argument(
        "--config-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of your own with data/, model/, experiment/ … beside ours; may be given several times",
    )
    parser.add_argument("--config-name", default=PRIMARY, help="the primary configuration (default: train)")


def _add_ranks(parser: ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", default="auto", help="ranks; auto (default): one a GPU, two on a CPU")
    parser.add_argument("--max-restarts", type=int, default=0, help="restarts after a crash (default: 0)")
    parser.add_argument(
        "--grace",
        type=int,
        default=GRACE_SECONDS,
        help=f"seconds that ranks have to save and end when asked to stop, then they are killed (default: {GRACE_SECONDS})",
    )


def _with_count(parser: ArgumentParser) -> ArgumentParser:
    parser.add_argument(
        "--nproc-per-node", help="ranks, or auto: one a GPU, two on a CPU (default: this process alone)"
    )
    return parser


def _add_rows(parser: ArgumentParser) -> None:
    """To be scored, and where their scores go."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="Parquet files, folders, globs or addresses such as s3://bucket/folder; a label is not needed",
    )
    parser.add_argument(
        "--root",
        default=".",
        help="what --input is relative to, as data.root; the working folder by default. Options of an object store "
        "follow its '?': s3://bucket/folder?endpoint_override=…",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the Parquet file to write, or an earlier one of this command's to replace; 'prediction' is null in rows that the "
        "schema's policies leave out",
    )
    parser.add_argument(
        "--keep", nargs="*", default=[], metavar="COLUMN", help="input columns to copy beside the prediction"
    )


def _add_run(parser: ArgumentParser) -> None:
    """Of a trained run."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run's configuration")
    parser.add_argument("--checkpoint", help=WHICH_CHECKPOINT)
