"""The node for rclpy."""
