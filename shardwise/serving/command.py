"""The command `serve`: its options, and the server's life from its first line to its end. Quick to import."""

from __future__ import annotations

import argparse
import ipaddress
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from shardwise.arguments import positive
from shardwise.errors import LaunchError

if TYPE_CHECKING:
    from shardwise.job import Job
    from shardwise.plan.plan import Plan
    from shardwise.serving.service import Service

DRAIN = 60
"""Seconds that requests have to be answered once the server was told to stop."""
_KEEP_ALIVE = 60  # seconds that a connection stays open between two requests
_BACKLOG = 2048


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`, beside those that say which job, by which plan, on how many ranks, in which numbers."""
    add = parser.add_argument
    text = "generate the tokens behind prompts instead, of up to N positions with their new tokens"
    add("--generate", type=positive, metavar="N", help=text)
    add("--batch", type=positive, metavar="N", help="samples of a batch at most, instead of the job's own")
    add("--wait-ms", type=milliseconds, default="5", metavar="MS", help="a batch waits so long for others (5)")
    add("--queue", type=positive, default=256, metavar="N", help="samples that may wait; more get 503 (256)")
    add("--max-bytes", type=positive, default=10_000_000, metavar="N", help="of a request; more get 413 (10000000)")
    text = "fields that requests have (those that the model needs)"
    add("--fields", type=lambda given: given.split(","), metavar="A,B", help=text)
    add("--host", default="127.0.0.1", metavar="H", help="address to listen on (127.0.0.1)")
    add("--port", type=port, default=8000, metavar="P", help="port to listen on; 0 takes a free one (8000)")


def milliseconds(text: str) -> float:
    """A number of milliseconds that is not below 0, as seconds."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 60_000:
        raise argparse.ArgumentTypeError(f"must be milliseconds from 0 to 60000, but is {text!r}")
    return found / 1000


def port(text: str) -> int:
    """The number of a port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, but is {text!r}")
    return int(text)


def serve(arguments: argparse.Namespace, job: Job, plan: Plan | None) -> dict[str, Any]:
    """Serves a job until SIGTERM or SIGINT; what it did.

    Raises:
        UserError: the job cannot be served by this plan, or there is no listening on this address.
        RunError: the ranks ended again and again.
    """
    from shardwise.engine.launch import launched

    if launched():
        raise LaunchError("shardwise serve starts its ranks by itself; run it without torchrun, with --ranks N")
    for option in ("precision", "fields"):
        if arguments.generate is not None and getattr(arguments, option) is not None:
            raise LaunchError(f"--{option} is for outputs, and --generate serves tokens; leave one of them out")
    try:
        from shardwise.serving.service import Service
        from shardwise.serving.web import application
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise LaunchError(f"shardwise serve needs {error.name}; install it: pip install 'shardwise[serve]'") from error
    with _bound(arguments.host, arguments.port) as listener:
        service = Service(
            job,
            plan,
            ranks=arguments.ranks,
            precision=arguments.precision,
            spec=arguments.spec,
            fields=arguments.fields,
            wait=arguments.wait_ms,
            queue=arguments.queue,
            positions=arguments.generate,
        )
        address = _address(listener)
        try:
            service.start()
            began = time.monotonic()
            listener.listen(_BACKLOG)
            print(_first_line(service, address), flush=True)
            _run(application(service, max_bytes=arguments.max_bytes), service, listener)
        finally:
            service.close()
    if service.failed is not None:
        raise service.failed
    seconds, samples = time.monotonic() - began, service.metrics.samples()
    print(f"stopped after {seconds:.0f} s and {samples:,} samples")
    return {"address": address, "seconds": seconds, "samples": samples}


def _run(app: Any, service: Service, listener: socket.socket) -> None:
    """Runs the web server until a signal, or until the service gives up; requests that came are answered."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=DRAIN,
        )
    )  # fmt: skip

    def stop(*_: Any) -> None:
        server.should_exit = True

    service.on_failure = stop
    if service.failed is not None:
        stop()
    # uvicorn has handlers of its own, and raises what it caught again at the end, which these take.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_line(service: Service, address: str) -> str:
    plan, count = service.plan, len(service.replicas)
    ranks = f"{plan.ranks} rank{'s' * (plan.ranks > 1)}"
    replicas = f" in {count} replicas" if count > 1 else ""
    held = f"weights in {service.precision}, " if service.precision is not None else ""
    return (
        f"{address} serves {service.job.title()}: {plan.title()}, {ranks}{replicas}, {held}batches of up to "
        f"{service.job.global_batch} {service.intake.takes}; Ctrl-C stops it"
    )


def _bound(host: str, number: int) -> socket.socket:
    """A socket on this address that does not listen yet.

    Raises:
        LaunchError: there is no such address, or its port is taken.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(place)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise LaunchError(
            f"there is no listening on {host}, port {number}: {error.strerror}; give another --host or --port "
            "(--port 0 takes a free one)"
        ) from error
    if not ipaddress.ip_address(place[0]).is_loopback:
        print(
            f"shardwise: warning: --host {host} can be reached from other machines, and there is no authentication and "
            "no encryption: whoever reaches it can use the model",
            file=sys.stderr,
        )
    return found


def _address(listener: socket.socket) -> str:
    host, number = listener.getsockname()[:2]
    return f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"
