"""Files, JSON, protobuf and threads for every other room. Imports errors alone."""
