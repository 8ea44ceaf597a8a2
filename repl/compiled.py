"""Which of the two makes of the data plane's loops is used: the compiled one where it could be built."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import batches
else:
    try:
        from . import _batches as batches
    except ImportError:  # there was no compiler
        from . import batches

__all__ = ["batches"]
