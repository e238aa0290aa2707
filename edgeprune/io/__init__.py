"""Files, JSON, protobuf and threads. Imports nothing else of edgeprune but errors."""
