"""Answers over HTTP for clients of OpenAI's API, and a page for the browser. Needs the extra [serve]; takes the runtime's face."""

from edgeprune.runtime.server.errors import Limits
from edgeprune.runtime.server.process import ServerOptions, serve

__all__ = ["Limits", "ServerOptions", "serve"]
