"""A run -> the README.md of the checkpoint it leaves: what it was trained on, how, and hashes to tell by."""

import yaml

from runtime.progress import visible
from sft.config import SFTConfig
from sft.data import Data
from sft.epochs import Epochs
from sft.mix import SourceConfig


def model_card(config: SFTConfig, data: Data, epochs: Epochs, *, step: int) -> str:
    """Markdown with the metadata block that model hubs read. Names of sources are data: shown as code, escaped."""
    counts = [
        f"| {_code(source.name)} | {_share(part)} | {source.samples:,} | {source.tokens:,} "
        f"| {sum(source.rejects.values()):,} | `{source.folder.name}` |"
        for part, source in zip(config.sources, data.train.sources, strict=True)
    ]
    metadata = {"base_model": config.model, "library_name": "transformers", "tags": ["sft", "trl-compatible"]}
    settings = {
        "step": step,
        "epochs": config.epochs,
        "row_length": config.row_length,
        "rows_per_step": config.rows_per_step,
        "learning rate": f"{config.optim.lr:g} to {config.optim.final_lr:g}, cosine",
        "precision": config.precision,
        "seed": config.seed,
        "adapters": "none" if config.lora is None else f"LoRA, rank {config.lora.rank}",
        "rows of an epoch": f"{epochs.counts[0]:,}, {epochs.fill:.1%} full",
    }
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).rstrip(),
            "---",
            "",
            f"# Fine-tuned from {_code(config.model)}",
            "",
            "Supervised fine-tuning on packed rows whose samples don't see each other; the loss is the mean over the "
            "assistant's tokens and its end of turn.",
            "",
            "| source | in an epoch | examples | tokens | set aside | hash |",
            "|---|---|---|---|---|---|",
            *counts,
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in settings.items()),
            "",
        ]
    )


def _share(source: SourceConfig) -> str:
    """What the mix says of a source."""
    return f"weight {source.weight:g}" if source.weight is not None else f"{source.epochs or 1:g} ×"


def _code(text: str) -> str:
    return "`" + visible(text, keep="").replace("`", "'").replace("|", r"\|") + "`"
