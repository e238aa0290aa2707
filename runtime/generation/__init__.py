"""One conversation: prefill, decode, sampling. Never imports a particular backend, the server or ROS 2."""
