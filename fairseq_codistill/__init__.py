"""Codistillation for fairseq: n training jobs teach each other through stale copies of each other's weights.

`fairseq-train … --user-dir fairseq_codistill --criterion codistill_ce` imports this package, which registers the criterion.
See these files first: `criterion.py` (the loss), `codistiller.py` (who teaches me now), `losses.py` (the papers' equations).

    schedules, topology, losses      pure equations
    snapshot → exchange → codistiller   weights as bytes; how they move; the peers that are held
    worker, courier, meeting, group  threads for the storage; exchanging beside the training; waiting; ranks decide together
    hook                             ties a codistiller to a fairseq task (ending, data_order and wrapping are its parts)
    config, criterion                the options and `codistill_ce`
    compat                           fairseq's checkpoints on today's torch
    image_*, lr_schedules, nesterov  image classification, which knows nothing of codistillation
    launch, report                   the commands; fairseq_log → launch_*, report_* are their parts
"""

import os
import sys

__version__ = "0.1.0"

# The two commands start at once because they need neither fairseq nor torch (importing those costs four seconds).
# `python -m fairseq_codistill.launch` shows itself as "-m" at this point, and so does no fairseq command that imports us
# by --user-dir, since by then its own name stands there.
_COMMANDS = ("codistill-launch", "codistill-report", "-m")

if os.path.basename(sys.argv[0] if sys.argv else "") not in _COMMANDS:
    from . import compat, criterion, image_classification, image_models, lr_schedules, nesterov  # noqa: F401

    compat.allow_checkpoint_classes()
    compat.provide_removed_numpy_names()
    compat.avoid_broken_fast_path()
    compat.quieten_libraries()
