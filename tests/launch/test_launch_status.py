"""codistill-launch status: what it says of each peer, whose clock it says it by, and what it does not believe."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fairseq_runs import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fairseq_codistill.exchange.exchange import Exchange, Run
from fairseq_codistill.exchange.manifest import BadSnapshot, Heartbeat, Manifest, file_name
from fairseq_codistill.exchange.snapshot import fingerprint, tensors_of
from fairseq_codistill.exchange.status import PEERS_LIMIT, Age, StatusReader, age_by_its_clock, find_exchange, plain, read_run
from fairseq_codistill.exchange.stores import DirectoryStore, MemoryStore, open_store
from fairseq_codistill.launch import main as launch
from fairseq_codistill.launch.status import age_text
from fairseq_codistill.launch.view import size

NOW = 1.8e9  # seconds since 1970, by the watcher's clock
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clocks:
    """Two clocks that only the test moves."""

    def __init__(self) -> None:
        self.wall, self.steady = NOW, 0.0

    def tick(self, seconds: float) -> None:
        self.wall, self.steady = self.wall + seconds, self.steady + seconds


def begin(store, peers: int = 3, **facts) -> None:
    run = {"format": 1, "peers": peers, "classes": 10_000, "dictionary_sha256": "ab" * 32, **facts}
    store.write("run.json", json.dumps(run).encode())


def alive(store, peer: int, **facts) -> None:
    told = dict(start_id="one", beat=1, state="training", host="node17", pid=4711, time=NOW - 3)
    told.update(update=160, updates=300, speed=4.5)
    store.write(f"peer{peer}/alive.json", Heartbeat(**{**told, **facts}).to_json())


def snapshot(store, peer: int, update: int = 150, **facts) -> None:
    told = dict(
        update=update, epoch=2, file=file_name(update), bytes=105_300_000, checksum="sha256:" + "ab" * 32, dtype="bfloat16",
        fingerprint="cd" * 8, model={}, time=NOW - 70, valid_loss=3.871,
    )  # fmt: skip
    store.write(f"peer{peer}/latest.json", Manifest(**{**told, **facts}).to_json())


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def store(clocks) -> MemoryStore:
    store = MemoryStore()
    begin(store)
    return store


def observe(store, clocks: Clocks) -> StatusReader:
    return StatusReader(store, clock=lambda: clocks.wall, monotonic=lambda: clocks.steady)


@pytest.fixture
def exchange(tmp_path: Path) -> DirectoryStore:
    """A run's exchange below its --save-dir, which is `tmp_path/run`."""
    store = DirectoryStore(str(tmp_path / "run/exchange"))
    begin(store)
    return store


@pytest.fixture
def at_now(monkeypatch) -> None:
    """The command's own clock stands at NOW."""
    monkeypatch.setattr(StatusReader.__init__, "__defaults__", (lambda: NOW, time.monotonic))


