"""Model families. `Model` is the registry: a family joins by adding its config class to the union."""

from __future__ import annotations

from pretrain.models.gpt import Gpt

Model = Gpt
