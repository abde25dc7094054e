"""The boundary with the user: command line, Python interface, recipes, run directories, and what fills them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runs.python_api import Run, open, run, search, train

__all__ = ["Run", "open", "run", "search", "train"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line starts without the engine.
    if name not in __all__:
        raise AttributeError(f"module 'runs' has no attribute '{name}'")
    from runs import python_api

    return getattr(python_api, name)
