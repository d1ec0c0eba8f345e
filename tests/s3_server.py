"""A real S3 server on loopback, moto's, for any test. In the test's file or in conftest.py:

    @pytest.fixture(scope="module")
    def s3():
        with s3_server() as server:
            yield server

Then `server.bucket()` is the URL of a new, empty bucket, and `server.environment` what a process needs in order to reach it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import urllib.request
from typing import Dict, Iterator

import pytest

ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTESTTEST", "wJalrTESTSECRETTESTSECRETTESTSECRETTEST"


class S3Server:
    """`address`: http://127.0.0.1:PORT. `environment`: the variables by which the S3 libraries find it, and nothing else."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.environment: Dict[str, str] = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": address,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        self._numbers = itertools.count()

    def bucket(self) -> str:
        """The URL of a new bucket."""
        name = f"bucket{next(self._numbers)}"
        self.put(name, b"")
        return f"s3://{name}"

    def put(self, path: str, data: bytes) -> None:
        """Write an object (BUCKET/KEY) or make a bucket, past every library and proxy."""
        headers = {"Content-Type": "application/octet-stream", "Authorization": f"AWS {ACCESS_KEY}:unchecked"}
        request = urllib.request.Request(f"{self.address}/{path}", data=data, headers=headers, method="PUT")
        _direct.open(request, timeout=60).close()


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server in a thread, with its environment set in this process. Skips the test where moto or s3fs is missing."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server", reason="moto[s3] with flask is not installed")
    threaded = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    threaded.start()
    host, port = threaded.get_host_and_port()
    server = S3Server(f"http://{host}:{port}")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    threaded.stop()
