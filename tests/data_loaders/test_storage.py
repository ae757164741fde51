"""Names, globs and retries of storage, against this machine's own files; an object store, against a real S3 server."""

import errno
import glob
import logging
import os
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from data_loaders import storage
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Feature, Schema, Table
from data_loaders.storage import (
    ATTEMPTS,
    Stat,
    Storage,
    StorageError,
    full_name,
    is_transient,
    path_name,
    relative_name,
    root_name,
)
from tests.helpers.flaky import Flaky

NAMES = (
    "a.parquet",
    "b/day=1/p.parquet",
    "b/day=2/p.parquet",
    "b/deep/er/q.parquet",
    "b/q [1].parquet",
    "b/.h/x.parquet",
)


@pytest.fixture
def tree(tmp_path):
    for name in (*NAMES, "b/_SUCCESS", "b/.hidden.parquet", "b/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.0)


# Names


def test_names_of_roots():
    here = os.getcwd()
    for root, expected in (
        (".", here),
        ("/a/../b/", "/b"),
        ("file:///a%20b/c", "/a b/c"),
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/", "s3://bucket"),
        ("s3://bucket/a//b/?endpoint_override=http%3A//localhost:9000&scheme=http", "s3://bucket/a/b"),
        ("memory://a/b%20c", "memory://a/b%20c"),
        ("flaky:///a/b", "flaky:///a/b"),
    ):
        assert root_name(root) == expected
    assert path_name("s3://b/part-?.parquet") == "s3://b/part-?.parquet"


def test_relative_names_and_back():
    for name, root, relative in (
        ("/a/b/c", "/a", "b/c"),
        ("/a/b", "/", "a/b"),
        ("/x/c", "/a", "../x/c"),
        ("s3://b/p/c", "s3://b/p", "c"),
        ("s3://b/pp/c", "s3://b/p", "s3://b/pp/c"),
        ("s3://b/p/c", "/a", "s3://b/p/c"),
        ("/a/c", "s3://b", "/a/c"),
    ):
        assert relative_name(name, root) == relative
        assert full_name(relative, root) == name


@pytest.mark.parametrize(
    "root",
    [
        "s3://AKIA:hunter2@bucket/x",
        "s3://AKIA:hun/ter2@bucket",
        "hdfs://me:hunter2@name:8020/x",
        "abfs://c@a.dfs.core.windows.net/x?account_key=hunter2",
        "s3://bucket?secret_key=hunter2",
        "abfs://c@a.dfs.core.windows.net?sas_token=hunter2",
    ],
)
def test_credentials_are_refused_and_not_shown(root):
    with pytest.raises(ValueError, match="holds credentials .*AWS_ACCESS_KEY_ID") as caught:
        Storage(root)
    assert "hun" not in str(caught.value)
    with pytest.raises(ValueError, match="holds credentials"):
        Storage("s3://AKIA:hunter2@bucket")


def test_schemes_that_cannot_be_opened():
    with pytest.raises(ValueError, match=r"'nope://x' cannot be opened .*: use a local path, s3://.* pip install"):
        Storage("nope://x/y")
    with pytest.raises(
        ValueError, match=r"'s3://bucket' cannot be opened .*query parameter.*'colour'.*correct the address"
    ):
        Storage("s3://bucket/x?colour=red")
    fsspec.register_implementation("absent", "package_that_is_not_here.Files", errtxt="get it", clobber=True)
    with pytest.raises(
        ValueError, match=r"absent:// needs a package that is not here: pip install package_that_is_not_here"
    ):
        Storage("absent://x")


def test_a_root_s_options_reach_a_plug_in():
    place = Storage("flaky:///tmp?colour=red")
    mount, path = place._mount("flaky:///tmp/x")
    plug_in = mount.filesystem.handler.fs
    assert plug_in.colour == "red" and path == "/tmp/x"
    assert not plug_in.dircache.use_listings_cache  # it would hide changes


# Files, folders, globs


def expanded(place, *paths):
    return [relative_name(stat.name, place.root) for stat in place.expand(paths)]


PATTERNS = (
    "*.parquet",
    "b/*/*.parquet",
    "**/*.parquet",
    "b/**",
    "b/day=[12]/p.parquet",
    "**/day=?/*",
    "b/.*/*",
    "b/**/er/*",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_globs_mean_the_same_everywhere(tree, pattern):
    matched = (os.path.join(tree, name) for name in glob.glob(pattern, root_dir=tree, recursive=True))
    expected = sorted(os.path.relpath(name, tree) for name in matched if os.path.isfile(name))
    assert expected
    assert expanded(Storage(str(tree)), pattern) == expected
    assert expanded(Storage(f"flaky://{tree}"), pattern) == expected


def test_a_glob_of_folders_means_what_lies_below_them(tmp_path):
    for name in ("day=1/hour=1/a.parquet", "day=1/b.parquet", "day=2/c.parquet", "day=2/notes.txt", "other/d.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    expected = ["day=1/b.parquet", "day=1/hour=1/a.parquet", "day=2/c.parquet"]
    for place in (Storage(str(tmp_path)), Storage(f"flaky://{tmp_path}")):
        assert expanded(place, "day=*") == expected
        assert expanded(place, "day=[2]") == expected[2:]


def test_files_and_folders_mean_the_same_everywhere(tree):
    for paths in (["."], ["b"], ["a.parquet", "b/q [1].parquet", "."], [str(tree / "a.parquet")], ["./b/../a.parquet"]):
        expected = expanded(Storage(str(tree)), *paths)
        there = [path.replace(str(tree), f"flaky://{tree}") for path in paths]
        assert expanded(Storage(f"flaky://{tree}"), *there) == expected and len(set(expected)) == len(expected)
    assert sorted(expanded(Storage(str(tree)), ".")) == sorted((*NAMES, "b/.hidden.parquet"))


def test_links_and_what_cannot_be_listed(tree, monkeypatch):
    os.symlink(tree / "a.parquet", tree / "b" / "link.parquet")
    os.symlink(tree, tree / "b" / "circle")
    place = Storage(str(tree))
    assert "b/link.parquet" in expanded(place, "b") and not any("circle" in name for name in expanded(place, "b"))
    os.symlink(tree / "nowhere", tree / "b" / "broken.parquet")
    for path in ("b", "b/*.parquet"):
        with pytest.raises(ValueError, match=r"cannot be read .*A link to nothing.*broken.parquet"):
            place.expand([path])
    refused = PermissionError(errno.EACCES, "Permission denied")

    def walk(folder, onerror):
        onerror(refused)

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(ValueError, match="b' cannot be read .*Permission denied"):
        place.expand(["b"])


def test_paths_elsewhere(tree):
    name = f"flaky://{tree}/a.parquet"
    (stat,) = Storage(str(tree)).expand([name])
    local = os.stat(tree / "a.parquet")
    assert (stat.name, stat.size) == (name, local.st_size)
    assert stat.mtime_ns == pytest.approx(local.st_mtime_ns, abs=1000)
    place = Storage("flaky:///nowhere")
    (stat,) = place.expand([str(tree / "a.parquet")])
    assert (
        stat == place.stat(str(tree / "a.parquet")) == Stat(str(tree / "a.parquet"), local.st_size, local.st_mtime_ns)
    )


def test_a_plug_in_without_mtime_is_asked_for_it():
    memory = fsspec.filesystem("memory")
    memory.pipe("/storage-test/x.parquet", b"abc")
    place = Storage("memory://storage-test")
    (stat,) = place.expand(["."])
    assert (stat.name, stat.size) == ("memory://storage-test/x.parquet", 3) and stat.mtime_ns > 0
    assert place.stat(stat.name) == stat
    with place.open(stat.name) as file:
        assert file.read() == b"abc"


@pytest.mark.parametrize("scheme", ["", "flaky://"])
def test_paths_without_files(tree, scheme):
    (tree / "empty").mkdir()
    place = Storage(f"{scheme}{tree}")
    for path, message in (
        ("absent", "path does not exist: '.*absent'"),
        ("absent-*", "glob matches no file: '.*absent-"),
        ("empty", "empty' holds no \\*.parquet file"),
    ):
        with pytest.raises(ValueError, match=message):
            place.expand([path])
    with pytest.raises(FileNotFoundError, match="absent"):
        place.stat(f"{scheme}{tree}/absent")


# Retries


def failing(*errors):
    left = list(errors)

    def work():
        if left:
            raise left.pop(0)
        return "done"

    return work


def test_what_passes_is_tried_again_and_said_once(tmp_path, caplog):
    place = Storage(str(tmp_path))
    eio = OSError(errno.EIO, "Input/output error")
    with caplog.at_level(logging.WARNING):
        assert place.retries("x").run(failing(eio, eio)) == "done"
        assert place.retries("x").run(failing(TimeoutError("slow"))) == "done"
    assert [record.getMessage() for record in caplog.records] == [
        "'x': trying again after: [Errno 5] Input/output error (said once per file)"
    ]
    with pytest.raises(
        StorageError, match=rf"^here: storage failed {ATTEMPTS} times, the last time with: .*output error"
    ):
        place.retries("x", "here").run(failing(*[eio] * ATTEMPTS))


def test_what_does_not_pass_is_raised_at_once(tmp_path):
    place = Storage(str(tmp_path))
    for error in (FileNotFoundError(2, "gone"), PermissionError(13, "no"), OSError("Corrupt snappy compressed data.")):
        with pytest.raises(type(error)) as caught:
            place.retries("x").run(failing(error))
        assert caught.value is error


def test_errors_of_object_stores_are_told_apart():
    for text in (
        "When reading: AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate.",
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout was reached",
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
        "AWS Error INTERNAL_FAILURE during GetObject operation: We encountered an internal error",
        "google::cloud::Status(UNAVAILABLE: Retry policy exhausted)",
    ):
        assert is_transient(OSError(text)), text
    for text in (
        "AWS Error ACCESS_DENIED during HeadObject operation: No response body.",
        "AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: The specified bucket does not exist",
        "AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body.",
        "could not verify page integrity, CRC checksum verification failed for page_ordinal 5",
        "Couldn't deserialize thrift: TProtocolException: Invalid data",
        "Unexpected end of stream",
    ):
        assert not is_transient(OSError(text)), text


def test_expanding_tries_again(tree):
    Flaky.fail("ls", 2)
    assert expanded(Storage(f"flaky://{tree}"), "b/day=1") == ["b/day=1/p.parquet"]
    Flaky.fail("ls", 1000)
    with pytest.raises(StorageError, match="b/day=1': storage failed 5 times"):
        Storage(f"flaky://{tree}").expand(["b/day=1"])


# S3

SCHEMA = Schema(
    tables={"id": Table(1000), "day": Table(40), "where": Table(50)},
    features={
        "id": Feature("sparse", table="id"),
        "day": Feature("sparse", table="day", on_null="missing"),
        "where": Feature("sparse", table="where", ids="hash", column="geo.city"),
    },
)
COLUMNS = ["label", *SCHEMA.columns(SCHEMA.layout())]
FILES = {
    "day=3/a.parquet": 0,
    "day=3/b c.parquet": 40,
    "day=17/a.parquet": 80,
    "day=__HIVE_DEFAULT_PARTITION__/a.parquet": 120,
}


def click_table(first):
    ids = list(range(first, first + 40))
    geo = pa.array([None if i % 7 == 0 else {"city": f"city {i % 5}"} for i in ids], pa.struct([("city", pa.string())]))
    return pa.table({"label": [i % 2 for i in ids], "id": ids, "geo": geo})


def write_clicks(filesystem, folder):
    for name, first in FILES.items():
        filesystem.create_dir(os.path.dirname(f"{folder}/{name}"))
        pq.write_table(click_table(first), f"{folder}/{name}", filesystem=filesystem, row_group_size=11)


@pytest.fixture(scope="module")
def s3():
    """The options of a root on an S3 server that runs in this process, and its file system."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("EC2_METADATA_DISABLED", "true")):
            patch.setenv(f"AWS_{name}", value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        filesystem = fs.S3FileSystem(
            endpoint_override=f"http://{host}:{port}", region="us-east-1", allow_bucket_creation=True
        )
        filesystem.create_dir("clicks")
        write_clicks(filesystem, "clicks/some log/train")
        yield f"endpoint_override={quote(f'http://{host}:{port}', safe='/')}&scheme=http", filesystem
        server.stop()


def batches(manifest, **changes):
    given = {"batch_size": 16, "shards": 4, "shuffle": True, "shuffle_rows": 64, "threads": 2, "prefetch_batches": 2}
    layout = SCHEMA.layout()
    loader = Loader(manifest, SCHEMA, layout, rank=0, world_size=1, seed=5, **{**given, **changes})
    return [
        (
            batch.labels.tolist(),
            *([batch.sparse[key].values().tolist(), batch.sparse[key].lengths().tolist()] for key in layout.pooled),
        )
        for batch in loader.epoch(0)
    ]


def test_a_bucket_is_read_like_a_folder(s3, tmp_path):
    options, _ = s3
    write_clicks(fs.LocalFileSystem(), f"{tmp_path}/some log/train")
    here, there = str(tmp_path / "some log"), f"s3://clicks/some log?{options}"
    expected = Manifest.scan(["train"], here, COLUMNS)
    assert expected.num_rows == 160
    for paths in (["train"], ["train/**/*.parquet"], ["train/day=*/?*.parquet"], ["s3://clicks/some log/train"]):
        manifest = Manifest.scan(paths, there, COLUMNS)
        assert manifest.fingerprint == expected.fingerprint  # the same paths, sizes, footers
        assert manifest.files[0].path.startswith("s3://clicks/some log/train/day=")
        assert all(file.mtime_ns > 0 for file in manifest.files)
    assert batches(manifest) == batches(expected)
    assert batches(manifest, shuffle=False) == batches(expected, shuffle=False)


def test_large_row_groups_of_a_bucket_are_streamed(s3, monkeypatch):
    options, filesystem = s3
    ids = pa.array(range(1000)).take(pa.array([i * 7919 % 1000 for i in range(200_000)]))
    table = pa.table({"label": pa.array([0] * len(ids)), "id": ids, "geo": pa.array([{"city": "x"}] * len(ids))})
    filesystem.create_dir("clicks/large/day=1")
    pq.write_table(table, "clicks/large/day=1/a.parquet", filesystem=filesystem, use_dictionary=False)
    manifest = Manifest.scan(["."], f"s3://clicks/large?{options}", COLUMNS)
    whole = batches(manifest, batch_size=4096)
    monkeypatch.setattr("data_loaders.reader.REMOTE_BYTES", 1 << 17)
    assert batches(manifest, batch_size=4096) == whole and len(whole) == 49


def test_a_bucket_by_the_environment_s_endpoint(s3, monkeypatch):
    options, _ = s3
    endpoint = options.split("&")[0].partition("=")[2].replace("%3A", ":")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    manifest = Manifest.scan(["s3://clicks/some log/train/day=3/*"], ".", COLUMNS)
    assert manifest.num_rows == 80


def test_missing_buckets_and_prefixes(s3):
    options, _ = s3
    for root, path, message in (
        ("s3://nobody", ".", "data path does not exist: 's3://nobody'"),
        ("s3://clicks/nothing", "x/*.parquet", "data glob matches no file: 's3://clicks/nothing/x/"),
        ("s3://clicks", "absent/x.parquet", "data path does not exist: 's3://clicks/absent/x.parquet'"),
    ):
        with pytest.raises(ValueError, match=message):
            Manifest.scan([path], f"{root}?{options}", COLUMNS)
    with pytest.raises(ValueError, match=r"options after '\?' belong in data.root"):
        Storage(f"s3://clicks?{options}").expand([f"s3://clicks/x?{options}"])


def test_objects_replaced_or_deleted_in_mid_run(s3):
    options, filesystem = s3
    write_clicks(filesystem, "clicks/changing")
    manifest = Manifest.scan(["."], f"s3://clicks/changing?{options}", COLUMNS)
    pq.write_table(click_table(500), "clicks/changing/day=17/a.parquet", filesystem=filesystem, row_group_size=11)
    message = r"data file 's3://clicks/changing/day=17/a.parquet' has changed since it was scanned"
    with pytest.raises(ValueError, match=message):
        batches(manifest)
    filesystem.delete_file("clicks/changing/day=17/a.parquet")
    with pytest.raises(StorageError, match=r"day=17/a.parquet', row group \d: No such file any more"):
        batches(manifest)


def test_a_server_that_stopped(monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 1)  # pyarrow has its own below, of six seconds
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(StorageError, match="s3://clicks/x': storage failed 1 times.*NETWORK_CONNECTION"):
        Storage("s3://clicks?endpoint_override=http%3A//127.0.0.1:1&scheme=http").expand(["x"])
