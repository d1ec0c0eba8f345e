"""Package fairseq-codistill: a fairseq --user-dir plugin and the commands around it."""
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
DOCS = ["mkdocs-material", "mkdocstrings[python]"]


def written_version() -> str:
    """Read, not imported: nothing that the package needs is there yet."""
    source = (HERE / "fairseq_codistill/common/version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)[1]


setup(
    name="fairseq-codistill",
    version=written_version(),
    description="Codistillation for fairseq: training jobs teach each other through stale copies of their weights",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.9",
    packages=find_packages(include=["fairseq_codistill", "fairseq_codistill.*"]),
    install_requires=[
        # Stock fairseq cannot be imported on Python >= 3.11; fairseq-fixed is its main branch with that mended.
        # Both provide the module `fairseq`, so there must be one or the other, never both.
        'fairseq-fixed==0.12.3.1; python_version>="3.11"',
        'fairseq==0.12.2; python_version<"3.11"',
        "torch",
        "numpy",
        "sacrebleu",
        "sentencepiece",
        "safetensors",
        "rich",
        "matplotlib",
        "tensorboard",
        "requests",
        "sacremoses",
        "subword-nmt",
        "tqdm",
        'tomli; python_version<"3.11"',  # the recipes' TOML
    ],
    extras_require={
        "image": ["torchvision"],
        "s3": ["s3fs"],
        "docs": DOCS,
        # moto's extra "server" would bring all of AWS, and thirty packages; its S3 needs no more than flask.
        "dev": [
            "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "s3fs", "moto[s3]", "flask", "flask-cors",
            "simpy", "scipy", "torchvision", "scikit-learn", *DOCS,
        ],  # fmt: skip
    },
    entry_points={
        "console_scripts": [
            "codistill-launch=fairseq_codistill.launch.main:main",
            "codistill-report=fairseq_codistill.report.main:main",
        ],
    },
)
