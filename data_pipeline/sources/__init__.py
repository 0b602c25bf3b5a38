"""Corpora. One corpus is one file here: its config class, which finds the inputs, and the reading of its documents.

A new corpus needs `kind`, `version`, `inputs()`, `can_split()`, `text_bytes()`, `read()`, and its name in this union.
"""

from typing import Annotated

from pydantic import Field

from data_pipeline.sources.bookcorpus import BookCorpus
from data_pipeline.sources.common_crawl import CommonCrawl
from data_pipeline.sources.text_files import TextFiles
from data_pipeline.sources.token_files import TokenFiles
from data_pipeline.sources.wikipedia import Wikipedia

Source = Annotated[CommonCrawl | Wikipedia | BookCorpus | TextFiles | TokenFiles, Field(discriminator="kind")]
