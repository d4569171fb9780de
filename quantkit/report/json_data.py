"""Results as JSON: the same shapes in every command's --json and in report.json, and no NaN."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any


def json_data(result: Any) -> Any:
    """Convert `result` to the types that JSON has.

    Dataclasses become objects of their fields, enum members their names, paths text, and numbers that are not finite
    null: JSON has no NaN and no infinity.
    """
    if isinstance(result, Enum):
        return result.name
    if result is None or isinstance(result, (bool, int, str)):
        return result
    if isinstance(result, float):
        return result if math.isfinite(result) else None
    if isinstance(result, PurePath):
        return str(result)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: json_data(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return {str(key): json_data(value) for key, value in result.items()}
    return [json_data(item) for item in result]


def json_text(result: Any) -> str:
    """`result` as JSON: ASCII, for any terminal and any reader."""
    return json.dumps(json_data(result), indent=2, allow_nan=False)
