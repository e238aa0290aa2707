"""A transformers model folder, checked and loaded, with weights that stay in their files. Imports no runtime and no export."""
