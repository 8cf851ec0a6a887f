"""The settings of a run -> its examples, tokenised, checked, and in the order of its epochs."""

import functools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from runtime.cache import cache_dir
from runtime.distributed import World
from runtime.errors import UserError
from sft.chat import CHAT_TEMPLATE
from sft.config import SFTConfig
from sft.guard import check_sources
from sft.mix import SourceConfig, epoch_examples
from sft.pack import Ints
from sft.shards import Settings
from sft.store import Store, build_store


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured by."""

    config: SFTConfig
    train: Store
    """The examples of all sources of the mix, numbered through."""
    held_out: dict[str, Store]
    """Held-out source -> its examples."""

    def epoch_examples(self, epoch: int) -> Ints:
        """Numbers of an epoch's examples; those due twice are there twice."""
        return self._epoch(epoch)

    @functools.cached_property
    def _epoch(self) -> "functools._lru_cache_wrapper[Ints]":
        mix, sizes, seed = self.config.sources, self.train.sizes, self.config.seed
        return functools.lru_cache(maxsize=2)(lambda epoch: epoch_examples(mix, sizes, seed=seed, epoch=epoch))


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give the tokenizer the template that `SFTConfig.chat_template` names. Raises UserError for a missing file."""
    if template == "project":
        tokenizer.chat_template = CHAT_TEMPLATE
    elif template != "model":
        try:
            tokenizer.chat_template = Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'chat_template={template!r}: {error}; give "model", "project" or a file') from error


def load_data(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, world: World, *, end_ids: Collection[int] | None = None
) -> Data:
    """Tokenise what has not been, by the first process while the others wait, and check it.

    Raises UserError for a source that can't be read, one with too many bad rows, and one the guard refuses.
    """
    if world.is_main:
        check_sources(
            [*config.sources, *config.evaluation.sources], tokenizer, train_turns=config.train_turns, end_ids=end_ids
        )
        data = _open(config, tokenizer)
    world.wait()
    return data if world.is_main else _open(config, tokenizer)


def _open(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    folder = Path(config.token_cache) if config.token_cache else cache_dir() / "tokens"
    settings = Settings(
        max_length=config.row_length,
        train_turns=config.train_turns,
        too_long=config.too_long,
        unreviewed=config.unreviewed,
    )

    def store(*sources: SourceConfig) -> Store:
        return build_store(
            sources,
            tokenizer,
            folder,
            settings=settings,
            max_bad_fraction=config.max_bad_fraction,
            workers=config.workers,
        )

    return Data(config, store(*config.sources), {source.path: store(source) for source in config.evaluation.sources})
