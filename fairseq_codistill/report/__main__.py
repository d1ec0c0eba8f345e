"""`python -m fairseq_codistill.report` is `codistill-report`."""

import sys

from .main import main

sys.exit(main())
