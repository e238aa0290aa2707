"""A ROS 2 node over DDS, without an installed ROS: images and prompts in, answers and diagnostics out. Takes the runtime's face."""