def status(capsys, *argv) -> tuple[int, str, str]:
    code = launch.main(["status", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


# What is known of a peer.


def test_what_each_peer_says(store, clocks):
    alive(store, 0, teachers={"1": 100, "2": 200})
    snapshot(store, 0)
    alive(store, 1, state="ended", update=300)
    snapshot(store, 1, 300, done=True)
    first, second, third = observe(store, clocks).look()
    assert (first.state, first.heartbeat.update, first.newest.update) == ("training", 160, 150)
    assert first.teachers == {1: 100, 2: 200}
    assert (first.heartbeat_age, first.snapshot_age) == (Age(3.0), Age(70.0)) and first.silent is None
    assert second.state == "ended" and third.state == "absent" and third.heartbeat is third.newest is None


def test_the_last_snapshot_may_be_newer_than_the_last_sign(store, clocks):
    alive(store, 0, state="ended", update=160)
    snapshot(store, 0, 300, done=True)
    alive(store, 1, update=160)  # it was started again from a checkpoint before its newest snapshot
    snapshot(store, 1, 200)
    assert [row.update for row in observe(store, clocks).look()] == [300, 160, None]


def test_a_peer_that_gives_no_sign_of_life(store, clocks):
    snapshot(store, 0)
    snapshot(store, 1, done=True)
    store.write("peer2/alive.json", b"")
    assert [row.state for row in observe(store, clocks).look()] == ["unknown", "ended", "unknown"]


def test_silence_is_told_by_the_watchers_own_clock(store, clocks):
    """Whatever the peer's clock says: one is days behind and beats, one is exact and does not, one has ended."""
    reader = observe(store, clocks)
    states = []
    for beat in range(8):
        alive(store, 0, beat=beat, time=NOW - 86400)
        alive(store, 1, time=clocks.wall)
        alive(store, 2, state="ended", time=NOW)
        states.append([row.state for row in reader.look()])
        clocks.tick(5)
        clocks.wall -= 3600
    assert states[:6] == [["training", "training", "ended"]] * 6
    assert states[6:] == [["training", "silent", "ended"]] * 2
    alive(store, 1, beat=2)
    row = reader.look()[1]
    assert row.state == "training" and row.silent is False and row.heartbeat_age == Age(0.0, local=True)


def test_a_restarted_peer_whose_beats_begin_again_is_not_silent(store, clocks):
    reader = observe(store, clocks)
    alive(store, 0, start_id="one", beat=0)
    reader.look()
    clocks.tick(29)
    alive(store, 0, start_id="two", beat=0)
    reader.look()
    clocks.tick(29)
    assert reader.look()[0].state == "training"
    clocks.tick(1)
    assert reader.look()[0].state == "silent"


def test_an_age_is_ours_once_we_saw_it_come(store, clocks):
    reader = observe(store, clocks)
    snapshot(store, 0, 100, time=NOW - 500)
    assert reader.look()[0].snapshot_age == Age(500.0)
    snapshot(store, 0, 150, time=NOW + 9999)
    clocks.tick(2)
    assert reader.look()[0].snapshot_age == Age(0.0, local=True)
    clocks.tick(7)
    assert reader.look()[0].snapshot_age == Age(7.0, local=True)


@given(st.floats(-1e300, 1e300), st.floats(0, 4e9))
def test_no_age_is_negative(written, now):
    age = age_by_its_clock(written, now)
    assert (age.seconds is None) != (age.ahead is None)
    assert age.seconds is None or 0 <= age.seconds <= 4e8
    assert "-" not in age_text(age) and age_text(age).endswith("*"), "a person sees whose clock it is"


@pytest.mark.parametrize(
    "written, text",
    [
        (NOW - 45, "45s*"), (NOW - 864_000, "10d00h*"), (NOW + 1, "0s*"), (NOW + 7500, "2h05m ahead*"),
        (0, "absurd*"), (1e17, "absurd*"),
    ],
)  # fmt: skip
def test_an_age_in_words(written, text):
    assert age_text(age_by_its_clock(written, NOW)) == text


def test_sizes_in_words():
    assert [size(n) for n in (0, 812, 1500, 105_300_000, 999_960, 2**62)] == [
        "0 B", "812 B", "1.5 kB", "105.3 MB", "1.0 MB", "4.6 EB"]  # fmt: skip


def test_only_teachers_that_can_be(store, clocks):
    names = {"1": 1, "01": 2, "١": 3, "9" * 5000: 4, "12": 5}
    alive(store, 0, teachers=names)
    assert observe(store, clocks).look()[0].teachers == {1: 1, 12: 5}


def test_a_run_that_is_begun_anew_while_we_watch(store, clocks):
    reader = observe(store, clocks)
    assert len(reader.look()) == 3
    begin(store, peers=5)
    assert len(reader.look()) == 5
    store.write("run.json", b"[]")
    assert len(reader.look()) == 5 and "run.json must be that of a run" in reader.note
    store.remove("run.json")
    assert len(reader.look()) == 5 and reader.note == ""


# The command.


def test_the_table(exchange, tmp_path, capsys, at_now):
    alive(exchange, 0, teachers={"1": 100, "2": 200, "3": 160, "4": 1, "5": 2})
    snapshot(exchange, 0)
    alive(exchange, 1, time=NOW - 300, updates=None, speed=None)
    code, out, err = status(capsys, tmp_path / "run")
    lines = out.splitlines()
    assert code == 0 and err == ""
    assert lines[0] == f"{exchange}: 3 peers, dictionary of 10000 symbols (sha256 abababababab), format 1"
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == [
        "peer", "state", "update", "upd/s", "newest snapshot", "its age", "valid loss", "learns from", "host:pid", "heartbeat",
    ]  # fmt: skip
    assert cells[1] == [
        "0", "training", "160/300 (53%)", "4.5", "150, 105.3 MB, bfloat16", "1m10s*", "3.871",
        "1 at 100 (60 old), 2 at 200 (40 ahead), 3 at 160 (0 old), 2 more", "node17:4711", "3s*",
    ]  # fmt: skip
    assert cells[2] == ["1", "training?", "160", "-", "-", "-", "-", "-", "node17:4711", "5m00s*"]
    assert cells[3] == ["2", "absent", "-", "-", "-", "-", "-", "-", "-", "-"]
    assert "* by its clock" in out and "one look cannot tell whether a peer is still alive: --watch can" in out


def test_the_layout_is_the_exchanges_own(tmp_path, capsys):
    """What a real peer writes is understood, given as the exchange or as the --save-dir above it."""
    net, peer = nn.Linear(3, 2), Exchange(DirectoryStore(str(tmp_path / "exchange")), 0)
    peer.join(Run(2, None, None))
    peer.publish(tensors_of(net), 50, epoch=1, model={}, time=0.0, fingerprint=fingerprint(net), valid_loss=2.5)
    for path in (tmp_path, tmp_path / "exchange", f"{tmp_path}/exchange/"):
        code, out, _ = status(capsys, path, "--json")
        told = json.loads(out)
        assert code == 0 and told["run"] == {"peers": 2, "classes": None, "dictionary_sha256": None}
        assert [row["state"] for row in told["peers"]] == ["waiting", "absent"]
        assert told["peers"][0]["newest"]["update"] == 50 and told["peers"][0]["newest"]["valid_loss"] == 2.5
        assert told["peers"][0]["snapshot_age"] is None and told["peers"][0]["snapshot_clock_ahead"] < -1e9


def test_a_url_as_the_exchange_or_above_it(capsys):
    run = "memory://codistill-status-test/run"
    store = open_store(f"{run}/exchange")
    begin(store)
    alive(store, 2, update=123)
    for url in (run, f"{run}/exchange"):
        code, out, _ = status(capsys, url, "--json")
        assert code == 0 and json.loads(out)["peers"][2]["update"] == 123


def test_json_for_scripts(exchange, capsys, at_now):
    alive(exchange, 1, teachers={"0": 100})
    code, out, _ = status(capsys, exchange.root, "--json")
    row = json.loads(out)["peers"][1]
    assert code == 0 and out.count("\n") == 1
    assert (row["state"], row["silent"], row["update"], row["updates"], row["speed"]) == ("training", None, 160, 300, 4.5)
    assert (row["last_sign_age"], row["last_sign_age_by_its_clock"], row["teachers"]) == (3.0, True, {"0": 100})


def test_bad_input_is_one_sentence(tmp_path, exchange, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/run.json").write_text("[1]")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/run.json").symlink_to(tmp_path / "file")
    cases = {
        (tmp_path / "none",): "DIR must be .* '.*none' is not there; did you forget to start the run",
        (tmp_path / "file",): "DIR must be .* is a file",
        (tmp_path / "other",): "neither '.*other' nor its exchange/ holds a run.json; did you forget .*--codistill-dir",
        ("memory://codistill-status-test/other",): "neither 'memory://.*/other' nor its exchange/ holds a run.json",
        ("nonsense://host/run",): "codistill_dir is 'nonsense://host/run', which fsspec does not know",
        (tmp_path / "strange",): "strange/run.json must be that of a run of format 1",
        (tmp_path / "linked",): "must hold the run.json of a run, but run.json cannot be read",
        (tmp_path / "evil\x1b[31m\n",): r"evil\?\[31m\?' is not there",
        (): "DIR",
        (exchange.root, "--seconds", "0"): "--seconds must be from 0.1 to 86400, but is 0",
        (exchange.root, "--seconds", "nan"): "--seconds must be from 0.1",
        (exchange.root, "--wtach"): "unrecognized arguments: --wtach .see codistill-launch status --help",
    }
    for argv, words in cases.items():
        code, out, err = status(capsys, *argv)
        assert code == 2 and out == "" and err.count("\n") == 1, argv
        assert re.match(f"codistill-launch status: .*{words}", err), err


@pytest.mark.parametrize("peers", [0, -1, 4097, 10**30, True, 2.0, "2", None])
def test_a_run_of_more_peers_than_can_be(peers):
    store = MemoryStore()
    begin(store, peers=peers)
    with pytest.raises(ValueError, match="with 1 to 4096 peers"):
        read_run(store)


def test_status_is_the_first_word_only(capsys):
    assert launch.main(["--peers", "0", "--", sys.executable, "status"]) == 2
    assert "codistill-launch: --peers must be at least 1" in capsys.readouterr().err
    for argv, words in ((["--help"], "codistill-launch status DIR"), (["status", "--help"], "--watch")):
        with pytest.raises(SystemExit) as stop:
            launch.main(argv)
        assert stop.value.code == 0 and words in capsys.readouterr().out


# Another person's data.

EVIL = "\x1b]0;owned\x07\x1b[2J\r\n\u202e\u0085"


def test_no_control_character_reaches_the_terminal(exchange, capsys):
    begin(exchange, dictionary_sha256=EVIL)
    snapshot(exchange, 0, dtype=EVIL, fingerprint=EVIL, model={EVIL: EVIL})
    exchange.write("peer1/latest.json", json.dumps({"format": EVIL}).encode())
    exchange.write("peer1/alive.json", json.dumps({"format": 1, "life": EVIL}).encode())
    alive(exchange, 2, host="[bold]x[/bold][/nothing]")
    code, out, _ = status(capsys, exchange.root)
    assert code == 0 and all(sign.isprintable() for sign in out.replace("\n", ""))
    assert "refused: the manifest's format must be 1" in out and "refused: the heartbeat" in out
    assert "[bold]x[/bold][/nothing]:4711" in out, "and no markup is obeyed"
    code, out, _ = status(capsys, exchange.root, "--json")
    assert code == 0 and out.strip("\n").isprintable() and len(json.loads(out)["peers"]) == 3


@given(st.text(), st.integers(4, 50))
def test_plain_text_is_short_and_plain(text, limit):
    shown = plain(text, limit)
    assert shown.isprintable() and len(shown) <= limit + 3
    assert shown == text or not text.isprintable() or len(text) > limit


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"{}", b"[" * 100_000, b'{"format":' + b"[" * 900, b"9" * 100_000, b" " * (1 << 21)]
)
def test_a_file_that_is_wrong_is_a_sentence_in_its_row(exchange, capsys, data):
    exchange.write("peer1/alive.json", data)
    exchange.write("peer1/latest.json", data)
    snapshot(exchange, 2)
    code, out, _ = status(capsys, exchange.root)
    assert code == 0 and out.count("refused: ") == 2 and "150, 105.3 MB" in out


