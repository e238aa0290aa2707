"""Build, authenticate and run TensorRT engines. Of the runtime, this package imports only the backend interface."""
