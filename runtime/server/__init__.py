"""Answers over HTTP for clients of OpenAI's API, and a page for the browser. Needs the extra [serve]; takes the runtime's face."""

import warnings

from edgeprune.runtime.server.errors import ServerLimits
from edgeprune.runtime.server.process import ServerOptions, serve

__all__ = ["ServerLimits", "ServerOptions", "serve"]


def __getattr__(name: str) -> object:
    if name != "Limits":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("edgeprune.runtime.server.Limits is now edgeprune.runtime.server.ServerLimits.", DeprecationWarning, stacklevel=2)
    return ServerLimits