def test_what_is_no_plain_file_does_not_hold_us(exchange, tmp_path, capsys):
    for peer in range(3):
        (tmp_path / f"run/exchange/peer{peer}").mkdir()
    os.mkfifo(tmp_path / "run/exchange/peer0/alive.json")
    (tmp_path / "run/exchange/peer1/alive.json").symlink_to("/dev/zero")
    (tmp_path / "run/exchange/peer2/alive.json").mkdir()
    code, out, _ = status(capsys, exchange.root)
    assert code == 0 and out.count("refused: ") == 3


def test_only_the_runs_peers_are_looked_for(clocks):
    """However many folders somebody makes: none is listed, and only two files of each peer are opened."""

    class Watched(MemoryStore):
        def names(self, folder):
            raise AssertionError("a listing can be of any length")

        def read(self, name, limit):
            opened.append(name)
            return super().read(name, limit)

    opened: list[str] = []
    store = Watched()
    begin(store, peers=2)
    alive(store, 99999999)
    reader = observe(store, clocks)
    opened.clear()
    assert [row.peer for row in reader.look()] == [0, 1]
    assert sorted(opened) == ["peer0/alive.json", "peer0/latest.json", "peer1/alive.json", "peer1/latest.json", "run.json"]


def test_a_store_that_fails_is_a_sentence_in_each_row(clocks):
    class Failing(MemoryStore):
        def read(self, name, limit):
            if name.endswith("alive.json"):
                raise OSError("the bucket answered 503")
            if name.endswith("latest.json"):
                raise BadSnapshot(f"{name} cannot be read")
            return super().read(name, limit)

    store = Failing()
    begin(store)
    for row in observe(store, clocks).look():
        assert row.problems == {
            "alive.json": "the bucket answered 503", "latest.json": f"peer{row.peer}/latest.json cannot be read"
        }  # fmt: skip


