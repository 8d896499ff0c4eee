"""`dspark serve`: the engine behind the OpenAI API."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.cli.inputs import Device, Dtype, Planner, the_pair
from dspark.common.extras import require

if TYPE_CHECKING:
    from dspark.server.service import Service

LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    target: Annotated[
        str | None, typer.Argument(help="A causal LM: directory or hub id; default: the embedded one.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Directory, hub id, ngram or none; default: the pair's.")] = None,
    planner: Planner = "auto",
    host: Annotated[str, typer.Option(help="0.0.0.0 is every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: TARGET's last part.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Clients need one of these; also $DSPARK_API_KEYS, by commas.")
    ] = None,
    api_keys: Annotated[Path | None, typer.Option(help="A file with one API key a line.")] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Let pages of this origin call; default none.")] = None,
    playground: Annotated[bool, typer.Option(help="A page at / to try prompts and watch the load.")] = True,
    queue: Annotated[
        int | None, typer.Option(min=0, help="Texts that may wait; more get 429. Default: a 32nd of --max-running.")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Texts generated at the same time.")] = 64,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the model's context.")] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request; larger ones get 413.")] = 2 << 20,
    max_draft: Annotated[int | None, typer.Option(help="Draft at most this many tokens a round.")] = None,
    pages: Annotated[int | None, typer.Option(help="Pages of 16 tokens; default: as memory reaches.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Costs for the planner, as `dspark profile` writes.")] = None,
    stream_ms: Annotated[
        float, typer.Option(min=0, help="Between two events of a stream, or more under load; 0: every commit.")
    ] = 20.0,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that running requests get after SIGTERM.")] = 30,
    compile: Annotated[bool, typer.Option(help="Compile the forwards, in the background.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    requests_per_minute: Annotated[int | None, typer.Option(help="Of each API key; a key file may say more.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Prompt and answer tokens of each API key.")] = None,
    request_seconds: Annotated[float, typer.Option(min=0, help="For a whole answer; 0 is no limit.")] = 600.0,
    stuck_seconds: Annotated[
        float, typer.Option(help="A longer step makes /health say that the device hangs.")
    ] = 120.0,
    idempotency: Annotated[
        str | None,
        typer.Option(
            envvar="DSPARK_IDEMPOTENCY",
            help="Keeps answers to an Idempotency-Key: a file, a redis:// URL, or off; default: a file of yours.",
        ),
    ] = None,
    idempotency_seconds: Annotated[float, typer.Option(min=1, help="How long they are kept.")] = 86400.0,
    trace_url: Annotated[
        str | None,
        typer.Option(help="Send traces to the OTLP collector here; also $OTEL_EXPORTER_OTLP_ENDPOINT. Default none."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info or debug.")] = "info",
    log_format: Annotated[str, typer.Option(help="text or json, a line for each request.")] = "text",
    log_prompts: Annotated[bool, typer.Option(help="Let the log have the prompts.")] = False,
) -> None:
    """Serve a target and its drafter to OpenAI clients; without arguments, the embedded pair."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")

    from dspark.server.keys import find_keys
    from dspark.server.launch import BACKLOG, address, bind
    from dspark.server.logs import configure
    from dspark.server.results import MEMORY, open_results, usual_file
    from dspark.server.service import ServerConfig, package_version
    from dspark.server.tracing import open_tracing

    configure(log_level, log_format)
    config = ServerConfig(
        name=name or served_name(target),
        queue=queue,
        most_body_bytes=max_body_bytes,
        most_prompt_tokens=max_prompt_tokens,
        keys=tuple(find_keys(api_key or (), api_keys)),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        request_seconds=request_seconds or None,
        stuck_seconds=stuck_seconds,
        log_prompts=log_prompts,
        origins=tuple(cors_origin or ()),
        playground=playground,
    )
    tracing = open_tracing(trace_url, config.name, package_version())
    usual = usual_file(config.name, port) if port else MEMORY  # a free port is no place to be found again
    results = open_results(idempotency, usual, seconds=idempotency_seconds)
    bound = bind(host, port)  # before the model is loaded: a taken port is known at once

    from dspark.common.collector import freeze_startup
    from dspark.common.log import quiet_libraries
    from dspark.engine.build import build_engine

    quiet_libraries()
    source, drafts = the_pair(target, drafter, needed=False)
    core = build_engine(
        source,
        drafts,
        planner,
        device=device,
        dtype=dtype,
        profile=profile,
        compile=compile,
        max_draft=max_draft,
        max_running=max_running,
        pages=pages,
    )
    freeze_startup()

    from dspark.engine.engine import Engine
    from dspark.server.api import create_app
    from dspark.server.launch import make_server, run

    engine = Engine(core, stream_ms / 1000)
    app = create_app(engine, config, results, tracing=tracing)
    traces = "none" if tracing is None else trace_url or "as the environment says"
    bound.listen(BACKLOG)  # whoever reads the address may connect: the first requests wait for the loop
    print(resolved(app.state.service, planner, address(bound), traces=traces), flush=True)
    if not config.keys and host not in LOCAL:
        print("warning: no API key is set, so whoever reaches this address may use it", file=sys.stderr, flush=True)
    run(make_server(app, grace=grace), bound)
    engine.close(seconds=grace)
    sys.stdout.flush()
    os._exit(0)  # a forward being compiled in the background is not waited for


def served_name(target: str | None) -> str:
    """How clients ask for a target of which no name is given: its hub id, or its directory's name."""
    if target is None:
        return "dspark-demo"
    return Path(target).resolve().name if Path(target).is_dir() else target


def resolved(service: Service, planner: str, url: str, *, traces: str) -> str:
    """What was made of the arguments, a line each."""
    from dspark.common.provenance import device_name

    core, config = service.engine.core, service.config
    target, pool = core.target, core.admission.pool
    waiting = [graph for graph in core.graphs if graph.status != "compiled"]
    forwards = "in the background" if waiting else "ready" if core.graphs else "none"
    drafter = type(core.drafter).__name__
    facts = {
        "model": f"{config.name} ({type(target.model).__name__}, context {core.intake.context_limit})",
        "device": f"{target.device} ({device_name(target.device)})",
        "dtype": str(target.dtype).removeprefix("torch."),
        "drafter": f"{drafter}, up to {core.admission.block_size} tokens a round"
        if core.drafter.block_size
        else "none",
        "planner": planner,
        "pages": f"{pool.capacity} of {pool.page_size} tokens",
        "texts": f"{core.config.max_running} at once, {service.gate.queue} more may wait",
        "compiled": forwards,
        "keys": str(len(config.keys)) if config.keys else "none needed",
        "traces": traces,
        "page": f"{url}/" if config.playground else "none",
        "address": f"{url}/v1",
    }
    return "\n".join(f"{name + ':':<10}{value}" for name, value in facts.items())
