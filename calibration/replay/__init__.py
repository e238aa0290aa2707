"""The torch model behind the runtime's interface, and recorded episodes. Imports nothing of collect, allocate or search."""
