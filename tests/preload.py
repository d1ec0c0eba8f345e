"""What the server that jobs are forked from imports once, rather than each job for itself: six seconds of each.

Nothing of the plugin: a job without --user-dir must not find it registered.
"""

import gc
import importlib
import importlib.util
import logging
from pathlib import Path

# First of all, since it sets the logging up as in a job. Then what fairseq, torch and the plugin import when they first need
# it; torch's optimizers bring sympy and a compiler.
for _name in (
    "fairseq_cli.train", "fairseq_cli.generate", "fairseq_cli.validate", "fairseq_cli.preprocess", "fairseq_cli.hydra_train",
    "torch._dynamo", "torch.distributed.fsdp", "safetensors.torch", "torch.utils.tensorboard", "requests",
):  # fmt: skip
    try:
        importlib.import_module(_name)
    except ImportError:  # not in every version
        pass

# torchvision, where it loads, as the plugin does it.
_spec = importlib.util.spec_from_file_location("compat_by_path", Path(__file__).parents[1] / "fairseq_codistill/compat.py")
_compat = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_compat)
try:
    _compat.load_torchvision()
except ValueError:
    pass


def _read_a_configuration() -> None:
    """fairseq has hydra parse 284 options for each job; its parser remembers what it has seen once."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from hydra.core.global_hydra import GlobalHydra

    words = ["data", "--arch", "transformer_iwslt_de_en", "--criterion", "cross_entropy", "--optimizer", "adam"]
    convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
    GlobalHydra.instance().clear()


_levels = logging.root.level, list(logging.root.handlers)
_read_a_configuration()
assert (logging.root.level, logging.root.handlers) == _levels
gc.collect()
gc.freeze()  # what is here stays: the collector of a job need not look at it, nor touch its pages
