"""A ROS 2 node on DDS, which needs no ROS: images and prompts in, answers and diagnostics out. Uses the runtime's public API."""
