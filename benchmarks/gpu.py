"""CUDA: the FP8 kernels, the update and the log-prob head, checked and then timed against what else there is.

`_fp8_gpu` has the FP8 products and quantisers and needs torch, Triton and transformers only; `_update_gpu` the update
and the head, which also need what our training loop imports (not TRL, vLLM or datasets). Each prints its table when it
is done; what can't run here is named with the reason. The exit code is 1 where ours computes something else than it
should, 2 without a GPU.

`--device cpu --tiny` runs the same code at the smallest size: a check that it works, no measurement.
"""

import argparse
import os
import sys
import time

import torch

from benchmarks import _fp8_gpu
from benchmarks._common import setting, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: does it run?")
    parser.add_argument("--preset", default="16b", help="model dimensions")
    parser.add_argument("--layers", type=int, default=2, help="of which the first is dense; 2: 1.1B parameters")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--mean", type=int, default=512, help="mean tokens of a completion")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest")
    parser.add_argument("--groups", type=int, default=4, help="groups of 8 an update")
    parser.add_argument("--rows", type=int, default=4, help="padded rows a micro-batch")
    parser.add_argument("--microbatch_tokens", type=int, default=16384, help="packed tokens a micro-batch")
    parser.add_argument("--head_tokens", type=int, default=8192, help="tokens that the head scores")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=5, help="after which no other FP8 row is begun")
    args = parser.parse_args()
    if args.tiny:
        args.preset, args.prompt, args.mean, args.longest, args.groups, args.head_tokens = "tiny", 8, 4, 12, 1, 64
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate would take a GPU that it sees
    elif not torch.cuda.is_available():
        print(
            "no CUDA device: nothing is measured. It takes an NVIDIA GPU, for FP8 of sm90 or later (H100, H200) with "
            "Triton, and a torch built with CUDA; `--device cpu --tiny` tries the code out",
            file=sys.stderr,
        )
        return 2
    until = time.monotonic() + 60 * args.minutes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else "no GPU"
    print(f"{name}; {setting(torch.get_num_threads(), 'torch', 'transformers', 'triton')}")
    wrong = False

    measured = _fp8_gpu.measure(device, tiny=args.tiny, rounds=args.rounds, until=until)
    if measured is None:
        wrong = True
    else:
        lines, notes = measured
        print("\nFP8" + "".join(f"  \nnot timed: {note}" for note in notes) + "\n")
        print(table(_fp8_gpu.HEADER, lines), flush=True)

    try:
        from benchmarks import _update_gpu
    except ModuleNotFoundError as error:
        print(f"\nnot timed: the update and the head: {error}")
        return int(wrong)
    rows = _update_gpu.measure(args, device)
    if rows is None:
        wrong = True
    else:
        print(f"\n{args.precision}, {args.layers} layers of {args.preset}\n")
        print(table(_update_gpu.HEADER, rows))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
