"""Answers over HTTP in the form of OpenAI's API, and a page for the browser. Needs the extra [serve]."""

from edgeprune.runtime.server.limits import Limits
from edgeprune.runtime.server.listening import serve

__all__ = ["Limits", "serve"]
