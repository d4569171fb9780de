"""What kernels know when they are compiled. Imports nothing, so that tables of such objects cost nothing to import."""

from __future__ import annotations


class Fixed:
    """An object that never changes, whose attributes are constants where a kernel reads them: numbers and pieces.

    A kernel finds it as a global or takes it as an argument of a piece, and is compiled for this object.
    """
