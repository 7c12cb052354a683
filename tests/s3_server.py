"""moto's S3 server on this machine, behind a gate that can refuse requests for a while."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileType, S3FileSystem

ACCESS, SECRET = "AKIATESTKEYOFTHISRUN", "kept-to-itself-9f8e7d6c5b4a"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": ACCESS,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "lab"
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class Storage:
    """The server: its address, what was asked of it, and what it refuses."""

    port: int = 0
    refuses: Callable[[str, str], bool] = lambda method, key: False
    """Whether a request (method, key) is answered with 503."""
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, key and status of every answer."""

    def uri(self, path: str) -> str:
        return f"s3://{BUCKET}/{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def system(self, **options: Any) -> S3FileSystem:
        address = {"endpoint_override": f"127.0.0.1:{self.port}", "scheme": "http", "region": "us-east-1"}
        return S3FileSystem(access_key=ACCESS, secret_key=SECRET, **address, **options)

    def keys(self, folder: str) -> list[str]:
        """Return the names of the objects below a folder, without its own name."""
        selector = FileSelector(f"{BUCKET}/{folder}", recursive=True, allow_not_found=True)
        infos = self.system().get_file_info(selector)
        start = len(f"{BUCKET}/{folder}/")
        return sorted(info.path[start:] for info in infos if info.type == FileType.File)

    def read(self, key: str) -> bytes:
        with self.system().open_input_file(f"{BUCKET}/{key}") as file:
            return file.read()

    def write(self, key: str, content: bytes) -> None:
        with self.system().open_output_stream(f"{BUCKET}/{key}") as file:
            file.write(content)

    def copy_to(self, folder: str, here: Path) -> Path:
        """Write all objects below a folder to files, as a run on a path would have left them."""
        for name in self.keys(folder):
            path = here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(f"{folder}/{name}"))
        return here

    def reached(self, folder: str, step: int) -> Callable[[], bool]:
        """Return a question whether the run has a checkpoint of this step or a later one."""
        return lambda: any(
            name.startswith("step-") and int(name[5:13]) >= step for name in self.keys(f"{folder}/checkpoints")
        )


@contextmanager
def serve() -> Iterator[Storage]:
    """Serve an empty bucket, one server at a time: moto keeps what it stores once for the whole process."""
    from moto.moto_api._internal.models import moto_api_backend
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    storage = Storage()
    moto_api_backend.reset()
    moto = DomainDispatcherApplication(create_backend_app)

    def gate(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix(f"/{BUCKET}/")

        def started(status: str, *rest: Any) -> Any:
            storage.requests.append((method, key, int(status.split()[0])))
            return start_response(status, *rest)

        if not storage.refuses(method, key):
            return moto(environ, started)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        started("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
        return [SLOW_DOWN]

    server = make_server("127.0.0.1", 0, gate, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    storage.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        storage.system(allow_bucket_creation=True).create_dir(BUCKET)
        yield storage
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
