"""Object stores on this machine: moto's S3 server, with faults, and an emulator of Google's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from runs import free_port

BUCKET = "bucket"
ERROR = "<Error><Code>{code}</Code><Message>{code}, by the test</Message></Error>"
CODES = {403: "AccessDenied", 503: "SlowDown"}


class S3:
    """A server with one bucket; `fault(method, path)` may name a status that is sent instead."""

    scheme = "s3"

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self.port, self.requests = free_port(), []
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.start()
        self.env = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        import boto3

        self._client = boto3.client(
            "s3",
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="tests",
            aws_secret_access_key="tests",
        )
        self._client.create_bucket(Bucket=BUCKET)

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if status := self.fault(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} fault", [("Content-Type", "application/xml")])
            return [ERROR.format(code=CODES[status]).encode()]
        return self._app(environ, start_response)

    def start(self) -> None:
        """The server answers, with what was stored before it stopped."""
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log_request(self, *_):
                pass

        self._server = make_server(
            "127.0.0.1", self.port, self._answer, threaded=True, request_handler=Quiet
        )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def names(self, prefix: str = "") -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [one["Key"] for page in pages for one in page.get("Contents", ())]

    def read(self, name: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=name)


class GCS:
    """gcp-storage-emulator with one bucket, for gcsfs, TensorStore and Google's own client."""

    scheme = "gs"

    def __init__(self):
        from gcp_storage_emulator.handlers import objects
        from gcp_storage_emulator.server import create_server

        objects.download = _with_generation(objects.download)
        port = free_port()
        self._server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
        self._server.start()
        url = f"http://127.0.0.1:{port}"
        self.env = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "tests",
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_CLOUD_PROJECT": "tests",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks by gRPC, without emulation
        }
        import fsspec

        self._fs = fsspec.filesystem(
            "gcs", token="anon", endpoint_url=url, use_listings_cache=False
        )

    def stop(self) -> None:
        self._server.stop()

    def names(self, prefix: str = "") -> list[str]:
        return [name.removeprefix(f"{BUCKET}/") for name in self._fs.find(f"{BUCKET}/{prefix}")]

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(f"{BUCKET}/{name}")

    def delete(self, name: str) -> None:
        self._fs.rm_file(f"{BUCKET}/{name}")


def _with_generation(download):
    """The emulator's handler with the header that Google sends and TensorStore's OCDBT needs."""

    def handler(request, response, storage, *args, **kwargs):
        with contextlib.suppress(Exception):  # the handler says what is wrong
            bucket, name = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(bucket, name)["generation"]
        return download(request, response, storage, *args, **kwargs)

    return handler


@contextlib.contextmanager
def serving(kind: type[S3] | type[GCS]) -> Iterator[S3 | GCS]:
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported
    store = kind()
    try:
        yield store
    finally:
        store.stop()


def url(store: S3 | GCS, name: str) -> str:
    return f"{store.scheme}://{BUCKET}/{name}"


def download(store: S3 | GCS, prefix: str, folder: Path) -> Path:
    """A copy of all objects below `prefix`."""
    for name in store.names(f"{prefix}/"):
        path = folder / name.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(name))
    return folder
