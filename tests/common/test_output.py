"""stdout and stderr that never raise: what is dropped, and how one knows."""

from __future__ import annotations

import os
import sys

import pytest

from fairseq_codistill.common.output import Tolerant, failure, hurried, is_gone, tolerant_output


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        try:
            os.close(end)
        except OSError:
            pass  # the test has closed it


def test_words_arrive_at_once_and_odd_signs_are_replaced(pipe):
    reader, writer = pipe
    stream = Tolerant(writer, "ascii")
    assert print("gr\u00fcn", file=stream) is None and os.read(reader, 99) == b"gr?n\n"
    assert not stream.isatty() and stream.fileno() == writer and stream.writable()


def test_a_reader_that_has_gone_is_no_failure(pipe):
    reader, writer = pipe
    stream = Tolerant(writer, "utf-8")
    os.close(reader)
    print("unread", file=stream, flush=True)
    assert is_gone(stream) and failure(stream) == ""


def test_a_full_disk_is_a_failure():
    with open("/dev/full", "w") as full:
        stream = Tolerant(full.fileno(), "utf-8")
        print("lost", file=stream, flush=True)
    assert failure(stream) == "No space left on device" and not is_gone(stream)


def test_a_reader_that_stands_still_is_waited_for_once(pipe, monkeypatch):
    reader, writer = pipe
    os.set_blocking(reader, False)
    with os.fdopen(os.dup(writer), "w") as text, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", text)
        with tolerant_output():
            assert sys.stdout.patience is None, "a command that has nothing else to do waits"
            with hurried(0.05):
                for _ in range(200):
                    print("x" * 4095)
                assert sys.stdout._is_stuck and not is_gone(sys.stdout) and failure(sys.stdout) == ""
                while True:
                    try:
                        os.read(reader, 65536)
                    except BlockingIOError:
                        break
                print("again")
            assert sys.stdout.patience is None
        assert sys.stdout is text
    assert os.read(reader, 99) == b"again\n"


def test_streams_of_any_kind(monkeypatch, capsys):
    """None where a descriptor was closed when Python began; without a descriptor under a test's capture."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        with tolerant_output():
            assert print("nowhere", file=sys.stderr) is None and not sys.stderr.isatty()
            print("captured")
    assert capsys.readouterr().out == "captured\n"
    assert not is_gone(sys.stdout) and failure(sys.stdout) == ""
