"""TensorRT engines: building them, trusting them, running them. Imports nothing of the runtime but the backend interface."""
