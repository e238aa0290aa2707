"""Serve answers over HTTP in the format of OpenAI's API, and a web page. Needs the extra [serve]. Uses the runtime's public API."""

from edgeprune.errors import renamed as _renamed
from edgeprune.runtime.server.errors import ServerLimits
from edgeprune.runtime.server.process import ServerOptions, serve

__all__ = ["ServerLimits", "ServerOptions", "serve"]

_RENAMED = {"Limits": "ServerLimits"}  # old public names, which work for one release


def __getattr__(name: str) -> object:
    return globals()[_renamed(__name__, name, _RENAMED)]
