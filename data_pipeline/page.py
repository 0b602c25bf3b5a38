"""Pages for people: HTML files without scripts, made from the templates that lie beside the code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


@cache
def _environment(folder: Path) -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: Path, filters: Mapping[str, Callable[..., Any]], **values: object) -> str:
    """A template with values put in. Everything put in is escaped; what the template names and is not given raises."""
    environment = _environment(template.parent)
    environment.filters |= filters
    return environment.get_template(template.name).render(**values)
