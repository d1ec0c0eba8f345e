"""Snapshots at a URL: the contract of `stores.MemoryStore` over fsspec, so S3, Google, Azure and what else it knows.

Two things are asked of the storage, and every object store of today does them: an object that is put appears whole or
not at all, and who asks after that sees it. Single requests are tried again, with back-off and jitter, by the storage's own
library (for S3 botocore); this file tries again what that library cannot see: an answer cut short, a version replaced while it
was read. No exception of a library leaves this file, and none of their words: those may hold an address, a header, a key.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import os
import random
import re
import threading
import time
import uuid
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from .manifest import BadSnapshot

_SLOWEST = 1e6  # bytes per second that a request may count on, beyond its fixed limit
_JITTER = random.Random()  # its own, since the global one belongs to the training
_ONE_AT_A_TIME = threading.Lock()
_S3 = ("s3", "s3a")
_TEMPORARY = ".tmp-"
_NUMBERS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 412: errno.EEXIST}
_KINDS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, FileExistsError: errno.EEXIST}
_CONFLICTS = (409, 425, 429)  # the server asks for another try, and botocore does not make it
# Errors by name, so that no library need be imported: an answer broke off, has another checksum, or is no XML.
_BROKEN = {
    "ClientPayloadError", "FlexibleChecksumError", "IncompleteRead", "IncompleteReadError", "ResponseParserError",
    "ResponseStreamingError",
}  # fmt: skip


class _Again(OSError):
    """What another try may mend."""


class UrlStore:
    """Named bytes below a URL, for any number of threads.

    `connect_s`, `silence_s`: seconds that an S3 server may take to accept a connection, or to send the next bytes.
    `request_s`: seconds that one request to an object store may cost in all, its tries included, beside its bytes at 1 MB/s.
    `tries`: of each request. `part_bytes`: what is sent or asked for in one request; at least 5 MiB at S3.
    Raises ValueError, in one sentence, for what cannot be a store.
    """

    def __init__(
        self,
        url: str,
        connect_s: float = 5.0,
        silence_s: float = 15.0,
        request_s: float = 60.0,
        tries: int = 4,
        part_bytes: int = 16 << 20,
    ) -> None:
        self._url = hidden(url)
        self._request_s, self._tries, self._part_bytes = request_s, tries, part_bytes
        # Standard mode is the one with exponential back-off and jitter for every kind of failure that may pass.
        retries = {"mode": "standard", "total_max_attempts": tries}
        self._fs, root = _file_system(url, {"connect_timeout": connect_s, "read_timeout": silence_s, "retries": retries})
        self._root = root.rstrip("/")
        self._is_s3 = url.split("://")[0] in _S3
        self._put_options: Dict[str, Any] = {"chunksize": part_bytes} if self._is_s3 else {}
        if self._is_s3:
            self._fs.retries = 1  # s3fs would repeat what botocore has repeated
        self._renames = _has_rename(self._fs)
        put = self._fs._pipe_file if self._fs.async_impl else self._fs.pipe_file
        # Where the library has no conditional put, an old one would pass the argument over in silence.
        self._create = {"mode": "create"} if "mode" in inspect.signature(put).parameters else {}

    def read(self, name: str, limit: int) -> Optional[bytes]:
        try:
            return self._patiently(lambda: self._whole(name, limit))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadSnapshot(f"{name} cannot be read ({error.strerror})") from None

    def write(self, name: str, data: Union[bytes, memoryview], replace: bool = True) -> bool:
        """As `MemoryStore.write`. Without `replace`, the first writer wins for certain where the storage has a conditional
        put (S3, Google, Azure); elsewhere only among the threads of one process, since it is looked first and written then."""
        path, body = self._path(name), _as_bytes(data, self._part_bytes)
        if replace:
            self._patiently(lambda: self._put(path, body))
            return True
        with contextlib.nullcontext() if self._fs.async_impl else _ONE_AT_A_TIME:
            try:
                if self._is_there(path):
                    return False
                self._patiently(lambda: self._put(path, body, **self._create))
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._ask("rm_file", self._path(name))

    def names(self, folder: str) -> List[str]:
        path = self._path(folder)
        try:
            found = self._ask("ls", path, detail=False)
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found if name.strip("/") != path.strip("/")})

    def sweep(self, folder: str) -> None:
        """As `MemoryStore.sweep`; at S3 also the parts of an upload that was never completed, which cost money unseen."""
        with contextlib.suppress(OSError):
            for name in self.names(folder):
                if name.startswith(_TEMPORARY):
                    self.remove(f"{folder}/{name}")
        if self._is_s3:
            with contextlib.suppress(OSError, LookupError, TypeError):  # not everybody may list or abort uploads
                bucket, _, key = self._path(folder).partition("/")
                found = self._ask("call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
                for upload in found.get("Uploads") or ():
                    options = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._ask("call_s3", "abort_multipart_upload", **options)

    def claim(self, folder: str) -> bool:
        return False  # object stores have no locks

    def held(self, folder: str) -> Optional[bool]:
        return None

    def release(self, folder: str) -> None:
        pass

    def __str__(self) -> str:
        return self._url

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _is_there(self, path: str) -> bool:
        try:
            self._ask("info", path)
        except FileNotFoundError:
            return False
        return True

    def _whole(self, name: str, limit: int) -> bytes:
        """One try at reading. Raises _Again when what came is not what was promised, and OSError, BadSnapshot."""
        info = self._ask("info", self._path(name))
        size = info.get("size")
        if info.get("type") != "file" or not isinstance(size, int):
            raise BadSnapshot(f"{name} is not a plain file")
        if size > limit:
            raise BadSnapshot(f"{name} has more than {limit} bytes")
        data = io.BytesIO()
        while data.tell() < size:
            start = data.tell()
            end = min(start + self._part_bytes, size)
            # A byte too many is asked for at the end: it comes when a longer version has taken the name meanwhile.
            part = self._ask("cat_file", self._path(name), moving=end - start, start=start, end=end + (end == size))
            if len(part) != end - start:
                raise _Again(errno.EIO, f"{len(part)} bytes came instead of {end - start}")
            data.write(part)
        return data.getvalue()

    def _put(self, path: str, data: Union[bytes, bytearray], **create: str) -> None:
        if not self._renames:
            self._ask("pipe_file", path, data, moving=len(data), **self._put_options, **create)
            return
        # SFTP, SMB and the like are no object stores: there a file grows under its readers, but has an atomic rename.
        folder = path.rsplit("/", 1)[0]
        aside = f"{folder}/{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            self._ask("makedirs", folder, exist_ok=True)
            self._ask("pipe_file", aside, data)
            self._ask("mv", aside, path)
        except OSError:
            with contextlib.suppress(OSError):
                self._ask("rm_file", aside)
            raise

    def _patiently(self, action: Callable[[], Any]) -> Any:
        """What `action` returns, in the end. Raises OSError."""
        for attempt in range(1, self._tries + 1):
            try:
                return action()
            except _Again:
                if attempt == self._tries:
                    raise
            time.sleep(_JITTER.uniform(0, 0.2 * 2**attempt))

    def _ask(self, method: str, *arguments: Any, moving: int = 0, **options: Any) -> Any:
        """One request, moving about that many bytes. Raises OSError, in words that hold no secret."""
        try:
            if not self._fs.async_impl:
                return getattr(self._fs, method)(*arguments, **options)
            from fsspec.asyn import sync

            # The libraries' limits are for each silence; a server that sends a byte now and then would hold it for ever.
            limit = self._request_s + moving / _SLOWEST
            return sync(self._fs.loop, getattr(self._fs, f"_{method}"), *arguments, timeout=limit, **options)
        except Exception as error:
            raise _plain(error) from None


def hidden(url: str) -> str:
    """The URL without password and query: fit to be printed."""
    return re.sub(r"\?.*", "?***", re.sub(r"://([^:/@]*):.*@", r"://\1:***@", url, flags=re.DOTALL), flags=re.DOTALL)


def _file_system(url: str, s3_config: Dict[str, Any]) -> Tuple[Any, str]:
    """(file system, path in it). Raises ValueError."""
    protocol, _, rest = url.partition("://")
    shown = f"codistill_dir is {hidden(url)!r}, which"
    if "::" in url or "?" in rest or not rest.strip("/"):
        raise ValueError(f"{shown} is no place for snapshots; it must be a path, or a URL such as s3://BUCKET/FOLDER.")
    if protocol in _S3 and "@" in rest.split("/")[0]:
        raise ValueError(f"{shown} holds credentials; S3's must be in the environment (AWS_ACCESS_KEY_ID …) or in ~/.aws.")
    options: Dict[str, Any] = {"skip_instance_cache": True}
    try:
        import fsspec

        if fsspec.get_filesystem_class(protocol).async_impl:
            options["use_listings_cache"] = False  # else what another peer writes now is seen when the cache pleases
        if protocol in _S3:
            options["config_kwargs"] = {**fsspec.config.conf.get(protocol, {}).get("config_kwargs", {}), **s3_config}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = (getattr(error.__cause__ or error, "name", None) or protocol).split(".")[0]
        wanted = "'fairseq-codistill[s3]'" if protocol in _S3 else package
        raise ValueError(f"{shown} needs the package {package}; pip install {wanted}") from None
    except Exception as error:
        if str(error).startswith("Protocol not known"):
            raise ValueError(f"{shown} fsspec does not know; did you mean s3://…, gs://… or a path?") from None
        raise ValueError(f"{shown} cannot be opened ({type(error).__name__}).") from None


def _has_rename(fs: Any) -> bool:
    """Whether files of this file system are renamed by the server, rather than copied and removed."""
    from fsspec import AbstractFileSystem

    return not fs.async_impl and type(fs).mv is not AbstractFileSystem.mv


def _as_bytes(data: Union[bytes, memoryview], step: int) -> Union[bytes, bytearray]:
    """The libraries take bytes only. Copied in steps: one great copy would hold Python's lock, and so the training."""
    if isinstance(data, bytes):
        return data
    copy = bytearray(len(data))
    for start in range(0, len(data), step):
        copy[start : start + step] = data[start : start + step]
    return copy


