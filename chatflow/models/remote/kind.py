"""The base of all kinds of remote models."""

from __future__ import annotations

import abc
import dataclasses

from chatflow.errors import UsageError, one_line
from chatflow.models.remote import faults
from chatflow.models.remote.calls import RemoteModel
from chatflow.models.remote.clients import Client
from chatflow.models.remote.handler import RemoteLanguageModelHandler
from chatflow.models.requests import Request
from chatflow.models.spec import Kind, ModelSpec, Say
from chatflow.options import RemoteSettings

CHECK_SECONDS = 15.0
"""The longest call to the service at launch."""

_NOT_OURS_TO_ASK = ("credentials", "http_401", "http_403")


class Remote(Kind):
    """Models behind a service; what differs is the client that calls it."""

    asked_by_json = True

    @abc.abstractmethod
    def client(self, name: str, settings: RemoteSettings) -> Client:
        """Returns a client that has made no call yet."""

    def instruct(self, spec: ModelSpec) -> bool:
        return True

    def check_service(self, spec: ModelSpec, local: bool, say: Say) -> None:
        """Checks with the service that the model exists.

        Prints only a warning if the service cannot be reached, or refuses the credentials of this
        machine for a job that runs elsewhere: the workers may reach it.
        """
        settings = dataclasses.replace(
            spec.remote, request_timeout=min(spec.remote.request_timeout, CHECK_SECONDS)
        )
        model = RemoteModel(spec.name, self.client(spec.name, settings), settings)
        try:
            say(model.check())
        except UsageError:
            raise
        except Exception as error:
            fault = faults.classify(error)
            said = f"--model={spec.name}: {fault.reason}: {one_line(error)}"
            if fault.kind is faults.Kind.FATAL and (local or fault.reason not in _NOT_OURS_TO_ASK):
                raise UsageError(f"{said} (--check_endpoint=false skips this check)") from None
            say(f"warning: not checked: {said}")
        finally:
            model.close()

    def handler(self, spec: ModelSpec, expected: tuple[Request, ...]) -> RemoteLanguageModelHandler:
        return RemoteLanguageModelHandler(spec.name, spec.remote, spec.batching)
