"""What is registered with fairseq. Importing this module registers it all; `registration` does so when fairseq is there."""

from . import compat, criterion  # noqa: F401
from .image import lr_schedules, models, nesterov, task  # noqa: F401

compat.allow_checkpoint_classes()
compat.provide_removed_numpy_names()
compat.avoid_broken_fast_path()
compat.quieten_libraries()
