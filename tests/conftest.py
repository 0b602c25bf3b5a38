"""What tests say of themselves to the fault table."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "trials(n): a test that tries its fault so often, as the fault table counts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Into a report as `--junitxml` writes it."""
    for item in items:
        if (mark := item.get_closest_marker("trials")) is not None:
            item.user_properties.append(("trials", mark.args[0]))
