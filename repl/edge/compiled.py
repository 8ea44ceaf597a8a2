"""Which of the two makes of the edge's system calls is used: the compiled one where it could be built."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import calls
else:
    try:
        from . import _calls as calls
    except ImportError:  # there was no compiler
        from . import calls

__all__ = ["calls"]