def _plain(error: Exception) -> OSError:
    """The error as an OSError in the words of this package."""
    names = [kind.__name__ for kind in type(error).__mro__]
    if any("Timeout" in name for name in names):
        return OSError(errno.ETIMEDOUT, "the server did not answer in time")
    if _BROKEN.intersection(names):
        return _Again(errno.EIO, f"the answer broke off ({names[0]})")
    status, code = _answer(error)
    if status:
        kind = _Again if status in _CONFLICTS else OSError
        return kind(_NUMBERS.get(status, errno.EIO), f"the server answered {status} {code}".rstrip())
    number = next((number for kind, number in _KINDS.items() if isinstance(error, kind)), None)
    if number is None and isinstance(error, OSError) and type(error).__module__ == "builtins":
        number = error.errno
    # Of what is no error of the operating system, the name alone: NoCredentialsError, EndpointConnectionError.
    return OSError(number or errno.EIO, os.strerror(number) if number else type(error).__name__)


def _answer(error: Exception) -> Tuple[int, str]:
    """(HTTP status, S3's word for the error) of a server's answer; (0, "") where there was none."""
    for each in (error, error.__cause__):  # s3fs translates botocore's
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status, code if re.fullmatch(r"[A-Za-z.]{1,60}", code) else ""
    for name in ("status_code", "status", "code"):  # Azure, aiohttp, Google
        status = getattr(error, name, None)
        if isinstance(status, int) and 100 <= status < 600:
            return status, ""
    return 0, ""
