"""`python -m fairseq_codistill.launch` is `codistill-launch`."""

import sys

from .main import main

sys.exit(main())
