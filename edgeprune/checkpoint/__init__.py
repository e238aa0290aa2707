"""Models in folders and on the hub: checked, then loaded with large weights left in files. Imports neither runtime nor export."""
