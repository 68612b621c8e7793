"""Bytes that this process has sent over TCP, as the kernel counts them (Linux 4.19 and newer).

gloo speaks over TCP, between processes of one machine as between machines, so this is what a layout
really sends, whoever makes it: payload with the headers of gloo's own messages, without those of TCP.
"""

from __future__ import annotations

import os
import socket
import struct

# `struct tcp_info` of linux/tcp.h: tcpi_bytes_sent, a u64 behind 200 bytes
TCP_INFO_BYTES, SENT_AT = 256, 200


def sent_bytes() -> int:
    """Bytes sent on the TCP connections that are open now, those sent again included."""
    return sum(map(_sent_on, _open_sockets()))


def _open_sockets() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # closed since: the one that listed the folder
            continue
        if target.startswith("socket:"):
            found.append(int(name))
    return found


def _sent_on(descriptor: int) -> int:
    # a copy of the descriptor: closing it leaves the connection as it is
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
        if not tcp or connection.type != socket.SOCK_STREAM:
            return 0
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    return int(struct.unpack_from("=Q", info, SENT_AT)[0])