def test_the_largest_run_is_shown_soon(exchange, capsys):
    begin(exchange, peers=PEERS_LIMIT)
    alive(exchange, PEERS_LIMIT - 1)
    start = time.monotonic()
    code, out, _ = status(capsys, exchange.root, "--json")
    assert code == 0 and json.loads(out)["peers"][-1]["state"] == "training"
    assert time.monotonic() - start < 20


# In a process of its own.

COMMAND = "import sys; from fairseq_codistill.launch.main import main; sys.exit(main())"


def command(*argv, **options) -> subprocess.Popen:
    path = {"PYTHONPATH": str(ROOT)}
    environ = {**os.environ, **path, **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", COMMAND, "status", *map(str, argv)], env=environ, **options)


def test_neither_torch_nor_fairseq_is_loaded(exchange):
    code = COMMAND.replace("sys.exit(main())", "main(); sys.exit(bool({'torch', 'fairseq', 'numpy'} & set(sys.modules)))")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code, "status", exchange.root], env=environ, timeout=60).returncode == 0


def test_watching_in_a_pipe_is_plain_blocks_until_ctrl_c(exchange):
    watching = command(exchange.root, "--watch", "--seconds", "0.1", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(watching, "absent")
    alive(exchange, 1, update=123)
    until(watching, "123/300")
    watching.send_signal(signal.SIGINT)
    rest, err = watching.communicate(timeout=30)
    assert watching.returncode == 0 and err == "" and "\x1b" not in rest


def until(process: subprocess.Popen, words: str) -> None:
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without {words!r}")


def test_watching_on_a_terminal_draws_in_place_until_ctrl_c(exchange):
    terminal, inner = pty.openpty()
    watching = command(
        exchange.root, "--watch", "--seconds", "0.1", stdin=inner, stdout=inner, stderr=inner,
        env={"TERM": "xterm", "COLUMNS": "79", "LINES": "24"},
    )  # fmt: skip
    os.close(inner)
    shown = read_until(terminal, b"absent")
    alive(exchange, 1, update=123)
    shown += read_until(terminal, b"123/300")
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 0
    os.close(terminal)
    assert b"\x1b[1A" in shown, "the second look is drawn over the first"
    lines = CODES.sub("", shown.decode(errors="replace")).splitlines()
    assert max(map(len, lines)) <= 79 and "Traceback" not in shown.decode()
    assert not any("host:pid" in line for line in lines), "what a narrow terminal has no room for is left out"


def read_until(terminal: int, words: bytes, seconds: float = 30.0) -> bytes:
    data, deadline = b"", time.monotonic() + seconds
    while words not in data:
        assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], f"no {words!r} in {data!r}"
        data += os.read(terminal, 65536)
    return data


def test_a_reader_that_has_seen_enough_ends_it_well(exchange):
    watching = command(exchange.root, "--watch", "--seconds", "0.1", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    watching.stdout.readline()
    watching.stdout.close()
    assert watching.wait(30) == 0 and watching.stderr.read() == b""
    watching.stderr.close()


def test_a_look_that_cannot_be_written_is_an_error(exchange):
    for argv in ((), ("--json",), ("--watch", "--seconds", "0.1")):
        with open("/dev/full", "w") as full:
            looking = command(exchange.root, *argv, stdout=full, stderr=subprocess.PIPE, text=True)
        _, err = looking.communicate(timeout=30)
        assert looking.returncode == 2
        assert err == "codistill-launch status: what it shows cannot be written: No space left on device\n"


def test_a_save_dir_without_an_exchange_of_its_own(exchange, tmp_path):
    assert str(find_exchange(str(tmp_path / "run"))) == str(find_exchange(exchange.root)) == exchange.root
