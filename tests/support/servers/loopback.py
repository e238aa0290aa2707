"""Where tests' processes meet: on this machine alone, whatever else runs there."""

from __future__ import annotations

import socket

CYCLONEDDS = (  # CYCLONEDDS_URI
    "<CycloneDDS><Domain><General><AllowMulticast>false</AllowMulticast>"
    "<Interfaces><NetworkInterface name='lo' multicast='false'/></Interfaces></General>"
    "<Discovery><ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>20</MaxAutoParticipantIndex>"
    "<Peers><Peer address='127.0.0.1'/></Peers></Discovery></Domain></CycloneDDS>"
)


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def zenoh_override(port: int) -> str:
    """Return the ZENOH_CONFIG_OVERRIDE of a node whose router listens on a port."""
    return f'connect/endpoints=["tcp/127.0.0.1:{port}"];listen/endpoints=["tcp/127.0.0.1:0"]'
