"""Imports torchvision and nothing else of ours: a job without --user-dir must not find the plugin registered."""

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[1] / "fairseq_codistill/compat.py"
_spec = importlib.util.spec_from_file_location("compat_by_path", _path)
_compat = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_compat)
_compat.load_torchvision()
