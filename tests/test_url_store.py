"""URLs: the contract of a store and format 1 on a real S3 server, which is slow, fails, lies and hangs as we please."""

import errno
import http.client
import importlib
import itertools
import logging
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest
from s3_server import ACCESS_KEY, SECRET_KEY, s3_server
from test_exchange import RUN, fetch, publish

from fairseq_codistill.exchange.exchange import KEEP, Exchange, Run
from fairseq_codistill.exchange.manifest import BadSnapshot
from fairseq_codistill.exchange.stores import DirectoryStore, open_store
from fairseq_codistill.exchange.url_store import UrlStore, hidden

pytest.importorskip("s3fs")
MIB = 1 << 20


class Proxy(ThreadingHTTPServer):
    """Stands before the S3 server. `proxy.on("PUT", 503, "cut")`: the next two PUTs meet these faults, later ones none.

    A number is answered in the server's place; see `_Handler` for the words; a function is called before the request goes on.
    """

    daemon_threads = True

    def __init__(self, server):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = server.address.replace("http://", "")
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.closing, self.atomic, self.faults, self.seen = threading.Event(), threading.Lock(), {}, []
        self.headers_seen = []

    def on(self, method, *faults):
        self.faults[method] = iter(faults)

    def always(self, method, fault):
        self.faults[method] = itertools.repeat(fault)

    def count(self, method):
        return self.seen.count(method)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _any(self):
        proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy.seen.append(self.command)
        proxy.headers_seen.append(dict(self.headers))
        fault = next(proxy.faults.get(self.command, iter(())), None)
        if isinstance(fault, int):
            names = {403: "AccessDenied", 409: "ConditionalRequestConflict", 412: "PreconditionFailed", 500: "InternalError"}
            text = f"<Error><Code>{names.get(fault, 'SlowDown')}</Code><Message>{SECRET_KEY}</Message></Error>".encode()
            return self._answer(fault, {}, b"" if self.command == "HEAD" else text)
        if fault == "hang":
            proxy.closing.wait()
        if fault in ("hang", "reset"):
            self.close_connection = True
            return None
        if callable(fault):
            fault()
        with proxy.atomic:  # moto looks and writes in two steps, which S3 does in one
            backend = http.client.HTTPConnection(proxy.target, timeout=60)
            backend.request(self.command, self.path, body, dict(self.headers))
            answer = backend.getresponse()
            content = answer.read()
            backend.close()
        own = ("connection", "date", "server", "transfer-encoding")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in own}
        return self._answer(answer.status, headers, content, fault)

    def _answer(self, status, headers, content, fault=None):
        half = content[: len(content) // 2]
        self.send_response(status)
        if self.command != "HEAD" and status != 204:
            headers["Content-Length"] = str(len(half if fault == "short" else content))
        if fault == "short":  # nor does every server send a checksum
            headers = {name: value for name, value in headers.items() if "checksum" not in name.lower()}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "trickle":  # a byte now and then, for ever
            for byte in itertools.cycle(content):
                self.wfile.write(bytes([byte]))
                if self.server.closing.wait(0.05):
                    break
        self.wfile.write(half if fault in ("cut", "short") else content)
        self.close_connection = self.close_connection or fault == "cut"

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


@pytest.fixture
def proxy(s3, monkeypatch):
    with Proxy(s3) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def bucket(s3, proxy):
    return s3.bucket()


@pytest.fixture(params=["s3", "memory", "file"])
def url(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/some/run"
    return f"memory://{tmp_path}" if request.param == "memory" else f"file://{tmp_path}/run"


def quick(url, **limits):
    """A store that gives up soon."""
    return UrlStore(url, **{"connect_s": 2.0, "silence_s": 5.0, "request_s": 30.0, "tries": 3, **limits})


# The contract, as in test_exchange.py.


def test_a_store_keeps_bytes(url):
    store = UrlStore(url)
    assert store.read("a/x", 10) is None and store.names("a") == []
    assert store.write("a/x", b"one") and store.write("a/y", b"") and store.write("a/z", memoryview(b"12345")[1:4])
    assert store.read("a/x", 3) == b"one" and store.read("a/y", 0) == b"" and store.read("a/z", 9) == b"234"
    assert store.names("a") == ["x", "y", "z"] and store.write("run.json", b"")
    assert store.write("a/x", b"two") and store.read("a/x", 10) == b"two"
    assert store.write("a/x", b"three", replace=False) is False and store.read("a/x", 10) == b"two"
    store.remove("a/x")
    store.remove("a/x")
    assert store.read("a/x", 10) is None and store.names("a") == ["y", "z"]
    assert store.claim("a") is False and str(store) == url
    store.release("a")


def test_a_store_gives_no_more_than_it_is_asked_for(url):
    store = UrlStore(url)
    store.write("x", b"12345")
    with pytest.raises(BadSnapshot, match="more than 4 bytes"):
        store.read("x", 4)
    with pytest.raises(BadSnapshot, match="not a plain file"):
        store.write("folder/y", b"") and store.read("folder", 100)


def test_what_is_too_large_is_not_even_asked_for(proxy, bucket):
    store = UrlStore(bucket)
    store.write("x", b"12345")
    with pytest.raises(BadSnapshot, match="more than 4 bytes"):
        store.read("x", 4)
    assert proxy.count("GET") == 0 and store.read("x", 5) == b"12345" and proxy.count("GET") == 1


def test_the_first_of_several_writers_wins(url):
    stores, barrier, wins = [UrlStore(url), UrlStore(url)], threading.Barrier(8), []

    def write(i):
        barrier.wait()
        wins.append((stores[i % 2].write("run.json", b"%d" % i * 1000, replace=False), i))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    winners = [i for won, i in wins if won]
    assert len(wins) == 8 and len(winners) == 1 and stores[0].read("run.json", 10**6) == b"%d" % winners[0] * 1000


def test_a_reader_never_sees_half_a_write(url):
    reader, writer = UrlStore(url), UrlStore(url)
    versions = [bytes([i]) * 30_000 * (i + 1) for i in range(4)]  # of different lengths
    looks, ready, wrote = 20, threading.Semaphore(0), threading.Semaphore(1)

    def write():
        for look in range(looks):
            ready.acquire()
            writer.write("x", versions[look % 4])
            wrote.release()

    writer.write("x", versions[0])
    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(looks):
        wrote.acquire()
        ready.release()  # one more is written while this one is read
        assert reader.read("x", 10**6) in versions
    thread.join()


def test_nothing_is_believed_that_was_seen_before(url):
    mine, theirs = UrlStore(url), UrlStore(url)
    assert mine.names("a") == [] and mine.read("a/x", 9) is None
    for i in range(3):
        theirs.write(f"a/{i}", b"")
        theirs.write("a/x", b"+" * i)
        assert mine.names("a") == [*map(str, range(i + 1)), "x"] and mine.read("a/x", 9) == b"+" * i
    theirs.remove("a/0")
    assert mine.names("a") == ["1", "2", "x"]


def test_where_files_are_renamed(tmp_path, monkeypatch):
    """A write goes to another name first; a failing one leaves the old version, and nothing else."""
    store, seen = UrlStore(f"file://{tmp_path}"), []
    store.write("a/x", b"old")

    def fail(_, aside, path):
        seen.extend([store.read("a/x", 9), open(aside, "rb").read()])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(store._fs), "mv", fail)
    with pytest.raises(OSError, match="No space left on device"):
        store.write("a/x", b"new")
    assert seen == [b"old", b"new"] and store.names("a") == ["x"] and store.read("a/x", 9) == b"old"


# Format 1 on S3.


def test_publish_newest_fetch(bucket):
    mine, theirs = Exchange(open_store(f"{bucket}/run"), 0), Exchange(open_store(f"{bucket}/run"), 1)
    mine.join(RUN)
    theirs.join(RUN)
    assert mine.newest(1) is None and mine.at(1, 50) is None
    publish(theirs, 50, 1.5)
    manifest = mine.newest(1)
    assert manifest.update == 50 and manifest == mine.at(1, 50)
    publish(theirs, 100, 2.5)
    assert mine.newest(1).update == 100 and mine.at(1, 50) == manifest
    assert (fetch(mine, 1, manifest)["weight"] == 1.5).all() and (fetch(mine, 1, mine.newest(1))["weight"] == 2.5).all()
    theirs.store.remove(f"peer1/{manifest.file}")
    assert fetch(mine, 1, manifest) is None, "it went meanwhile"
    with pytest.raises(ValueError, match="same target dictionary"):
        Exchange(open_store(f"{bucket}/run"), 1).join(Run(2, "cd" * 32, RUN.classes))


def test_the_newest_few_are_kept(bucket):
    exchange = Exchange(open_store(f"{bucket}/run"), 0)
    exchange.join(RUN)
    for update in range(10, 60, 10):
        publish(exchange, update)
    kept = [name for name in exchange.store.names("peer0") if name.endswith(".safetensors")]
    assert kept == [f"u{update:09d}.safetensors" for update in (30, 40, 50)] and len(kept) == KEEP
    exchange.leave()
    again = Exchange(open_store(f"{bucket}/run"), 0)
    again.join(RUN)
    publish(again, 35)  # resumed: what was left before the restart is found and counted
    kept = [name for name in again.store.names("peer0") if name.endswith(".safetensors")]
    assert kept == [f"u{update:09d}.safetensors" for update in (35, 40, 50)]
    again.forget()
    assert again.newest(0) is None and again.store.names("peer0") == ["alive.json"]


def test_what_failed_on_the_way_teaches_nothing(proxy, bucket):
    mine, theirs = Exchange(open_store(bucket), 0), Exchange(quick(bucket, tries=1), 1)
    theirs.join(RUN)
    publish(theirs, 50, 1.5)
    proxy.on("PUT", 500)
    with pytest.raises(OSError, match="the server answered 500 InternalError"):
        publish(theirs, 100, 2.5)
    assert mine.newest(1).update == 50 and (fetch(mine, 1, mine.newest(1))["weight"] == 1.5).all()
    publish(theirs, 150, 3.5)
    assert mine.newest(1).update == 150


# Answers that are wrong, late, cut short, or never come.


# After a reset the library that Python 3.9 gets sends its request again without the body, and waits in vain: that
# snapshot is lost, the next one comes.
repeats_whole = pytest.mark.skipif(version("aiobotocore").startswith("2."), reason="a fault of aiobotocore 2 with aiohttp 3.13")


@pytest.mark.parametrize("fault, times", [(500, 1), (503, 2), pytest.param("reset", 1, marks=repeats_whole)])
def test_what_passes_is_tried_again(proxy, bucket, fault, times):
    store = quick(bucket)
    proxy.on("PUT", *[fault] * times)
    assert store.write("x", b"12345") and proxy.count("PUT") == times + 1
    proxy.on("GET", fault)
    proxy.on("HEAD", fault)
    assert store.read("x", 9) == b"12345" and proxy.count("GET") == proxy.count("HEAD") == 2


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_an_answer_cut_short_is_asked_for_again(proxy, bucket, fault):
    """With a promised length that never comes, and as a liar would, with a length that fits the half."""
    store = quick(bucket)
    store.write("x", bytes(range(200)))
    proxy.on("GET", fault, fault)
    assert store.read("x", 200) == bytes(range(200)) and proxy.count("GET") == 3
    proxy.always("GET", fault)
    with pytest.raises(BadSnapshot, match=r"x cannot be read \((100 bytes came instead of 200|the answer broke off)"):
        store.read("x", 200)
    assert proxy.count("GET") == 6


@pytest.mark.parametrize("length, looks", [(50, 2), (100, 1), (101, 2), (400, 2)])
def test_a_version_replaced_while_it_is_read(s3, proxy, bucket, length, looks):
    """A shorter or a longer one shows; one of the same length came whole, from one request."""
    store = quick(bucket)
    store.write("x", b"old" * 100)
    path = f"{bucket[5:]}/x"
    proxy.on("GET", lambda: s3.put(path, b"new" * length))
    assert store.read("x", 9999) == b"new" * length and proxy.count("GET") == looks


def test_what_stays_broken_is_given_up(proxy, bucket):
    store = quick(bucket, tries=2)
    store.write("x", b"12345")
    for method in ("PUT", "HEAD", "GET", "DELETE"):
        proxy.always(method, 503)
    for action in (lambda: store.write("x", b""), lambda: store.write("y", b"", replace=False), lambda: store.names("a")):
        with pytest.raises(OSError, match="the server answered 503"):
            action()
    with pytest.raises(BadSnapshot, match="x cannot be read .the server answered 503"):
        store.read("x", 9)
    store.remove("x")
    assert proxy.count("DELETE") == proxy.count("GET") == 2 and proxy.count("PUT") == 1 + 2 and proxy.count("HEAD") == 4
    proxy.faults.clear()
    assert store.read("x", 9) == b"12345", "and the store still works"


def test_forbidden_is_not_tried_again(proxy, bucket):
    store = quick(bucket)
    proxy.always("PUT", 403)
    proxy.always("HEAD", 403)
    with pytest.raises(PermissionError, match="the server answered 403 AccessDenied"):
        store.write("x", b"")
    with pytest.raises(BadSnapshot, match="the server answered 403"):
        store.read("x", 9)
    assert proxy.count("PUT") == proxy.count("HEAD") == 1
    with pytest.raises(ValueError, match=r"codistill_dir must be .* write to, but s3://\S+ is not: the server answered 403"):
        Exchange(store, 0).join(RUN)


@pytest.mark.parametrize("problem", ["no bucket", "no server", "no credentials", "bad name"])
def test_a_store_that_is_not_there_is_one_sentence(proxy, bucket, monkeypatch, problem):
    words, url = {"no bucket": "404 NoSuchBucket", "bad name": "ParamValidationError"}, bucket
    if problem == "no bucket":
        url = "s3://elsewhere/run"
    elif problem == "bad name":
        url = "s3://no_such name/run"
    elif problem == "no server":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store, expected = quick(url, tries=2), words.get(problem, "EndpointConnectionError|NoCredentialsError")
    with pytest.raises(OSError, match=expected):
        store.write("x", b"")
    with pytest.raises(ValueError, match=f"codistill_dir must be .* {url} is not: .*({expected})") as error:
        Exchange(store, 0).join(RUN)
    assert "\n" not in str(error.value)


def test_a_slow_server_is_waited_for(proxy, bucket):
    store = quick(bucket, silence_s=30.0)
    store.write("x", b"12345")
    went = threading.Event()
    proxy.on("GET", lambda: went.wait(1.0))  # nobody sets it: an answer after a second
    assert store.read("x", 9) == b"12345" and proxy.count("GET") == 1


@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_a_server_that_hangs_costs_a_bounded_time(proxy, bucket, fault):
    """One that says nothing is left after `silence_s`, one that always says a little after `request_s`."""
    UrlStore(bucket).write("x", bytes(range(200)))
    store = quick(bucket, tries=2, **({"silence_s": 0.5} if fault == "hang" else {"silence_s": 60.0, "request_s": 2.0}))
    start = time.monotonic()
    proxy.always("GET", fault)
    with pytest.raises(BadSnapshot, match="x cannot be read .the server did not answer in time"):
        store.read("x", 200)
    if fault == "hang":
        proxy.always("PUT", fault)
        with pytest.raises(OSError) as error:
            store.write("x", b"")
        assert error.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - start < 20


# Large ones, in parts.


def test_parts(proxy, bucket):
    store = quick(bucket, part_bytes=5 * MIB)
    data = b"0123456789abcdef" * (11 * MIB // 16) + b"end"
    proxy.on("PUT", None, 503)
    assert store.write("x", memoryview(data)) and proxy.count("PUT") == 4 and proxy.count("POST") == 2
    proxy.on("GET", None, "cut")
    assert store.read("x", len(data)) == data and proxy.count("GET") >= 4
    proxy.always("PUT", 500)
    with pytest.raises(OSError, match="the server answered 500"):
        store.write("x", memoryview(data[::-1]))
    with pytest.raises(OSError, match="the server answered 500"):
        store.write("y", memoryview(data))
    assert store.read("x", len(data)) == data and store.read("y", len(data)) is None and store.names("") == ["x"]


# The first writer, at S3: by a conditional put.


def test_somebody_else_writes_between_look_and_put(s3, proxy, bucket):
    store = quick(bucket)
    proxy.on("PUT", lambda: s3.put(f"{bucket[5:]}/run.json", b"theirs"))
    assert store.write("run.json", b"mine", replace=False) is False and store.read("run.json", 9) == b"theirs"
    assert [headers["If-None-Match"] for headers in proxy.headers_seen if "If-None-Match" in headers] == ["*"]


def test_two_conditional_puts_at_once(proxy, bucket):
    """S3 answers 409 when another is under way: try again. A bare 412 is what other servers say for a taken name."""
    store = quick(bucket)
    proxy.on("PUT", 409)
    assert store.write("run.json", b"mine", replace=False) is True and proxy.count("PUT") == 2
    proxy.on("PUT", 409, 412)
    assert store.write("other.json", b"mine", replace=False) is False and store.read("other.json", 9) is None


# What nobody may see.


def test_credentials_are_never_shown(proxy, bucket, caplog):
    caplog.set_level(logging.INFO)  # fairseq's level
    logging.getLogger("fairseq_codistill").setLevel(logging.DEBUG)
    store, said = quick(bucket, tries=2), []
    store.write("x", b"12345")
    assert ACCESS_KEY in str(proxy.headers_seen), "they were used"
    for fault in (403, 500, "reset", 409):
        for method in ("PUT", "GET", "HEAD"):
            proxy.always(method, fault)
        for action in (lambda: store.write("x", b""), lambda: store.read("x", 9), lambda: Exchange(store, 0).join(RUN)):
            with pytest.raises((OSError, ValueError)) as error:
                action()
            said += [str(error.getrepr(style="long", chain=True)), str(error.value), repr(error.value)]
            assert error.value.__suppress_context__ or error.value.__context__ is None
    text = caplog.text + " ".join(said) + str(store)
    assert SECRET_KEY not in text and ACCESS_KEY not in text


@pytest.mark.parametrize(
    "url, shown",
    [
        ("sftp://user:secret@host/run", "sftp://user:***@host/run"),
        ("sftp://user:se/cr@et@host/run", "sftp://user:***@host/run"),
        ("sftp://:secret@host/run", "sftp://:***@host/run"),
        ("https://host/run?sig=secret&a=b", "https://host/run?***"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("abfs://container@account/run", "abfs://container@account/run"),
    ],
)
def test_no_password_is_printed(url, shown):
    assert hidden(url) == shown
    if shown.startswith("sftp"):
        assert str(UrlStore(url.replace("sftp", "memory"))) == shown.replace("sftp", "memory")


# What cannot be a store.


@pytest.mark.parametrize(
    "url, words",
    [
        ("s3://", "is 's3://', which is no place for snapshots; it must be a path, or a URL such as s3://BUCKET/FOLDER"),
        ("memory:///", "is no place for snapshots"),
        ("simplecache::s3://bucket/run", "is no place for snapshots"),
        ("s3://bucket/run?key=secret", r"is 's3://bucket/run\?\*\*\*', which is no place"),
        ("s3://key:secret@bucket/run", r"is 's3://key:\*\*\*@bucket/run', which holds credentials; .*AWS_ACCESS_KEY_ID"),
        ("s4://bucket/run", "is 's4://bucket/run', which fsspec does not know; did you mean s3://"),
        ("s3:/bucket/run", "must be a path or a URL such as s3://BUCKET/FOLDER"),
        ("s3:bucket", "must be a path or a URL"),
        ("file://relative/run", "or file:///PATH, but is 'file://relative/run'"),
        ("reference://x", r"cannot be opened \("),
    ],
)
def test_a_bad_url_is_one_sentence(url, words):
    with pytest.raises(ValueError, match=f"^codistill_dir .*{words}") as error:
        open_store(url)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["s3fs", "aiobotocore", "fsspec"])
def test_a_missing_package_is_one_sentence(monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] in ("s3fs", package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ModuleNotFoundError
    expected = rf"^codistill_dir is 's3://b/run', which needs the package {package}; pip install 'fairseq-codistill\[s3\]'$"
    with pytest.raises(ValueError, match=expected):
        open_store("s3://b/run")


def test_a_path_needs_no_fsspec(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fairseq_codistill.exchange.url_store", None)
    for url in (str(tmp_path / "run"), f"file://{tmp_path}/run"):
        store = open_store(url)
        assert isinstance(store, DirectoryStore) and str(store) == str(tmp_path / "run") and store.write("x", b"1")
    with pytest.raises(ImportError):
        open_store("s3://bucket/run")


def test_parts_of_an_upload_that_was_killed_are_removed_at_the_next_join(bucket):
    """My own alone: another peer's, and what else lies in the bucket, may be under way."""
    store = UrlStore(f"{bucket}/run")
    names = ("run/peer0/u000000001.safetensors", "run/peer01/x", "run/peer1/u000000001.safetensors", "other")
    for name in names:
        upload = store._fs.call_s3("create_multipart_upload", Bucket=bucket[5:], Key=name)
        place = {"Bucket": bucket[5:], "Key": name, "UploadId": upload["UploadId"]}
        store._fs.call_s3("upload_part", PartNumber=1, Body=b"x" * 5 * MIB, **place)
    Exchange(store, 0).join(RUN)
    assert {upload["Key"] for upload in store._fs.list_multipart_uploads(bucket[5:])} == set(names[1:])


def test_who_may_not_list_uploads_joins_all_the_same(proxy, bucket):
    store = quick(f"{bucket}/run")
    store._ask = lambda method, *args, ask=store._ask, **options: (
        _refuse() if method == "call_s3" else ask(method, *args, **options)
    )
    Exchange(store, 0).join(RUN)
    assert Exchange(store, 0).heartbeat(0).state == "waiting"


def _refuse():
    raise OSError(errno.EACCES, "the server answered 403 AccessDenied")
