"""A checkpoint folder -> what it holds, what is wrong with it, and its tensors a few rows at a time.

safetensors only: nothing is unpickled. Looking at a folder reads headers, not weights. Either layout is understood
(convert_tensors.py); which it is, the files' names tell, and whether weights are FP8, config.json.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import DeepseekV3Config

from deepseek_v3.convert_tensors import (
    CheckpointFault,
    Expected,
    Placed,
    expected_tensors,
    official_layout,
    scale_of,
)
from deepseek_v3.fp8.reference import BLOCK

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
"""The `quantization_config` of released checkpoints."""

_OFFICIAL_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_AGAIN = "download or save it again"


@dataclass(frozen=True)
class Held:
    """A tensor in a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    def rows(self, start: int, stop: int) -> Tensor:
        """[start:stop] along the first dimension. Nothing else is read, or kept in memory as a mapped file would be."""
        dtype = DTYPES[self.dtype]
        row = dtype.itemsize * torch.Size(self.shape[1:]).numel()
        buffer = bytearray((stop - start) * row)
        with self.file.open("rb") as file:
            file.seek(self.offset + start * row)
            if file.readinto(buffer) != len(buffer):
                raise CheckpointFault(f"{self.file}: it ends within {self.name}; {_AGAIN}")
        return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(stop - start, *self.shape[1:])


@dataclass
class Folder:
    """A checkpoint as it lies on disk."""

    path: Path
    settings: dict[str, Any]
    """config.json, with whatever it holds besides."""
    config: DeepseekV3Config
    fp8: bool
    ranks: int | None
    """Files of the official layout; None: Hugging Face's."""
    files: list[Path] = field(default_factory=list)
    expected: dict[str, Expected] = field(default_factory=dict)
    layout: dict[str, Placed] = field(default_factory=dict)
    held: dict[str, list[Held]] = field(default_factory=dict)
    """Hugging Face name -> the tensor, or in the official layout the part of each rank that has one."""
    faults: list[str] = field(default_factory=list)
    """What is missing, superfluous or otherwise than config.json has it: file, tensor and remedy."""

    def in_mtp_layer(self, name: str) -> bool:
        """Whether a tensor, by its name in either layout, belongs to the layer behind the last."""
        return name.removeprefix("model.").startswith(f"layers.{self.config.num_hidden_layers}.")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[start:stop] of a tensor by its Hugging Face name, put together from the ranks' parts."""
        parts, dim = self.held[name], self.layout[name].dim if self.layout else None
        if dim is None:
            return parts[0].rows(start, stop)
        if dim == 1:
            return torch.cat([part.rows(start, stop) for part in parts], 1)
        height = parts[0].shape[0]
        inside = [(part, start - i * height, stop - i * height) for i, part in enumerate(parts)]
        return torch.cat([p.rows(max(a, 0), min(b, height)) for p, a, b in inside if a < height and b > 0])


def read_folder(path: Path, *, drop_mtp: bool = False) -> Folder:
    """Look at a checkpoint; what is wrong with its tensors is listed in `faults`.

    drop_mtp: as if there were no MTP layer in it.
    Raises CheckpointFault when it can't be looked at: no config.json, no safetensors, another model.
    """
    settings = _settings(path)
    if drop_mtp:
        settings["num_nextn_predict_layers"] = 0
    fp8 = _is_fp8(path, settings)
    files, index, ranks = _files(path)
    try:
        config = DeepseekV3Config.from_dict(settings)
        expected = expected_tensors(config, fp8=fp8)
    except (ValueError, RuntimeError, StrictDataclassError) as error:  # RuntimeError: a negative size
        raise CheckpointFault(f"{path / 'config.json'}: {' '.join(str(error).split())}") from error
    folder = Folder(path, settings, config, fp8, ranks, files, expected)
    if ranks is not None:
        folder.layout = official_layout(config, expected, ranks)
    found = _scan(folder, index)
    if not folder.faults:  # or every tensor of a lost file would be a fault of its own
        if drop_mtp:
            found = {key: tensor for key, tensor in found.items() if not folder.in_mtp_layer(key[1])}
        folder.faults.extend(_compare(folder, found, index))
    return folder


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointFault(f"{path}: no such folder; give one with config.json and *.safetensors")
    file = path / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointFault(f"{file} is missing; put the model's Hugging Face config.json there") from error
    except ValueError as error:
        raise CheckpointFault(f"{file} is not JSON ({error}); {_AGAIN}") from error
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != "deepseek_v3":
        raise CheckpointFault(f"{file}: model_type={kind!r}; only deepseek_v3 checkpoints can be converted")
    return settings


def _is_fp8(path: Path, settings: dict[str, Any]) -> bool:
    quantisation = settings.get("quantization_config")
    if quantisation is None:
        return False
    at = f"{path / 'config.json'}: quantization_config"
    if not isinstance(quantisation, dict):
        raise CheckpointFault(f"{at}={quantisation!r}; take it out, or give {FP8}")
    for key, value in FP8.items():
        if quantisation.get(key, value) != value:
            raise CheckpointFault(f"{at}.{key}={quantisation[key]!r}; only {value!r} is understood")
    return True


