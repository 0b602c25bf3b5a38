"""Which language a text is in: resiliparse's quick guess, or a fastText model of the user's. The door of fastText."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from configs import ConfigError, Float, Int, Section

LOOKED_AT = 20_000  # characters from the beginning; more says nothing new
UNKNOWN = "unknown"


def language(text: str, max_distance: int = 1200) -> str:
    """The likeliest of resiliparse's 101 languages, "unknown" where none is near."""
    from resiliparse.parse.lang import detect_fast

    code: str = detect_fast(text[:LOOKED_AT], cutoff=max_distance)[0]
    return code


class Resiliparse(Section):
    """One of 101 languages as codes such as en, de; needs no model. Short texts are often guessed wrong."""

    kind: Literal["resiliparse"] = "resiliparse"
    max_distance: Int = 1200  # from the language's profile; a farther text is "unknown". Prose is near 600.

    version: ClassVar[int] = 1

    def of(self, text: str) -> str:
        """The code of the likeliest language."""
        return language(text, self.max_distance)

    def identity(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {**self.model_dump(mode="json"), "version": self.version}


class FastText(Section):
    """A fastText classifier from a local file: lid.176.bin (codes such as en), GlotLID (codes such as eng_Latn)."""

    kind: Literal["fasttext"] = "fasttext"
    path: Path
    min_score: Float = 0.65  # a text whose likeliest language scores less is "unknown"; FineWeb's threshold

    version: ClassVar[int] = 1

    def of(self, text: str) -> str:
        """The code of the likeliest language. Raises ConfigError where the model cannot be loaded."""
        labels, scores = _loaded(self.path).predict(text[:LOOKED_AT].replace("\n", " "))
        return str(labels[0]).removeprefix("__label__") if len(labels) and scores[0] >= self.min_score else UNKNOWN

    def identity(self) -> dict[str, Any]:
        """What its answers depend on: the model's bytes, not where they lie. Raises ConfigError."""
        model = {"sha256": file_sha256(self.path), "version": self.version}
        return self.model_dump(mode="json", exclude={"path"}) | model


LanguageModel = Annotated[Resiliparse | FastText, Field(discriminator="kind")]


@lru_cache(1)
def _loaded(path: Path) -> Any:
    try:
        import fasttext
    except ImportError:
        raise ConfigError("language: kind fasttext needs fastText; run pip install 'longhaul[fasttext]'") from None
    try:
        return fasttext.load_model(str(path))
    except ValueError as error:
        raise ConfigError(f"{path}: not a fastText model ({error})") from None


def file_sha256(path: Path) -> str:
    """Of a file's bytes, hex. Raises ConfigError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
