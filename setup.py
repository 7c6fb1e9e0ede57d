"""Packaging: the map from import names to folders, the dependencies, the `engram` command."""

import re
from pathlib import Path

from setuptools import setup


# Import name -> folder. A folder needs an `__init__.py` (editable installs find none without), and a line here.
PACKAGES = {
    "engram_transformers": "modeling_engram",
    "engram_transformers.configuration": "configuration",
    "engram_transformers.training": "training",
    "engram_transformers.conversion": "conversion",
    "engram_transformers.inspection": "inspection",
    "engram_transformers.model_cards": "model_cards",
}

# Oldest versions that are allowed, and in TESTED the ones that every test has run with.
REQUIRED = [
    "torch>=2.4",
    "transformers>=5.20,<6",
    "accelerate>=1.10",
    "safetensors>=0.6",
    "huggingface_hub>=1.0",
    "peft>=0.18",
    "numpy>=1.26",
    "psutil>=5.9",
    "typer>=0.12",
    "rich>=13",
    "matplotlib>=3.8",
]
TRL = ["trl>=1.16"]  # brings datasets
TESTED = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "huggingface_hub": "2.4.0",
    "peft": "0.21.2",
    "numpy": "2.4.6",
    "trl": "1.16.0",
}

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "modeling_engram" / "__init__.py").read_text())[1]

setup(
    name="engram-transformers",
    version=VERSION,
    description="Engram, a memory of hashed n-grams, for any causal language model of Hugging Face Transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"engram_transformers": ["py.typed"], "engram_transformers.model_cards": ["*.md"]},
    install_requires=REQUIRED,
    extras_require={
        "demo": ["gguf>=0.17"],
        "trl": TRL,
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff==0.17.6",
            "torchao>=0.18",
            "bitsandbytes>=0.50; sys_platform == 'linux'",
            *TRL,
        ],
        "foreign": ["pytest>=8", "pytest-timeout>=2.3", "parameterized>=0.9"],
    },
    entry_points={"console_scripts": ["engram = engram_transformers.conversion.cli:main"]},
)
