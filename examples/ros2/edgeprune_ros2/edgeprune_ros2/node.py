"""The node of `edgeprune ros2` for rclpy: the same topics, and the same code behind them; only publishing is rclpy's."""

from __future__ import annotations

from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from edgeprune.runtime import Runtime, load
from edgeprune.runtime.ros2.answerer import OnPhase, OutputCallbacks, QuestionWorker
from edgeprune.runtime.ros2.diagnostics import DiagnosticReport

# Parameters and their defaults; "" and 0 leave the choice to the bundle.
ANSWERING: dict[str, Any] = {"on_busy": "cancel", "frame_timeout": 2.0, "fit": "exact", "max_tokens": 128}
ANSWERING |= {"tier": "", "deadline_ms": 0.0}
DEPTH = 100  # an answer has many pieces


class AnswerNode(Node):  # type: ignore[misc]
    """Subscribes to image, image/compressed and ~/prompt, publishes ~/answer, ~/answer/pieces and /diagnostics."""

    def __init__(self) -> None:
        super().__init__("edgeprune")
        self._bundle: str = self.declare_parameter("bundle", "").value
        self._threads: int = self.declare_parameter("threads", 0).value
        options = {name: self.declare_parameter(name, default).value for name, default in ANSWERING.items()}
        self._answers = self.create_publisher(String, "~/answer", DEPTH)
        self._pieces = self.create_publisher(String, "~/answer/pieces", DEPTH)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", DEPTH)
        outlets = OutputCallbacks(self._piece, self._answer, self._report)
        given = {name: value for name, value in options.items() if value}
        self.answerer = QuestionWorker(self._load, outlets, clock=self._seconds, **given)
        self.create_subscription(Image, "image", self.answerer.image, qos_profile_sensor_data)
        self.create_subscription(CompressedImage, "image/compressed", self.answerer.compressed, qos_profile_sensor_data)
        self.create_subscription(String, "~/prompt", lambda message: self.answerer.prompt(message.data), DEPTH)
        self.create_timer(1.0, self._tick)
        self.answerer.start()

    def _load(self, on_phase: OnPhase) -> Runtime:
        return load(self._bundle, threads=self._threads or None, warm_up=True, on_phase=on_phase)

    def _seconds(self) -> float:
        return 1e-9 * float(self.get_clock().now().nanoseconds)  # of /clock where use_sim_time is set

    def _tick(self) -> None:
        if self.answerer.failure is not None:
            raise self.answerer.failure  # ends spin
        self.answerer.publish_diagnostics()

    def _piece(self, text: str) -> None:
        self._pieces.publish(String(data=text))

    def _answer(self, text: str) -> None:
        self._answers.publish(String(data=text))

    def _report(self, report: DiagnosticReport) -> None:
        values = [KeyValue(key=key, value=value) for key, value in report.values]
        name = f"{self.get_fully_qualified_name()[1:]}: answers"
        status = DiagnosticStatus(level=bytes([report.level]), name=name, message=report.message, values=values)
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)


def main() -> None:
    """Run the node until it is interrupted."""
    rclpy.init()
    node = AnswerNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.answerer.close()
        node.destroy_node()
        rclpy.try_shutdown()
