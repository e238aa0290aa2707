"""Reports: one self-contained HTML page about a plan or a bundle. Does not import export; measures only answers."""
