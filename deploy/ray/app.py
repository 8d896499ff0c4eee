"""Several replicas of the server behind Ray Serve, as many as the requests under way call for.

    serve run --app-dir deploy/ray app:build                                  # the embedded pair, two to four replicas
    serve run --app-dir deploy/ray app:build target=MODEL drafter=DRAFTER most=8 cpus=4

Ray's proxy listens on port 8000 and hands each request to the replica that has the fewest; an answer streams through.
"""

from __future__ import annotations

import sys
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import cloudpickle, serve
from ray.serve import Application


class Settings(BaseModel):
    """What `serve run` takes as name=value."""

    model_config = ConfigDict(extra="forbid")

    target: str | None = None  # the embedded one
    drafter: str | None = None  # the one in the target's directory, or the embedded
    planner: str = "full"
    name: str = "default"  # of the model, as clients ask for it
    least: int = 2  # replicas
    most: int = 4
    ongoing: int = 16  # requests of a replica that autoscaling aims at
    running: int = 64  # texts of a replica that are generated at once
    queue: int = 64  # ... and that wait; a client then gets 429
    cpus: float = 1.0  # of a replica, also its threads
    gpus: float = 0.0


def build(given: dict[str, str]) -> Application:
    """The application that `serve run` starts, from fields of Settings. Raises ValueError for what they cannot be."""
    settings = Settings.model_validate(given)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers have dspark, but not this file
    made: dict[str, Any] = {}  # in the replica, once its engine is there

    def application() -> Any:
        from dspark.demo.pair import demo_drafter_path, demo_target_path
        from dspark.engine.build import build_engine
        from dspark.engine.engine import Engine
        from dspark.server.api import create_app
        from dspark.server.service import ServerConfig, package_version
        from dspark.server.tracing import open_tracing

        embedded = settings.target is None
        core = build_engine(
            settings.target or demo_target_path(),
            settings.drafter or (demo_drafter_path() if embedded else "auto"),
            settings.planner,
            max_running=settings.running,
        )
        tracing = open_tracing(None, settings.name, package_version())  # where OTEL_EXPORTER_OTLP_ENDPOINT says so
        config = ServerConfig(name=settings.name, queue=settings.queue)
        app = create_app(Engine(core), config, tracing=tracing)
        made["service"] = app.state.service
        return app

    @serve.deployment(
        name="dspark",
        max_ongoing_requests=settings.running + settings.queue,
        autoscaling_config={
            "min_replicas": settings.least,
            "max_replicas": settings.most,
            "target_ongoing_requests": settings.ongoing,
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 300.0,  # a replica takes long to start
        },
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        health_check_period_s=10.0,
        graceful_shutdown_timeout_s=40.0,
    )
    @serve.ingress(application)
    class Replica:
        async def check_health(self) -> None:
            """Ray replaces a replica for which this raises."""
            if made["service"].trouble:
                raise RuntimeError(made["service"].trouble)

    return Replica.bind()
