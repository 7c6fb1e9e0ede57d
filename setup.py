"""Packaging: the map from import names to folders, the dependencies, the `engram` command."""

import re
from pathlib import Path

from setuptools import setup


# Import name -> folder. A folder needs an `__init__.py` (editable installs find none without), and a line here.
PACKAGES = {
    "engram_transformers": "modeling_engram",
    "engram_transformers.configuration": "configuration",
    "engram_transformers.adapters": "adapters",
    "engram_transformers.training": "training",
    "engram_transformers.conversion": "conversion",
    "engram_transformers.serving": "serving",
    "engram_transformers.inspection": "inspection",
    "engram_transformers.model_cards": "model_cards",
    "engram_vllm": "engram_vllm",
}

# The oldest and newest versions that the core tests pass with (make test-versions). requirements/lock.txt holds the
# exact set that make and CI install, and every test passes with.
REQUIRED = [
    "torch>=2.6",  # transformers refuses an older one
    "transformers>=5.20.2,<5.25",
    "accelerate>=1.15",  # its hooks bring rows to the device
    "safetensors>=0.8",
    "huggingface_hub>=1.31",
    "numpy>=1.26",
    "pyyaml>=6",  # recipes; transformers needs it anyway
    "psutil>=5.9",  # free host memory, which decides where tables go; accelerate needs it anyway
    # Required because users name it, and imported only when it is used. Transformers refuses an older one.
    "peft>=0.20",
    # For the `engram` command alone, and no extra all the same: every transformers of the range needs typer, and typer
    # needs rich, so an extra would leave nothing out. An older typer does not know `str | None`.
    "typer>=0.15.4",
    "rich>=13",
]
TRL = ["trl>=1.16; python_version >= '3.11'"]  # brings datasets
SERVE = ["transformers[serving]>=5.20.2,<5.25"]  # for `engram serve`

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
    package_data={
        "engram_transformers.conversion": ["families/*.yaml"],
        "engram_transformers.model_cards": ["*.md"],
        "engram_transformers.training": ["general_english.*"],
        "engram_transformers.inspection": ["page.*"],
    },
    install_requires=REQUIRED,
    extras_require={
        "demo": ["gguf>=0.17", "matplotlib>=3.8"],
        "trl": TRL,
        "serve": SERVE,
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff==0.17.6",
            "uv==0.13.9",
            "lm-eval>=0.4.13",
            "torchao>=0.18",
            "bitsandbytes>=0.50; sys_platform == 'linux'",
            *TRL,
            *SERVE,
        ],
        "foreign": ["pytest>=8", "pytest-timeout>=2.3", "parameterized>=0.9"],
    },
    entry_points={
        "console_scripts": ["engram = engram_transformers.conversion.cli:main"],
        "vllm.general_plugins": ["engram = engram_vllm:register"],
    },
)
