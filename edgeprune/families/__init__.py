"""Model families: the adapters of EdgePrune to model architectures. Imports transformers' modules, but no runtime."""
