"""Loading of transformers model folders, with large weights left in their files. Imports neither runtime nor export."""
