"""Which of the two makes of this room's loops is used: the compiled one where it could be built."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import batches, waiting
else:
    try:
        from . import _batches as batches
        from . import _waiting as waiting
    except ImportError:  # there was no compiler
        from . import batches, waiting

__all__ = ["batches", "waiting"]
