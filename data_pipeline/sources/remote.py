"""Objects on web servers (https://, http://) and in object stores that speak S3 (s3://), read by ranges.

    RFC 9110, sections 13 (If-Match), 14 (ranges) and 15 (statuses)

A read is a sequence of ranges of some MiB. A range that breaks off is resumed where it broke, after a growing wait; it
names the version (ETag) that the plan has, so that no read mixes two versions of an object. Stores take endpoint,
region and credentials from the environment: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, …, and
AWS_SKIP_SIGNATURE=true for public buckets.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import random
import re
import socket
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from data_pipeline import files
from data_pipeline.sources.inputs import InputError

if TYPE_CHECKING:
    import urllib3

PIECE_BYTES = 2**20
STORE_PIECE_BYTES = 2**15  # what has not filled a piece is lost where a body breaks off
ASKED_AT_ONCE = 32  # sizes of addresses that are named one by one
REDIRECTS = 5


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for. A range is given up after `attempts` that did not finish it."""

    attempts: int = 8
    wait_s: float = 0.5  # after the first, doubled after each, of which half is by chance
    longest_wait_s: float = 30.0
    silence_s: float = 60.0  # until a connection in which nothing arrives counts as broken
    range_s: float = 300.0  # until one in which too little arrives does

    def wait(self, failures: int, asked_for: float = 0.0) -> None:
        """Between two attempts; at least what the server asked for, within bounds."""
        longest = min(self.longest_wait_s, self.wait_s * 2 ** (failures - 1))
        files.wait(max(random.uniform(longest / 2, longest), min(asked_for, 4 * self.longest_wait_s)))


PATIENCE = Patience()


class Broken(Exception):
    """An answer that did not come, or not whole; to be tried again."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Shorter(Exception):
    """An object of unknown size that ends before the range does."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes")
        self.size = size


class Gone(InputError):
    """An object that is not there."""


class Unanswered(InputError):
    """A server that was asked in vain, as often as it is worth: what passes one day, and is nobody's mistake."""


class Server(Protocol):
    """Where an object is. Both raise Broken, and InputError for what trying again will not mend."""

    def describe(self) -> tuple[int, str]:
        """(size, version) of the object."""
        ...

    def fetch(self, start: int, stop: int, size: int | None, version: str | None) -> Iterator[bytes]:
        """The bytes from `start` to `stop` of the object of that size and version, in pieces.

        Where neither is known (None), of the object as it is. Raises Shorter where it ends before `stop`.
        """
        ...


def describe(name: str) -> tuple[int, str]:
    """(size, version) of an object now. Raises InputError."""
    server, failures = _server(name), 0
    while True:
        try:
            return server.describe()
        except Broken as broken:
            failures = _again(name, failures, broken)


def find(addresses: Sequence[str], suffixes: tuple[str, ...]) -> list[tuple[str, int, str]]:
    """(name, size, version) of the objects that addresses, patterns and prefixes name. Raises InputError."""
    found: list[tuple[str, int, str]] = []
    single = [address for address in addresses if not _is_pattern(address)]
    for pattern in addresses:
        if _is_pattern(pattern):
            listed = _list(pattern, suffixes)
            if not listed:
                raise InputError(f"no object matches {pattern!r}")
            found += listed
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        found += [(name, *about) for name, about in zip(single, pool.map(describe, single), strict=True)]
    return found


def _is_pattern(address: str) -> bool:
    return address.startswith("s3://") and (address.endswith("/") or any(c in address for c in "*?["))


def _again(name: str, failures: int, broken: Broken) -> int:
    """Wait, and give the number of failures so far; raise Unanswered after the last attempt."""
    failures += 1
    if failures >= PATIENCE.attempts:
        raise Unanswered(f"{name}: {broken}, after {failures} attempts; run the same command again to go on") from None
    PATIENCE.wait(failures, broken.wait_s)
    return failures


class RemoteFile:
    """Bytes of a remote object, all of one version: the given one, or the one there is when it is opened."""

    def __init__(self, name: str, size: int | None, version: str | None) -> None:
        self.name, self.server = name, _server(name)
        if size is None or version is None:
            size, version = describe(name)
        self.size, self.version = size, version
        self._held, self._held_at = b"", 0

    def at(self, offset: int, size: int, ahead: int = 0) -> bytes:
        """The bytes at `offset`, fewer than `size` only at the end. `ahead`: how many to ask the server for."""
        stop = min(offset + size, self.size)
        inside = offset - self._held_at
        data = self._held[inside : inside + size] if 0 <= inside <= len(self._held) else b""
        if (begin := offset + len(data)) < stop:
            self._held = self._range(begin, min(max(stop, begin + ahead), self.size))
            self._held_at = begin
            data += self._held[: stop - begin]
        return data

    def close(self) -> None:
        self._held = b""

    def _range(self, start: int, stop: int) -> bytes:
        return _range(self.server, self.name, start, stop, self.size, self.version)


