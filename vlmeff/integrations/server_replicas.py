"""``vlmeff serve --replicas N``: several copies of the wrapped model on this machine, behind Ray Serve's HTTP proxy.

Every replica runs the application of ``server.py``, gate included: the proxy hands over whole HTTP requests and knows
nothing of their content. A replica that dies is started again; the requests that it was answering fail.

Ray is started for this purpose alone and bound to 127.0.0.1. One of its ports is not: each replica listens on all
interfaces for calls of other deployments, and unpickles them. Ray answers nobody there without the cluster's token, so
that the token is always on, and new for each run instead of the one that Ray keeps in the user's folder. Ray had
no such token before the versions that are taken here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmeff.errors import ConfigError, EnvironmentMismatchError, MissingExtraError, RunError
from vlmeff.integrations import server
from vlmeff.integrations.server_gate import RequestLimits

TESTED_RAY = ">=2.60,<3"
ALONE = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` it would copy the whole working directory
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # whatever the system, this is what binds it to 127.0.0.1
    "RAY_worker_niceness": "0",  # 15 unless told: beside other work a replica would starve
}
OBJECT_STORE = 80 * 2**20  # bytes; nothing large is shared
ONGOING = 64  # requests that a replica has taken; it answers them one at a time
APPLICATION = "vlmeff"


@dataclass(frozen=True, kw_only=True)
class Replica:
    """What every replica loads and how it answers; travels to their processes."""

    model: str
    preset: str | None
    name: str
    limits: RequestLimits
    revision: str | None = None
    device: str | None = None
    dtype: str = "auto"
    hosts: tuple[str, ...] | None = None
    cors_origins: tuple[str, ...] = ()

    def build(self) -> Any:
        """The application of ``server.build_app`` around a model of its own."""
        from vlmeff.loading import load

        loaded, processor = load(self.model, self.preset, revision=self.revision, device=self.device, dtype=self.dtype)
        options: dict[str, Any] = {"hosts": self.hosts, "cors_origins": self.cors_origins}
        return server.build_app(loaded, processor, name=self.name, limits=self.limits, **options)


def check_ray() -> None:
    """Raises:
    MissingExtraError: Ray Serve is not installed.  EnvironmentMismatchError: E-ENV-02, another version than those that
    were tested."""
    for module in ("ray", "grpc"):  # grpc is what ray[serve] adds and Ray Serve cannot be imported without
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "replicas", "the replicas of vlmeff serve")
    from packaging.specifiers import SpecifierSet

    installed = importlib.metadata.version("ray")
    if not SpecifierSet(TESTED_RAY).contains(installed):
        raise EnvironmentMismatchError(
            f"E-ENV-02: vlmeff serve --replicas was tested with ray {TESTED_RAY}, whose ports ask for a token; "
            f'{installed} is installed. pip install "ray[serve]{TESTED_RAY}"'
        )


def serve_replicas(
    replicas: int,
    model: str,
    preset: str | None = "fast",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    limits: RequestLimits | None = None,
    cors_origins: Sequence[str] = (),
    log_level: str = "warning",
    say: Callable[[str], None] = lambda line: None,
    until: threading.Event | None = None,
) -> None:
    """``server.serve`` with ``replicas`` (>= 2) processes that take turns, until interrupted or ``until`` is set.

    On the CPU the replicas share the cores; with ``device="cuda"`` each has a GPU of its own.

    Raises:
        ConfigError: as ``serve``; also a GPU by number, or fewer GPUs than replicas.
        MissingExtraError, EnvironmentMismatchError: as ``check_ray`` and ``server.check_environment``.
        RunError: E-RUN-04, the replicas cannot be started.
    """
    server.check_environment()
    check_ray()
    if device is not None and device.startswith("cuda:"):
        raise ConfigError(f"--device {device}: every replica gets a GPU of its own; use --device cuda.")
    with server._bind(host, port) as free:  # a port in use is known at once; the proxy binds it again
        port = free.getsockname()[1]
    from vlmeff import zoo
    from vlmeff.config import check_methods

    if preset is not None:
        check_methods(zoo.resolve(model, preset).steps, None, {}, None)
    local = host in server.LOOPBACK
    folder = Path(model).is_dir()
    replica = Replica(
        model=str(Path(model).resolve()) if folder else model,  # replicas may have another working directory
        preset=preset,
        name=name or (Path(model).resolve().name if folder else model),
        limits=limits or RequestLimits(),
        revision=revision,
        device=device,
        dtype=dtype,
        hosts=server.LOOPBACK if local else None,
        cors_origins=tuple(cors_origins),
    )
    until = until or threading.Event()
    with _ray(replicas) as ray:
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: it reports each step otherwise
        share = _share(ray, replicas, device)
        say(f"loading {model} in {replicas} replicas")
        quiet = {"log_level": log_level.upper(), "enable_access_log": log_level in ("info", "debug")}
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        try:
            deployed = serve.deployment(
                name=APPLICATION,
                num_replicas=replicas,
                max_ongoing_requests=ONGOING,
                max_queued_requests=server.MAX_CONNECTIONS,
                graceful_shutdown_timeout_s=server.GOODBYE_SECONDS,
                ray_actor_options=share,
            )(serve.ingress(_builder(replica))(type("Served", (), {})))
            try:
                serve.run(deployed.bind(), name=APPLICATION, route_prefix="/", logging_config=quiet)
            except RuntimeError as error:
                raise RunError(
                    f"E-RUN-04: the replicas of {model} cannot be started: {_cause(serve, error)} Try --replicas 1, "
                    "which shows what is wrong with the model."
                ) from error
            if not local:
                say(f"warning: {host} is open to others without a password: put a proxy in front that asks for one.")
            shown = f"[{host}]" if ":" in host else host
            what = f"{replica.name} with preset {preset}" if preset else replica.name
            say(f"serving {what} in {replicas} replicas at http://{shown}:{port}/v1")
            until.wait()
        finally:
            serve.shutdown()


def _builder(replica: Replica) -> Callable[[], Any]:
    def build() -> Any:
        return replica.build()

    return build


@contextmanager
def _ray(replicas: int) -> Iterator[Any]:
    """A Ray of our own on this machine, with a token that nobody else has; whatever cluster there may be is left alone.

    Raises:
        ConfigError: this process has loaded Ray already, which reads token and address when it is imported.
    """
    if "ray" in sys.modules:
        raise ConfigError("serve --replicas: this process uses Ray already; serve from a process of its own.")
    before = {key: os.environ.get(key) for key in (*ALONE, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")}
    os.environ.update(ALONE, RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    try:
        import ray

        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=OBJECT_STORE,
            num_cpus=max(replicas, os.cpu_count() or 1),
        )
        if threading.current_thread() is threading.main_thread():  # in place of Ray's own, which aborts
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        yield ray
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})


def _share(ray: Any, replicas: int, device: str | None) -> dict[str, float]:
    """What a replica gets of the machine. Ray also makes it the number of threads that torch takes."""
    there = ray.cluster_resources()
    cpus = max(1, int(there["CPU"]) // replicas)
    if device != "cuda":
        return {"num_cpus": cpus, "num_gpus": 0}
    if (gpus := int(there.get("GPU", 0))) < replicas:
        raise ConfigError(f"--replicas {replicas} --device cuda: this machine has {gpus} GPUs, and each needs one.")
    return {"num_cpus": cpus, "num_gpus": 1}


def _cause(serve: Any, error: BaseException) -> str:
    """The last line of what a replica died of, or of Ray's own words."""
    try:
        message = serve.status().applications[APPLICATION].deployments[APPLICATION].message
    except (KeyError, RuntimeError):
        message = str(error)
    lines = [line.strip() for line in str(message or error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300].rstrip(".") + "."
