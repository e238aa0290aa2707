"""The node beside a camera.

ros2 launch edgeprune_ros2 answers_launch.py bundle:=/data/tabletop.bundle image:=/camera/image_raw
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue


def generate_launch_description() -> LaunchDescription:
    """Return the node with the topics of the camera and the bundle that were given."""
    image = LaunchConfiguration("image")
    text = {name: ParameterValue(LaunchConfiguration(name), value_type=str) for name in ("bundle", "on_busy", "fit")}
    return LaunchDescription(
        [
            DeclareLaunchArgument("bundle", description="The exported bundle's folder."),
            DeclareLaunchArgument("image", default_value="/camera/image_raw", description="The camera's sensor_msgs/Image."),
            DeclareLaunchArgument("on_busy", default_value="cancel", description="cancel, queue or refuse."),
            DeclareLaunchArgument("fit", default_value="pad", description="exact, stretch or pad."),
            Node(
                package="edgeprune_ros2",
                executable="answers",
                name="edgeprune",
                parameters=[text],
                remappings=[("image", image), ("image/compressed", [image, "/compressed"])],
                output="screen",
            ),
        ]
    )