def _files(path: Path) -> tuple[list[Path], dict[str, str], int | None]:
    """The folder's weight files, its index (tensor -> file), and the ranks of the official layout."""
    names = sorted(file.name for file in path.iterdir() if file.suffix == ".safetensors" and file.name[0] != ".")
    if official := [match for name in names if (match := _OFFICIAL_FILE.fullmatch(name))]:
        ranks = int(official[0][2])
        wanted = {f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)}
        if set(names) != wanted:
            odd = sorted(wanted ^ set(names))
            raise CheckpointFault(f"{path}: {odd[0]}: model0 to model{ranks - 1}-mp{ranks} must be there and no others")
        return [path / f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)], {}, ranks
    index: dict[str, str] = {}
    if (path / INDEX).exists():
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(file) for file in index.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointFault(f"{path / INDEX} is not an index of tensors ({error!r}); {_AGAIN}") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointFault(f"{path / INDEX}: {outside[0]!r} is not the name of a file in the same folder")
    if not names:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise CheckpointFault(
                f"{path / pickles[0]}: such files are pickles, which can run any code when they are opened; "
                "get the safetensors, or convert it to them where you trust it"
            )
        raise CheckpointFault(f"{path}: no *.safetensors in it")
    return [path / name for name in names], index, None


def _scan(folder: Folder, index: dict[str, str]) -> dict[tuple[int | None, str], Held]:
    """(rank or None, name in the file) -> tensor, by the files' headers."""
    found: dict[tuple[int | None, str], Held] = {}
    for number, file in enumerate(folder.files):
        if not file.is_file():
            count = sum(name == file.name for name in index.values())
            folder.faults.append(f"{file} is missing, {INDEX} has {count} tensors in it; {_AGAIN}")
            continue
        try:
            tensors = read_header(file)
        except SafetensorError as error:
            folder.faults.append(f"{file}: not a whole safetensors file ({error}); {_AGAIN}")
            continue
        rank = None if folder.ranks is None else number
        for tensor in tensors:
            if (other := found.get((rank, tensor.name))) is not None:
                folder.faults.append(f"{file}: {tensor.name} is in {other.file.name} too; remove one of the files")
            found[rank, tensor.name] = tensor
    return found


def read_header(path: Path) -> list[Held]:
    """The tensors of a file. Raises SafetensorError unless it is whole, by safetensors' own reader."""
    with safe_open(path, "pt"):
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return [
        Held(path, name, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def _compare(folder: Folder, found: dict[tuple[int | None, str], Held], index: dict[str, str]) -> Iterator[str]:
    """Enter what is as config.json has it into `held`; say what isn't."""
    expected = folder.expected
    if folder.config.num_nextn_predict_layers and not any(folder.in_mtp_layer(name) for _, name in found):
        layer = f"{'' if folder.ranks else 'model.'}layers.{folder.config.num_hidden_layers}.*"
        yield (
            f"{folder.path / 'config.json'}: num_nextn_predict_layers=1, and no tensor of that layer ({layer}) is "
            "there; get it, or convert with --drop_mtp"
        )
        expected = {name: tensor for name, tensor in expected.items() if not folder.in_mtp_layer(name)}
    for name, tensor in expected.items():
        placed = folder.layout.get(name)
        stored, shape = (placed.name, placed.part(tensor.shape)) if placed else (name, tensor.shape)
        ranks = placed.ranks if placed else (None,)
        if tensor.optional and not any((rank, stored) in found for rank in ranks):
            continue
        for rank in ranks:
            part = found.pop((rank, stored), None)
            if part is None:
                yield _missing(folder, name, stored, rank, index)
                continue
            at = f"{part.file}: {stored}"
            if part.shape != shape:
                yield f"{at} has shape {list(part.shape)}, config.json has {list(shape)}; are they of one model?"
            elif part.dtype not in tensor.dtypes:
                yield f"{at} is {part.dtype} instead of {' or '.join(tensor.dtypes)}; {_dtype_remedy(folder, name)}"
            else:
                parts = folder.held.setdefault(name, [])
                parts.append(part)
                if part.dtype != parts[0].dtype:
                    yield f"{at} is {part.dtype}, {parts[0].file.name} has it as {parts[0].dtype}; {_AGAIN}"
                if index.get(name, part.file.name) != part.file.name:
                    yield f"{at} is in another file by {INDEX} ({index[name]}); {_AGAIN}"
    for (_, name), part in found.items():
        yield f"{part.file}: {name} is no tensor of this config.json's model; {_extra_remedy(folder, name)}"


def _missing(folder: Folder, name: str, stored: str, rank: int | None, index: dict[str, str]) -> str:
    file = folder.path / index[name] if name in index else folder.path
    at = f"{folder.files[rank] if rank is not None else file}: {stored} is missing"
    if name.endswith("_scale_inv"):
        return f"{at}, and without its scales an FP8 weight means nothing; {_AGAIN}"
    return f"{at}; {_AGAIN}"


def _dtype_remedy(folder: Folder, name: str) -> str:
    if scale_of(name) in folder.expected:
        return "if the checkpoint isn't FP8, take quantization_config out of config.json"
    if name.endswith("e_score_correction_bias"):
        return "rounded it routes otherwise; save it in fp32"
    return "if the checkpoint is FP8, config.json needs its quantization_config"


def _extra_remedy(folder: Folder, name: str) -> str:
    if folder.in_mtp_layer(name):
        return "for the MTP layer set num_nextn_predict_layers to 1, or convert with --drop_mtp"
    if name.endswith(("_scale_inv", ".scale")):
        return "if the checkpoint is FP8, config.json needs its quantization_config"
    return "check that they belong together"
