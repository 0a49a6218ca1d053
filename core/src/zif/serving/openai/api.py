"""All routes of the OpenAI API, for the server that registers them."""

from zif.serving.chat.service import ChatService
from zif.serving.http.registry import Route
from zif.serving.openai.chat import ChatApi
from zif.serving.openai.completions import CompletionsApi
from zif.serving.openai.models import ModelsApi
from zif.serving.openai.pooling import PoolingApi
from zif.serving.openai.tokens import TokensApi


def openai_routes(service: ChatService) -> list[Route]:
    """Return the routes, whose handlers share `service`."""
    apis = (ModelsApi(), ChatApi(service), CompletionsApi(service), TokensApi(service), PoolingApi(service))
    return [route for api in apis for route in api.routes()]
