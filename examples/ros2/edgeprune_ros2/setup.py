"""What colcon builds: the node and its launch file."""

from setuptools import setup  # type: ignore[import-untyped]

setup(
    name="edgeprune_ros2",
    version="0.1.0",
    packages=["edgeprune_ros2"],
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/edgeprune_ros2"]),
        ("share/edgeprune_ros2", ["package.xml"]),
        ("share/edgeprune_ros2/launch", ["launch/answers_launch.py"]),
    ],
    install_requires=["setuptools", "edgeprune"],
    entry_points={"console_scripts": ["answers = edgeprune_ros2.node:main"]},
)
