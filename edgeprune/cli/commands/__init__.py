"""One module for each group of commands. A command parses, calls one library function, prints; heavy imports live in its body."""
