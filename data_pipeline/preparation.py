"""The configuration of a preparation: which corpora become token shards, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from configs import Bool, ConfigError, Int, Section
from data_pipeline import card as data_card
from data_pipeline.classifier import QualityClassifier
from data_pipeline.clean import Clean
from data_pipeline.decontaminate import Decontamination
from data_pipeline.dedup import Dedup
from data_pipeline.filters import Filters
from data_pipeline.publish import check_address
from data_pipeline.slices import Validation
from data_pipeline.sources import Source
from data_pipeline.sources.inputs import Input
from data_pipeline.sources.token_files import TokenFiles
from data_pipeline.tokenizer import GivenTokenizer, TokenizerChoice

NOT_IDENTITY = {"paths", "base", "on_damage", "about", "licence"}  # of a source: these change no byte


class Preparation(Section):
    """Which corpora become token shards, and how."""

    name: str
    out: Path
    tokenizer: TokenizerChoice
    corpora: dict[str, Source]
    clean: Clean = Clean()
    filters: Filters = Filters()
    dedup: Dedup | None = None
    classifier: QualityClassifier | None = None
    decontamination: Decontamination | None = None
    validation: Validation = Validation()
    slice_bytes: Int = 256 * 2**20  # of input; the unit of work and of restart
    shard_bytes: Int = 256 * 2**20
    block_tokens: Int | None = None  # a power of two; None: chosen at plan time so that tails stay under 1 %
    workers: Int = 1  # processes on this machine
    card: data_card.Card = data_card.Card()
    publish: str | None = None  # s3://bucket/prefix or a folder: finished slices go there as well, the manifests last
    keep_local: Bool = True  # false: the tars of slices that were sent are removed here

    @model_validator(mode="after")
    def _sent_before_removed(self) -> Self:
        if self.publish is not None:
            check_address(self.publish)
        elif not self.keep_local:
            raise ValueError("keep_local: expected true, since nothing is published (publish is not set)")
        return self

    @field_validator("corpora")
    @classmethod
    def _names(cls, corpora: dict[str, Source]) -> dict[str, Source]:
        if not corpora:
            raise ValueError("expected at least one corpus")
        for name in corpora:
            if not name.replace("-", "_").replace("_", "a").isalnum():
                raise ValueError(f"{name!r}: expected a name of letters, digits, - and _ (it becomes a folder)")
            if name == "submissions":
                raise ValueError(f"{name!r}: the folder of that name is for the jobs of launch prep")
        return corpora

    @model_validator(mode="after")
    def _tokens_have_their_tokenizer(self) -> Self:
        made = [name for name, source in self.corpora.items() if isinstance(source, TokenFiles)]
        if made and not isinstance(self.tokenizer, GivenTokenizer):
            raise ValueError(
                f"corpora.{made[0]} holds tokens already: expected tokenizer.kind file, with the path of the "
                f"tokenizer.json that made them, got {self.tokenizer.kind}"
            )
        return self

    @model_validator(mode="after")
    def _classifier_knows_its_corpora(self) -> Self:
        for name in self.classifier.corpora if self.classifier else ():
            if name not in self.corpora:
                raise ValueError(f"classifier.corpora: no corpus {name!r}; there are {', '.join(self.corpora)}")
        return self

    @field_validator("slice_bytes", "shard_bytes", "workers")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"expected at least 1, got {value}")
        return value

    def source(self, corpus: str) -> Source:
        """Raises ConfigError for a corpus that the configuration does not have."""
        if corpus not in self.corpora:
            raise ConfigError(f"no corpus {corpus!r}; the configuration has {', '.join(self.corpora)}")
        return self.corpora[corpus]

    def inputs(self, corpus: str) -> list[Input]:
        """The corpus' files as they are now. Raises ConfigError naming the corpus."""
        try:
            return self.source(corpus).inputs()
        except ConfigError as error:
            raise ConfigError(f"corpora.{corpus}.{error}") from None
