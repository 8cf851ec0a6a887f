"""`python -m deepseek_v3.convert bf16 | fp8 | official | hf SOURCE TARGET`, `... check FOLDER`: checkpoints in and out.

Released FP8 weights become bf16, bf16 or fp32 ones FP8 with `weight_scale_inv` and `quantization_config`, Hugging
Face's layout DeepSeek's own and back. The MTP layer stays unless `--drop_mtp` is given. Every tensor of SOURCE is
checked against its config.json before the first is written.

A shard gets its name once it is whole on disk, and its SHA-256 goes to conversion.json; started again, a conversion
that died writes only the shards whose hash isn't there or doesn't agree. Index and config.json come last: a folder
with a config.json is whole. Exit codes: 0 done, 1 a folder that is not in order (check), 2 bad input, 74 a full or
failing disk, 130 interrupted.

The path of the data: convert_tensors.py (what a config's checkpoint holds), convert_folder.py (what SOURCE holds),
convert_shards.py (the files of TARGET), convert_record.py (which of them are done). Left out: pickled checkpoints,
models other than DeepSeek-V3, blocks other than 128×128, and several processes for one conversion.
"""

import argparse
import errno
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from deepseek_v3.convert_folder import FP8, INDEX, PICKLES, Folder, read_folder
from deepseek_v3.convert_record import LOCK, RECORD, Record, alone, write_json
from deepseek_v3.convert_shards import Direction, Shard, plan, replacing, write_shard
from deepseek_v3.convert_tensors import CheckpointFault

SHARD_BYTES = 5 * 10**9
SHOWN_FAULTS = 20
EXIT_DISK = 74
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def convert(
    source: Path,
    target: Path,
    to: Direction,
    *,
    drop_mtp: bool = False,
    model_parallel: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint in `source` to the new folder `target`, or go on where an earlier call left off.

    model_parallel: ranks of the official layout, one file each.
    shard_bytes: about the size of a file of Hugging Face's layout.
    Raises CheckpointFault for what `source` lacks or `target` holds, and OSError for what the disk does.
    """
    folder = read_folder(source, drop_mtp=drop_mtp)
    _refuse(folder, to)
    shards = plan(folder, to, ranks=model_parallel, shard_bytes=shard_bytes)
    what = [to, drop_mtp, model_parallel, shard_bytes, _state_of(folder)]
    if target.resolve().is_relative_to(source.resolve()):
        raise CheckpointFault(f"{target} is the source, or inside it; give another folder")
    with alone(target):
        record = Record(target, what)
        _write_shards(target, shards, record)
        for file in _others(folder):
            with replacing(target / file.name) as aside:
                shutil.copyfile(file, aside)
        if to != "official":
            write_json(target / INDEX, _index(shards))
        write_json(target / "config.json", _settings(folder, to))


def _write_shards(target: Path, shards: list[Shard], record: Record) -> None:
    """Those that aren't there yet: a bar by bytes on a terminal, a line for each shard elsewhere."""
    needed = sum(shard.bytes for shard in shards if shard.name not in record.sha256)
    if (free := shutil.disk_usage(target).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are to be written and {free:,} are free", str(target))
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    console, live = Console(stderr=True), sys.stderr.isatty()
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not live) as bar:
        task = bar.add_task("", total=sum(shard.bytes for shard in shards))
        for shard in shards:
            bar.update(task, description=shard.name)
            kept = record.holds(shard.name)
            if not live:
                print(f"{shard.name}{': written before' if kept else ''}", file=sys.stderr, flush=True)
            if kept:
                bar.advance(task, shard.bytes)
                continue
            (target / "config.json").unlink(missing_ok=True)
            write_shard(target / shard.name, shard, lambda size: bar.advance(task, size))
            record.add(shard.name)


def _refuse(folder: Folder, to: Direction) -> None:
    if folder.faults:
        raise CheckpointFault("\n".join(shown_faults(folder)))
    if to == "hf" and folder.ranks is None:
        raise CheckpointFault(f"{folder.path} has Hugging Face's layout already")
    if to != "hf" and folder.ranks is not None:
        raise CheckpointFault(f"{folder.path} has the official layout; convert it to hf first")
    if to == "fp8" and folder.fp8:
        raise CheckpointFault(f"{folder.path} is FP8 already")


def shown_faults(folder: Folder) -> list[str]:
    """The first faults of a folder, and how many more there are."""
    more = len(folder.faults) - SHOWN_FAULTS
    return folder.faults[:SHOWN_FAULTS] + ([f"... and {more:,} more"] if more > 0 else [])


def _state_of(folder: Folder) -> list[Any]:
    """What a source that changed between two calls would differ in."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.files]
    return [files, folder.settings]


def _others(folder: Folder) -> list[Path]:
    """The tokenizer and whatever else lies beside the weights."""
    ours = {INDEX, RECORD, LOCK, "config.json"}
    return sorted(
        file
        for file in folder.path.iterdir()
        if file.is_file() and file.name not in ours and file.suffix not in (".safetensors", *PICKLES)
    )


def _index(shards: list[Shard]) -> dict[str, Any]:
    files = {name: shard.name for shard in shards for tensors in shard.tensors for name in tensors.written}
    return {"metadata": {"total_size": sum(shard.bytes for shard in shards)}, "weight_map": files}


def _settings(folder: Folder, to: Direction) -> dict[str, Any]:
    """config.json, with what vLLM wants of a DeepSeek-V3 and transformers doesn't write."""
    settings = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        **folder.settings,
    }
    if to in ("bf16", "fp8"):
        settings.pop("quantization_config", None)
        settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = "bfloat16"
    return settings | {"quantization_config": FP8} if to == "fp8" else settings


