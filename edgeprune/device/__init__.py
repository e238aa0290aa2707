"""Facts about a machine, the table of Jetson modules, and what work costs on one. Imports no runtime and no torch."""
