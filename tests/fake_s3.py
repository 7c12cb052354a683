"""A server on this machine that speaks as much of the S3 protocol as reading takes."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

MEET_WITHIN_S = 2.0  # the client gives up after 3 s
ERROR = "<Error><Code>{0}</Code><Message>{0}</Message></Error>"


@dataclass
class Bucket:
    """The files below a folder, as objects of a bucket called ``images``."""

    folder: Path
    port: int = 0
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, key and bytes sent of every answer."""
    forbidden: bool = False
    unplugged: bool = False
    """Connections are cut without an answer."""
    together: int = 1
    """Requests for objects are answered once so many are under way, or :data:`MEET_WITHIN_S` later."""
    met: bool = False
    """Whether so many ever were."""
    under_way: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def meet(self) -> None:
        with self.changed:
            self.under_way += 1
            self.met = self.met or self.under_way >= self.together
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.met, timeout=MEET_WITHIN_S)
            self.under_way -= 1

    def uri(self, path: str = "", bucket: str = "images", keys: str = "me:hidden@") -> str:
        return f"s3://{keys}{bucket}/{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=x"

    def objects(self) -> dict[str, Path]:
        found = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        return dict(sorted(found.items()))


@contextmanager
def serve(folder: Path) -> Iterator[Bucket]:
    """Serve a folder as ``s3://images``."""
    bucket = Bucket(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            name, _, key = unquote(url.path).lstrip("/").partition("/")
            if key:
                bucket.meet()
            if bucket.unplugged:
                self.close_connection = True
                return None
            if bucket.forbidden:
                return self.send(403, ERROR.format("AccessDenied").encode(), key)
            if name != "images":
                return self.send(404, ERROR.format("NoSuchBucket").encode(), key)
            if not key:
                query = {k: v[0] for k, v in parse_qs(url.query).items()}
                return self.send(200, listing(bucket, query).encode(), key)
            if key not in bucket.objects():
                return self.send(404, ERROR.format("NoSuchKey").encode(), key)
            path = bucket.objects()[key]
            content, status = path.read_bytes(), 200
            headers = {"Last-Modified": formatdate(path.stat().st_mtime, usegmt=True), "ETag": '"x"'}
            if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            self.send(status, content, key, headers)

        do_HEAD = do_GET  # noqa: N815

        def send(self, status: int, body: bytes, key: str, headers: dict[str, str] | None = None) -> None:
            with_body = self.command == "GET"
            bucket.requests.append((self.command, key, len(body) if with_body else 0))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    bucket.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def listing(bucket: Bucket, query: dict[str, str]) -> str:
    """ListObjectsV2, all in one page."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    objects, folders = [], set()
    for key, path in bucket.objects().items():
        if key.startswith(prefix):
            head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if cut:
                folders.add(prefix + head + cut)
            else:
                stat = path.stat()
                changed = datetime.fromtimestamp(stat.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
                text = f"<Key>{escape(key)}</Key><Size>{stat.st_size}</Size><LastModified>{changed}</LastModified>"
                objects.append(f"<Contents>{text}</Contents>")
    common = [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders)]
    count = f"<IsTruncated>false</IsTruncated><KeyCount>{len(objects) + len(common)}</KeyCount>"
    return f"<ListBucketResult><Name>images</Name>{count}{''.join(objects + common)}</ListBucketResult>"
