"""The one thing that flows through the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)  # frozen, it would take nine times as long to make
class Document:
    """A text and where it came from. Never changed once made.

    `id` is unique in its corpus and the same in every run; `source` is the corpus; `uri` is where a person finds it.
    `meta` carries "input" (the file, as the plan lists it), "offset" (where it begins there: a byte, or for a packed
    file the byte at which its packed member or block begins) and, where known, "language" and "title".
    `ids`, shape (n,), are its tokens where an input holds tokens already; its text is then empty.
    """

    text: str
    id: str
    source: str
    uri: str
    meta: dict[str, str | int] = field(default_factory=dict)
    ids: npt.NDArray[np.integer[Any]] | None = field(default=None, compare=False)
