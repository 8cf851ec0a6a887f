"""Limits name the field, the value and the remedy."""

from typing import Any

import pytest

from rewards.sandbox.limits import Limits


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("cpu_seconds", 1.5, "whole number"),
        ("wall_seconds", 0, "number"),
        ("wall_seconds", float("nan"), "number"),
        ("memory_mb", -1, "whole number"),
        ("processes", True, "whole number"),
        ("tmp_mb", 1 << 40, "whole number"),
    ],
)
def test_a_bad_limit_is_named(field: str, value: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}: give a positive {kind}"):
        Limits(**{field: value})
