"""Signs people in by an OpenID provider, with a code and PKCE (OpenID Connect Core, 3.1)."""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import secrets
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import pydantic_core
from authlib.integrations.requests_client import OAuth2Session
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.jwk import KeySet

from chatflow.database.keys import signed
from chatflow.errors import UsageError, one_line

SECONDS = 10.0
"""Seconds in which the provider must answer."""

ATTEMPT_SECONDS = 600
"""Seconds in which a person must have signed in at the provider."""

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]
"""How ID tokens may be signed: never not at all, and never with the client's secret."""

KEYS_SECONDS = 60.0
"""Seconds until the provider's keys are read again for an unknown one."""


class SignInError(Exception):
    """The provider did not sign the person in; the message is for the log."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What a browser must bring back from the provider."""

    state: str
    nonce: str
    verifier: str
    to: str
    until: int


class Provider:
    """An OpenID provider, and this console as its client."""

    def __init__(
        self, issuer: str, client_id: str, secret: str, claim: str = "email", method: str = ""
    ):
        """Reads the provider's metadata.

        Args:
          claim: the claim of the ID token that names the person.
          method: how people must have signed in there, a value of the claim `amr` such as mfa.

        Raises:
          UsageError: it cannot be reached, or is not the provider that it should be.
        """
        self._client_id, self._secret, self._claim = client_id, secret, claim
        self._method = method
        self._metadata: dict[str, Any] = {}
        self._lock, self._keys_at, self._keys = threading.Lock(), 0.0, KeySet([])
        _check_address(issuer)
        place = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
        try:
            self._metadata = self._get(place)
            ends = ("authorization_endpoint", "token_endpoint", "jwks_uri")
            for address in [str(self._metadata[name]) for name in ends]:
                _check_address(address)
        except UsageError:
            raise
        except Exception as error:  # also of JSON and of missing fields
            raise UsageError(f"--openid={issuer}: {place}: {one_line(error)}") from None
        if self._metadata.get("issuer") != issuer:
            said = self._metadata.get("issuer")
            raise UsageError(f"--openid={issuer}: the provider calls itself {said}; give that")
        self.issuer = issuer

    def begin(self, redirect_uri: str, to: str) -> tuple[str, Attempt]:
        """Returns the provider's address for a person to sign in, and what to remember."""
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        attempt = Attempt(state, nonce, verifier, to, int(time.time()) + ATTEMPT_SECONDS)
        with self._session(redirect_uri) as session:
            address, _ = session.create_authorization_url(
                self._metadata["authorization_endpoint"],
                state=attempt.state,
                nonce=attempt.nonce,
                code_verifier=attempt.verifier,
            )
        return str(address), attempt

    def end(self, redirect_uri: str, attempt: Attempt, said: dict[str, str]) -> str:
        """Returns the name of the person whom the provider has signed in.

        Args:
          said: the parameters with which the browser came back.

        Raises:
          SignInError: the provider refused, or its answer is not for this attempt.
        """
        if not hmac.compare_digest(said.get("state", "").encode(), attempt.state.encode()):
            raise SignInError("the answer is for another attempt")
        if time.time() > attempt.until:
            raise SignInError("it took too long")
        # Another provider's answer (RFC 9207).
        must_say = self._metadata.get("authorization_response_iss_parameter_supported", False)
        if said.get("iss", "" if must_say else self.issuer) != self.issuer:
            raise SignInError("the answer comes from another provider")
        if "code" not in said:
            raise SignInError(said.get("error", "no code")[:100])
        try:
            with self._session(redirect_uri) as session:
                token = session.fetch_token(
                    self._metadata["token_endpoint"],
                    code=said["code"],
                    code_verifier=attempt.verifier,
                    timeout=SECONDS,
                    allow_redirects=False,
                )
                claims: dict[str, Any] = self._claims(token["id_token"], token, attempt.nonce)
                if self._method and self._method not in claims.get("amr", []):
                    raise SignInError(f"the provider does not say that it was by {self._method}")
                if self._claim not in claims:
                    claims = self._user_info(session, claims["sub"])
        except SignInError:
            raise
        except Exception as error:  # of the network, of OAuth, of JWT and of claims
            raise SignInError(one_line(error)) from None
        name = claims.get(self._claim)
        if not isinstance(name, str) or not name:
            raise SignInError(f"the provider does not say the {self._claim}")
        if self._claim == "email" and claims.get("email_verified", True) not in (True, "true"):
            raise SignInError("the e-mail address is not verified")
        return name

    def _claims(self, id_token: str, token: dict[str, Any], nonce: str) -> CodeIDToken:
        """Returns the claims of an ID token; raises errors of any kind if it is not valid."""
        try:
            found = jwt.decode(id_token, self._keys, ALGORITHMS)
        except Exception:
            self._read_keys()  # the provider may have new ones
            found = jwt.decode(id_token, self._keys, ALGORITHMS)
        claims = CodeIDToken(
            found.claims,
            found.header,
            {
                "iss": {"essential": True, "value": self.issuer},
                "aud": {"essential": True, "value": self._client_id},
            },
            {
                "nonce": nonce,
                "client_id": self._client_id,
                "access_token": token.get("access_token"),
            },
        )
        claims.validate(leeway=60)
        return claims

    def _user_info(self, session: OAuth2Session, sub: str) -> dict[str, Any]:
        """Returns what the provider says of a person beside the ID token."""
        place = self._metadata["userinfo_endpoint"]
        answer = session.get(place, timeout=SECONDS, allow_redirects=False)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        if found["sub"] != sub:
            raise SignInError("userinfo is about another person")
        return found

    def _read_keys(self) -> None:
        with self._lock:
            if self._keys_at and time.monotonic() - self._keys_at < KEYS_SECONDS:
                return
            self._keys = KeySet.import_key_set(self._get(self._metadata["jwks_uri"]))
            self._keys_at = time.monotonic()

    def _session(self, redirect_uri: str) -> OAuth2Session:
        methods = self._metadata.get("token_endpoint_auth_methods_supported", [])
        basic = not methods or "client_secret_basic" in methods
        session = OAuth2Session(
            self._client_id,
            self._secret,
            scope="openid email profile",
            redirect_uri=redirect_uri,
            code_challenge_method="S256",
            token_endpoint_auth_method="client_secret_basic" if basic else "client_secret_post",
        )
        session.trust_env = False  # no passwords of ~/.netrc
        return session

    def _get(self, address: str) -> Any:
        with self._session("") as session:
            answer = session.get(
                address, withhold_token=True, timeout=SECONDS, allow_redirects=False
            )
            answer.raise_for_status()
            return answer.json()


def seal(key: bytes, attempt: Attempt) -> str:
    """Returns an attempt as the value of a cookie that only this console can make."""
    text = pydantic_core.to_json(dataclasses.asdict(attempt)).hex()
    return f"{text}.{signed(key, 'openid', text)}"


def unseal(key: bytes, value: str) -> Attempt | None:
    """Returns the attempt of a cookie; None if this console did not make it."""
    text, _, code = value.partition(".")
    if not hmac.compare_digest(signed(key, "openid", text).encode(), code.encode()):
        return None
    return Attempt(**pydantic_core.from_json(bytes.fromhex(text)))


def _check_address(address: str) -> None:
    """Raises `UsageError` if what is sent to an address could be read on the way."""
    found = urlsplit(address)
    near = found.hostname == "localhost" or _is_loopback(found.hostname or "")
    if found.scheme != "https" and not (found.scheme == "http" and near):
        raise UsageError(f"--openid: {address!r} must begin with https://")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
