"""Clients of a server, each of which sends its next request when it has its answer: `python -m benchmarks.serve_load`.

A process of its own that imports nothing but the standard library, so that it takes as little of the machine as it can.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time


async def load(host: str, port: int, clients: int, warm: int, requests: int, bodies: list[bytes]) -> dict[str, object]:
    """Sends requests until `warm` and then `requests` more are answered with 200; seconds of the latter."""
    done = 0
    began = ended = 0.0
    seconds: list[float] = []
    statuses: dict[int, int] = {}

    async def client(number: int) -> None:
        nonlocal done, began, ended
        reader, writer = await asyncio.open_connection(host, port)
        sent = number
        while done < warm + requests:
            body = bodies[sent % len(bodies)]
            sent += clients
            since = time.perf_counter()
            writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            now = time.perf_counter()
            status = int(head.split(b" ", 2)[1])
            statuses[status] = statuses.get(status, 0) + 1
            if status != 200:
                await asyncio.sleep(0.05)
                continue
            done += 1
            if done == warm:
                began = now
            if warm < done <= warm + requests:
                seconds.append(now - since)
                ended = now
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    seconds.sort()
    at = {f"p{p}": seconds[min(len(seconds) - 1, len(seconds) * p // 100)] for p in (50, 90, 99)}
    return {"rate": requests / (ended - began), **at, "statuses": statuses, "cpu_s": time.process_time()}


if __name__ == "__main__":
    told = json.load(sys.stdin)
    told["bodies"] = [body.encode() for body in told["bodies"]]
    print(json.dumps(asyncio.run(load(**told))))