def check(path: Path) -> int:
    """Say what a folder holds, and on stderr what is wrong with it; 0 if nothing is."""
    folder = read_folder(path)
    if folder.faults:
        print("\n".join(shown_faults(folder)), file=sys.stderr)
        return 1
    held = [folder.expected[name].shape for name in folder.held]
    elements = sum(math.prod(shape) for shape in held)
    layers = f"{folder.config.num_hidden_layers} layers{' + MTP' if folder.config.num_nextn_predict_layers else ''}"
    layout = f"official layout of {folder.ranks} ranks" if folder.ranks else "Hugging Face's layout"
    precision = "FP8" if folder.fp8 else " and ".join(sorted({tensors[0].dtype for tensors in folder.held.values()}))
    print(f"{path}: {layers}, {precision}, {layout}: {len(held):,} tensors, {elements:,} elements; nothing is missing")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        if args.command == "check":
            return check(args.folder)
        ranks = args.model_parallel if args.command == "official" else 1
        convert(args.source, args.target, args.command, drop_mtp=args.drop_mtp, model_parallel=ranks)
        return 0
    except CheckpointFault as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        disk = error.errno in _DISK_FAULTS
        remedy = "make room or mend the disk, then the same command goes on" if disk else "check path and permissions"
        print(f"{parser.prog}: {error.filename or 'file'}: {error.strerror or error}; {remedy}", file=sys.stderr)
        return EXIT_DISK if disk else 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on", file=sys.stderr)
        return 130


_HELP = {
    "bf16": ("FP8 or fp32 -> bf16", "Weights in FP8 or fp32 become bf16; FP8 ones are multiplied by their scales."),
    "fp8": (
        "bf16 or fp32 -> FP8, as released",
        "Linear weights become FP8 (E4M3) with a scale for every 128 x 128 values (weight_scale_inv), as the released "
        "ones are; embedding, head, norms, router and eh_proj become bf16, the routing bias stays fp32.",
    ),
    "official": (
        "Hugging Face's layout -> that of DeepSeek's inference code",
        "Files for DeepSeek's own inference code, one for each rank; precision stays. That code loads no MTP layer: "
        "give --drop_mtp if the files are for it.",
    ),
    "hf": (
        "the layout of DeepSeek's inference code -> Hugging Face's",
        "The ranks' files become one checkpoint with Hugging Face's names; precision stays. SOURCE needs the model's "
        "Hugging Face config.json.",
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_v3.convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert DeepSeek-V3 checkpoints, or check one. Only safetensors are read, some rows of a tensor "
        "at a time.\nA conversion that was stopped goes on when the same command is given again.",
        epilog="example: python -m deepseek_v3.convert bf16 DeepSeek-V3 DeepSeek-V3-bf16\n"
        "exit codes: 0 done, 1 check found faults, 2 bad input, 74 the disk is full or fails, 130 interrupted",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="bf16 | fp8 | official | hf | check")
    for name, (short, description) in _HELP.items():
        command = commands.add_parser(name, help=short, description=description)
        command.add_argument("source", type=Path, metavar="SOURCE", help="a folder with config.json and *.safetensors")
        command.add_argument("target", type=Path, metavar="TARGET", help="a new folder, or one that was begun before")
        command.add_argument("--drop_mtp", action="store_true", help="leave the MTP layer out")
        if name == "official":
            command.add_argument(
                "--model_parallel", type=int, default=1, metavar="N", help="ranks, a file each; default: %(default)s"
            )
    says = "what is missing, superfluous or wrong; reads headers only"
    command = commands.add_parser("check", help=says, description=f"Say {says}.")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="a folder with config.json and *.safetensors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
