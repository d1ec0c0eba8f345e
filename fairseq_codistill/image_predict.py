"""`python -m fairseq_codistill.image_predict`, a command: see `image/predict.py`."""

import sys

from .image.predict import main

if __name__ == "__main__":
    sys.exit(main())
