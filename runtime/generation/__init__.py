"""Conversations: prefill, decode steps and sampling. Never imports a specific backend, the server or ROS 2."""
