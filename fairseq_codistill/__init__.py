"""Codistillation for fairseq: n training jobs teach each other through stale copies of each other's weights.

`fairseq-train … --user-dir PATH --criterion codistill_ce` imports this package (`codistill-launch --user-dir` prints PATH),
which registers the criterion. So does any program that imports both, in either order. Without fairseq it is light.
See these files first: `criterion.py` (the loss), `core/codistiller.py` (which peers teach), `core/losses.py` (the equations).

The folders, each of which imports only from those above it:

    common/      the version, paths, output to terminals, fairseq's log lines
    exchange/    weights as bytes, and how they move between peers
    core/        distances, schedules, frozen peers: codistillation with torch alone, for any trainer
    launch/      codistill-launch
    report/      codistill-report
    image/       image classification for fairseq, which knows nothing of codistillation

The plugin, which alone knows fairseq, is in this folder: `config` (the options), `criterion` (`codistill_ce`), `teachers`
(models in files), `hook` (ties a codistiller to a task; `ending`, `data_order` and `wrapping` are its parts), `compat` (fairseq
on today's libraries), `registration` and `plugin` (when this package registers with fairseq, and what).
"""

from .common.version import __version__ as __version__
from .registration import register_with_fairseq

register_with_fairseq()
