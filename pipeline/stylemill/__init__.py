"""stylemill turns a Parquet manifest of content × style pairs into a dataset of stylized images.

>>> import stylemill
>>> stylemill.run("jobs/quickstart.yaml")          # doctest: +SKIP

Importing this package loads neither torch nor Ray. The first call that needs them loads them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stylemill.engine import Engine
    from stylemill.execution.driver import run
    from stylemill.execution.repair import repair
    from stylemill.execution.retry import retry_failed
    from stylemill.planning.plan import plan
    from stylemill.report.status import status
    from stylemill.store.verify import verify

__version__ = "0.1.0"
__all__ = ["Engine", "plan", "repair", "retry_failed", "run", "status", "verify"]

_MODULE_OF = {
    "Engine": "stylemill.engine",
    "plan": "stylemill.planning.plan",
    "repair": "stylemill.execution.repair",
    "retry_failed": "stylemill.execution.retry",
    "run": "stylemill.execution.driver",
    "status": "stylemill.report.status",
    "verify": "stylemill.store.verify",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'stylemill' has no attribute {name!r}")
