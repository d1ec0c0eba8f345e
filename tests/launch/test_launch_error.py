"""What the launcher shows of a failed peer's log: the one sentence that counts, whole, or the log's end."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.launch import error as launch_error
from fairseq_codistill.launch import progress as launch_progress

ADVICE = (
    "ValueError: All peers of a run must have the same dictionary, but runs/two/exchange was begun with "
    + "a dictionary of 10000 symbols " * 12
    + "and this peer has another; did you forget to give this run a --codistill-dir of its own?"
)
TRACEBACK = """Traceback (most recent call last):
  File "/usr/lib/fairseq_cli/train.py", line 557, in cli_main
    distributed_utils.call_main(cfg, main)
  File "/usr/lib/fairseq/trainer.py", line 123, in train_step
    raise ValueError(
    ^^^^^^^^^^^^^^^^^
"""
LEAKED = "/usr/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: There appear to be 2 leaked semaphores\n"
HEADER = "=== 2025-11-21 00:00:00 | codistill-launch | peer0 of 2 | restart 0 | fairseq-train D\n"
LINES = "\n".join(f"2025-11-21 00:00:00 | INFO | x | line {number}" for number in range(30)) + "\n"


@pytest.mark.parametrize(
    "log, shown",
    [
        (LINES + TRACEBACK + ADVICE + "\n" + LEAKED, [ADVICE]),
        (TRACEBACK + "KeyError: 'x'\n", ["KeyError: 'x'", "  in /usr/lib/fairseq/trainer.py, line 123"]),
        (
            TRACEBACK + "RuntimeError: CUDA error: out of range\nFor debugging pass CUDA_LAUNCH_BLOCKING=1\n\n" + LEAKED,
            ["RuntimeError: CUDA error: out of range", "For debugging pass CUDA_LAUNCH_BLOCKING=1",
             "  in /usr/lib/fairseq/trainer.py, line 123"],
        ),  # fmt: skip
        (  # a rank that torch has spawned
            TRACEBACK + "torch.multiprocessing.spawn.ProcessRaisedException: \n\n-- Process 1 terminated with the "
            "following error:\n" + TRACEBACK + "ValueError: codistill_dir must be given.\n\n",
            ["ValueError: codistill_dir must be given."],
        ),  # fmt: skip
        (
            TRACEBACK + "ValueError: one\n\nDuring handling of the above exception, another exception occurred:\n\n"
            + TRACEBACK + "ValueError: two\n", ["ValueError: two"],
        ),  # fmt: skip
        ("usage: fairseq-train [-h]\nfairseq-train: error: unrecognized arguments: --x\n",
         ["fairseq-train: error: unrecognized arguments: --x"]),
        (TRACEBACK + "ValueError: of the start before\n" + HEADER + "Killed\n", None),
        (TRACEBACK + "ValueError: caught, and long ago\n" + LINES * 2, None),
        (TRACEBACK + "AssertionError\n", None),  # the lines above it say more
        (TRACEBACK, None),
        ("", None),
    ],
)  # fmt: skip
def test_the_reason_is_the_sentence_whole(tmp_path: Path, log: str, shown) -> None:
    (tmp_path / "log").write_text(log)
    sentence, lines = launch_error.reason(str(tmp_path / "log"))
    assert lines == (shown or launch_progress.last_lines(str(tmp_path / "log"))) and bool(sentence) == bool(shown)


def test_a_log_that_is_gone_has_no_reason(tmp_path: Path) -> None:
    assert launch_error.reason(str(tmp_path / "log")) == ("", ["the log cannot be read: No such file or directory"])


@given(st.lists(st.sampled_from([*TRACEBACK.splitlines(), ADVICE, "", " ", "\x00", LEAKED, HEADER, "x: y", "\r\r"])))
def test_any_log_has_a_reason_or_none(lines: list) -> None:
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("\n".join(lines))
        file.flush()
        assert isinstance(launch_error.reason(file.name)[0], str)
