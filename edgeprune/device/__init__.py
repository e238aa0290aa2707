"""Machine detection, the table of Jetson modules, and cost estimates. Imports no runtime and no torch."""
