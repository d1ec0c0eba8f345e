"""Codistillation for fairseq: n training jobs teach each other through stale copies of each other's weights.

`fairseq-train … --user-dir PATH --criterion codistill_ce` imports this package (`codistill-launch --user-dir` prints PATH),
which registers the criterion. So does any program that imports both, in either order. Without fairseq it is light.
See these files first: `criterion.py` (the loss), `codistiller.py` (who teaches me now), `losses.py` (the papers' equations).

    schedules, topology, losses      pure equations
    snapshot → exchange → codistiller   weights as bytes; how they move; the peers that are held
    worker, courier, meeting, group  threads for the storage; exchanging beside the training; waiting; ranks decide together
    hook                             ties a codistiller to a fairseq task (ending, data_order and wrapping are its parts)
    config, criterion                the options and `codistill_ce`
    registration, plugin             when we register with fairseq, and what
    compat                           fairseq's checkpoints on today's torch
    image_*, lr_schedules, nesterov  image classification, which knows nothing of codistillation
    launch, report                   the commands; fairseq_log → launch_*, report_* are their parts
"""

from .registration import register_with_fairseq

__version__ = "0.1.0"

register_with_fairseq()
