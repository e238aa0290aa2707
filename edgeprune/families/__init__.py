"""Model families: what EdgePrune must know of an architecture, one file each. Imports transformers' modules, no runtime."""