def read_range(name: str, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop` of an object, in whatever version: for who knows their hash, without asking for
    size and version first. Fewer only where the object ends. Raises InputError."""
    try:
        return _range(_server(name), name, start, stop, None, None)
    except Shorter as shorter:
        if shorter.size <= start:
            return b""
        return _range(_server(name), name, start, shorter.size, None, None)


def _range(server: Server, name: str, start: int, stop: int, size: int | None, version: str | None) -> bytes:
    got, failures = bytearray(), 0
    while True:
        deadline = time.monotonic() + PATIENCE.range_s
        try:
            for piece in server.fetch(start + len(got), stop, size, version):
                got += piece[: stop - start - len(got)]
                if len(got) == stop - start:
                    return bytes(got)
                if time.monotonic() > deadline:
                    raise Broken(f"too slow: {len(got)} of {stop - start} bytes")
            raise Broken(f"ended at byte {start + len(got)} of the range {start}-{stop}")
        except Broken as broken:
            failures = _again(name, failures, broken)


@functools.lru_cache(maxsize=64)
def _server(name: str) -> Server:
    return ObjectStore(name) if name.startswith("s3://") else WebServer(name)


def _changed(name: str) -> InputError:
    return InputError(f"{name}: changed since it was planned; run data-prep run again, which plans anew")


def _gone(name: str, why: str) -> InputError:
    return Gone(f"{name}: not there ({why}); check the address, or put it back")


# --- https:// and http:// -------------------------------------------------------------------------------------------

REDIRECTING = (301, 302, 303, 307, 308)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class WebServer:
    """An address on a web server. Redirects within its host are followed, and those out of it to public addresses."""

    def __init__(self, name: str) -> None:
        url = urllib.parse.urlsplit(name)
        if "*" in name:
            raise InputError(f"{name}: only s3:// can be listed; name files one by one, or in a list (*.paths)")
        if url.query or url.fragment or url.username is not None:
            raise InputError(
                f"{url.scheme}://{url.hostname}{url.path}: no query, fragment or password, please: all go into plans"
            )
        if not url.hostname:
            raise InputError(f"{name}: expected an address such as https://example.org/file")
        self.name = name

    def describe(self) -> tuple[int, str]:
        with _Answer(self.name, {"Range": "bytes=0-0"}) as answer:
            _, total = answer.content_range()
            if answer.status == 200:
                total = answer.length()
            elif answer.status not in (206, 416):
                raise answer.refusal()
            if answer.status == 206:
                next(answer.pieces(), None)  # so that the connection can be used again
            if total is None:
                raise InputError(f"{self.name}: its server does not tell its size; copy it here")
            return total, answer.version()

    def fetch(self, start: int, stop: int, size: int | None, version: str | None) -> Iterator[bytes]:
        strong = {"If-Match": version} if version is not None and version.startswith('"') else {}
        with _Answer(self.name, {"Range": f"bytes={start}-{stop - 1}", **strong}) as answer:
            if answer.status == 416 and version is None:
                raise Shorter(answer.content_range()[1] or 0)
            if answer.status in (412, 416):
                raise _changed(self.name)
            if answer.status not in (200, 206):
                raise answer.refusal()
            begin, total = answer.content_range() if answer.status == 206 else (0, answer.length())
            if version is None and total is not None and total < stop:
                raise Shorter(total)
            if version is not None and (answer.version() != version or total != size):
                raise _changed(self.name)
            if answer.status == 200 and (start, stop) != (0, total):
                raise InputError(f"{self.name}: its server does not answer range requests; copy it here")
            if begin != start:
                raise Broken(f"asked for byte {start}, got {begin}")
            yield from answer.pieces()


class _Answer:
    """The answer to a GET, as a context: redirects followed, errors of the connection raised as Broken."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.url = url
        self.headers = {"Accept-Encoding": "identity", "User-Agent": "longhaul-data-prep", **headers}

    def __enter__(self) -> _Answer:
        url, origin = self.url, _origin(self.url)
        for _ in range(REDIRECTS + 1):
            address = None if _origin(url) == origin else _public_address(self.url, url)
            self.response = self._get(url, address)
            self.status: int = self.response.status
            if self.status not in REDIRECTING:
                return self
            self.response.close()
            url = urllib.parse.urljoin(url, self.response.headers.get("Location", ""))
        raise InputError(f"{self.url}: redirected more than {REDIRECTS} times; name the last address itself")

    def __exit__(self, *_: object) -> None:
        if self.response.length_remaining == 0:
            self.response.drain_conn()  # an empty body has an end that wants to be read, else the next request fails
            self.response.release_conn()
        else:
            self.response.close()

    def _get(self, url: str, address: str | None) -> urllib3.BaseHTTPResponse:
        import urllib3

        parsed = urllib.parse.urlsplit(url)
        path = urllib.parse.quote(parsed.path or "/", safe="/%:@!$&'()*+,;=-._~")
        path += f"?{parsed.query}" if parsed.query else ""
        pool = _pool(*_origin(url), address)
        try:
            response: urllib3.BaseHTTPResponse = pool.urlopen(
                *("GET", path),
                headers={**self.headers, "Host": parsed.netloc},
                timeout=urllib3.Timeout(connect=PATIENCE.silence_s, read=PATIENCE.silence_s),
                redirect=False,
                retries=False,
                preload_content=False,
            )
            return response
        except urllib3.exceptions.SSLError as error:
            raise InputError(f"{url}: no safe connection ({error})") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Broken(f"no answer ({type(error).__name__})") from None

    def pieces(self) -> Iterator[bytes]:
        import urllib3

        try:
            while data := self.response.read1(PIECE_BYTES):
                yield data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Broken(f"broke off ({type(error).__name__})") from None

    def length(self) -> int | None:
        text = self.response.headers.get("Content-Length", "")
        return int(text) if text.isdecimal() else None

    def content_range(self) -> tuple[int | None, int | None]:
        """(first byte, size of the whole) as the answer says."""
        unit, _, text = self.response.headers.get("Content-Range", "").partition(" ")
        span, _, total = text.partition("/")
        first = span.partition("-")[0]
        known = unit == "bytes"
        return (
            int(first) if known and first.isdecimal() else None,
            int(total) if known and total.isdecimal() else None,
        )

    def version(self) -> str:
        headers = self.response.headers
        return str(headers.get("ETag") or headers.get("Last-Modified") or "")

    def refusal(self) -> Exception:
        import urllib3

        if self.status in (404, 410):
            return _gone(self.url, f"HTTP {self.status}")
        if self.status in (401, 403):
            return InputError(
                f"{self.url}: its server refuses it (HTTP {self.status}); it may need credentials, or less haste"
            )
        if self.status in TRANSIENT:
            return Broken(f"HTTP {self.status}", urllib3.Retry().get_retry_after(self.response) or 0.0)
        return InputError(f"{self.url}: unexpected HTTP {self.status}")


def _origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port)."""
    parsed = urllib.parse.urlsplit(url)
    try:
        port = parsed.port or {"https": 443, "http": 80}.get(parsed.scheme, 0)
    except ValueError:
        port = 0
    return parsed.scheme, parsed.hostname or "", port


def _public_address(asked: str, url: str) -> str:
    """The IP address to which a redirect out of the host may go. Looked up once, so that it is the one gone to."""
    scheme, host, port = _origin(url)
    if scheme not in ("http", "https") or not port or (asked.startswith("https:") and scheme == "http"):
        raise InputError(f"{asked}: redirected to {url!r:.200}: refused; name that address itself if it is meant")
    addresses = _addresses(host, port)
    if not addresses or not all(ipaddress.ip_address(address).is_global for address in addresses):
        raise InputError(
            f"{asked}: redirected to {host}, which is no public address: refused; name it itself if it is meant"
        )
    return addresses[0]


def _addresses(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(entry[4][0]).partition("%")[0] for entry in found]


@functools.lru_cache(maxsize=64)
def _pool(scheme: str, host: str, port: int, address: str | None) -> Any:
    """Connections to a host; `address` is the IP to use for it."""
    import urllib3

    if address is None and any(ipaddress.ip_address(a).is_link_local for a in _addresses(host, port)):
        raise InputError(f"{scheme}://{host}: a link-local address: refused")
    if scheme == "http":
        return urllib3.HTTPConnectionPool(address or host, port, maxsize=ASKED_AT_ONCE)
    names: dict[str, Any] = {} if address is None else {"server_hostname": host, "assert_hostname": host}
    return urllib3.HTTPSConnectionPool(address or host, port, maxsize=ASKED_AT_ONCE, **names)


# --- s3:// ----------------------------------------------------------------------------------------------------------

LASTING = re.compile(r"status code: 4(?!08|25|29)\d\d")  # what a store has said for good, in the words of the library


class ObjectStore:
    """An object in a bucket. The library tries requests again; a body that breaks off is tried again here."""

    def __init__(self, name: str) -> None:
        self.name = name
        bucket, _, self.key = name.removeprefix("s3://").partition("/")
        self.store = store(bucket)

    def describe(self) -> tuple[int, str]:
        import obstore

        try:
            about = obstore.head(self.store, self.key)
        except Exception as error:
            raise refusal(self.name, error) from None
        return about["size"], about["e_tag"] or about["last_modified"].isoformat()

    def fetch(self, start: int, stop: int, size: int | None, version: str | None) -> Iterator[bytes]:
        import obstore

        options: Any = {"range": (start, stop)}
        if version is not None and version.startswith('"'):
            options["if_match"] = version
        try:
            answer = obstore.get(self.store, self.key, options=options)
        except Exception as error:
            if version is None and "416 Range Not Satisfiable" in str(error):
                raise Shorter(self.describe()[0]) from None
            raise refusal(self.name, error) from None
        about = answer.meta
        if version is None and about["size"] < stop:
            raise Shorter(about["size"])
        if version is not None and (
            about["size"] != size or (about["e_tag"] or about["last_modified"].isoformat()) != version
        ):
            raise _changed(self.name)
        try:
            for piece in answer.stream(min_chunk_size=STORE_PIECE_BYTES):
                yield bytes(piece)
        except Exception as error:
            raise Broken(f"broke off ({type(error).__name__})") from None


def _list(pattern: str, suffixes: tuple[str, ...]) -> list[tuple[str, int, str]]:
    """The objects that match a pattern, or lie below a prefix that ends with a slash."""
    import obstore

    bucket, _, key = pattern.removeprefix("s3://").partition("/")
    fixed = key[: min((key.index(c) for c in "*?[" if c in key), default=len(key))]
    found = []
    try:
        for page in obstore.list(store(bucket), fixed.rpartition("/")[0] or None, chunk_size=1000):
            for about in page:
                name = about["path"]
                if name.endswith(suffixes) if key in ("", fixed) else PurePosixPath("/" + name).match("/" + key):
                    version = about["e_tag"] or about["last_modified"].isoformat()
                    found.append((f"s3://{bucket}/{name}", about["size"], version))
    except Exception as error:
        raise refusal(pattern, error) from None
    return found


def s3_options() -> dict[str, Any]:
    """How obstore is to speak to S3: where the environment says, as patiently as with other servers."""
    endpoint = next((os.environ[k] for k in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(k)), None)
    return {
        "config": {"endpoint": endpoint} if endpoint else {},
        "client_options": {
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "connect_timeout": timedelta(seconds=PATIENCE.silence_s),
            "timeout": timedelta(seconds=PATIENCE.range_s),
        },
        "retry_config": {
            "max_retries": PATIENCE.attempts - 1,
            "retry_timeout": timedelta(seconds=PATIENCE.range_s),
            "backoff": {
                "init_backoff": timedelta(seconds=PATIENCE.wait_s),
                "max_backoff": timedelta(seconds=PATIENCE.longest_wait_s),
                "base": 2,
            },
        },
    }


@functools.lru_cache(maxsize=64)
def store(bucket: str) -> Any:
    """A bucket, as the environment has it. Raises InputError where the library is missing."""
    try:
        from obstore.store import S3Store
    except ImportError:
        raise InputError("s3:// needs obstore: pip install 'longhaul[s3]'") from None
    return S3Store(bucket, **s3_options())


def refusal(name: str, error: Exception) -> InputError:
    """What a store said, as one line."""
    from obstore import exceptions

    if isinstance(error, FileNotFoundError):
        return _gone(name, "no such object or bucket")
    if isinstance(error, exceptions.PreconditionError) or "416 Range Not Satisfiable" in str(error):
        return _changed(name)
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return InputError(f"{name}: its store refuses it; check AWS_ACCESS_KEY_ID, or set AWS_SKIP_SIGNATURE=true")
    said = " ".join(str(error).partition("Debug source")[0].split())
    passes = isinstance(error, exceptions.GenericError) and not LASTING.search(said)
    return (Unanswered if passes else InputError)(f"{name}: {said[:300]}")
