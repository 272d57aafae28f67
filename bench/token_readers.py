"""The clients of token_path's server: many chat completions at once, read to their ends. Standard library only, so that it starts at once.

python bench/token_readers.py PORT COUNT BYTES < body      # each answer must have more than BYTES bytes
"""

from __future__ import annotations

import asyncio
import sys


async def ask(port: int, body: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    received = 0
    while part := await reader.read(65536):
        received += len(part)
    writer.close()
    return received


async def main(port: int, count: int, least: int) -> None:
    body = sys.stdin.buffer.read()
    answers = await asyncio.gather(*(ask(port, body) for _ in range(count)))
    assert min(answers) > least, "an answer is too short"


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
