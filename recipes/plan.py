"""`python -m recipes.plan`: what a run will take, before any weight is loaded: memory, FLOPs, hours, commands.

    python -m recipes.plan --config recipes/configs/sft_64_gpus.yaml --model 671b --gpus 256 --gpu h200
    python -m recipes.plan --model 16b --gpus 8            # SFT and GRPO, at their defaults

It takes every setting of recipes.sft and recipes.grpo, their files, too, and tells by them which of the two is meant.
`model` is a preset (tiny to 671b) or a folder with a DeepSeek-V3's config.json. What it says of memory is what this
project's code holds, checked on a CPU (benchmarks/plan.py); where no recipe launches the layout, it says so.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import DeepseekV3Config

from deepseek_v3 import preset
from recipes.cli import parse, read
from recipes.planning.grpo import plan_grpo
from recipes.planning.page import as_json, show
from recipes.planning.plan import Plan, PlanConfig
from recipes.planning.sft import plan_sft
from rl.config import GRPOConfig
from runtime.errors import UserError
from sft.config import SFTConfig

PROG = "python -m recipes.plan"
RECIPES = {"sft": SFTConfig, "grpo": GRPOConfig}
TINY = Path(__file__).parent / "configs/sft_tiny.yaml"
"""What recipes.sft does without arguments."""


def model_config(model: str) -> DeepseekV3Config:
    """Of a preset, or of a checkpoint's config.json. UserError names the nearest preset."""
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        try:
            return preset(model)
        except ValueError as error:
            raise UserError(f"model: neither a folder with a config.json nor a preset; {error}") from error
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"model={model!r}: {file} is no config: {error}") from error
    if kind != "deepseek_v3":
        raise UserError(f"model={model!r}: model_type={kind!r}; only deepseek_v3 can be planned for")
    return DeepseekV3Config.from_pretrained(str(file))


def plans(argv: Sequence[str]) -> tuple[PlanConfig, list[Plan]]:
    """The options, and a plan for each recipe that takes the other arguments."""
    own, others = split(argv)
    options = parse(PlanConfig, own, prog=PROG, description=__doc__ or "")
    made = []
    for config in recognise(others, options.recipe):
        model = model_config(config.model)
        if isinstance(config, SFTConfig):
            made.append(plan_sft(config, model, options, arguments=others))
        else:
            made.append(plan_grpo(config, model, options, arguments=others))
    return options, made


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments that are ours, with their values, and those of a recipe."""
    names = {field.name for field in dataclasses.fields(PlanConfig)} | {"help"}
    parts: tuple[list[str], list[str]] = [], []
    mine = True
    for token in argv:
        if token.startswith("-"):
            mine = token == "-h" or token.removeprefix("--").partition("=")[0] in names
        parts[0 if mine else 1].append(token)
    return parts


def recognise(argv: Sequence[str], recipe: str | None) -> list[SFTConfig | GRPOConfig]:
    """The settings of the recipes that know all of `argv`, of `recipe` alone if given. UserError if none does."""
    found: list[SFTConfig | GRPOConfig] = []
    refusals = []
    for name in RECIPES if recipe is None else [recipe]:
        try:
            found.append(read(RECIPES[name], argv, prog=PROG, description=""))
        except UserError as error:
            refusals.append(f"recipes.{name} refuses them: {error}")
    if not found:
        raise UserError("; ".join(refusals))
    return found


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Print the plans; 2 for a mistake in the arguments."""
    try:
        options, made = plans(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"{PROG}: error: {error}\n(--help explains every setting)", file=sys.stderr)
        return 2
    console = console or Console()
    if options.json:
        console.print_json(json.dumps({plan.recipe: as_json(plan) for plan in made}))
    else:
        for plan in made:
            show(plan, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
