"""Reports: one HTML page about a plan or a bundle, complete in itself. Imports no export; measures nothing but answers."""
