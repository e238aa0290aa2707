"""The PyTorch reference behind the runtime's interface, and recorded answers. Imports nothing from collect, allocate or search."""
