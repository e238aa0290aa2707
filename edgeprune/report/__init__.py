"""Reports: one HTML page about a plan or a bundle, with nothing outside it."""
