"""The layout of a block: its fields by name, in the order of their bytes."""

from __future__ import annotations

from quantkit.compile.fixed import Fixed


class Layout(Fixed):
    """Fields of a block: `Layout(d=2, dmin=2, scales=12, qs=128)` says their bytes, and `.qs`, 16, where one begins.

    `nbytes` is the size of the whole block.
    """

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for field, size in sizes.items():
            self.offsets[field] = self.nbytes
            self.nbytes += size

    def __getattr__(self, field: str) -> int:
        """The offset of `field`."""
        offsets = self.__dict__.get("offsets")
        if offsets is None:  # it is being copied, and asked for methods that it does not have
            raise AttributeError(field)
        if field not in offsets:
            raise AttributeError(f"{self!r} has no field {field!r}")
        return int(offsets[field])

    def __repr__(self) -> str:
        return f"Layout({', '.join(f'{field}={size}' for field, size in self.sizes.items())})"
