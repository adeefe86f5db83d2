"""Serves the stand-in over gRPC: GetEndpoint and Predict, which Google's clients use by default."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.cloud.aiplatform_v1.types import (
    Endpoint,
    GetEndpointRequest,
    PredictRequest,
    PredictResponse,
)
from google.protobuf import any_pb2, duration_pb2, json_format
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

if TYPE_CHECKING:
    from .vertex import FakeVertex

CODES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 501: "UNIMPLEMENTED",
    503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip


async def open_door(fake: FakeVertex, certificate: Path, key: Path) -> tuple[Any, str]:
    """Returns a server with TLS on a free port, and its address."""

    async def get_endpoint(request: Any, context: Any) -> Any:
        found = fake.endpoint(request.name)
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no endpoint {request.name}")
        return Endpoint.from_json(json.dumps(found))

    async def predict(request: Any, context: Any) -> Any:
        from .vertex import prompts_of

        instances = [json_format.MessageToDict(value) for value in request._pb.instances]
        body = {"instances": instances}
        call = fake.brain.receive("grpc:predict", prompts_of(body), body, "")
        try:
            if call.fault.isdecimal():
                await refuse(context, int(call.fault))
            await fake.brain.wait()
            if call.fault == "hang":
                await asyncio.Event().wait()
            return PredictResponse.from_json(json.dumps(fake.predicted(call)))
        finally:
            fake.brain.leave(call)

    async def refuse(context: Any, status: int) -> None:
        code = getattr(code_pb2, CODES.get(status, "UNKNOWN"))
        details = []
        if fake.brain.asks_to_wait(str(status)):
            wait = duration_pb2.Duration()
            wait.FromMilliseconds(round(1000 * (fake.brain.behaviour.retry_after or 0.0)))
            packed = any_pb2.Any()
            packed.Pack(error_details_pb2.RetryInfo(retry_delay=wait))
            details.append(packed)
        said = status_pb2.Status(code=code, message="the stand-in refuses", details=details)
        await context.abort_with_status(rpc_status.to_status(said))

    server = grpc.aio.server()
    methods = {
        "EndpointService": ("GetEndpoint", get_endpoint, GetEndpointRequest, Endpoint),
        "PredictionService": ("Predict", predict, PredictRequest, PredictResponse),
    }
    for service, (method, function, takes, gives) in methods.items():
        handler = grpc.unary_unary_rpc_method_handler(
            function,
            request_deserializer=takes.deserialize,
            response_serializer=gives.serialize,
        )
        name = f"google.cloud.aiplatform.v1.{service}"
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, {method: handler}),)
        )
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    return server, f"127.0.0.1:{port}"
