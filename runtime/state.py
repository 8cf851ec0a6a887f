"""Optimizer, scheduler and random state to a safetensors file plus a JSON file, and back exactly; no pickle.

Tensors go into `<name>.safetensors` under their key path, everything around them into `<name>.json`. JSON
has no tuples, integer keys, NaN or tensors: those are written as one-key objects such as {"$tuple": [...]}.
Leaves out sharded tensors: a rank saves its own shard, and which rank that is belongs to the caller.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runtime.errors import CheckpointError


def save_state(folder: str | Path, name: str, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings, bools and None.

    Tensors keep their dtype and come back on the CPU. Any other value is a ValueError naming its key path.
    """
    folder = Path(folder)
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors)
    save_file(_own_memory(tensors), folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")


def load_state(folder: str | Path, name: str) -> Any:
    """Read what `save_state` wrote. CheckpointError names a file that is missing or unreadable."""
    weights, tree = Path(folder) / f"{name}.safetensors", Path(folder) / f"{name}.json"
    try:
        return _decode(json.loads(tree.read_text(encoding="utf-8")), load_file(weights))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"can't read saved state {tree} with {weights.name}: {error!r}") from error


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's global generators, and of this process's own CUDA device."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        # Only the current device: asking for all of them would open a context on every rank's GPU.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave. CUDA's is skipped where either side had none."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if hasattr(value, "to_local") or value.layout is not torch.strided:
            kind = type(value).__name__
            raise ValueError(f"{path or 'state'}: a {kind} can't be saved; give its local dense tensor")
        tensors[path or "."] = value.detach()
        return {"$tensor": path or "."}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) in (list, tuple):
        items = [_encode(v, f"{path}.{i}" if path else str(i), tensors) for i, v in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"{path or 'state'}: key {key!r} is a {type(key).__name__}; use str or int keys")
            # repr tells the key 0 from the key "0".
            pairs.append((key, _encode(item, f"{path}.{key!r}" if path else repr(key), tensors)))
        plain = all(type(k) is str and not k.startswith("$") for k, _ in pairs)
        return dict(pairs) if plain else {"$dict": [list(p) for p in pairs]}
    kind = type(value).__name__
    raise ValueError(f"{path or 'state'}={value!r}: a {kind} can't be saved without pickle; convert it first")


def _decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"$tensor": path}:
            return tensors[path]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_decode(v, tensors) for v in items)
        case {"$dict": pairs}:
            return {k: _decode(v, tensors) for k, v in pairs}
    return {k: _decode(v, tensors) for k, v in tree.items()}


def _own_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, contiguous, and none sharing memory with another, which safetensors refuses."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        if (address := tensor.untyped_storage().data_ptr()) in seen:
            tensor = tensor.clone()
        seen.add(address)
        out[name] = tensor
    return out
