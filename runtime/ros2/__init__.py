"""A ROS 2 node: images and prompts in, answers and diagnostics out, over DDS or beside rclpy. Nothing here needs ROS itself."""
