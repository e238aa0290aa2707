"""The commands, one module per group. Heavy imports are in the bodies of commands, so that --help stays fast."""
