"""A checkpoint's config.json, read as an untrusted file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import read_json

MAX_INTEGER = 1 << 31  # hyper-parameters are 32-bit in GGUF
MAX_FLOAT = 3e38


class Config:
    """The hyper-parameters of a checkpoint, by their names in config.json.

    Fields that a family's configuration class fills in when config.json leaves them out are filled in here too
    (`with_defaults`), because the reference converter reads them from that class. Where several families call one
    thing differently, a look-up takes all its names and the first one that is there counts.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        """Take `values` as the hyper-parameters; `path` is the file that messages name."""
        self.values, self.path = dict(values), path

    @classmethod
    def load(cls, directory: Path) -> Config:
        """Read `directory`/config.json. Raises QuantkitError when there is none."""
        path = directory / "config.json"
        if not path.is_file():
            if (directory / "adapter_config.json").is_file():
                raise QuantkitError(f"{directory}: a LoRA adapter, and no model", option="lora")
            raise QuantkitError(f"{directory}: it has no config.json; a transformers checkpoint directory is needed")
        config = cls(read_json(path), path)
        # Of models that speak, too, what thinks is the text model.
        thinker = cls(config.table("thinker_config") or {}, path)
        return config.changed(text_config=text) if (text := thinker.table("text_config")) is not None else config

    @property
    def model_class(self) -> str:
        """The transformers class of the (text) model, as `architectures` names it."""
        text = self.values.get("text_config")
        for values in (text if isinstance(text, dict) else {}, self.values):
            names = values.get("architectures")
            if isinstance(names, list) and names and isinstance(names[0], str):
                return names[0]
        raise QuantkitError(f"{self.path}: it names no model class in `architectures`")

    @property
    def text_type(self) -> str | None:
        """The `model_type` of the text part, or None where there is none."""
        text = self.values.get("text_config")
        kind = text.get("model_type") if isinstance(text, dict) else None
        return kind if isinstance(kind, str) else None

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        """This config with the text part at its root, and `defaults` under what the model's own part says.

        The root of a wrapper is no part of the text model: its fields count only where that has none.
        """
        text = self.values.get("text_config")
        if isinstance(text, dict):
            return Config({**self.values, **defaults, **text}, self.path)
        return Config({**defaults, **self.values}, self.path)

    def changed(self, **values: Any) -> Config:
        """This config with `values` in place of its own."""
        return Config({**self.values, **values}, self.path)

    def without(self, *names: str) -> Config:
        """This config without the fields `names`."""
        return Config({key: value for key, value in self.values.items() if key not in names}, self.path)

    def find(self, *names: str) -> Any:
        """The value of the first of `names` that is there, or None. Present and null counts as there."""
        return next((self.values[name] for name in names if name in self.values), None)

    def integer(self, *names: str) -> int | None:
        """A whole number from 0 on, or None when there is none. Raises QuantkitError for anything else."""
        value = self.find(*names)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value % 1 != 0:
            raise self.wrong(names, value, "a whole number")
        if not 0 <= value < MAX_INTEGER:
            raise self.wrong(names, value, f"between 0 and {MAX_INTEGER - 1}")
        return int(value)

    def number(self, *names: str) -> float | None:
        """A finite number, or None when there is none. Raises QuantkitError for anything else."""
        value = self.find(*names)
        return None if value is None else self.finite(value, names)

    def required_number(self, *names: str) -> float:
        """A finite number. Raises QuantkitError when there is none."""
        value = self.number(*names)
        if value is None:
            raise QuantkitError(f"{self.path}: it lacks {names[0]}")
        return value

    def require(self, *names: str) -> int:
        """A whole number from 1 on. Raises QuantkitError when there is none."""
        value = self.integer(*names)
        if not value:
            raise QuantkitError(f"{self.path}: it lacks {names[0]}")
        return value

    def listed(self, name: str, count: int) -> list[Any]:
        """A list of `count` entries, one for each layer. Raises QuantkitError when there is none, or another."""
        value = self.find(name)
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong((name,), value, f"a list for {count} layers")
        return value

    def table(self, *names: str) -> dict[str, Any] | None:
        """A nested object, or None when there is none. Raises QuantkitError for anything else."""
        value = self.find(*names)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(names, value, "an object")
        return value

    def finite(self, value: Any, names: tuple[str, ...]) -> float:
        """`value` as a finite number that float32 can hold. `names` are for the message of the QuantkitError."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) < MAX_FLOAT:
            raise self.wrong(names, value, "a finite number")
        return float(value)

    def wrong(self, names: tuple[str, ...], value: object, wanted: str) -> QuantkitError:
        """The error that says that `value` of the first of `names` is not `wanted`."""
        return QuantkitError(f"{self.path}: {names[0]} is {str(value)[:80]!r}, not {wanted}")
