"""What a device is and what it can do: facts of this machine, the table of modules, the roofline. Torch-free."""
