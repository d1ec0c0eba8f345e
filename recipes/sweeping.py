"""What the sweeps of translation and of images share: scripts that run in process groups of their own, and end together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Dict, Mapping, Sequence


class Scripts:
    """Processes that were started here and have not ended; `stopped_by` is the number of the signal that asked them to."""

    def __init__(self) -> None:
        self.stopped_by = 0
        self._live: set = set()
        self._lock = threading.RLock()  # a second signal may come while `stop` holds it

    def run(self, command: Sequence[object], environment: Mapping[str, str], log: Path) -> int:
        """The exit status of a command whose output is appended to `log`; it is not begun after a signal to stop."""
        with self._lock:
            if self.stopped_by:
                return -signal.SIGTERM
            with open(log, "ab") as out:
                streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
                process = subprocess.Popen([*map(str, command)], env=dict(environment), start_new_session=True, **streams)
            self._live.add(process)
        status = process.wait()
        with self._lock:
            self._live.discard(process)
        return status

    def stop(self, number: int, frame: object = None) -> None:
        """A handler of signals: begin nothing more, ask every script to end; codistill-launch passes it on to its peers.

        It raises nothing: an exception could come before the first run is waited for, and nobody would be told to end.
        """
        with self._lock:
            self.stopped_by = self.stopped_by or number
            for process in self._live:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)

    @contextlib.contextmanager
    def stopped_by_signals(self):
        """SIGTERM and SIGINT `stop` these scripts, also where a shell has started us in the background, deaf to SIGINT."""
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def sweep(runs: Sequence, pool, jobs: int) -> Dict[object, str]:
    """`pool.work` for each run (which has a `name` and a `seed`), `jobs` at a time; returns those that failed and why."""
    failed: Dict[object, str] = {}
    began = time.monotonic()
    with ThreadPoolExecutor(jobs) as executor:
        futures = {executor.submit(pool.work, run): run for run in runs}
        for count, future in enumerate(as_completed(futures), 1):
            run, error = futures[future], future.result()
            if error:
                failed[run] = error
            if not pool.stopped_by:
                so_far = f"[{count}/{len(runs)}, {(time.monotonic() - began) / 60:.1f} min]"
                print(f"{so_far} {run.name} seed {run.seed}: {error or 'done'}", flush=True)
    return failed
