"""What a person should know of a corpus. It stands on the data card and changes no byte of a shard."""

from __future__ import annotations

from configs import Section


class Noted(Section):
    """Fields that every source has."""

    about: str | None = None  # what it is, and where it is from
    licence: str | None = None  # of its texts, such as CC BY-SA 4.0
