"""Whatever others may have written is read without a crash or a hang: targets, and two engines that make up their inputs."""
