"""Secrets stay out of what is recorded: credentials in addresses, and values under keys that name a secret."""

from __future__ import annotations

import itertools
import re
from typing import Any

MASK = "***"
CREDENTIALS = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s'\"]*@")
SIGNATURE = re.compile(r"([?&][^=&\s]*(?:token|secret|signature|password|credential|key)[^=&\s]*=)[^&\s'\"]+", re.I)
SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "token", "credential", "credentials", "apikey"}
SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("account", "key")}


def mask_text(text: str) -> str:
    """A text with the credentials of every address in it masked: `s3://key:secret@host` becomes `s3://***@host`."""
    return SIGNATURE.sub(rf"\g<1>{MASK}", CREDENTIALS.sub(rf"\g<1>{MASK}@", text))


def names_a_secret(key: str) -> bool:
    """Whether a key's words name a secret: `hf_token` and `s3.secret_key` do, `batch_tokens` and `tokenizer` do not."""
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", key))]
    return bool(SECRET_WORDS & set(words)) or any(pair in SECRET_PAIRS for pair in itertools.pairwise(words))


def mask(tree: Any) -> Any:
    """A tree of dicts, lists and scalars with the secrets in its texts masked. Numbers and flags are never secrets."""
    if isinstance(tree, dict):
        return {
            key: MASK if isinstance(value, str) and value and names_a_secret(str(key)) else mask(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [mask(value) for value in tree]
    return mask_text(tree) if isinstance(tree, str) else tree
