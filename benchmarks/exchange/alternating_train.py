"""fairseq-train whose peers exchange in every second interval only, for speed.py; all other options are its own.

Appends to $ALTERNATING_TIMES/peer{i} one line for each update as it begins: its number, and seconds.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def exchanges(update: int, interval: int) -> bool:
    """Whether the interval that begins at `update` begins with an exchange: those of even numbers do."""
    return update // interval % 2 == 0


def alternate(times: Path) -> None:
    """Make every Codistiller of this process alternate, and write down when it is asked for an update."""
    from fairseq_codistill.core.codistiller import Codistiller

    asked, exchange = Codistiller.teaching, Codistiller._exchange
    lines = open(times / f"peer{os.environ['CODISTILL_PEER']}", "w", buffering=1, encoding="utf-8")

    def teaching(self, update):
        if update != self._update:
            lines.write(f"{update} {time.perf_counter():.4f}\n")
        return asked(self, update)

    def sometimes_exchange(self, update, first):
        if exchanges(update, self.interval):
            exchange(self, update, first)
        else:
            self._exchanged, self._due = time.monotonic(), []  # what is held stays held, and nothing is looked for

    Codistiller.teaching, Codistiller._exchange = teaching, sometimes_exchange


if __name__ == "__main__":
    from fairseq_cli.train import cli_main

    del sys.argv[1]  # the word fairseq-train, by which codistill-launch knows what it starts
    alternate(Path(os.environ["ALTERNATING_TIMES"]))
    cli_main()
