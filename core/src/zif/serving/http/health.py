"""The server's own routes: is it alive, is it ready, what is it, what can it do, how busy is it.

`/livez` says that the process answers and that restarting it would not help; `/readyz` that the engine makes progress
or is provably idle. `/health` is what existing probes and routers ask, and means ready.
"""

import msgspec

from zif import __version__
from zif.serving.answers import EngineState, ModelInfo
from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import AuthScope, Request, Response, json_response
from zif.serving.http.registry import Handler, Route, ServerContext

_RETRY_AFTER_S = 1.0


class Health(msgspec.Struct, frozen=True):
    """What a probe is told. `reason` says why the server is not ready."""

    status: str
    state: str
    reason: str | None = None


class Load(msgspec.Struct, frozen=True):
    """How busy the server is: HTTP requests in flight, and the engine's counts where it has sent some."""

    server_load: int
    num_requests_running: int | None
    num_requests_waiting: int | None
    kv_cache_usage: float | None


def health_routes() -> list[Route]:
    """Return the routes that every server has, whatever APIs it serves."""
    return [
        _probe("/livez", livez, "Is the process alive"),
        _probe("/readyz", readyz, "Does the engine make progress"),
        _probe("/health", readyz, "The same as /readyz"),
        Route("/version", "GET", AuthScope.PUBLIC, version, summary="The version of the server"),
        Route("/props", "GET", AuthScope.INFERENCE, props, summary="The model, the limits, and fields without effect"),
        Route("/load", "GET", AuthScope.INFERENCE, load, summary="How busy the server is", answer_type=Load),
        Route(
            "/reset_prefix_cache", "POST", AuthScope.ADMIN, reset_prefix_cache, summary="Forget every computed prefix"
        ),
    ]


async def livez(request: Request[None], context: ServerContext) -> Response:
    """Answer 200 unless the engine failed for good, which only a new process can mend."""
    state = context.engine.state
    if state is EngineState.FAILED:
        return json_response(Health("failed", state.value, "the engine failed and is not started again"), 503)
    return json_response(Health("alive", state.value))


async def readyz(request: Request[None], context: ServerContext) -> Response:
    """Answer 200 when a request that came now would be worked on."""
    state = context.engine.state
    problem = context.engine.problem()
    if problem is None and not context.status.serving:
        problem = "the server is starting"
    if context.status.draining:
        problem = "the server shuts down"
    if problem is None:
        return json_response(Health("ready", state.value))
    if state is EngineState.FAILED:
        problem = "the engine failed and is not started again"  # its own words may quote a path
    return json_response(Health("not ready", state.value, problem), 503, {"retry-after": "1"})


async def version(request: Request[None], context: ServerContext) -> Response:
    """Answer with the version."""
    return json_response({"version": __version__})


async def load(request: Request[None], context: ServerContext) -> Response:
    """Answer with counts."""
    stats = context.engine.stats
    return json_response(
        Load(
            context.status.num_in_flight,
            None if stats is None else stats.num_running,
            None if stats is None else stats.num_waiting,
            None if stats is None else stats.kv_usage,
        )
    )


async def props(request: Request[None], context: ServerContext) -> Response:
    """Answer with what the server can do. `no_effect` lists accepted fields that change nothing, with the reason."""
    settings = context.settings
    return json_response(
        {
            "version": __version__,
            "model": _model(context.engine.info),
            "limits": {
                "max_body_bytes": settings.max_body_bytes,
                "max_body_bytes_in_flight": settings.max_body_bytes_in_flight,
                "max_json_depth": settings.max_json_depth,
                "max_json_values": settings.max_json_values,
                "max_header_bytes": settings.max_header_bytes,
                "max_headers": settings.max_headers,
                "max_connections": settings.max_connections,
                "max_queued_requests": settings.max_queued_requests,
                "max_queued_tokens": settings.max_queued_tokens,
            },
            "unknown_fields": "refused" if settings.strict else "named in the header zif-unknown-fields",
            "no_effect": {route.path: dict(route.no_effect) for route in context.registry.routes() if route.no_effect},
            "routes": [
                {"path": route.path, "method": route.method, "scope": route.scope.value}
                for route in context.registry.routes()
            ],
        }
    )


async def reset_prefix_cache(request: Request[None], context: ServerContext) -> Response:
    """Forget every computed prefix."""
    if context.status.draining:
        raise ApiError(FailureKind.UNAVAILABLE, "the server shuts down", retry_after_s=_RETRY_AFTER_S)
    await context.engine.reset_prefix_cache()
    return json_response({"status": "reset"})


def _probe(path: str, handler: Handler, summary: str) -> Route:
    return Route(path, "GET", AuthScope.PUBLIC, handler, summary=summary, answer_type=Health, any_host=True)


def _model(info: ModelInfo) -> dict[str, object]:
    """Return what callers may know of the model: not the folder, which is a path of this machine."""
    sampling = info.default_sampling
    return {
        "name": info.name,
        "max_model_len": info.max_model_len,
        "vocab_size": info.vocab_size,
        "eos_token_ids": info.eos_token_ids,
        "num_kv_blocks": info.num_kv_blocks,
        "block_size": info.block_size,
        "max_num_seqs": info.max_num_seqs,
        "platform": info.platform,
        "generates": info.pooling.generates,
        "pooling": {
            "embedding_dimensions": info.pooling.num_dimensions,
            "labels": info.pooling.labels,
            "refused": info.pooling.problem,
        },
        "default_sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
        },
    }
