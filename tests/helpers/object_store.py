"""An S3 server in this process, for tests: other processes reach it by the address that ``serve`` gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

BUCKET = "models"


@contextmanager
def serve() -> Iterator[tuple[str, fs.S3FileSystem]]:
    """The options of addresses on it (``s3://models/…?<options>``), and its file system; the credentials are in the
    environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("EC2_METADATA_DISABLED", "true")):
            patch.setenv(f"AWS_{name}", value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        filesystem = fs.S3FileSystem(
            endpoint_override=f"http://{host}:{port}", region="us-east-1", allow_bucket_creation=True
        )
        filesystem.create_dir(BUCKET)
        try:
            yield f"endpoint_override={quote(f'http://{host}:{port}', safe='/')}&scheme=http", filesystem
        finally:
            server.stop()
